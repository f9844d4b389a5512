// The gate's linear layer on CUDA, and its gradients: few experts, so the tokens are read once and not multiplied
// by a matrix library, which would first convert them to float32.
//
// T tokens, D width, E experts. X: type of the tokens, W: of the weight, P: of the sums (float or double).
#pragma once

#include "pack.cuh"

namespace medplib {

constexpr int LOGIT_THREADS = 256;
constexpr int LOGIT_WARPS = LOGIT_THREADS / WARP;
constexpr int LOGIT_EXPERTS = 8;   // experts per block, blockIdx.y counts these groups
constexpr int SLICE_EXPERTS = 4;   // the same for the weight's gradient

// A block takes ROWS tokens and up to EXPERTS experts; its threads split the width.
template <class X, class W, class P, int N, int ROWS, int EXPERTS>
__global__ void __launch_bounds__(LOGIT_THREADS) gate_logits_kernel(
    const X* tokens, const W* weight, P* logits, int64_t num_tokens, int num_experts, int64_t dim) {
  __shared__ P partial[LOGIT_WARPS][ROWS * EXPERTS];
  const int64_t first_token = static_cast<int64_t>(blockIdx.x) * ROWS;
  const int first_expert = blockIdx.y * EXPERTS;
  P sums[ROWS][EXPERTS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) sums[r][e] = 0;
  }
#pragma unroll 1  // the loads of one step are enough in flight; more steps would spill registers
  for (int64_t d = static_cast<int64_t>(threadIdx.x) * N; d < dim; d += LOGIT_THREADS * N) {
    Pack<X, N> x[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int64_t token = first_token + r < num_tokens ? first_token + r : num_tokens - 1;
      x[r] = load_pack<X, N>(tokens + token * dim + d);
    }
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) {
      if (first_expert + e >= num_experts) break;
      const Pack<W, N> w = load_pack<W, N>(weight + (first_expert + e) * dim + d);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
#pragma unroll
        for (int j = 0; j < N; ++j) sums[r][e] += x[r][j] * w[j];
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) {
      if (first_expert + e >= num_experts) break;  // the same for the whole block
      const P sum = warp_sum(sums[r][e]);
      if (lane_index() == 0) partial[warp_index()][r * EXPERTS + e] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < ROWS * EXPERTS; i += LOGIT_THREADS) {
    const int64_t token = first_token + i / EXPERTS;
    const int expert = first_expert + i % EXPERTS;
    if (token >= num_tokens || expert >= num_experts) continue;
    P sum = 0;
    for (int warp = 0; warp < LOGIT_WARPS; ++warp) sum += partial[warp][i];
    logits[token * num_experts + expert] = sum;
  }
}

// grad_tokens[t] = sum over e of grad[t, e] * weight[e]: a thread takes one pack of one token.
template <class X, class W, class P, int N>
__global__ void __launch_bounds__(LOGIT_THREADS) logits_token_gradient_kernel(
    const P* grad, const W* weight, X* grad_tokens, int64_t num_tokens, int num_experts, int64_t dim) {
  const int64_t packs = dim / N;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * LOGIT_THREADS + threadIdx.x;
  if (unit >= num_tokens * packs) return;
  const int64_t token = unit / packs, d = (unit - token * packs) * N;
  P sums[N];
#pragma unroll
  for (int j = 0; j < N; ++j) sums[j] = 0;
  for (int e = 0; e < num_experts; ++e) {
    const P g = grad[token * num_experts + e];
    const Pack<W, N> w = load_pack<W, N>(weight + e * dim + d);
#pragma unroll
    for (int j = 0; j < N; ++j) sums[j] += g * w[j];
  }
  Pack<X, N> out;
#pragma unroll
  for (int j = 0; j < N; ++j) out.set(j, sums[j]);
  store_pack<X, N>(grad_tokens + token * dim + d, out);
}

// partial[s, e] = sum over the tokens t of slice s of grad[t, e] * tokens[t]; blockIdx.y = slice * groups + group.
template <class X, class P, int N>
__global__ void __launch_bounds__(LOGIT_THREADS) logits_weight_partial_kernel(
    const P* grad, const X* tokens, P* partial, int64_t num_tokens, int num_experts, int64_t dim,
    int64_t slice_tokens, int groups) {
  const int64_t d = (static_cast<int64_t>(blockIdx.x) * LOGIT_THREADS + threadIdx.x) * N;
  if (d >= dim) return;
  const int slice = blockIdx.y / groups, first_expert = blockIdx.y % groups * SLICE_EXPERTS;
  const int64_t begin = slice * slice_tokens;
  const int64_t end = begin + slice_tokens < num_tokens ? begin + slice_tokens : num_tokens;
  P sums[SLICE_EXPERTS][N];
#pragma unroll
  for (int e = 0; e < SLICE_EXPERTS; ++e) {
#pragma unroll
    for (int j = 0; j < N; ++j) sums[e][j] = 0;
  }
#pragma unroll 4
  for (int64_t token = begin; token < end; ++token) {
    const Pack<X, N> x = load_pack<X, N>(tokens + token * dim + d);
#pragma unroll
    for (int e = 0; e < SLICE_EXPERTS; ++e) {
      const P g = first_expert + e < num_experts ? grad[token * num_experts + first_expert + e] : P(0);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[e][j] += g * x[j];
    }
  }
#pragma unroll
  for (int e = 0; e < SLICE_EXPERTS; ++e) {
    if (first_expert + e >= num_experts) break;
    P* to = partial + (static_cast<int64_t>(slice) * num_experts + first_expert + e) * dim + d;
#pragma unroll
    for (int j = 0; j < N; ++j) to[j] = sums[e][j];
  }
}

// grad_weight[i] = sum over the slices, in order.
template <class W, class P>
__global__ void logits_weight_total_kernel(const P* partial, W* grad_weight, int64_t numbers, int slices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= numbers) return;
  P sum = 0;
#pragma unroll 8
  for (int slice = 0; slice < slices; ++slice) sum += partial[slice * numbers + i];
  grad_weight[i] = static_cast<W>(sum);
}

}  // namespace medplib
