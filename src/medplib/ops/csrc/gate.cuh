// The gate on CUDA: one thread per token; sums of the statistics in two steps whose order is fixed.
//
// T tokens, E experts, K experts per token.
#pragma once

#include "pack.cuh"

namespace medplib {

constexpr int GATE_THREADS = 128;

template <class T>
struct GateTensors {
  const T* logits;
  const T* selection;
  const bool* mask;
  T* probabilities;
  int64_t* experts;
  T* weights;
  double* partial_sums;   // (blocks, E + 3), absent without statistics
  int64_t* partial_counts;  // (blocks, E)
};

// Sum the statistics of the block's tokens into its own row of the partial results.
template <class T>
__device__ void block_statistics(const GateShape& shape, const GateTensors<T>& at, int64_t token, bool counted) {
  constexpr int warps = GATE_THREADS / WARP;
  const int num_experts = shape.num_experts, columns = num_experts + 3;
  double* sums = shared_memory<double>();                       // (warps, E + 3)
  int* counts = reinterpret_cast<int*>(sums + warps * columns);  // (E,)
  for (int i = threadIdx.x; i < num_experts; i += GATE_THREADS) counts[i] = 0;
  __syncthreads();
  const int64_t row = counted ? token * num_experts : 0;
  TokenStatistics<T> own = {0, 0, 0};
  if (counted) own = token_statistics<T>(at.logits + row, at.probabilities + row, num_experts);
  for (int column = 0; column < columns; ++column) {
    double value = 0;
    if (counted) {
      if (column < num_experts) {
        value = at.probabilities[row + column];
      } else {
        value = column == num_experts ? own.entropy : column == num_experts + 1 ? own.margin : own.square;
      }
    }
    value = warp_sum(value);
    if (lane_index() == 0) sums[warp_index() * columns + column] = value;
  }
  for (int choice = 0; counted && choice < shape.k; ++choice) {
    atomicAdd(&counts[at.experts[token * shape.k + choice]], 1);  // whole numbers: any order gives the same
  }
  __syncthreads();
  for (int column = threadIdx.x; column < columns; column += GATE_THREADS) {
    double total = 0;
    for (int warp = 0; warp < warps; ++warp) total += sums[warp * columns + column];
    at.partial_sums[static_cast<int64_t>(blockIdx.x) * columns + column] = total;
    if (column < num_experts) {
      at.partial_counts[static_cast<int64_t>(blockIdx.x) * num_experts + column] = counts[column];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(GATE_THREADS) gate_kernel(GateShape shape, GateTensors<T> at) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * GATE_THREADS + threadIdx.x;
  const bool inside = token < shape.tokens;
  const bool hidden = inside && at.mask != nullptr && !at.mask[token];
  if (inside) {
    const int64_t row = token * shape.num_experts, choice = token * shape.k;
    gate_token<T>(
        shape, at.logits + row, at.selection + row, hidden, at.probabilities + row, at.experts + choice,
        at.weights + choice);
  }
  if (at.partial_sums != nullptr) block_statistics<T>(shape, at, token, inside && !hidden);
}

// One warp per column: add up the blocks' partial results, lane by lane, then over the lanes.
template <class T>
__global__ void gate_totals_kernel(
    const double* partial_sums, const int64_t* partial_counts, int blocks, int num_experts, T* sums,
    int64_t* counts) {
  const int column = blockIdx.x, columns = num_experts + 3;
  double sum = 0, count = 0;  // counts below 2^53 are exact
  for (int block = lane_index(); block < blocks; block += WARP) {
    sum += partial_sums[static_cast<int64_t>(block) * columns + column];
    if (column < num_experts) {
      count += static_cast<double>(partial_counts[static_cast<int64_t>(block) * num_experts + column]);
    }
  }
  sum = warp_sum(sum);
  count = warp_sum(count);
  if (lane_index() == 0) {
    sums[column] = static_cast<T>(sum);
    if (column < num_experts) counts[column] = static_cast<int64_t>(count);
  }
}

template <class T>
__global__ void __launch_bounds__(GATE_THREADS) gate_backward_kernel(
    GateShape shape, const T* grad_probabilities, const T* grad_weights, const T* probabilities,
    const int64_t* experts, T* grad_logits) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * GATE_THREADS + threadIdx.x;
  if (token >= shape.tokens) return;
  const int64_t row = token * shape.num_experts, choice = token * shape.k;
  gate_token_backward<T>(
      shape, grad_probabilities == nullptr ? nullptr : grad_probabilities + row,
      grad_weights == nullptr ? nullptr : grad_weights + choice, probabilities + row, experts + choice,
      grad_logits + row);
}

}  // namespace medplib
