# Projects of strangers, each configured, built and run: after an install, with add_subdirectory, from the Debian package,
# and as an extension of Python. The copy is one of scripted_builds.cmake.
set(install_folder ${CMAKE_CURRENT_BINARY_DIR}/installed)
add_test(NAME consumers/install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${install_folder})
set_tests_properties(consumers/install PROPERTIES FIXTURES_SETUP installed)

function(add_consumer name project)
  add_test(NAME consumers/${name}
           COMMAND ${CMAKE_CTEST_COMMAND}
                   --build-and-test ${CMAKE_CURRENT_SOURCE_DIR}/consumers/${project} ${CMAKE_CURRENT_BINARY_DIR}/${name}
                   --build-generator ${CMAKE_GENERATOR}
                   --build-options -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
                                   -DFREE_TRANSFORMER_TORCH_WHEEL=${LibTorch_WHEEL} ${ARGN}
                   --test-command consumer)
endfunction()

add_consumer(find_package find_package -Dfree_transformer_ROOT=${install_folder})
set_tests_properties(consumers/find_package PROPERTIES FIXTURES_REQUIRED installed)

add_consumer(older_wheel older_wheel -DFREE_TRANSFORMER_FOLDER=${PROJECT_SOURCE_DIR})

add_consumer(add_subdirectory add_subdirectory -DFREE_TRANSFORMER_FOLDER=${PROJECT_SOURCE_DIR})

# What is in the package does not depend on LibTorch. Unpacked, as installing it would need root; its CMake files are
# those of consumers/install, with which consumers/find_package is built.
find_program(DPKG_DEB dpkg-deb)
if(DPKG_DEB AND NOT LibTorch_WHEEL)
  add_test(NAME consumers/debian_package
           COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/consumers/unpack_debian_package.sh
                   ${PROJECT_BINARY_DIR} ${CMAKE_CURRENT_BINARY_DIR}/debian_package ${install_folder})
  set_tests_properties(consumers/debian_package PROPERTIES FIXTURES_REQUIRED installed)
endif()

# With the Python that was named, or that in whose virtual environment the torch folder lies.
if(LibTorch_WHEEL)
  if(EXISTS "${FREE_TRANSFORMER_TORCH_WHEEL}" AND NOT IS_DIRECTORY "${FREE_TRANSFORMER_TORCH_WHEEL}")
    set(wheel_python ${FREE_TRANSFORMER_TORCH_WHEEL})
  else()
    find_program(wheel_python python3 PATHS ${FREE_TRANSFORMER_TORCH_WHEEL} ${LibTorch_WHEEL}/../../../..
                 PATH_SUFFIXES bin NO_DEFAULT_PATH NO_CACHE)
  endif()
  if(wheel_python)
    add_test(NAME consumers/python_extension
             COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/consumers/python_extension/build_and_run.sh
                     ${CMAKE_CURRENT_BINARY_DIR}/python_extension ${wheel_python})
    set_tests_properties(consumers/python_extension PROPERTIES SKIP_RETURN_CODE 77)
  else()
    message(STATUS "consumers/python_extension is left out: no Python found beside ${LibTorch_WHEEL}")
  endif()
endif()
