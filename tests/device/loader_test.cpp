/// Loader, compiler, cache, folder and launches, driven by stand-in libraries for NVRTC and the driver that are found
/// by LD_LIBRARY_PATH.
///     loader_test stand_in   with those that note what they are asked for
///     loader_test lacking    with some that lack functions
///     loader_test absent     with none; ends with 77 where the machine has a driver
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "free_transformer/detail/device/launch.hpp"
#include "stand_in/stand_in.hpp"

namespace {

using namespace free_transformer::detail;
using namespace free_transformer::detail::device;

int failures = 0;

void expect(int line, const char* what, bool holds, const std::string& seen = "") {
  if (holds) return;
  ++failures;
  std::printf("loader_test.cpp:%d: %s\n    %s\n", line, what, seen.c_str());
}
#define EXPECT(...) expect(__LINE__, #__VA_ARGS__, __VA_ARGS__)

bool has(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }

template <typename Library>
Library& controls(const char* library, const char* symbol) {
  return *static_cast<Library*>(dlsym(dlopen(library, RTLD_LAZY), symbol));
}
stand_in::Nvrtc& nvrtc() { return controls<stand_in::Nvrtc>("libnvrtc.so.13", stand_in::nvrtc_symbol); }
stand_in::Driver& driver() { return controls<stand_in::Driver>("libcuda.so.1", stand_in::driver_symbol); }

/// Both as at the start of the process.
void reset() {
  nvrtc() = stand_in::Nvrtc();
  driver() = stand_in::Driver();
}

const Place place{1, reinterpret_cast<void*>(0x1234)};

CrossEntropyJob job_of_rows() {
  CrossEntropyJob job{};
  job.columns = 32768;
  job.ignore_index = -100;
  return job;
}

std::string launch(KernelCache& cache, const Place& at = place) {
  return launch_cross_entropy_rows(job_of_rows(), Element::bfloat16, 7, at, cache);
}

template <typename Job>
bool was_given(const stand_in::Launch& launch, const Job& job) {
  return std::memcmp(launch.argument, &job, sizeof(job)) == 0;
}

void test_launches() {
  reset();
  KernelCache cache;
  CrossEntropyJob rows = job_of_rows();
  driver().argument_bytes = sizeof(rows);
  EXPECT(launch(cache).empty());
  const stand_in::Launch& first = driver().launches[0];
  EXPECT(std::string(first.kernel) == "cross_entropy_rows", first.kernel);
  EXPECT(first.grid[0] == 7 && first.grid[1] == 1 && first.grid[2] == 1);
  EXPECT(first.block[0] == 512 && first.block[1] == 1 && first.block[2] == 1 && first.shared_bytes == 0);
  EXPECT(first.stream == place.stream && was_given(first, rows));
  const std::string options = nvrtc().options;
  for (const char* option : {"-DELEMENT=2 ", "-DSOFTCAP=0 ", "-DSMOOTHING=0 ", "-DENTROPY=0 ", "--fmad=false ",
                             "--gpu-architecture=sm_80 "}) {
    EXPECT(has(options, option), options);
  }
  EXPECT(has(nvrtc().text, "cross_entropy_rows"));
  EXPECT(driver().devices_asked == 1 && driver().contexts_retained == 1 && nvrtc().alive == 0);

  EXPECT(launch(cache).empty());
  EXPECT(nvrtc().compilations == 1 && driver().launch_count == 2 && driver().modules_loaded == 1);
  float weights[1] = {};
  rows.class_weight = weights;
  EXPECT(launch_cross_entropy_rows(rows, Element::bfloat16, 7, place, cache).empty());
  EXPECT(nvrtc().compilations == 1);  // a weight of the target's class alone costs no element anything
  rows.label_smoothing = 0.1;
  rows.softcap = 30;
  rows.entropy = weights;
  EXPECT(launch_cross_entropy_rows(rows, Element::float32, 7, place, cache).empty());
  EXPECT(nvrtc().compilations == 2 && was_given(driver().launches[3], rows));
  for (const char* option : {"-DELEMENT=0 ", "-DSOFTCAP=1 ", "-DSMOOTHING=2 ", "-DENTROPY=1 "}) {
    EXPECT(has(nvrtc().options, option), nvrtc().options);
  }
  EXPECT(launch(cache, {2, nullptr}).empty());  // another device
  EXPECT(nvrtc().compilations == 3 && driver().devices_asked == 2 && driver().launches[4].stream == nullptr);
  EXPECT(launch_cross_entropy_rows(rows, Element::float32, 0, place, cache).empty());
  EXPECT(driver().launch_count == 5);  // no rows, no launch
}

void test_batch_launches() {
  reset();
  KernelCache cache;
  CrossEntropyBatchJob batch{};
  batch.rows = 8192;
  driver().argument_bytes = sizeof(batch);
  EXPECT(launch_cross_entropy_scales(batch, place, cache).empty());
  EXPECT(launch_cross_entropy_sums(batch, place, cache).empty());
  EXPECT(nvrtc().compilations == 1 && driver().launch_count == 2);  // one text has both
  EXPECT(std::string(driver().launches[0].kernel) == "cross_entropy_scales");
  EXPECT(std::string(driver().launches[1].kernel) == "cross_entropy_sums");
  EXPECT(driver().launches[1].grid[0] == 4 && driver().launches[1].block[0] == 256);
  EXPECT(was_given(driver().launches[1], batch));
}

void test_latent_launches() {
  double totals[2], sums[19];
  float gradient[16], penalty[1];
  for (const kernels::Hinge hinge :
       {kernels::Hinge::per_position, kernels::Hinge::per_bit, kernels::Hinge::batch_mean}) {
    reset();
    KernelCache cache;
    LatentJob job{};
    job.rows = 100000;
    job.totals = totals;
    job.sums = sums;
    driver().argument_bytes = sizeof(job);
    const auto launch_job = [&] { return launch_latent_kl(job, Element::float32, hinge, 16, place, cache); };
    EXPECT(launch_job().empty() && driver().launch_count == 1);  // no gradient: the sums say all
    job.gradient = gradient;
    job.penalty = penalty;
    EXPECT(launch_job().empty() && driver().launch_count == 3 && nvrtc().compilations == 1);
    EXPECT(has(nvrtc().options, "-DBITS=16 "), nvrtc().options);
    EXPECT(has(nvrtc().options, ("-DHINGE=" + std::to_string(static_cast<int>(hinge))).c_str()), nvrtc().options);
    LatentJob given[2];
    std::memcpy(&given[0], driver().launches[1].argument, sizeof(job));
    std::memcpy(&given[1], driver().launches[2].argument, sizeof(job));
    const std::string first = driver().launches[1].kernel;
    EXPECT(std::string(driver().launches[2].kernel) == "latent_kl_positions");
    EXPECT(given[1].gradient == gradient && given[1].penalty == penalty && given[1].scale == totals);
    if (hinge == kernels::Hinge::batch_mean) {
      EXPECT(first == "latent_kl_positions", first);
      EXPECT(given[0].sums == sums && !given[0].gradient && !given[0].penalty);
      EXPECT(!given[1].sums && given[1].mean_kl == totals + 1);
    } else {
      EXPECT(first == "latent_kl_scale", first);
      EXPECT(given[1].sums == sums);
    }
    job.sums = nullptr;  // a later backward
    job.scale = totals;
    EXPECT(launch_job().empty() && driver().launch_count == 4 && nvrtc().compilations == 1);
  }
}

/// Each call that fails says so by its name, leaves no context and no program behind, and is not tried again.
void test_failures() {
  for (const char* call :
       {"cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent",
        "cuCtxPushCurrent", "cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel"}) {
    reset();
    driver().failing = call;
    KernelCache cache;
    const std::string reason = launch(cache);
    const bool is_launch = std::strcmp(call, "cuLaunchKernel") == 0;
    EXPECT(has(reason, is_launch ? "cross_entropy_rows: an error of the stand-in (700)" : call), reason);
    EXPECT(launch(cache) == reason, call);
    EXPECT(nvrtc().compilations <= 1 && nvrtc().alive == 0 && driver().launch_count == 0, call);
    EXPECT(driver().pushed == driver().popped, call);
    if (std::strcmp(call, "cuModuleGetFunction") == 0) EXPECT(driver().modules_unloaded == 1);
    driver().failing = "";
    const bool is_tried_again = is_launch || std::strcmp(call, "cuCtxGetCurrent") == 0;
    EXPECT(launch(cache).empty() == is_tried_again, call);
  }
  for (const char* call : {"nvrtcCreateProgram", "nvrtcCompileProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"}) {
    reset();
    nvrtc().failing = call;
    KernelCache cache;
    const std::string reason = launch(cache);
    EXPECT(has(reason, "NVRTC could not compile cross_entropy with --gpu-architecture=sm_80: NVRTC_ERROR"), reason);
    if (std::strcmp(call, "nvrtcCompileProgram") == 0) EXPECT(has(reason, "a line of the log"), reason);
    EXPECT(launch(cache) == reason && nvrtc().compilations <= 1 && nvrtc().alive == 0, call);
    EXPECT(driver().pushed == driver().popped, call);
  }
  reset();
  nvrtc().makes_nothing = true;
  KernelCache cache;
  EXPECT(has(launch(cache), "NVRTC made nothing of cross_entropy"));
  reset();
  nvrtc().failing = "nvrtcGetProgramLogSize";  // no harm
  KernelCache without_log;
  EXPECT(launch(without_log).empty());
}

void test_architectures() {
  reset();
  driver().architecture = 120;
  KernelCache newer;
  EXPECT(launch(newer).empty());
  EXPECT(has(nvrtc().options, "--gpu-architecture=compute_90 "), nvrtc().options);
  EXPECT(std::strncmp(driver().binary, "ptx ", 4) == 0, driver().binary);
  reset();
  driver().architecture = 70;
  KernelCache older;
  EXPECT(launch(older) == "NVRTC 13.2 does not know the architecture sm_70", launch(older));
  reset();
  nvrtc().architecture_count = 0;
  KernelCache none;
  EXPECT(has(launch(none), "does not know the architecture sm_80"));
}

void test_contexts() {
  reset();
  KernelCache cache;
  EXPECT(launch(cache).empty());
  EXPECT(driver().pushed == 2 && driver().popped == 2);  // to load, and to launch
  void* context = nullptr;
  const auto retain =
      reinterpret_cast<int (*)(void**, int)>(dlsym(dlopen("libcuda.so.1", RTLD_LAZY), "cuDevicePrimaryCtxRetain"));
  retain(&context, 41);
  driver().current_context = context;
  EXPECT(launch(cache).empty());
  EXPECT(driver().pushed == 2 && driver().popped == 2);  // it is there already
  driver().current_context = nullptr;
  driver().failing = "cuLaunchKernel";
  EXPECT(!launch(cache).empty());
  EXPECT(driver().pushed == 3 && driver().popped == 3);
}

void test_graph_capture() {
  reset();
  KernelCache cache;
  driver().capture_status = 1;
  EXPECT(has(launch(cache), "run the loss once before"));
  EXPECT(nvrtc().compilations == 0 && driver().modules_loaded == 0 && driver().launch_count == 0);
  driver().capture_status = 0;
  EXPECT(launch(cache).empty() && nvrtc().compilations == 1);
  driver().capture_status = 1;
  EXPECT(launch(cache).empty() && nvrtc().compilations == 1 && driver().launch_count == 2);
}

std::string file_in(const std::string& folder) {
  std::FILE* const list = popen(("ls " + folder).c_str(), "r");
  char name[256] = "";
  if (std::fscanf(list, "%255s", name) != 1) name[0] = 0;
  pclose(list);
  return folder + "/" + name;
}

std::string content(const std::string& file) {
  std::string all(1 << 16, '\0');
  std::FILE* const stream = std::fopen(file.c_str(), "rb");
  all.resize(stream ? std::fread(all.data(), 1, all.size(), stream) : 0);
  if (stream) std::fclose(stream);
  return all;
}

void overwrite(const std::string& file, const std::string& all) {
  std::FILE* const stream = std::fopen(file.c_str(), "wb");
  std::fwrite(all.data(), 1, all.size(), stream);
  std::fclose(stream);
}

void test_folder() {
  std::string pattern = std::filesystem::temp_directory_path() / "free_transformer_kernels_XXXXXX";
  const std::string parent = mkdtemp(pattern.data()), folder = parent + "/kernels";
  const auto compilations_of_new_process = [&] {
    const int before = nvrtc().compilations;
    KernelCache cache;
    cache.keep_in_folder(folder);
    EXPECT(launch(cache).empty());
    return nvrtc().compilations - before;
  };
  reset();
  EXPECT(compilations_of_new_process() == 1);
  const std::string file = file_in(folder), good = content(file);
  EXPECT(has(file, "cross_entropy_sm_80_") && has(good, "cubin "), file);
  EXPECT(compilations_of_new_process() == 0);
  std::string turned = good;
  turned[good.size() - 3] ^= 1;
  std::string other_option = good;
  other_option.replace(good.find("-DELEMENT=2"), 11, "-DELEMENT=1");
  for (const std::string& bad : {std::string(), good.substr(0, 10), good.substr(0, good.size() - 1), turned,
                                 other_option, std::string(5000, 'x')}) {
    overwrite(file, bad);
    EXPECT(compilations_of_new_process() == 1, bad.substr(0, 100));
    EXPECT(content(file) == good);  // and as good as new
  }
  const std::string cubin = "cubin of another driver";
  overwrite(file, good.substr(0, good.find('\n') + 1) + hash_of(cubin) + "\n" + cubin);
  driver().refused = "another driver";
  EXPECT(compilations_of_new_process() == 1 && content(file) == good);

  nvrtc().failing = "nvrtcCompileProgram";  // what lies there needs no compiler
  EXPECT(compilations_of_new_process() == 0);
  nvrtc().failing = "";
  KernelCache unwritable;
  unwritable.keep_in_folder(file + "/not/a/folder");
  EXPECT(launch(unwritable).empty());
  EXPECT(std::system(("rm -r " + parent).c_str()) == 0);
}

/// Many threads that want the same and other kernels: each is compiled once, and all are launched.
void test_threads() {
  reset();
  KernelCache cache;
  constexpr int thread_count = 8, rounds = 20, variants = 6;
  std::vector<std::thread> threads;
  threads.reserve(thread_count);
  std::vector<int> failed(thread_count);
  for (int thread = 0; thread < thread_count; ++thread) {
    threads.emplace_back([&cache, &failed, thread] {
      for (int round = 0; round < rounds; ++round) {
        const int variant = (round + thread) % variants;
        CrossEntropyJob job = job_of_rows();
        job.softcap = variant < 3 ? 0 : 1;
        const auto element = static_cast<Element>(variant % 3);
        if (!launch_cross_entropy_rows(job, element, 4, place, cache).empty()) ++failed[static_cast<size_t>(thread)];
        kernels_are_wanted() = round % 2 == 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int count : failed) EXPECT(count == 0);
  EXPECT(nvrtc().compilations == variants, std::to_string(nvrtc().compilations));
  EXPECT(driver().launch_count == thread_count * rounds && driver().pushed == driver().popped);
}

int test_with_stand_in() {
  EXPECT(!kernels_are_wanted());  // as the environment of this test says
  test_launches();
  test_batch_launches();
  test_latent_launches();
  test_failures();
  test_architectures();
  test_contexts();
  test_graph_capture();
  test_folder();
  test_threads();
  return failures;
}

int test_without() {
  EXPECT(kernels_are_wanted());
  KernelCache cache;
  const std::string reason = launch(cache);
  EXPECT(reason == "the CUDA driver (libcuda.so.1) was not found", reason);
  EXPECT(launch(cache) == reason);
  return failures;
}

int test_lacking() {
  KernelCache cache;
  EXPECT(launch(cache) == "the CUDA driver lacks a function that the kernels need", launch(cache));
  Nvrtc lacking;
  EXPECT(load_nvrtc(lacking) == "NVRTC is older than 11.2");
  return failures;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string with = count > 1 ? arguments[1] : "";
  if (with == "stand_in") return test_with_stand_in();
  if (with == "lacking") return test_lacking();
  if (dlopen("libcuda.so.1", RTLD_LAZY)) return 77;
  return test_without();
}
