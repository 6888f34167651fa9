// Catch2, whichever major version is installed, with its own CHECK: LibTorch's logging defines one that ends the
// program.
#pragma once

#include <c10/util/Logging.h>
#undef CHECK

#if __has_include(<catch2/catch_all.hpp>)
#include <catch2/catch_all.hpp>
#else
#include <catch2/catch.hpp>
#endif
