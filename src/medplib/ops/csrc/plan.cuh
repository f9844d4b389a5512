// Ordering assignments by expert on CUDA, and dropping what exceeds a capacity. Stable and without float sums.
//
// T tokens, E experts, K experts per token, n = T*K assignments, B = E + 1 buckets (the last: dropped).
//
// A tile is TILE assignments in order. An assignment's rank in its bucket is the number of earlier ones there:
// those of earlier tiles, of earlier warps of its tile, of earlier lanes of its warp.
#pragma once

#include "pack.cuh"

namespace medplib {

constexpr int TILE = 1024;
constexpr int TILE_WARPS = TILE / WARP;
constexpr int MOST_TILES = 8;  // up to here one block does it all

struct PlanShape {
  int64_t n, tokens;
  int num_experts;
  int k;
  int64_t capacity;  // of drop alone
};

struct PlanTensors {
  const int64_t* experts;
  int64_t* order;
  int64_t* position;
  int64_t* counts;
  int* ends;
  int64_t* kept;     // of drop alone; the four above of plan alone
  int* tile_counts;  // (tiles, B), with several blocks
};

// Plan takes assignments as numbered; drop takes all first choices, then all second ones.
template <bool DROP>
__device__ __forceinline__ int64_t assignment_of(int64_t item, const PlanShape& shape) {
  return DROP ? item % shape.tokens * shape.k + item / shape.tokens : item;
}

template <bool DROP>
__device__ __forceinline__ int bucket_at(int64_t item, const PlanShape& shape, const PlanTensors& at) {
  if (item >= shape.n) return -1;
  return static_cast<int>(bucket_of(at.experts[assignment_of<DROP>(item, shape)], shape.num_experts));
}

// The rank of this thread's bucket within the tile; totals (B,) gets the tile's counts. counts: (TILE_WARPS, B).
__device__ inline int tile_rank(int bucket, int buckets, int* counts, int* totals) {
  const int lane = lane_index(), warp = warp_index();
  for (int i = threadIdx.x; i < TILE_WARPS * buckets; i += TILE) counts[i] = 0;
  __syncthreads();
  const unsigned peers = __match_any_sync(FULL, bucket);
  const int before = __popc(peers & ((1u << lane) - 1u));
  if (bucket >= 0 && before == 0) counts[warp * buckets + bucket] = __popc(peers);
  __syncthreads();
  for (int b = warp; b < buckets; b += TILE_WARPS) {  // lanes stand for warps: an exclusive scan over them
    const int own = counts[lane * buckets + b];
    int sum = own;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
      const int other = __shfl_up_sync(FULL, sum, offset);
      if (lane >= offset) sum += other;
    }
    counts[lane * buckets + b] = sum - own;
    if (lane == WARP - 1) totals[b] = sum;
  }
  __syncthreads();
  return bucket < 0 ? 0 : counts[warp * buckets + bucket] + before;
}

// Where one assignment goes, once the rows before its bucket and its rank in the bucket are known.
template <bool DROP>
__device__ __forceinline__ void place(
    int64_t item, int bucket, int64_t start, int64_t rank, const PlanShape& shape, const PlanTensors& at) {
  if (bucket < 0) return;
  const int64_t assignment = assignment_of<DROP>(item, shape);
  const bool served = bucket < shape.num_experts;
  if (DROP) {
    at.kept[assignment] = rank < shape.capacity ? bucket : shape.num_experts;
  } else {
    at.order[start + rank] = served ? assignment : -1;
    at.position[assignment] = served ? start + rank : -1;
  }
}

// starts (B,) from totals (B,); one thread, B is small. The first block also writes counts and ends.
template <bool DROP>
__device__ inline void starts_of(
    const int* totals, int* starts, const PlanShape& shape, const PlanTensors& at, bool write) {
  int sum = 0;
  for (int b = 0; b <= shape.num_experts; ++b) {
    starts[b] = sum;
    sum += totals[b];
    if (!DROP && write && b < shape.num_experts) {
      at.counts[b] = totals[b];
      at.ends[b] = sum;
    }
  }
}

// All tiles in one block, MOST_TILES at most: count, then place. Every thread reads its assignments at the beginning,
// all at once, since one read after another would take longer than the rest.
template <bool DROP>
__global__ void __launch_bounds__(TILE) plan_one_block_kernel(PlanShape shape, PlanTensors at) {
  const int buckets = shape.num_experts + 1;
  int* counts = shared_memory<int>();          // (TILE_WARPS, B)
  int* totals = counts + TILE_WARPS * buckets;  // (B,)
  int* starts = totals + buckets;               // (B,)
  int* seen = starts + buckets;                 // (B,) in earlier tiles
  for (int b = threadIdx.x; b < buckets; b += TILE) seen[b] = 0;
  int held[MOST_TILES];
#pragma unroll
  for (int tile = 0; tile < MOST_TILES; ++tile) held[tile] = bucket_at<DROP>(tile * TILE + threadIdx.x, shape, at);
  if (!DROP) {
    __syncthreads();
#pragma unroll
    for (int tile = 0; tile < MOST_TILES; ++tile) {
      if (tile * TILE >= shape.n) break;  // the same for the whole block
      const unsigned peers = __match_any_sync(FULL, held[tile]);
      if (held[tile] >= 0 && (peers & ((1u << lane_index()) - 1u)) == 0) atomicAdd(&seen[held[tile]], __popc(peers));
    }
    __syncthreads();
    if (threadIdx.x == 0) starts_of<DROP>(seen, starts, shape, at, true);
    __syncthreads();
    for (int b = threadIdx.x; b < buckets; b += TILE) seen[b] = 0;
  }
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < MOST_TILES; ++tile) {
    if (tile * TILE >= shape.n) break;
    const int64_t item = tile * TILE + threadIdx.x;
    const int bucket = held[tile];
    const int rank = tile_rank(bucket, buckets, counts, totals);
    if (bucket >= 0) place<DROP>(item, bucket, DROP ? 0 : starts[bucket], seen[bucket] + rank, shape, at);
    __syncthreads();
    for (int b = threadIdx.x; b < buckets; b += TILE) seen[b] += totals[b];
    __syncthreads();
  }
}

// Several blocks, first pass: each tile's counts.
template <bool DROP>
__global__ void __launch_bounds__(TILE) plan_count_kernel(PlanShape shape, PlanTensors at) {
  const int buckets = shape.num_experts + 1;
  int* totals = shared_memory<int>();  // (B,)
  for (int b = threadIdx.x; b < buckets; b += TILE) totals[b] = 0;
  __syncthreads();
  const int bucket = bucket_at<DROP>(static_cast<int64_t>(blockIdx.x) * TILE + threadIdx.x, shape, at);
  const unsigned peers = __match_any_sync(FULL, bucket);
  if (bucket >= 0 && (peers & ((1u << lane_index()) - 1u)) == 0) atomicAdd(&totals[bucket], __popc(peers));
  __syncthreads();
  for (int b = threadIdx.x; b < buckets; b += TILE) {
    at.tile_counts[static_cast<int64_t>(blockIdx.x) * buckets + b] = totals[b];
  }
}

// Second pass: every block adds up the tiles before its own, and all, then places its tile.
template <bool DROP>
__global__ void __launch_bounds__(TILE) plan_place_kernel(PlanShape shape, PlanTensors at) {
  const int buckets = shape.num_experts + 1;
  const int tiles = gridDim.x, tile = blockIdx.x;
  int* counts = shared_memory<int>();          // (TILE_WARPS, B)
  int* totals = counts + TILE_WARPS * buckets;  // (B,) of this tile
  int* starts = totals + buckets;               // (B,)
  int* seen = starts + buckets;                 // (B,) in earlier tiles
  int* all = seen + buckets;                    // (B,)
  for (int b = warp_index(); b < buckets; b += TILE_WARPS) {
    int before = 0, sum = 0;
    for (int other = lane_index(); other < tiles; other += WARP) {
      const int count = at.tile_counts[static_cast<int64_t>(other) * buckets + b];
      sum += count;
      if (other < tile) before += count;
    }
    before = warp_sum(before);
    sum = warp_sum(sum);
    if (lane_index() == 0) {
      seen[b] = before;
      all[b] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) starts_of<DROP>(all, starts, shape, at, tile == 0);
  const int64_t item = static_cast<int64_t>(tile) * TILE + threadIdx.x;
  const int bucket = bucket_at<DROP>(item, shape, at);
  const int rank = tile_rank(bucket, buckets, counts, totals);  // synchronises the block
  if (bucket >= 0) {
    place<DROP>(item, bucket, DROP ? 0 : starts[bucket], static_cast<int64_t>(seen[bucket]) + rank, shape, at);
  }
}

constexpr int DROP_THREADS = 256;

// Drop by priority: an assignment's rank is the number of better ones of its expert, counted one by one.
template <class T>
__global__ void __launch_bounds__(DROP_THREADS) drop_by_key_kernel(
    PlanShape shape, const int64_t* experts, const T* priority, const int64_t* seed, int64_t* kept) {
  __shared__ int64_t keys[DROP_THREADS];
  __shared__ int buckets[DROP_THREADS];
  const auto key_at = [&](int64_t assignment) {
    return priority == nullptr ? counter_hash(*seed, assignment) : order_key(priority[assignment]);
  };
  const int64_t item = static_cast<int64_t>(blockIdx.x) * DROP_THREADS + threadIdx.x;
  const bool inside = item < shape.n;
  const int64_t assignment = inside ? assignment_of<true>(item, shape) : 0;
  const int bucket = inside ? static_cast<int>(bucket_of(experts[assignment], shape.num_experts)) : -1;
  const int64_t key = inside ? key_at(assignment) : 0;
  int64_t rank = 0;
  for (int64_t first = 0; first < shape.n; first += DROP_THREADS) {
    const int64_t other = first + threadIdx.x;
    __syncthreads();
    buckets[threadIdx.x] = -2;
    if (other < shape.n) {
      const int64_t theirs = assignment_of<true>(other, shape);
      buckets[threadIdx.x] = static_cast<int>(bucket_of(experts[theirs], shape.num_experts));
      keys[threadIdx.x] = key_at(theirs);
    }
    __syncthreads();
    for (int i = 0; i < DROP_THREADS; ++i) {
      if (buckets[i] == bucket && (keys[i] > key || (keys[i] == key && first + i < item))) ++rank;
    }
  }
  if (inside) kept[assignment] = rank < shape.capacity ? bucket : shape.num_experts;
}

static __global__ void counter_bits_kernel(const int64_t* seed, int64_t* bits, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) bits[i] = counter_hash(*seed, i);
}

}  // namespace medplib
