/// How this unit is compiled: whether it may hold the vector kernels, and the namespace of code that depends on flags.
#pragma once

#include "free_transformer/version.hpp"

// The kernels need GCC's vector types, the byte order that their half types assume, and arithmetic as it is written:
// -ffast-math and its parts round in another way and let the compiler assume that there is no NaN. Elsewhere the losses
// are computed in LibTorch's operations, which LibTorch compiled. Define FREE_TRANSFORMER_VECTOR_KERNELS as 0 for that.
#if !defined(FREE_TRANSFORMER_VECTOR_KERNELS)
#if !defined(__GNUC__) || !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#define FREE_TRANSFORMER_VECTOR_KERNELS 0
#elif defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || __FINITE_MATH_ONLY__
#define FREE_TRANSFORMER_VECTOR_KERNELS 0
#else
#define FREE_TRANSFORMER_VECTOR_KERNELS 1
#endif
#endif

// Between these are functions that call LibTorch and compute nothing themselves. Inlining LibTorch's small functions into
// them would cost clang two of the six seconds that a loss takes to compile.
#if defined(__clang__) && defined(__OPTIMIZE__)
#define FREE_TRANSFORMER_SMALL_CODE_BEGIN _Pragma("clang attribute push(__attribute__((minsize)), apply_to = function)")
#define FREE_TRANSFORMER_SMALL_CODE_END _Pragma("clang attribute pop")
#else
#define FREE_TRANSFORMER_SMALL_CODE_BEGIN
#define FREE_TRANSFORMER_SMALL_CODE_END
#endif

// This header is made by a build of LibTorch with CUDA alone; beside another LibTorch nothing of the device kernels is
// compiled. Whether there is a device, and what compiles for it, is found when the program runs.
#if !defined(FREE_TRANSFORMER_DEVICE_KERNELS)
#if defined(__unix__) && __has_include(<c10/cuda/impl/cuda_cmake_macros.h>)
#define FREE_TRANSFORMER_DEVICE_KERNELS 1
#else
#define FREE_TRANSFORMER_DEVICE_KERNELS 0
#endif
#endif

// Units of one program may be compiled with different flags, and the linker keeps one copy of a function for all of
// them; copies of the library of several versions may meet there, too. So a name says its version and, of a function whose
// code depends on flags, which: free_transformer::detail is an alias for a namespace such as
// detail_0_1_0_vector_optimized_avx2, and public functions and types are in inline namespaces of that kind.
#if FREE_TRANSFORMER_VECTOR_KERNELS
#define FREE_TRANSFORMER_KERNELS_TAG _vector
#elif defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__
#define FREE_TRANSFORMER_KERNELS_TAG _plain_finite
#else
#define FREE_TRANSFORMER_KERNELS_TAG _plain
#endif

#if defined(__OPTIMIZE__)
#define FREE_TRANSFORMER_LEVEL_TAG _optimized
#else
#define FREE_TRANSFORMER_LEVEL_TAG _unoptimized
#endif

#if defined(__AVX512F__)
#define FREE_TRANSFORMER_INSTRUCTIONS_TAG _avx512
#elif defined(__AVX2__)
#define FREE_TRANSFORMER_INSTRUCTIONS_TAG _avx2
#elif defined(__AVX__)
#define FREE_TRANSFORMER_INSTRUCTIONS_TAG _avx
#else
#define FREE_TRANSFORMER_INSTRUCTIONS_TAG
#endif

#define FREE_TRANSFORMER_JOIN_NOW(name, major, minor, patch, rest) name##_##major##_##minor##_##patch##rest
#define FREE_TRANSFORMER_JOIN(name, major, minor, patch, rest) \
  FREE_TRANSFORMER_JOIN_NOW(name, major, minor, patch, rest)
#define FREE_TRANSFORMER_VERSIONED(name, rest)                                                \
  FREE_TRANSFORMER_JOIN(name, FREE_TRANSFORMER_VERSION_MAJOR, FREE_TRANSFORMER_VERSION_MINOR, \
                        FREE_TRANSFORMER_VERSION_PATCH, rest)
#define FREE_TRANSFORMER_TAGS_NOW(kernels, level, instructions) kernels##level##instructions
#define FREE_TRANSFORMER_TAGS(kernels, level, instructions) FREE_TRANSFORMER_TAGS_NOW(kernels, level, instructions)
#define FREE_TRANSFORMER_FLAGS \
  FREE_TRANSFORMER_TAGS(FREE_TRANSFORMER_KERNELS_TAG, FREE_TRANSFORMER_LEVEL_TAG, FREE_TRANSFORMER_INSTRUCTIONS_TAG)
#define FREE_TRANSFORMER_DETAIL FREE_TRANSFORMER_VERSIONED(detail, FREE_TRANSFORMER_FLAGS)
#define FREE_TRANSFORMER_FUNCTIONS FREE_TRANSFORMER_VERSIONED(functions, FREE_TRANSFORMER_FLAGS)
#define FREE_TRANSFORMER_TYPES FREE_TRANSFORMER_VERSIONED(types, )

namespace free_transformer {
namespace FREE_TRANSFORMER_DETAIL {}
namespace detail = FREE_TRANSFORMER_DETAIL;
inline namespace FREE_TRANSFORMER_FUNCTIONS {}
inline namespace FREE_TRANSFORMER_TYPES {}
}  // namespace free_transformer
