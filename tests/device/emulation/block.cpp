/// The fibers that the threads of an emulated block are, and their turns.
#include "block.hpp"

namespace emulation {

Block block;

void Block::run_thread() {
  (*block.kernel_)();
  Fiber& fiber = block.fibers_[block.thread_];
  fiber.has_ended = true;
  block.progress_ = true;
  Barrier& of_warp = block.warps_[block.thread_ / 32].barrier;
  for (Barrier* barrier : {&block.barrier_, &of_warp}) {
    --barrier->alive;
    barrier->open_if_complete();
  }
  _longjmp(block.scheduler_, 1);
}

void Block::resume(unsigned thread) {
  thread_ = thread;
  threadIdx.x = thread;
  if (_setjmp(scheduler_) != 0) return;
  Fiber& fiber = fibers_[thread];
  if (fiber.has_started) _longjmp(fiber.state, 1);
  fiber.has_started = true;
  setcontext(&fiber.start);
}

void Block::prepare(Fiber& fiber) {
  fiber.has_started = fiber.has_ended = false;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = stack_bytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, &Block::run_thread, 0);
}

void Block::run_block(Order order) {
  const unsigned threads = blockDim.x;
  barrier_ = Barrier{0, threads, 0};
  for (unsigned warp = 0; warp < threads / 32; ++warp) warps_[warp].barrier = Barrier{0, 32, 0};
  for (unsigned thread = 0; thread < threads; ++thread) prepare(fibers_[thread]);
  do {
    progress_ = false;
    for (unsigned index = 0; index < threads; ++index) {
      const unsigned thread = order == Order::ascending ? index : threads - 1 - index;
      if (!fibers_[thread].has_ended) resume(thread);
    }
  } while (progress_);
  for (unsigned thread = 0; thread < threads; ++thread) {
    if (!fibers_[thread].has_ended) fail("a barrier or a shuffle waits for threads that never come");
  }
}

void Block::launch(unsigned blocks, unsigned threads, Order order, const std::function<void()>& kernel) {
  if (threads == 0 || threads % 32 != 0) fail("a block must be of whole warps");
  while (fibers_.size() < threads) {
    fibers_.emplace_back();
    fibers_.back().stack.reset(new char[stack_bytes]);
  }
  if (warps_.size() < threads / 32) warps_.resize(threads / 32);
  kernel_ = &kernel;
  blockDim.x = threads;
  gridDim.x = blocks;
  for (unsigned index = 0; index < blocks; ++index) {
    blockIdx.x = index;
    run_block(order);
  }
}

}  // namespace emulation
