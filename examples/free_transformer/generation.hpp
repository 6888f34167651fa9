/// Text written by the model, byte by byte.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <string>

#include "model.hpp"
#include "text.hpp"

namespace example {

/// The prompt and what follows it. The prompt's codes come from the encoder, as in training; the others from the prior.
inline std::string continue_text(FreeTransformer& model, const std::string& prompt, int64_t byte_count) {
  torch::NoGradGuard no_grad;
  const auto context = model->options().context;
  auto text = prompt;
  auto tokens = to_tensor(prompt).to(torch::kInt64).unsqueeze(0).slice(1, -context);
  auto codes = model->sample_posterior(tokens);
  for (int64_t index = 0; index < byte_count; ++index) {
    const auto logits = model->predict(tokens, codes).select(1, -1);
    const auto next = logits.softmax(-1).multinomial(1);
    text.push_back(static_cast<char>(next.item<int64_t>()));
    tokens = torch::cat({tokens, next}, 1).slice(1, -context);
    codes = torch::cat({codes, model->sample_prior({1, 1})}, 1).slice(1, -context);
  }
  return text;
}

/// Text that a terminal shows and does not obey.
inline std::string without_control_characters(std::string text) {
  const auto is_control = [](char character) {
    return std::iscntrl(static_cast<unsigned char>(character)) != 0 && character != '\n' && character != '\t';
  };
  std::replace_if(text.begin(), text.end(), is_control, '?');
  return text;
}

}  // namespace example
