/// Writes the kernels' texts as C++, once for each combination of type and options, with a table of what was written.
///     write_kernels cross_entropy 0|1|2    the rows of one element type
///     write_kernels sums                   what all rows have in common
///     write_kernels latent_kl 0|1|2        the positions of one element type
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "free_transformer/detail/device/arithmetic_source.hpp"
#include "free_transformer/detail/device/cross_entropy_source.hpp"
#include "free_transformer/detail/device/cross_entropy_sums_source.hpp"
#include "free_transformer/detail/device/latent_kl_source.hpp"

namespace device = free_transformer::detail::device;

namespace {

void begin(const char* name, int number) { std::printf("namespace %s_%d {\n", name, number); }

void define(const char* macro, int value) { std::printf("#define %s %d\n", macro, value); }

/// The entry that takes a job of the library's, whose fields must lie where the text's lie.
void end(const char* kernel, const char* job) {
  std::printf("void run_%s(const device::%s& job) {\n  %s own;\n", kernel, job, job);
  std::printf("  static_assert(sizeof(own) == sizeof(job));\n  std::memcpy(&own, &job, sizeof(own));\n  %s(own);\n}\n",
              kernel);
}

void close() {
  for (const char* macro : {"ELEMENT", "SOFTCAP", "SMOOTHING", "ENTROPY", "BITS", "HINGE"}) {
    std::printf("#undef %s\n", macro);
  }
  std::printf("}\n");
}

void same_field(const char* job, const char* field) {
  std::printf("static_assert(offsetof(%s, %s) == offsetof(device::%s, %s));\n", job, field, job, field);
}

void write_cross_entropy(int element) {
  for (int number = 0; number < 12; ++number) {
    begin("rows", number);
    define("ELEMENT", element);
    define("SOFTCAP", number % 2);
    define("ENTROPY", number / 2 % 2);
    define("SMOOTHING", number / 4);
    std::printf("%s%s", device::arithmetic_source, device::cross_entropy_source);
    end("cross_entropy_rows", "CrossEntropyJob");
    if (number == 0) {
      for (const char* field :
           {"logits",          "gradient",        "logit_rows",   "gradient_rows",    "columns", "targets",
            "ignore_index",    "token_weight",    "class_weight", "likelihood_scale", "z_scale", "upstream",
            "upstream_stride", "label_smoothing", "z_loss",       "softcap",          "loss",    "nll",
            "likelihood_loss", "log_sum_exp",     "entropy",      "prediction"}) {
        same_field("CrossEntropyJob", field);
      }
    }
    close();
  }
  std::printf("}\nvoid add_rows_of_element_%d(std::vector<RowsKernel>& kernels) {\n", element);
  for (int number = 0; number < 12; ++number) {
    std::printf("  kernels.push_back({device::Element{%d}, %d, %d, %d, &rows_%d::run_cross_entropy_rows});\n", element,
                number % 2, number / 4, number / 2 % 2, number);
  }
  std::printf("}\n");
}

void write_sums() {
  begin("sums", 0);
  define("ELEMENT", 0);
  std::printf("%s%s", device::arithmetic_source, device::cross_entropy_sums_source);
  end("cross_entropy_scales", "CrossEntropyBatchJob");
  end("cross_entropy_sums", "CrossEntropyBatchJob");
  for (const char* field :
       {"targets", "ignore_index", "token_weight", "class_weight", "rows", "columns", "divisor", "z_loss", "nll",
        "likelihood_loss", "log_sum_exp", "prediction", "scales", "sums", "loss", "ticket", "partial"}) {
    same_field("CrossEntropyBatchJob", field);
  }
  for (const char* field : {"rows_of_group", "group_stride", "row_stride"}) same_field("RowLayout", field);
  for (const char* field : {"kind", "number", "tensor"}) same_field("Divisor", field);
  close();
  std::printf(
      "}\nconst BatchKernels batch_kernels{&sums_0::run_cross_entropy_scales, &sums_0::run_cross_entropy_sums};\n");
}

/// Latent bits on both sides of where a position takes more lanes, of the full lanes, and what the unit tests have.
constexpr int every_bits[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 32, 33, 1024};

void write_latent_kl(int element) {
  int number = 0;
  for (int bits : every_bits) {
    for (int hinge = 0; hinge < 3; ++hinge, ++number) {
      begin("positions", number);
      define("ELEMENT", element);
      define("BITS", bits);
      define("HINGE", hinge);
      std::printf("%s%s", device::arithmetic_source, device::latent_kl_source);
      end("latent_kl_positions", "LatentJob");
      end("latent_kl_scale", "LatentJob");
      if (number == 0) {
        for (const char* field :
             {"z_logits", "gradient", "z_rows", "rows", "free_bits", "token_weight", "scale", "mean_kl", "upstream",
              "upstream_stride", "penalty", "divisor", "sums", "totals", "loss", "ticket", "partial"}) {
          same_field("LatentJob", field);
        }
      }
      close();
    }
  }
  std::printf("}\nvoid add_positions_of_element_%d(std::vector<LatentKernel>& kernels) {\n", element);
  number = 0;
  for (int bits : every_bits) {
    for (int hinge = 0; hinge < 3; ++hinge, ++number) {
      std::printf(
          "  kernels.push_back({device::Element{%d}, %d, kernels::Hinge{%d}, &positions_%d::run_latent_kl_positions,\n"
          "                     &positions_%d::run_latent_kl_scale});\n",
          element, bits, hinge, number, number);
    }
  }
  std::printf("}\n");
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) return 1;
  std::printf("#include <cstddef>\n#include \"block.hpp\"\n#include \"kernels.hpp\"\n");
  std::printf("#pragma GCC diagnostic ignored \"-Wunused-parameter\"\n");  // what a combination has no use for
  std::printf("#pragma GCC diagnostic ignored \"-Winvalid-offsetof\"\n");
  std::printf("namespace emulation {\nnamespace {\n");
  const int element = count > 2 ? std::atoi(arguments[2]) : 0;
  if (std::strcmp(arguments[1], "cross_entropy") == 0) write_cross_entropy(element);
  if (std::strcmp(arguments[1], "sums") == 0) write_sums();
  if (std::strcmp(arguments[1], "latent_kl") == 0) write_latent_kl(element);
  std::printf("}\n");
}
