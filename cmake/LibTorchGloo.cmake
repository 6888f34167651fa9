# Whether this LibTorch has c10d's processes over Gloo: LibTorch_HAS_GLOO. Its headers include some of Gloo's, which no
# LibTorch brings along; ${gloo_declarations} has what they need of them.
include(CheckCXXSourceCompiles)
set(gloo_declarations ${CMAKE_CURRENT_LIST_DIR}/../examples/free_transformer/gloo_declarations)
set(CMAKE_REQUIRED_LIBRARIES LibTorch::LibTorch)
set(CMAKE_REQUIRED_INCLUDES ${gloo_declarations})
set(CMAKE_REQUIRED_DEFINITIONS -DUSE_C10D_GLOO)
if(CMAKE_CXX_STANDARD)
  set(CMAKE_REQUIRED_FLAGS ${CMAKE_CXX${CMAKE_CXX_STANDARD}_STANDARD_COMPILE_OPTION})
elseif(LibTorch_WHEEL)
  set(CMAKE_REQUIRED_FLAGS ${CMAKE_CXX20_STANDARD_COMPILE_OPTION})
endif()
check_cxx_source_compiles("
  #include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
  int main() { return c10d::ProcessGroupGloo::createDeviceForHostname(\"127.0.0.1\") == nullptr; }" LibTorch_HAS_GLOO)
foreach(setting LIBRARIES INCLUDES DEFINITIONS FLAGS)
  unset(CMAKE_REQUIRED_${setting})
endforeach()
