/// The kernels that `write_kernels` has written as C++, each with the combination that it was written for.
#pragma once

#include <vector>

#include "free_transformer/detail/device/jobs.hpp"

namespace emulation {

namespace device = free_transformer::detail::device;
namespace kernels = free_transformer::detail::kernels;

struct RowsKernel {
  device::Element element;
  int softcap, smoothing, entropy;
  void (*run)(const device::CrossEntropyJob&);
};

struct BatchKernels {
  void (*scales)(const device::CrossEntropyBatchJob&);
  void (*sums)(const device::CrossEntropyBatchJob&);
};

struct LatentKernel {
  device::Element element;
  int bits;
  kernels::Hinge hinge;
  void (*positions)(const device::LatentJob&);
  void (*scale)(const device::LatentJob&);
};

void add_rows_of_element_0(std::vector<RowsKernel>& kernels);
void add_rows_of_element_1(std::vector<RowsKernel>& kernels);
void add_rows_of_element_2(std::vector<RowsKernel>& kernels);
void add_positions_of_element_0(std::vector<LatentKernel>& kernels);
void add_positions_of_element_1(std::vector<LatentKernel>& kernels);
void add_positions_of_element_2(std::vector<LatentKernel>& kernels);
extern const BatchKernels batch_kernels;

inline std::vector<RowsKernel> all_rows_kernels() {
  std::vector<RowsKernel> all;
  for (const auto add : {add_rows_of_element_0, add_rows_of_element_1, add_rows_of_element_2}) add(all);
  return all;
}

inline std::vector<LatentKernel> all_latent_kernels() {
  std::vector<LatentKernel> all;
  for (const auto add : {add_positions_of_element_0, add_positions_of_element_1, add_positions_of_element_2}) add(all);
  return all;
}

}  // namespace emulation
