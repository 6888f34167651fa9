/// Calls the library with shapes, strides, types, options, infinities and NaN made from bytes. On every path the results must be
/// those of the equations in float64, nothing may be written that was not asked for, and what must be refused is refused with
/// an error of this library's.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/util/Logging.h>

#include <string>

#include "choices.hpp"
#include "kl_divergence.hpp"
#include "latent_code.hpp"
#include "linear_logits.hpp"
#include "reconstruction_loss.hpp"
#include "token_statistics.hpp"
#include "vae_loss.hpp"

namespace fuzz {

void call_one_of_all(Choices& choices) {
  switch (choices.below(6)) {
    case 0:
      return fuzz_reconstruction_loss(choices);
    case 1:
      return fuzz_kl_divergence(choices);
    case 2:
      return fuzz_vae_loss(choices);
    case 3:
      return fuzz_linear_logits(choices);
    case 4:
      return fuzz_token_statistics(choices);
    default:
      return fuzz_latent_code(choices);
  }
}

}  // namespace fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  [[maybe_unused]] static const bool is_prepared = [] {
    c10::SetStackTraceFetcher([] { return std::string(); });  // which costs a refusal more than all the rest
    at::set_num_threads(1);
    return true;
  }();
  fuzz::Choices choices(data, size);
  fuzz::call_one_of_all(choices);
  return 0;
}
