# Finds LibTorch for this project and for its users, as target LibTorch::LibTorch. In this order:
#   1. a target `torch` that exists already;
#   2. a Python wheel: FREE_TRANSFORMER_TORCH_WHEEL is its torch folder, or a Python interpreter or virtual environment
#      that has it; or Torch_DIR or CMAKE_PREFIX_PATH leads into one;
#   3. find_package(Torch CONFIG), such as Debian's libtorch-dev.
# A wheel's own TorchConfig is left aside, as it demands a CUDA toolkit. A program for CUDA calls find_package(Torch)
# before it looks for this library, and so comes under 1.
# Also defines LibTorch_INCLUDE_DIR, LibTorch_VERSION and LibTorch_WHEEL (the wheel's torch folder, if it is one).

set(FREE_TRANSFORMER_TORCH_WHEEL "" CACHE PATH "torch folder of a Python wheel, or a Python that has it")

function(libtorch_wheel_of_python python result)
  find_program(interpreter python3 PATHS "${python}/bin" NO_DEFAULT_PATH NO_CACHE)
  if(interpreter)
    set(python "${interpreter}")
  endif()
  execute_process(
    COMMAND "${python}" -c "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
    OUTPUT_VARIABLE wheel OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  set(${result} "${wheel}" PARENT_SCOPE)
endfunction()

function(libtorch_wheel_of_configuration result)
  find_path(configuration TorchConfig.cmake
            HINTS "${Torch_DIR}" ENV Torch_DIR ${CMAKE_PREFIX_PATH} ENV CMAKE_PREFIX_PATH
            PATH_SUFFIXES Torch share/cmake/Torch
            NO_DEFAULT_PATH NO_CACHE)
  cmake_path(SET wheel NORMALIZE "${configuration}/../../..")
  if(configuration AND EXISTS "${wheel}/__init__.py")
    set(${result} "${wheel}" PARENT_SCOPE)
  endif()
endfunction()

function(libtorch_import_wheel wheel)
  file(STRINGS "${wheel}/include/torch/csrc/api/include/torch/all.h" standard REGEX "C\\+\\+[0-9]+ or later")
  string(REGEX REPLACE ".*C\\+\\+([0-9]+).*" "cxx_std_\\1" standard "${standard}")
  find_library(torch_cpu torch_cpu PATHS "${wheel}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  find_library(c10 c10 PATHS "${wheel}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)

  # Wheels up to 2.6 have the C++ library's strings of before C++11, and say so there.
  set(configuration "${wheel}/share/cmake/Torch/TorchConfig.cmake")
  if(EXISTS "${configuration}")
    file(STRINGS "${configuration}" strings REGEX "_GLIBCXX_USE_CXX11_ABI=[01]")
    string(REGEX MATCH "_GLIBCXX_USE_CXX11_ABI=[01]" strings "${strings}")
  endif()

  target_compile_features(LibTorch::LibTorch INTERFACE ${standard})
  target_compile_definitions(LibTorch::LibTorch INTERFACE ${strings})
  target_include_directories(LibTorch::LibTorch INTERFACE "${wheel}/include" "${wheel}/include/torch/csrc/api/include")
  target_link_libraries(LibTorch::LibTorch INTERFACE "${torch_cpu}" "${c10}")
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # libtorch_cpu.so knows where its CUDA libraries are; the linker does not.
    target_link_options(LibTorch::LibTorch INTERFACE LINKER:--allow-shlib-undefined)
  endif()
endfunction()

if(NOT TARGET torch)
  if(NOT FREE_TRANSFORMER_TORCH_WHEEL)
    libtorch_wheel_of_configuration(LibTorch_WHEEL)
  elseif(EXISTS "${FREE_TRANSFORMER_TORCH_WHEEL}/include/torch")
    set(LibTorch_WHEEL "${FREE_TRANSFORMER_TORCH_WHEEL}")
  else()
    libtorch_wheel_of_python("${FREE_TRANSFORMER_TORCH_WHEEL}" LibTorch_WHEEL)
  endif()
  # A wheel that was asked for and is not there must not end in another LibTorch.
  if(NOT LibTorch_WHEEL AND NOT FREE_TRANSFORMER_TORCH_WHEEL)
    find_package(Torch CONFIG QUIET)
  endif()
endif()

if(TARGET torch)
  get_target_property(libtorch_folders torch INTERFACE_INCLUDE_DIRECTORIES)
else()
  set(libtorch_folders "${LibTorch_WHEEL}/include")
endif()
find_path(LibTorch_INCLUDE_DIR torch/csrc/api/include/torch/version.h
          PATHS ${libtorch_folders} NO_DEFAULT_PATH NO_CACHE)

if(LibTorch_INCLUDE_DIR)
  string(REGEX REPLACE "/$" "" LibTorch_INCLUDE_DIR "${LibTorch_INCLUDE_DIR}")
  file(GLOB libtorch_version_files "${LibTorch_INCLUDE_DIR}/torch/headeronly/version.h"
                                   "${LibTorch_INCLUDE_DIR}/torch/csrc/api/include/torch/version.h")
  foreach(file IN LISTS libtorch_version_files)
    file(STRINGS "${file}" libtorch_numbers REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
    if(libtorch_numbers)
      list(TRANSFORM libtorch_numbers REPLACE "^.* " "")
      list(JOIN libtorch_numbers "." LibTorch_VERSION)
    endif()
  endforeach()
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  LibTorch
  REQUIRED_VARS LibTorch_INCLUDE_DIR
  VERSION_VAR LibTorch_VERSION
  REASON_FAILURE_MESSAGE "
  Install Debian's (apt-get install libtorch-dev), or PyPI's (pip install torch) and set FREE_TRANSFORMER_TORCH_WHEEL to
  that Python, its virtual environment or the torch folder in it. For another LibTorch set Torch_DIR to the folder of its
  TorchConfig.cmake. FREE_TRANSFORMER_TORCH_WHEEL is now \"${FREE_TRANSFORMER_TORCH_WHEEL}\".")

if(LibTorch_FOUND AND NOT TARGET LibTorch::LibTorch)
  add_library(LibTorch::LibTorch INTERFACE IMPORTED)
  if(TARGET torch)
    target_link_libraries(LibTorch::LibTorch INTERFACE torch)
  else()
    libtorch_import_wheel("${LibTorch_WHEEL}")
  endif()
endif()
