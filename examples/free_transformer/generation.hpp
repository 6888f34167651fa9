/// Text written by the model, byte by byte.
#pragma once

#include <torch/torch.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <string>
#include <vector>

#include "model.hpp"
#include "text.hpp"

namespace example {

/// A prompt as the model reads it, int64 [1, positions]: its last bytes where it is longer than the context.
inline torch::Tensor tokens_of_prompt(const FreeTransformer& model, const std::string& prompt) {
  return to_tensor(prompt).to(torch::kInt64).unsqueeze(0).slice(1, -model->options().context);
}

/// Codes of the prompt from the encoder, as in training, and of the bytes that follow from the prior: [samples, positions].
inline torch::Tensor draw_codes(FreeTransformer& model, const torch::Tensor& prompt, int64_t byte_count,
                                int64_t samples) {
  torch::NoGradGuard no_grad;
  return torch::cat({model->sample_posterior(prompt.expand({samples, -1})), model->sample_prior({samples, byte_count})},
                    1);
}

/// What the model writes after the prompt, one text for each row of codes. Bytes of a lower temperature are the likelier ones.
inline std::vector<std::string> continue_text(FreeTransformer& model, const torch::Tensor& prompt,
                                              const torch::Tensor& codes, double temperature = 1.0) {
  torch::NoGradGuard no_grad;
  const auto context = model->options().context;
  auto tokens = prompt.expand({codes.size(0), -1});
  for (int64_t length = prompt.size(1); length < codes.size(1); ++length) {
    const auto logits = model->predict(tokens.slice(1, -context), codes.slice(1, 0, length).slice(1, -context));
    const auto next = (logits.select(1, -1) / temperature).softmax(-1).multinomial(1);
    tokens = torch::cat({tokens, next}, 1);
  }
  std::vector<std::string> texts;
  for (const auto& row : tokens.slice(1, prompt.size(1)).to(torch::kUInt8).contiguous().unbind(0)) {
    texts.emplace_back(reinterpret_cast<const char*>(row.data_ptr<uint8_t>()), static_cast<size_t>(row.size(0)));
  }
  return texts;
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
