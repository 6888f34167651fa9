# Projects of strangers, each configured, built and run: after an install, with add_subdirectory, and as a copy.
set(install_folder ${CMAKE_CURRENT_BINARY_DIR}/installed)
add_test(NAME consumers/install COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${install_folder})
set_tests_properties(consumers/install PROPERTIES FIXTURES_SETUP installed)

function(add_consumer name)
  add_test(NAME consumers/${name}
           COMMAND ${CMAKE_CTEST_COMMAND}
                   --build-and-test ${CMAKE_CURRENT_SOURCE_DIR}/consumers/${name} ${CMAKE_CURRENT_BINARY_DIR}/${name}
                   --build-generator ${CMAKE_GENERATOR}
                   --build-options -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
                                   -DFREE_TRANSFORMER_TORCH_WHEEL=${LibTorch_WHEEL} ${ARGN}
                   --test-command consumer)
endfunction()

add_consumer(find_package -Dfree_transformer_ROOT=${install_folder})
set_tests_properties(consumers/find_package PROPERTIES FIXTURES_REQUIRED installed)

add_consumer(add_subdirectory -DFREE_TRANSFORMER_FOLDER=${PROJECT_SOURCE_DIR})

add_consumer(older_wheel -DFREE_TRANSFORMER_FOLDER=${PROJECT_SOURCE_DIR})
