// SwiGLU on CUDA, and the whole feed-forward of few tokens, which reads the chosen experts' weights once.
//
// T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments.
#pragma once

#include "pack.cuh"

namespace medplib {

constexpr int FFN_THREADS = 256;
constexpr int FFN_WARPS = FFN_THREADS / WARP;

template <class P>
__device__ __forceinline__ P silu(P x) {
  return x / (P(1) + exponential(-x));
}

template <class T, int N>
__global__ void __launch_bounds__(FFN_THREADS) swiglu_kernel(const T* gate_up, T* out, int64_t rows, int64_t packs) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * FFN_THREADS + threadIdx.x;
  if (unit >= rows * packs) return;
  const int64_t row = unit / packs, pack = unit - row * packs;
  const T* from = gate_up + (2 * row * packs + pack) * N;
  const Pack<T, N> gate = load_pack<T, N>(from), up = load_pack<T, N>(from + packs * N);
  Pack<T, N> result;
#pragma unroll
  for (int j = 0; j < N; ++j) result.set(j, silu(gate[j]) * up[j]);
  store_pack<T, N>(out + unit * N, result);
}

template <class T, int N>
__global__ void __launch_bounds__(FFN_THREADS) swiglu_backward_kernel(
    const T* grad, const T* gate_up, T* out, int64_t rows, int64_t packs) {
  using P = precise_t<T>;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * FFN_THREADS + threadIdx.x;
  if (unit >= rows * packs) return;
  const int64_t row = unit / packs, pack = unit - row * packs;
  const int64_t first = (2 * row * packs + pack) * N, second = first + packs * N;
  const Pack<T, N> above = load_pack<T, N>(grad + unit * N);
  const Pack<T, N> gate = load_pack<T, N>(gate_up + first), up = load_pack<T, N>(gate_up + second);
  Pack<T, N> grad_gate, grad_up;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const P g = gate[j], u = up[j], dy = above[j];
    const P sigmoid = P(1) / (P(1) + exponential(-g));
    grad_gate.set(j, dy * u * sigmoid * (P(1) + g * (P(1) - sigmoid)));
    grad_up.set(j, dy * g * sigmoid);
  }
  store_pack<T, N>(out + first, grad_gate);
  store_pack<T, N>(out + second, grad_up);
}

// Which of up to DECODE_MAX assignments chose an expert: each lane holds one in WARP, every warp on its own.
constexpr int DECODE_WORDS = 4;
constexpr int DECODE_MAX = DECODE_WORDS * WARP;

struct Members {
  int64_t held[DECODE_WORDS];
  unsigned words[DECODE_WORDS];

  __device__ Members(const int64_t* experts, int n) {
#pragma unroll
    for (int word = 0; word < DECODE_WORDS; ++word) {
      const int assignment = word * WARP + lane_index();
      held[word] = assignment < n ? experts[assignment] : -1;
      words[word] = 0;
    }
  }

  // Select those of one expert; false if there are none.
  __device__ bool select(int64_t expert) {
    unsigned any = 0;
#pragma unroll
    for (int word = 0; word < DECODE_WORDS; ++word) {
      words[word] = __ballot_sync(FULL, held[word] == expert);
      any |= words[word];
    }
    return any != 0;
  }

  // The number of the first selected one.
  __device__ int first() const {
#pragma unroll
    for (int word = 0; word < DECODE_WORDS; ++word) {
      if (words[word] != 0) return word * WARP + __ffs(static_cast<int>(words[word])) - 1;
    }
    return DECODE_MAX;
  }

  // Take up to COUNT of the selected ones out; returns how many.
  template <int COUNT>
  __device__ int take(int (&taken)[COUNT]) {
    int count = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) taken[i] = 0;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
#pragma unroll
      for (int word = 0; word < DECODE_WORDS; ++word) {
        if (count == i && words[word] != 0) {
          taken[i] = word * WARP + __ffs(static_cast<int>(words[word])) - 1;
          words[word] &= words[word] - 1;
          ++count;
        }
      }
    }
    return count;
  }
};

constexpr int DECODE_UNROLL = 4;

// hidden[a, h] = silu(gate . x) * (up . x) of the expert of assignment a. A warp takes one h of one expert: with as
// many blockIdx.y as experts, of expert blockIdx.y, if anybody chose it; with fewer, one per assignment, of the
// expert of that assignment, if it is the first to choose it. So few blocks are started in vain.
template <class T, int N, int COUNT>
__global__ void __launch_bounds__(FFN_THREADS, 2) decode_hidden_kernel(
    const T* tokens, const int64_t* experts, const T* gate_up, T* hidden, int n, int k, int num_experts, int64_t dim,
    int64_t hidden_dim) {
  using P = precise_t<T>;
  const int64_t h = static_cast<int64_t>(blockIdx.x) * FFN_WARPS + warp_index();
  const bool by_expert = static_cast<int>(gridDim.y) == num_experts;
  const int64_t expert = by_expert ? static_cast<int64_t>(blockIdx.y) : experts[blockIdx.y];
  if (h >= hidden_dim || bucket_of(expert, num_experts) == num_experts) return;
  Members members(experts, n);
  if (!members.select(expert) || (!by_expert && members.first() != static_cast<int>(blockIdx.y))) return;
  const T* gate_row = gate_up + (2 * expert * hidden_dim + h) * dim;
  const T* up_row = gate_row + hidden_dim * dim;
  const int64_t packs = dim / N;
  int taken[COUNT];
  while (const int count = members.take<COUNT>(taken)) {
    P gates[COUNT], ups[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) gates[m] = ups[m] = 0;
    for (int64_t first = lane_index(); first < packs; first += WARP * DECODE_UNROLL) {
      Pack<T, N> gate[DECODE_UNROLL], up[DECODE_UNROLL];
#pragma unroll
      for (int i = 0; i < DECODE_UNROLL; ++i) {
        const int64_t pack = first + i * WARP;
        if (pack >= packs) continue;
        gate[i] = load_pack<T, N>(gate_row + pack * N, true);
        up[i] = load_pack<T, N>(up_row + pack * N, true);
      }
#pragma unroll
      for (int i = 0; i < DECODE_UNROLL; ++i) {
        const int64_t pack = first + i * WARP;
        if (pack >= packs) continue;
#pragma unroll
        for (int m = 0; m < COUNT; ++m) {
          if (m >= count) continue;
          const Pack<T, N> x = load_pack<T, N>(tokens + taken[m] / k * dim + pack * N);
#pragma unroll
          for (int j = 0; j < N; ++j) {
            gates[m] += gate[i][j] * x[j];
            ups[m] += up[i][j] * x[j];
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < COUNT; ++m) {
      const P gate = warp_sum(gates[m]), up = warp_sum(ups[m]);
      if (m < count && lane_index() == 0) hidden[taken[m] * hidden_dim + h] = static_cast<T>(silu(gate) * up);
    }
  }
}

template <class T>
struct DecodeTensors {
  const T* hidden;
  const int64_t* experts;
  const precise_t<T>* weights;
  const T* down;
  const T* residual;  // may be absent
  T* out;
  int tokens, k, num_experts;
  int64_t dim, hidden_dim;
};

// out[t, d] = sum over k, in order, of weight * (down row d . hidden), plus residual. A warp takes one d and goes
// through the experts that were chosen.
template <class T, int N, int COUNT>
__global__ void __launch_bounds__(FFN_THREADS, 2) decode_down_kernel(DecodeTensors<T> given) {
  using P = precise_t<T>;
  __shared__ P answers[FFN_WARPS][DECODE_MAX];
  const int64_t d = static_cast<int64_t>(blockIdx.x) * FFN_WARPS + warp_index();
  if (d >= given.dim) return;
  P* own = answers[warp_index()];
  const int64_t packs = given.hidden_dim / N;
  Members members(given.experts, given.tokens * given.k);
  for (int expert = 0; expert < given.num_experts; ++expert) {
    if (!members.select(expert)) continue;
    const T* row = given.down + (static_cast<int64_t>(expert) * given.dim + d) * given.hidden_dim;
    int taken[COUNT];
    while (const int count = members.take<COUNT>(taken)) {
      P sums[COUNT];
#pragma unroll
      for (int m = 0; m < COUNT; ++m) sums[m] = 0;
      for (int64_t first = lane_index(); first < packs; first += WARP * DECODE_UNROLL) {
        Pack<T, N> w[DECODE_UNROLL];
#pragma unroll
        for (int i = 0; i < DECODE_UNROLL; ++i) {
          const int64_t pack = first + i * WARP;
          if (pack < packs) w[i] = load_pack<T, N>(row + pack * N, true);
        }
#pragma unroll
        for (int i = 0; i < DECODE_UNROLL; ++i) {
          const int64_t pack = first + i * WARP;
          if (pack >= packs) continue;
#pragma unroll
          for (int m = 0; m < COUNT; ++m) {
            if (m >= count) continue;
            const Pack<T, N> x = load_pack<T, N>(given.hidden + taken[m] * given.hidden_dim + pack * N);
#pragma unroll
            for (int j = 0; j < N; ++j) sums[m] += w[i][j] * x[j];
          }
        }
      }
#pragma unroll
      for (int m = 0; m < COUNT; ++m) {
        const P sum = warp_sum(sums[m]);
        if (m < count && lane_index() == 0) own[taken[m]] = sum;
      }
    }
  }
  __syncwarp();
  for (int token = lane_index(); token < given.tokens; token += WARP) {
    P total = 0;
    for (int choice = 0; choice < given.k; ++choice) {
      const int assignment = token * given.k + choice;
      const int64_t expert = given.experts[assignment];
      P term = 0;
      if (expert >= 0 && expert < given.num_experts) term = times(own[assignment], given.weights[assignment]);
      total = choice == 0 ? term : plus(total, term);
    }
    if (given.residual != nullptr) total = plus(total, P(given.residual[token * given.dim + d]));
    given.out[token * given.dim + d] = static_cast<T>(total);
  }
}

}  // namespace medplib
