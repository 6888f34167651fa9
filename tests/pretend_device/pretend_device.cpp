// The pretend device: its memory, its guard, and the few operations that are its own. All others are the CPU's.
#include "pretend_device.hpp"

#include <ATen/EmptyTensor.h>
#include <ATen/NativeFunctions.h>
#include <ATen/native/CPUFallback.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <torch/version.h>
#include <unistd.h>

#if TORCH_VERSION_MAJOR >= 2
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#endif

#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

namespace pretend_device {

namespace {

#if TORCH_VERSION_MAJOR >= 2
template <typename Value>
using Optional = std::optional<Value>;
#else
template <typename Value>
using Optional = c10::optional<Value>;
#endif

/// One range of addresses, given out from its front and anew once nothing of it is in use. It can be read and written
/// while the device is at work alone: a kernel of the library that took a device's pointer for one of the CPU ends the test.
/// Not so where all unit tests run on this device, whose finite differences would take minutes of such system calls.
class Memory final : public c10::Allocator {
 public:
  static Memory& instance() {
    static Memory& memory = *new Memory;  // tensors may outlive everything static
    return memory;
  }

#if TORCH_VERSION_MAJOR >= 2
  c10::DataPtr allocate(size_t bytes) override { return take(bytes); }
  void copy_data(void*, const void*, size_t) const override {
    TORCH_CHECK(false, "pretend device: memory is copied as tensors only");
  }
#else
  c10::DataPtr allocate(size_t bytes) const override { return instance().take(bytes); }
#endif
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }

  /// Within reach as long as it lives.
  class Reach {
   public:
    Reach() : lock_(instance().reach_) { instance().protect(PROT_READ | PROT_WRITE); }
    ~Reach() { instance().protect(PROT_NONE); }
    Reach(const Reach&) = delete;
    Reach& operator=(const Reach&) = delete;

   private:
    const std::lock_guard<std::mutex> lock_;
  };

 private:
  static constexpr size_t size = size_t{1} << 30;  // addresses, not memory

  Memory() {
    const int access = is_protected_ ? PROT_NONE : PROT_READ | PROT_WRITE;
    void* range = mmap(nullptr, size, access, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(range != MAP_FAILED, "pretend device: no address space");
    begin_ = static_cast<char*>(range);
  }

  c10::DataPtr take(size_t bytes) {
    if (bytes == 0) return {nullptr, device()};
    const std::lock_guard<std::mutex> lock(mutex_);
    constexpr size_t line = 64;
    const size_t rounded = (bytes + line - 1) / line * line;
    TORCH_CHECK(rounded <= size - used_, "pretend device: out of memory");
    void* data = begin_ + std::exchange(used_, used_ + rounded);
    ++tensors_;
    return {data, data, &give_back, device()};
  }

  static void give_back(void*) {
    Memory& memory = instance();
    const std::lock_guard<std::mutex> lock(memory.mutex_);
    if (--memory.tensors_ == 0) memory.used_ = 0;
  }

  void protect(int access) {
    if (is_protected_) TORCH_INTERNAL_ASSERT(mprotect(begin_, size, access) == 0);
  }

  const bool is_protected_ = std::getenv("FREE_TRANSFORMER_TEST_DEVICE") == nullptr;
  std::mutex reach_, mutex_;
  char* begin_ = nullptr;
  size_t used_ = 0, tensors_ = 0;
};

/// One device with one stream, on which everything has happened when a call returns.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::PrivateUse1; }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}

 private:
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
};

#if TORCH_VERSION_MAJOR >= 2
/// Autograd asks these which device is the machine's accelerator, whose streams it orders, and at::manual_seed for its
/// generator.
struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
};
#endif

std::mutex operations_mutex;
std::vector<std::string> operations;
int64_t moved_bytes = 0;

/// True while an operation of this thread is at work: what it calls is part of it.
thread_local bool is_within_operation = false;

/// Counts an operation, and nothing within it, and lets it reach the device's memory.
class Operation {
 public:
  explicit Operation(const std::string& name) : was_within_(std::exchange(is_within_operation, true)) {
    if (was_within_) return;
    reach_.emplace();
    const std::lock_guard<std::mutex> lock(operations_mutex);
    operations.push_back(name);
  }
  ~Operation() { is_within_operation = was_within_; }

  void moves(int64_t count) const {
    if (was_within_) return;
    const std::lock_guard<std::mutex> lock(operations_mutex);
    moved_bytes += count;
  }
  Operation(const Operation&) = delete;
  Operation& operator=(const Operation&) = delete;

 private:
  const bool was_within_;
  std::optional<Memory::Reach> reach_;
};

/// Of the memory that a tensor stands for: an expanded dimension is there once.
int64_t bytes_of(const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.is_cpu()) return 0;
  int64_t elements = 1;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) elements *= tensor.stride(dim) == 0 ? 1 : tensor.size(dim);
  return elements * static_cast<int64_t>(tensor.itemsize());
}

bool begins_with(const std::string& name, const char* front) { return name.rfind(front, 0) == 0; }

/// What an operation moves of one of its arguments.
int64_t bytes_of_argument(const std::string& name, const c10::Argument& argument, const at::Tensor& tensor) {
  const bool is_written = argument.alias_info() && argument.alias_info()->isWrite();
  const std::string base = name.substr(0, name.find('.'));
  const bool is_inplace = base.back() == '_' && base != "aten::fill_" && base != "aten::zero_";
  int64_t times = is_written && is_inplace ? 2 : 1;
  const bool is_softmax = begins_with(name, "aten::_softmax.") || begins_with(name, "aten::_log_softmax.");
  if (is_softmax && !is_written) times = 3;
  if (begins_with(name, "aten::_log_softmax_backward_data") && argument.name() == "grad_output") times = 2;
  return times * bytes_of(tensor);
}

/// What an operation moves that picks or places one number for each index.
std::optional<int64_t> bytes_of_picked(const std::string& name, const torch::jit::Stack& arguments) {
  if (begins_with(name, "aten::gather") || begins_with(name, "aten::scatter")) {
    const at::Tensor& index = arguments[2].toTensor();
    return bytes_of(index) + 2 * index.numel() * static_cast<int64_t>(arguments[0].toTensor().itemsize());
  }
  if (begins_with(name, "aten::nll_loss_forward")) return bytes_of(arguments[1].toTensor());
  if (begins_with(name, "aten::nll_loss_backward")) return bytes_of(arguments[1].toTensor());  // zeroes are written
  return {};
}

/// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU));
}

at::Tensor empty(at::IntArrayRef sizes, Optional<at::ScalarType> type, Optional<at::Layout>, Optional<at::Device>,
                 Optional<bool>, Optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &Memory::instance(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   type.value_or(at::kFloat), format);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, Optional<at::ScalarType> type,
                         Optional<at::Layout>, Optional<at::Device>, Optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &Memory::instance(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           type.value_or(at::kFloat));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool /*non_blocking*/) {
  const Operation operation(target.is_cpu() ? copy_to_host : "aten::_copy_from");
  operation.moves(bytes_of(source) + bytes_of(target));
  on_cpu(target).copy_(on_cpu(source));
  return target;
}

/// Contiguous, without the values: nothing here grows a tensor that has some.
const at::Tensor& resize(const at::Tensor& tensor, at::IntArrayRef sizes, Optional<at::MemoryFormat> /*format*/) {
  auto* const implementation = tensor.unsafeGetTensorImpl();
  implementation->set_sizes_contiguous(sizes);
  const size_t bytes =
      static_cast<size_t>(tensor.storage_offset() + tensor.numel()) * static_cast<size_t>(tensor.itemsize());
  const c10::Storage& storage = tensor.storage();
  if (storage.nbytes() < bytes) {
    storage.unsafeGetStorageImpl()->set_data_ptr(Memory::instance().allocate(bytes));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
  return tensor;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  if (target.sizes() != source.sizes()) target.resize_(source.sizes());
  return copy_from(source, target, false);
}

at::Tensor view(const at::Tensor& tensor, at::IntArrayRef sizes) { return at::native::view(tensor, sizes); }

at::Tensor as_strided(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides,
                      Optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(tensor, sizes, strides, offset);
}

at::Tensor reshape_alias(const at::Tensor& tensor, at::IntArrayRef sizes, at::IntArrayRef strides) {
  return at::native::_reshape_alias(tensor, sizes, strides);
}

/// Products of half types as a GPU makes them, in float32 and rounded once: not every LibTorch's CPU has them.
at::Tensor wide(const at::Tensor& tensor) {
  const at::Tensor here = on_cpu(tensor);
  return here.scalar_type() == at::kDouble ? here : here.to(at::kFloat);
}

at::Tensor& mm_out(const at::Tensor& left, const at::Tensor& right, at::Tensor& result) {
  const Operation operation("aten::mm.out");
  operation.moves(bytes_of(left) + bytes_of(right) + bytes_of(result));
  on_cpu(result).copy_(at::mm(wide(left), wide(right)));
  return result;
}

at::Tensor& addmm_out(const at::Tensor& added, const at::Tensor& left, const at::Tensor& right, const at::Scalar& beta,
                      const at::Scalar& alpha, at::Tensor& result) {
  const Operation operation("aten::addmm.out");
  operation.moves(bytes_of(added) + bytes_of(left) + bytes_of(right) + bytes_of(result));
  on_cpu(result).copy_(at::addmm(wide(added), wide(left), wide(right), beta, alpha));
  return result;
}

#if TORCH_VERSION_MAJOR >= 2
at::Tensor& mm_dtype_out(const at::Tensor& left, const at::Tensor& right, at::ScalarType type, at::Tensor& result) {
  TORCH_CHECK(result.scalar_type() == type, "pretend device: the result of mm must be ", type);
  const Operation operation("aten::mm.dtype_out");
  operation.moves(bytes_of(left) + bytes_of(right) + bytes_of(result));
  on_cpu(result).copy_(at::mm(wide(left), wide(right)));
  return result;
}

at::Tensor& addmm_dtype_out(const at::Tensor& added, const at::Tensor& left, const at::Tensor& right,
                            at::ScalarType type, const at::Scalar& beta, const at::Scalar& alpha, at::Tensor& result) {
  TORCH_CHECK(result.scalar_type() == type, "pretend device: the result of addmm must be ", type);
  const Operation operation("aten::addmm.dtype_out");
  operation.moves(bytes_of(added) + bytes_of(left) + bytes_of(right) + bytes_of(result));
  on_cpu(result).copy_(at::addmm(wide(added), wide(left), wide(right), beta, alpha));
  return result;
}
#endif

void by_cpu(const c10::OperatorHandle& handle, torch::jit::Stack* stack) {
  const auto& name = handle.operator_name();
  const std::string full = name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
  const Operation operation(full);
  const auto& schema = handle.schema();
  const size_t count = schema.arguments().size();
  const torch::jit::Stack arguments(stack->end() - static_cast<std::ptrdiff_t>(count), stack->end());
  at::native::cpu_fallback(handle, stack);
  if (const auto picked = bytes_of_picked(full, arguments)) return operation.moves(*picked);
  for (size_t index = 0; index < count; ++index) {
    if (!arguments[index].isTensor()) continue;
    operation.moves(bytes_of_argument(full, schema.arguments()[index], arguments[index].toTensor()));
  }
  for (size_t index = 0; index < schema.returns().size(); ++index) {  // fresh results; others were arguments
    const auto& value = (*stack)[stack->size() - schema.returns().size() + index];
    if (value.isTensor() && !schema.returns()[index].alias_info()) operation.moves(bytes_of(value.toTensor()));
  }
}

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  c10::SetAllocator(c10::DeviceType::PrivateUse1, &Memory::instance());
#if TORCH_VERSION_MAJOR >= 2
  c10::register_privateuse1_backend("pretend");
  at::RegisterPrivateUse1HooksInterface(new Hooks);
#endif
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("_copy_from", TORCH_FN(copy_from));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  library.impl("resize_", TORCH_FN(resize));
  library.impl("mm.out", TORCH_FN(mm_out));
  library.impl("addmm.out", TORCH_FN(addmm_out));
  library.impl("view", TORCH_FN(view));
  library.impl("as_strided", TORCH_FN(as_strided));
  library.impl("_reshape_alias", TORCH_FN(reshape_alias));
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_cpu>()); }

}  // namespace

at::Device device() { return {c10::DeviceType::PrivateUse1, 0}; }

std::vector<std::string> take_operations() {
  const std::lock_guard<std::mutex> lock(operations_mutex);
  return std::exchange(operations, {});
}

#if TORCH_VERSION_MAJOR >= 2
std::shared_ptr<void> with_float_products() {
  if (!c10::Dispatcher::singleton().findSchema({"aten::addmm", "dtype_out"})) return {};
  auto library = std::make_shared<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::PrivateUse1, __FILE__,
                                                  static_cast<uint32_t>(__LINE__));
  library->impl("mm.dtype_out", TORCH_FN(mm_dtype_out));
  library->impl("addmm.dtype_out", TORCH_FN(addmm_dtype_out));
  return library;
}
#else
std::shared_ptr<void> with_float_products() { return {}; }
#endif

int64_t take_bytes() {
  const std::lock_guard<std::mutex> lock(operations_mutex);
  return std::exchange(moved_bytes, 0);
}

bool is_out_of_reach(const at::Tensor& tensor) {
  int ends[2];
  TORCH_CHECK(pipe(ends) == 0, "pretend device: no pipe");
  const bool is_refused = write(ends[1], tensor.data_ptr(), 1) < 0;  // the kernel reads it, and says if it can't
  close(ends[0]);
  close(ends[1]);
  return is_refused;
}

}  // namespace pretend_device
