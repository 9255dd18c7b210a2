// The scheduler: a warp is 32 fibers, resumed in a shuffled order from one operation across lanes to the next.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, gridDim;

namespace emulation {

Settings settings;

namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;

// A suspended flow of control. ucontext makes it; setjmp, which saves no signal mask and so makes no system call, then changes
// between them at a tenth of the cost.
struct Flow {
  ucontext_t beginning;
  jmp_buf place;
  bool begun = true;
};

void lane_main();

void change(Flow& from, Flow& to) {
  if (_setjmp(from.place) != 0) return;
  if (to.begun) _longjmp(to.place, 1);
  to.begun = true;
  setcontext(&to.beginning);
}

// Runs one warp's kernel after another's.
struct Lane {
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  Flow flow;
  Operation operation;  // at which it waits
  unsigned mask;
  int argument;
  bool finished;

  Lane() {
    getcontext(&flow.beginning);
    flow.beginning.uc_stack.ss_sp = stack.get();
    flow.beginning.uc_stack.ss_size = kStackBytes;
    flow.beginning.uc_link = nullptr;
    makecontext(&flow.beginning, lane_main, 0);
    flow.begun = false;
  }
};

// One warp at a time, one launch at a time.
struct Warp {
  Lane lanes[kLanes];
  Flow scheduler;
  uint32_t brought[kLanes];    // to the operation at hand
  uint32_t exchanged[kLanes];  // by the operation before: what the resumed lanes read
  const std::function<void()>* kernel;
  int running;
  const void* scheduler_stack;
  size_t scheduler_stack_bytes;
};

std::unique_ptr<Warp> warp;

struct SharedMemory {
  void* memory;
  size_t bytes;
};
SharedMemory shared;

// What a block finds in shared memory is what another left there, or anything. AddressSanitizer keeps it to what it asked for.
void poison_shared_memory(size_t used) {
  if (used > shared.bytes) throw std::logic_error("more shared memory than there is: " + std::to_string(used));
  if (used == 0) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(shared.memory, shared.bytes);
#endif
  memset(shared.memory, 0xa5, used);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(static_cast<char*>(shared.memory) + used, shared.bytes - used);
#endif
}

// AddressSanitizer follows the stack that is in use, and has to be told of each change.
void start_switch(void** save, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

void finish_switch(void* saved, const void** from, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, from, bytes);
#else
  (void)saved, (void)from, (void)bytes;
#endif
}

// From a lane back to the scheduler, until the lane is resumed.
void suspend(Lane& lane) {
  void* saved = nullptr;
  start_switch(&saved, warp->scheduler_stack, warp->scheduler_stack_bytes);
  change(lane.flow, warp->scheduler);
  finish_switch(saved, &warp->scheduler_stack, &warp->scheduler_stack_bytes);
}

void lane_main() {
  finish_switch(nullptr, &warp->scheduler_stack, &warp->scheduler_stack_bytes);
  Lane& lane = warp->lanes[warp->running];
  for (;;) {
    (*warp->kernel)();
    lane.finished = true;
    suspend(lane);
  }
}

void resume(int lane, unsigned first_thread) {
  warp->running = lane;
  threadIdx.x = first_thread + unsigned(lane);
  Lane& resumed = warp->lanes[lane];
  resumed.operation = Operation::kNone;
  void* saved = nullptr;
  start_switch(&saved, resumed.stack.get(), kStackBytes);
  change(warp->scheduler, resumed.flow);
  finish_switch(saved, nullptr, nullptr);
}

[[noreturn]] void report(int lane, const char* what) {
  const char* names[] = {"nothing", "a shuffle", "a xor shuffle", "a ballot", "a maximum", "a sum", "a barrier"};
  auto describe = [&](int number) {
    const Lane& at = warp->lanes[number];
    return "lane " + std::to_string(number) + " is at " + (at.finished ? "the end" : names[int(at.operation)]) + " (" +
           std::to_string(at.argument) + ")";
  };
  std::string message =
      "block " + std::to_string(blockIdx.x) + ": " + what + ": " + describe(0) + ", " + describe(lane);
  warp.reset();  // its lanes stand in the midst of a kernel
  throw std::logic_error(message);
}

void run_warp(unsigned first_thread, const std::function<void()>& kernel, std::mt19937_64& random) {
  warp->kernel = &kernel;
  for (Lane& lane : warp->lanes) {
    lane.finished = false;
    lane.argument = 0;
  }
  int order[kLanes];
  std::iota(order, order + kLanes, 0);
  while (true) {
    std::shuffle(order, order + kLanes, random);
    for (int lane : order) resume(lane, first_thread);
    const Lane& first = warp->lanes[0];
    for (int i = 0; i < kLanes; ++i) {
      const Lane& lane = warp->lanes[i];
      if (lane.finished != first.finished || lane.operation != first.operation || lane.argument != first.argument) {
        report(i, "the lanes of a warp part ways");
      }
      if (!lane.finished && lane.mask != 0xffffffffu) report(i, "an operation of fewer than 32 lanes");
    }
    if (first.finished) return;
    memcpy(warp->exchanged, warp->brought, sizeof warp->brought);
  }
}

}  // namespace

int lane() { return warp->running; }

const uint32_t* exchange(Operation operation, unsigned mask, int argument, uint32_t value) {
  Lane& lane = warp->lanes[warp->running];
  lane.operation = operation;
  lane.mask = mask;
  lane.argument = argument;
  warp->brought[warp->running] = value;
  suspend(lane);
  return warp->exchanged;
}

void set_shared_memory(void* memory, size_t bytes) { shared = {memory, bytes}; }

void run_grid(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (!warp) warp = std::make_unique<Warp>();
  std::mt19937_64 random(settings.seed);
  std::vector<unsigned> order(blocks * (threads / kLanes));
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  gridDim.x = blocks;
  for (unsigned number : order) {
    blockIdx.x = number * kLanes / threads;
    poison_shared_memory(shared_bytes);
    run_warp(number * kLanes % threads, kernel, random);
  }
}

}  // namespace emulation
