#include "free_transformer/detail/autograd/process_wide.hpp"

#include <thread>
#include <vector>

#include "../catch.hpp"

namespace {

namespace losses = free_transformer::detail;

struct Number {
  int value = 3;
};

}  // namespace

TEST_CASE("All who ask for an object of the process get the same, whoever is first", "[process]") {
  std::vector<Number*> found(8);
  std::vector<std::thread> threads;
  threads.reserve(found.size());
  for (Number*& number : found) {
    threads.emplace_back([&number] { number = &losses::process_wide<Number>("number_of_this_test"); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Number* number : found) CHECK(number == found[0]);
  CHECK(found[0]->value == 3);
  auto& other = losses::process_wide<Number>("other_number_of_this_test");
  CHECK(&other != found[0]);
  other.value = 4;
  CHECK(losses::process_wide<Number>("other_number_of_this_test").value == 4);
  CHECK(found[0]->value == 3);
}
