/// Which text a kernel is of, and what it is compiled for.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "free_transformer/detail/compilation.hpp"
#include "free_transformer/detail/device/arithmetic_source.hpp"
#include "free_transformer/detail/device/cross_entropy_source.hpp"
#include "free_transformer/detail/device/cross_entropy_sums_source.hpp"
#include "free_transformer/detail/device/jobs.hpp"
#include "free_transformer/detail/device/latent_kl_source.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL::device {

enum class Text { cross_entropy, cross_entropy_sums, latent_kl };

/// The options are those that the texts name; an option of another text is 0.
struct Variant {
  Text text;
  Element element = Element::float32;
  int softcap = 0, smoothing = 0, entropy = 0;
  int bits = 0, hinge = 0;

  bool operator<(const Variant& other) const { return key() < other.key(); }

  const char* name() const {
    return text == Text::cross_entropy ? "cross_entropy" : text == Text::latent_kl ? "latent_kl" : "cross_entropy_sums";
  }
  [[gnu::cold]] std::string source() const {
    return std::string(arithmetic_source) + (text == Text::cross_entropy ? cross_entropy_source
                                             : text == Text::latent_kl   ? latent_kl_source
                                                                         : cross_entropy_sums_source);
  }
  /// The options of NVRTC, but for the architecture.
  [[gnu::cold]] std::vector<std::string> options() const {
    const auto define = [](const char* macro, int value) { return "-D" + (macro + ("=" + std::to_string(value))); };
    std::vector<std::string> all{"--std=c++17", "--fmad=false", define("ELEMENT", static_cast<int>(element))};
    if (text == Text::cross_entropy) {
      for (auto [macro, value] : {std::pair{"SOFTCAP", softcap}, {"SMOOTHING", smoothing}, {"ENTROPY", entropy}}) {
        all.push_back(define(macro, value));
      }
    }
    if (text == Text::latent_kl) {
      all.push_back(define("BITS", bits));
      all.push_back(define("HINGE", hinge));
    }
    return all;
  }

 private:
  std::tuple<Text, Element, int, int, int, int, int> key() const {
    return {text, element, softcap, smoothing, entropy, bits, hinge};
  }
};

/// The kernels of the texts; each text has one or two.
enum class Kernel {
  cross_entropy_rows,
  cross_entropy_scales,
  cross_entropy_sums,
  latent_kl_positions,
  latent_kl_scale
};

inline const char* name_of(Kernel kernel) {
  constexpr const char* names[] = {"cross_entropy_rows", "cross_entropy_scales", "cross_entropy_sums",
                                   "latent_kl_positions", "latent_kl_scale"};
  return names[static_cast<int>(kernel)];
}

[[gnu::cold]] inline std::vector<Kernel> kernels_of(Text text) {
  if (text == Text::cross_entropy) return {Kernel::cross_entropy_rows};
  if (text == Text::latent_kl) return {Kernel::latent_kl_positions, Kernel::latent_kl_scale};
  return {Kernel::cross_entropy_scales, Kernel::cross_entropy_sums};
}

/// What the rows of a job are compiled for.
inline Variant variant_of(const CrossEntropyJob& job, Element element) {
  Variant variant{Text::cross_entropy, element};
  variant.softcap = job.softcap > 0;
  if (job.label_smoothing > 0) variant.smoothing = job.class_weight ? 2 : 1;
  variant.entropy = job.entropy != nullptr;
  return variant;
}

inline Variant variant_of(Element element, kernels::Hinge hinge, int64_t bits) {
  Variant variant{Text::latent_kl, element};
  variant.bits = static_cast<int>(bits);
  variant.hinge = static_cast<int>(hinge);
  return variant;
}

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL::device
