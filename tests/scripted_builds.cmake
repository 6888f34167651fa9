# What a script builds, by each compiler that is here: a copy of include/, units of one program that are compiled with
# different flags, and one unit whose code is weighed. Then what the README shows.
set(api_folder torch/csrc/api/include)
if(LibTorch_WHEEL)
  set(libtorch_flags -std=c++20 -isystem ${LibTorch_INCLUDE_DIR} -isystem ${LibTorch_INCLUDE_DIR}/${api_folder}
                     -L${LibTorch_WHEEL}/lib -Wl,-rpath,${LibTorch_WHEEL}/lib -Wl,--allow-shlib-undefined)
else()
  set(libtorch_flags -std=c++17 -isystem ${LibTorch_INCLUDE_DIR}/${api_folder})
endif()

foreach(compiler g++ clang++-14)
  find_program(compiler_path ${compiler} NO_CACHE)
  if(compiler_path)
    set(folders consumers/vendored_copy)
    if(NOT LibTorch_WHEEL)  # what flags do to the library's code does not depend on LibTorch, and takes minutes to try
      list(APPEND folders compiler_flags)
    endif()
    foreach(folder IN LISTS folders)
      add_test(NAME ${folder}/${compiler}
               COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/${folder}/build_and_run.sh
                       ${CMAKE_CURRENT_BINARY_DIR}/${folder}/${compiler} ${compiler_path} ${libtorch_flags})
    endforeach()
    if(NOT LibTorch_WHEEL)
      add_test(NAME compile_time/code_size/${compiler}
               COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/compile_time/check_code_size.sh
                       ${CMAKE_CURRENT_BINARY_DIR}/code_size-${compiler}.o ${compiler_path} ${libtorch_flags})
      set_tests_properties(compile_time/code_size/${compiler} PROPERTIES SKIP_RETURN_CODE 77)
    endif()
  endif()
  unset(compiler_path)
endforeach()

# Its g++ line is for Debian's LibTorch.
if(LibTorch_WHEEL OR LibTorch_INCLUDE_DIR STREQUAL "/usr/include")
  add_test(NAME readme/commands COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/readme/run_commands.sh
                                        ${CMAKE_CURRENT_BINARY_DIR}/readme_commands ${LibTorch_WHEEL})
  set_tests_properties(readme/commands PROPERTIES ENVIRONMENT CMAKE_GENERATOR=${CMAKE_GENERATOR})
endif()
if(NOT LibTorch_WHEEL)
  add_test(NAME readme/snippets COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/readme/compile_snippets.sh
                                        ${CMAKE_CURRENT_BINARY_DIR}/snippets.cpp ${CMAKE_CXX_COMPILER} ${libtorch_flags})
endif()
