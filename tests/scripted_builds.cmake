# Programs that a script builds without CMake, by each compiler that is here: a copy of include/, and units of one program
# that are compiled with different flags.
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
    foreach(folder consumers/vendored_copy compiler_flags)
      add_test(NAME ${folder}/${compiler}
               COMMAND ${CMAKE_CURRENT_SOURCE_DIR}/${folder}/build_and_run.sh
                       ${CMAKE_CURRENT_BINARY_DIR}/${folder}/${compiler} ${compiler_path} ${libtorch_flags})
    endforeach()
  endif()
  unset(compiler_path)
endforeach()
