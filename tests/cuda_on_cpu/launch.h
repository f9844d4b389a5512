// Stands in for csrc/launch.cuh and runs the CUDA kernels on the CPU, thread by thread, where there is no GPU.
//
// Every CUDA thread of a block is a fiber with a stack of its own. At __syncthreads and at the warp intrinsics it
// gives way to the others until all have come. What a GPU would answer with a wrong result or a hang is an error here:
// a warp intrinsic that some lanes of the warp do not take part in, a barrier that some threads never reach,
// more shared memory or a larger block than a device has. MEDPLIB_EMULATED_ORDER=backward runs blocks and threads
// last first, which changes the result of what depends on their order. The memory model and speed are not
// imitated.
#pragma once
#define MEDPLIB_LAUNCH_CUH
#define MEDPLIB_DEVICE_KEY CPU

#include "common.h"

#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <ucontext.h>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

constexpr int LANES = 32;
constexpr size_t STACK = 64 << 10;
constexpr size_t MOST_SHARED = 163 << 10;  // of sm_80; sm_90 has more

struct Slot {
  const char* kind = nullptr;
  uint64_t bits = 0;
};

struct Warp {
  Slot slots[2][LANES];  // of the latest two intrinsics, since a lane may come to the next before others leave
  int64_t arrivals = 0;
};

struct Fiber {  // begun once, by ucontext, then moved to and fro by jumps, which call no kernel of the system
  ucontext_t beginning = {};
  jmp_buf place = {};
  std::unique_ptr<char[]> stack;
  dim3 thread;
  Warp* warp = nullptr;
  int lane = 0;
  int64_t warp_calls = 0, block_calls = 0;
  bool done = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  int threads = 0;
  int64_t arrivals = 0;
  jmp_buf scheduler = {};
  std::function<void()> body;
};

inline Block block;
inline Fiber* current = nullptr;
inline dim3 block_index, block_size, grid_size;
inline std::vector<uint4> shared;

inline void give_way() {
  if (_setjmp(current->place) == 0) _longjmp(block.scheduler, 1);
}

inline void enter() {
  for (;;) {  // one pass per block of a grid
    block.body();
    current->done = true;
    give_way();
  }
}

__attribute__((noinline)) inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(block.scheduler) != 0) return;
  if (fiber.stack) _longjmp(fiber.place, 1);
  fiber.stack.reset(new char[STACK]);
  getcontext(&fiber.beginning);
  fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
  fiber.beginning.uc_stack.ss_size = STACK;
  makecontext(&fiber.beginning, enter, 0);
  setcontext(&fiber.beginning);
}

inline bool may_run(const Fiber& fiber) {
  return !fiber.done && fiber.warp->arrivals >= LANES * fiber.warp_calls &&
      block.arrivals >= block.threads * fiber.block_calls;
}

inline void prepare(int threads) {
  block.threads = threads;
  block.arrivals = 0;
  block.warps.assign(threads / LANES, Warp());
  if (block.fibers.empty()) block.fibers = std::vector<Fiber>(1024);  // fibers do not move in memory
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.thread = dim3(i);
    fiber.warp = &block.warps[i / LANES];
    fiber.lane = i % LANES;
    fiber.warp_calls = fiber.block_calls = 0;
    fiber.done = false;
  }
}

inline void run_block(int threads, bool backward) {
  prepare(threads);
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < threads; ++i) {
      Fiber& fiber = block.fibers[backward ? threads - 1 - i : i];
      if (!may_run(fiber)) continue;
      resume(fiber);
      moved = true;
    }
  }
  for (int i = 0; i < threads; ++i) {
    if (block.fibers[i].done) continue;
    block.fibers.clear();
    throw std::runtime_error("emulated CUDA: a barrier that some threads never reach");
  }
}

// The bits that every lane of the warp gave to this intrinsic.
inline const Slot* exchange(const char* kind, uint64_t bits) {
  Fiber& fiber = *current;
  Slot* slots = fiber.warp->slots[fiber.warp_calls % 2];
  slots[fiber.lane] = {kind, bits};
  ++fiber.warp_calls;
  ++fiber.warp->arrivals;
  give_way();
  for (int lane = 0; lane < LANES; ++lane) {
    if (std::strcmp(slots[lane].kind, kind) != 0) {
      std::fprintf(stderr, "emulated CUDA: lanes of one warp are at %s and %s\n", kind, slots[lane].kind);
      std::abort();
    }
  }
  return slots;
}

template <class T>
uint64_t to_bits(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulated

#define threadIdx (emulated::current->thread)
#define blockIdx (emulated::block_index)
#define blockDim (emulated::block_size)
#define gridDim (emulated::grid_size)

inline void __syncthreads() {
  ++emulated::current->block_calls;
  ++emulated::block.arrivals;
  emulated::give_way();
}

inline void __syncwarp() { emulated::exchange("syncwarp", 0); }

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const auto* slots = emulated::exchange("shfl_xor", emulated::to_bits(value));
  return emulated::from_bits<T>(slots[emulated::current->lane ^ mask].bits);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int offset) {
  const auto* slots = emulated::exchange("shfl_up", emulated::to_bits(value));
  const int from = emulated::current->lane - offset;
  return from < 0 ? value : emulated::from_bits<T>(slots[from].bits);
}

inline unsigned __ballot_sync(unsigned, bool value) {
  const auto* slots = emulated::exchange("ballot", value);
  unsigned found = 0;
  for (int lane = 0; lane < emulated::LANES; ++lane) found |= static_cast<unsigned>(slots[lane].bits) << lane;
  return found;
}

inline unsigned __match_any_sync(unsigned, int value) {
  const uint64_t own = emulated::to_bits(value);
  const auto* slots = emulated::exchange("match_any", own);
  unsigned found = 0;
  for (int lane = 0; lane < emulated::LANES; ++lane) found |= static_cast<unsigned>(slots[lane].bits == own) << lane;
  return found;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline int atomicAdd(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}

namespace medplib {

class Launcher {
 public:
  explicit Launcher(const Tensor&) {}

  template <class... Parameters, class... Arguments>
  void operator()(
      void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0) return;
    STD_TORCH_CHECK(threads % emulated::LANES == 0 && threads <= 1024, "emulated CUDA: ", threads, " threads");
    STD_TORCH_CHECK(shared_bytes <= emulated::MOST_SHARED, "emulated CUDA: ", shared_bytes, " bytes of shared memory");
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const char* order = std::getenv("MEDPLIB_EMULATED_ORDER");
    const bool backward = order != nullptr && std::string(order) == "backward";
    emulated::block_size = dim3(threads);
    emulated::grid_size = grid;
    emulated::block.body = [&] { kernel(static_cast<Parameters>(arguments)...); };
    const int64_t blocks = static_cast<int64_t>(grid.x) * grid.y;
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t index = backward ? blocks - 1 - i : i;
      emulated::block_index = dim3(static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x));
      emulated::shared.assign(shared_bytes / sizeof(uint4) + 1, uint4{~0u, 0xa5a5a5a5u, ~0u, 0xa5a5a5a5u});
      emulated::run_block(threads, backward);
    }
  }
};

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulated::shared.data());
}

inline uint4 load_streaming(const uint4* from) { return *from; }
inline void store_kept(uint4* to, uint4 value) { *to = value; }
inline void store_streaming(uint4* to, uint4 value) { *to = value; }

}  // namespace medplib
