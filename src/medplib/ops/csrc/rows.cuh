// Moving rows between token order and expert order on CUDA: permute, combine, and their gradients.
//
// T tokens, D width, K experts per token, R rows. All of it is bound by memory: a warp takes a stretch of one row,
// 16 bytes per lane, and has several loads under way before the first store. Sums run over the choices in order,
// products and sums are not fused, so the bits are those of the CPU.
#pragma once

#include "pack.cuh"

namespace medplib {

constexpr int ROW_THREADS = 256;
constexpr int ROW_WARPS = ROW_THREADS / WARP;
constexpr int COPY_UNROLL = 8;
constexpr int SUM_UNROLL = 2;

// Which stretch of which row this warp takes: `unroll` packs per lane.
struct Stretch {
  int64_t row;
  int64_t first;  // pack of this lane; the next ones follow WARP apart

  __device__ Stretch(int64_t packs, int unroll) {
    const int64_t unit = static_cast<int64_t>(blockIdx.x) * ROW_WARPS + warp_index();
    const int64_t stretches = (packs + WARP * unroll - 1) / (WARP * unroll);
    row = unit / stretches;
    first = (unit - row * stretches) * WARP * unroll + lane_index();
  }
};

inline int64_t row_blocks(int64_t rows, int64_t packs, int unroll) {
  return ceil_div(rows * ceil_div(packs, WARP * unroll), ROW_WARPS);
}

// rows[r] = tokens[order[r] / k], zeros where order[r] is no assignment. V: what one lane moves at a time.
template <class V>
__global__ void __launch_bounds__(ROW_THREADS) permute_kernel(
    const V* tokens, const int64_t* order, V* rows, int64_t num_rows, int64_t assignments, int k, int64_t packs,
    bool streaming) {
  const Stretch at(packs, COPY_UNROLL);
  if (at.row >= num_rows) return;
  const int64_t assignment = order[at.row];
  const bool served = assignment >= 0 && assignment < assignments;
  const V* from = tokens + (served ? assignment / k : 0) * packs;
  V* to = rows + at.row * packs;
  V held[COPY_UNROLL];
#pragma unroll
  for (int i = 0; i < COPY_UNROLL; ++i) {
    const int64_t pack = at.first + i * WARP;
    held[i] = V{};
    if (served && pack < packs) held[i] = from[pack];
  }
#pragma unroll
  for (int i = 0; i < COPY_UNROLL; ++i) {
    const int64_t pack = at.first + i * WARP;
    if (pack >= packs) continue;
    if constexpr (sizeof(V) == 16) {
      if (streaming) {
        store_streaming(to + pack, held[i]);
        continue;
      }
    }
    to[pack] = held[i];
  }
}

template <class T>
struct SumTensors {
  const T* rows;
  const int64_t* position;
  const precise_t<T>* weights;  // absent: 1
  const T* residual;            // may be absent
  T* out;
  int64_t tokens, num_rows, packs;
  int k;
  bool streaming;
};

// out[t] = sum over k of weights[t, k] * rows[position[t, k]], plus residual[t].
template <class T, int N>
__global__ void __launch_bounds__(ROW_THREADS) sum_choices_kernel(SumTensors<T> given) {
  using P = precise_t<T>;
  const Stretch at(given.packs, SUM_UNROLL);
  if (at.row >= given.tokens) return;
  P total[SUM_UNROLL][N];
  for (int choice = 0; choice < given.k; ++choice) {
    const int64_t place = given.position[at.row * given.k + choice];
    const bool served = place >= 0 && place < given.num_rows;
    const P weight = given.weights != nullptr && served ? given.weights[at.row * given.k + choice] : P(1);
    const T* from = given.rows + (served ? place : 0) * given.packs * N;
    Pack<T, N> held[SUM_UNROLL];
#pragma unroll
    for (int i = 0; i < SUM_UNROLL; ++i) {
      const int64_t pack = at.first + i * WARP;
      if (served && pack < given.packs) held[i] = load_pack<T, N>(from + pack * N);
    }
#pragma unroll
    for (int i = 0; i < SUM_UNROLL; ++i) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        P term = 0;
        if (served && at.first + i * WARP < given.packs) {
          term = held[i][j];
          if (given.weights != nullptr) term = times(term, weight);
        }
        total[i][j] = choice == 0 ? term : plus(total[i][j], term);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < SUM_UNROLL; ++i) {
    const int64_t pack = at.first + i * WARP;
    if (pack >= given.packs) continue;
    const int64_t offset = (at.row * given.packs + pack) * N;
    if (given.residual != nullptr) {
      const Pack<T, N> residual = load_pack<T, N>(given.residual + offset);
#pragma unroll
      for (int j = 0; j < N; ++j) total[i][j] = plus(total[i][j], residual[j]);
    }
    Pack<T, N> out;
#pragma unroll
    for (int j = 0; j < N; ++j) out.set(j, total[i][j]);
    store_pack<T, N>(given.out + offset, out, given.streaming);
  }
}

template <class T>
struct CombineBackwardTensors {
  const T* grad;
  const T* rows;
  const int64_t* order;
  const int64_t* position;
  const precise_t<T>* weights;
  T* grad_rows;
  precise_t<T>* grad_weights;
  int64_t tokens, num_rows, packs;
  int k;
  bool streaming;
};

// One warp per token: the gradients of its rows and weights. Then one warp per row that no token has: zeros.
template <class T, int N>
__global__ void __launch_bounds__(ROW_THREADS) combine_backward_kernel(CombineBackwardTensors<T> given) {
  using P = precise_t<T>;
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * ROW_WARPS + warp_index();
  if (unit >= given.tokens) {
    const int64_t row = unit - given.tokens;
    if (row >= given.num_rows) return;
    const int64_t owner = given.order[row];
    if (owner >= 0 && owner < given.tokens * given.k) return;
    Pack<T, N> zero;
#pragma unroll
    for (int j = 0; j < N; ++j) zero.set(j, P(0));
    for (int64_t pack = lane_index(); pack < given.packs; pack += WARP) {
      store_pack<T, N>(given.grad_rows + (row * given.packs + pack) * N, zero, given.streaming);
    }
    return;
  }
  const T* grad = given.grad + unit * given.packs * N;
  for (int choice = 0; choice < given.k; ++choice) {
    const int64_t assignment = unit * given.k + choice, place = given.position[assignment];
    const bool served = place >= 0 && place < given.num_rows;
    const int64_t row = (served ? place : 0) * given.packs * N;
    const P weight = given.weights[assignment];
    P dot = 0;
    for (int64_t first = lane_index(); served && first < given.packs; first += WARP * SUM_UNROLL) {
      Pack<T, N> above[SUM_UNROLL], held[SUM_UNROLL];
#pragma unroll
      for (int i = 0; i < SUM_UNROLL; ++i) {
        const int64_t pack = first + i * WARP;
        if (pack >= given.packs) continue;
        above[i] = load_pack<T, N>(grad + pack * N);
        held[i] = load_pack<T, N>(given.rows + row + pack * N);
      }
#pragma unroll
      for (int i = 0; i < SUM_UNROLL; ++i) {
        const int64_t pack = first + i * WARP;
        if (pack >= given.packs) continue;
        Pack<T, N> out;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const P g = above[i][j];
          dot += g * held[i][j];
          out.set(j, times(g, weight));
        }
        store_pack<T, N>(given.grad_rows + row + pack * N, out, given.streaming);
      }
    }
    dot = warp_sum(dot);
    if (lane_index() == 0) given.grad_weights[assignment] = dot;
  }
}

}  // namespace medplib
