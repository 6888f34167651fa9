/// What a call may do beside its result: refuse with an error of this library's before anything is written, and write over
/// logits that were given for that.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "expected.hpp"
#include "tensors.hpp"

namespace fuzz {

/// The bytes of tensors as they were.
class Memory {
 public:
  explicit Memory(const std::vector<at::Tensor>& tensors) {
    for (const auto& tensor : tensors) {
      if (!tensor.defined()) continue;
      const auto* bytes = static_cast<const char*>(tensor.storage().data());
      watched_.push_back({tensor, {bytes, bytes + tensor.storage().nbytes()}});
    }
  }

  void check_untouched(const std::string& after) const {
    for (const auto& of : watched_) {
      const auto* bytes = static_cast<const char*>(of.tensor.storage().data());
      if (!std::equal(of.bytes.begin(), of.bytes.end(), bytes)) fail("written to by " + after);
    }
  }

  /// The same, but for the elements of this layout in the first tensor.
  void allow_writes(const Layout& layout) {
    auto& of = watched_.front();
    const at::Tensor all = at::empty({0}, of.tensor.options()).set_(of.tensor.storage(), 0, {layout.buffer_size}, {1});
    const at::Tensor before =
        at::from_blob(of.bytes.data(), {layout.buffer_size}, of.tensor.options().requires_grad(false));
    const at::Tensor places = layout.places();
    before.index_put_({places}, all.index({places}).detach());
  }

 private:
  struct Watched {
    at::Tensor tensor;
    std::vector<char> bytes;
  };
  std::vector<Watched> watched_;
};

enum class Refusal { wrong, possible, required };

/// True if the call was refused, as it must or may be; aborts on any other error, and on what is wrong about it.
template <typename Call>
bool is_refused(Refusal refusal, const Memory& memory, const Call& call) {
  try {
    call();
  } catch (const c10::Error& error) {
    const std::string what = error.what_without_backtrace();
    const auto names = {"compute_",         "sample_latent_bits",          "pack_latent_bits", "unpack_latent_codes",
                        "map_latent_codes", "straight_through_latent_bits"};
    const bool is_ours =
        std::any_of(names.begin(), names.end(), [&](const char* name) { return what.rfind(name, 0) == 0; });
    if (!is_ours || what.find("must") == std::string::npos) fail("an error that is not this library's: " + what);
    if (refusal == Refusal::wrong) fail("refused for no reason: " + what);
    memory.check_untouched("a refusal: " + what);
    return true;
  }
  if (refusal == Refusal::required) fail("a wrong argument was taken");
  return false;
}

}  // namespace fuzz
