/// A device that every machine has: LibTorch's PrivateUse1 over host memory. It computes by LibTorch's CPU operations,
/// counts what would be a launch on a GPU, and keeps its memory out of the host's reach.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace pretend_device {

/// The only one of its kind.
at::Device device();

/// The operations that have reached the device since the last call, in order and from all threads: autograd has one of
/// its own for each device. Views and empty tensors are none, a copy is one.
std::vector<std::string> take_operations();

/// The bytes that they have read and written, as LibTorch's CUDA kernels do for long rows: a softmax reads them for the
/// largest, for the sum and for the result, the gradient of a logarithmic softmax reads what comes from above twice.
/// What picks a number of each row, or places one, moves these alone.
int64_t take_bytes();

/// The name of a copy to the CPU among them: what the host must wait for.
inline constexpr const char* copy_to_host = "copy to the host";

/// As long as the result lives, the device multiplies half matrices to a float32 one, as CUDA does in new LibTorches;
/// null if this LibTorch has no such operation.
std::shared_ptr<void> with_float_products();

/// True if reading the tensor's memory as the host's would end the program, as it would on a GPU.
bool is_out_of_reach(const at::Tensor& tensor);

}  // namespace pretend_device
