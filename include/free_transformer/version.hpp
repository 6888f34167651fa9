/// The version of this copy of the library; CMake reads it from here.
#pragma once

#define FREE_TRANSFORMER_VERSION_MAJOR 0
#define FREE_TRANSFORMER_VERSION_MINOR 1
#define FREE_TRANSFORMER_VERSION_PATCH 0
