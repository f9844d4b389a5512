// The operators for CUDA, as medplib::* on the CUDA key: checks, then launches; the kernels are in the .cuh files.
//
// T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows. Nothing here waits
// for the device or asks it for a number, so every operator can be recorded in a CUDA graph.
#include "calls.h"

#include "ffn.cuh"
#include "gate.cuh"
#include "launch.cuh"
#include "logits.cuh"
#include "plan.cuh"
#include "rows.cuh"

#include <algorithm>

namespace medplib {
namespace {

// Call `use` with the number of T that move at a time, as a constant: a wide pack where all allows it, else one.
template <class T, class Use>
void with_pack(int64_t width, std::initializer_list<const void*> places, Use use) {
  if (is_wide<T>(width, places)) {
    use(std::integral_constant<int, WIDE<T>>());
  } else {
    use(std::integral_constant<int, 1>());
  }
}

bool is_large(const Tensor& tensor, int64_t bytes) { return tensor.numel() * bytes > CACHE_BYTES; }

// gate_logits takes tokens of one type and a weight of that type or of the sums' type.
template <class Use>
void with_gate_types(const Tensor& tokens, const Tensor& weight, Use use) {
  with_type(tokens, "tokens", [&](auto x) {
    using P = precise_t<decltype(x)>;
    if (weight.scalar_type() == tokens.scalar_type()) {
      use(x, x, P());
    } else {
      check_type(weight, sizeof(P) == 8 ? ScalarType::Double : ScalarType::Float, "weight");
      use(x, P(), P());
    }
  });
}

Tensor gate_logits(Tensor tokens, Tensor weight) {
  check_dim(tokens, 2, "tokens");
  check_devices(tokens, {weight});
  tokens = packed(tokens);
  weight = packed(weight);
  const int64_t num_tokens = tokens.size(0), dim = tokens.size(1), num_experts = weight.size(0);
  check_shape(weight, {num_experts, dim}, "weight");
  Tensor logits = allocate({num_tokens, num_experts}, precise_type(tokens), tokens);
  const Launcher launch(tokens);
  with_gate_types(tokens, weight, [&](auto x, auto w, auto p) {
    using X = decltype(x);
    using W = decltype(w);
    using P = decltype(p);
    const X* from = data<X>(tokens);
    const W* by = data<W>(weight);
    const auto start = [&](auto kernel, int64_t rows, int64_t experts) {
      launch(
          kernel, grid_of(ceil_div(num_tokens, rows), ceil_div(num_experts, experts)), LOGIT_THREADS, 0, from, by,
          mutable_data<P>(logits), num_tokens, static_cast<int>(num_experts), dim);
    };
    with_pack<X>(dim, {from, by}, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      if (N > 1 && num_tokens >= 512 && num_experts <= 2) {
        start(gate_logits_kernel<X, W, P, N, 4, 2>, 4, 2);
      } else if (N > 1 && num_tokens >= 512) {
        start(gate_logits_kernel<X, W, P, N, 4, LOGIT_EXPERTS>, 4, LOGIT_EXPERTS);
      } else {
        start(gate_logits_kernel<X, W, P, N, 1, LOGIT_EXPERTS>, 1, LOGIT_EXPERTS);
      }
    });
  });
  return logits;
}

std::tuple<Tensor, Tensor> gate_logits_backward(
    Tensor grad, Tensor tokens, Tensor weight, bool for_tokens, bool for_weight) {
  check_dim(tokens, 2, "tokens");
  check_devices(tokens, {weight, grad});
  grad = packed(grad);
  tokens = packed(tokens);
  weight = packed(weight);
  const int64_t num_tokens = tokens.size(0), dim = tokens.size(1), num_experts = weight.size(0);
  check_shape(weight, {num_experts, dim}, "weight");
  check_shape(grad, {num_tokens, num_experts}, "grad");
  check_type(grad, precise_type(tokens), "grad");
  const auto wanted = [](bool yes, int64_t rows, int64_t columns) {
    return yes ? std::vector<int64_t>{rows, columns} : std::vector<int64_t>{0};
  };
  Tensor grad_tokens = allocate(wanted(for_tokens, num_tokens, dim), tokens.scalar_type(), tokens);
  Tensor grad_weight = allocate(wanted(for_weight, num_experts, dim), weight.scalar_type(), weight);
  // Slices of the tokens: enough to fill the device, few enough that their partial sums stay small.
  const int64_t most = std::max<int64_t>(1, (4ll << 20) / std::max<int64_t>(1, num_experts * dim));
  const int64_t slices = num_tokens == 0 ? 0 : std::min({ceil_div(num_tokens, 32), most, int64_t(256)});
  const int64_t slice_tokens = slices == 0 ? 0 : ceil_div(num_tokens, slices);
  const int groups = static_cast<int>(ceil_div(num_experts, SLICE_EXPERTS));
  Tensor partial = allocate({for_weight ? slices : 0, num_experts, dim}, grad.scalar_type(), grad);
  const Launcher launch(tokens);
  with_gate_types(tokens, weight, [&](auto x, auto w, auto p) {
    using X = decltype(x);
    using W = decltype(w);
    using P = decltype(p);
    const int experts = static_cast<int>(num_experts);
    if (for_tokens) {
      with_pack<X>(dim, {data<W>(weight), data<X>(grad_tokens)}, [&](auto pack) {
        constexpr int N = decltype(pack)::value;
        launch(
            logits_token_gradient_kernel<X, W, P, N>, grid_of(ceil_div(num_tokens * (dim / N), LOGIT_THREADS)),
            LOGIT_THREADS, 0, data<P>(grad), data<W>(weight), mutable_data<X>(grad_tokens), num_tokens, experts, dim);
      });
    }
    if (!for_weight) return;
    with_pack<X>(dim, {data<X>(tokens)}, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      launch(
          logits_weight_partial_kernel<X, P, N>, grid_of(ceil_div(dim, LOGIT_THREADS * N), slices * groups),
          LOGIT_THREADS, 0, data<P>(grad), data<X>(tokens), mutable_data<P>(partial), num_tokens, experts, dim,
          slice_tokens, groups);
    });
    launch(
        logits_weight_total_kernel<W, P>, grid_of(ceil_div(num_experts * dim, LOGIT_THREADS)), LOGIT_THREADS, 0,
        data<P>(partial), mutable_data<W>(grad_weight), num_experts * dim, static_cast<int>(slices));
  });
  return {grad_tokens, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    Tensor logits, MaybeTensor selection, MaybeTensor mask, int64_t k, bool sigmoid, bool renormalize,
    bool statistics) {
  const GateCall call(logits, selection, mask, k, sigmoid, renormalize, statistics);
  const int64_t blocks = ceil_div(call.tokens, GATE_THREADS), columns = call.num_experts + 3;
  Tensor partial_sums = allocate({statistics ? blocks * columns : 0}, ScalarType::Double, call.logits);
  Tensor partial_counts = allocate({statistics ? blocks * call.num_experts : 0}, ScalarType::Long, call.logits);
  const Launcher launch(call.logits);
  with_precise_type(call.logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    GateTensors<T> at = {};
    at.logits = data<T>(call.logits);
    at.selection = call.selection ? data<T>(*call.selection) : at.logits;
    at.mask = data<bool>(call.mask);
    at.probabilities = mutable_data<T>(call.probabilities);
    at.experts = mutable_data<int64_t>(call.experts);
    at.weights = mutable_data<T>(call.weights);
    at.partial_sums = statistics ? mutable_data<double>(partial_sums) : nullptr;
    at.partial_counts = statistics ? mutable_data<int64_t>(partial_counts) : nullptr;
    const size_t shared = (GATE_THREADS / WARP * columns) * sizeof(double) + call.num_experts * sizeof(int);
    launch(gate_kernel<T>, grid_of(blocks), GATE_THREADS, statistics ? shared : 0, call.shape(), at);
    if (statistics) {
      launch(
          gate_totals_kernel<T>, grid_of(columns), WARP, 0, data<double>(partial_sums),
          data<int64_t>(partial_counts), static_cast<int>(blocks), static_cast<int>(call.num_experts),
          mutable_data<T>(call.sums), mutable_data<int64_t>(call.counts));
    }
  });
  return call.results();
}

Tensor gate_backward(
    MaybeTensor grad_probabilities, MaybeTensor grad_weights, Tensor probabilities, Tensor experts, bool sigmoid,
    bool renormalize) {
  const GateBackwardCall call(grad_probabilities, grad_weights, probabilities, experts, sigmoid, renormalize);
  const Launcher launch(call.probabilities);
  with_precise_type(call.probabilities, "probabilities", [&](auto zero) {
    using T = decltype(zero);
    launch(
        gate_backward_kernel<T>, grid_of(ceil_div(call.shape().tokens, GATE_THREADS)), GATE_THREADS, 0,
        call.shape(), data<T>(call.grad_probabilities), data<T>(call.grad_weights), data<T>(call.probabilities),
        data<int64_t>(call.experts), mutable_data<T>(call.grad_logits));
  });
  return call.grad_logits;
}

// Launch the kernels that rank assignments, for plan or for drop by position.
template <bool DROP>
void launch_plan(const PlanShape& shape, PlanTensors at, const Tensor& like) {
  const int buckets = shape.num_experts + 1;
  const size_t shared = static_cast<size_t>(TILE_WARPS + 4) * buckets * sizeof(int);
  const Launcher launch(like);
  if (shape.n <= MOST_TILES * TILE) {
    launch(plan_one_block_kernel<DROP>, grid_of(1), TILE, shared, shape, at);
    return;
  }
  const int64_t tiles = ceil_div(shape.n, TILE);
  Tensor tile_counts = allocate({tiles, buckets}, ScalarType::Int, like);
  at.tile_counts = mutable_data<int>(tile_counts);
  launch(plan_count_kernel<DROP>, grid_of(tiles), TILE, buckets * sizeof(int), shape, at);
  launch(plan_place_kernel<DROP>, grid_of(tiles), TILE, shared, shape, at);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan(Tensor experts, int64_t num_experts) {
  const PlanCall call(experts, num_experts);
  STD_TORCH_CHECK(call.n < (1ll << 31), "medplib: plan takes fewer than 2^31 assignments, got ", call.n);
  PlanTensors at = {};
  at.experts = data<int64_t>(call.experts);
  at.order = mutable_data<int64_t>(call.order);
  at.position = mutable_data<int64_t>(call.position);
  at.counts = mutable_data<int64_t>(call.counts);
  at.ends = mutable_data<int>(call.ends);
  const PlanShape shape = {
      call.n, call.experts.size(0), static_cast<int>(num_experts), static_cast<int>(call.experts.size(1)), 0};
  launch_plan<false>(shape, at, call.experts);
  return call.results();
}

Tensor counter_bits(Tensor seed, int64_t count) {
  check_seed(seed);
  Tensor bits = allocate({count}, ScalarType::Long, seed);
  const Launcher launch(seed);
  launch(
      counter_bits_kernel, grid_of(ceil_div(count, DROP_THREADS)), DROP_THREADS, 0, data<int64_t>(seed),
      mutable_data<int64_t>(bits), count);
  return bits;
}

Tensor drop(Tensor experts, MaybeTensor priority, MaybeTensor seed, int64_t num_experts, int64_t capacity) {
  const DropCall call(experts, priority, seed, num_experts, capacity);
  if (call.n == 0) return call.kept;
  STD_TORCH_CHECK(call.n < (1ll << 31), "medplib: drop takes fewer than 2^31 assignments, got ", call.n);
  const PlanShape shape = {
      call.n, call.tokens, static_cast<int>(num_experts), static_cast<int>(call.k), capacity};
  if (!priority && !seed) {
    PlanTensors at = {};
    at.experts = data<int64_t>(call.experts);
    at.kept = mutable_data<int64_t>(call.kept);
    launch_plan<true>(shape, at, call.experts);
    return call.kept;
  }
  const Launcher launch(call.experts);
  const auto start = [&](auto kernel, auto* priorities) {
    launch(
        kernel, grid_of(ceil_div(call.n, DROP_THREADS)), DROP_THREADS, 0, shape, data<int64_t>(call.experts),
        priorities, data<int64_t>(call.seed), mutable_data<int64_t>(call.kept));
  };
  if (!call.priority) {
    start(drop_by_key_kernel<float>, static_cast<const float*>(nullptr));
  } else {
    with_precise_type(*call.priority, "priority", [&](auto zero) {
      using T = decltype(zero);
      start(drop_by_key_kernel<T>, data<T>(*call.priority));
    });
  }
  return call.kept;
}

Tensor permute(Tensor tokens, Tensor order, MaybeTensor /*position*/, int64_t k) {
  const PermuteCall call(tokens, order, k);
  const Launcher launch(call.tokens);
  with_type(call.tokens, "tokens", [&](auto zero) {
    using T = decltype(zero);
    const bool streaming = is_large(call.rows, sizeof(T));
    const auto start = [&](auto value, int64_t packs) {
      using V = decltype(value);
      launch(
          permute_kernel<V>, grid_of(row_blocks(call.num_rows, packs, COPY_UNROLL)), ROW_THREADS, 0,
          data<V>(call.tokens), data<int64_t>(call.order), mutable_data<V>(call.rows), call.num_rows,
          call.assignments, static_cast<int>(k), packs, streaming);
    };
    using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>>;
    if (is_wide<T>(call.dim, {data<T>(call.tokens), data<T>(call.rows)})) {
      start(uint4(), call.dim / WIDE<T>);
    } else {
      start(Bits(), call.dim);
    }
  });
  return call.rows;
}

template <class T>
void launch_sum(const SumCall& call) {
  const Launcher launch(call.rows);
  using P = precise_t<T>;
  SumTensors<T> given = {};
  given.rows = data<T>(call.rows);
  given.position = data<int64_t>(call.position);
  given.weights = data<P>(call.weights);
  given.residual = data<T>(call.residual);
  given.out = mutable_data<T>(call.out);
  given.tokens = call.tokens;
  given.num_rows = call.num_rows;
  given.k = static_cast<int>(call.k);
  given.streaming = is_large(call.out, sizeof(T));
  with_pack<T>(call.dim, {given.rows, given.residual, given.out}, [&](auto pack) {
    constexpr int N = decltype(pack)::value;
    given.packs = call.dim / N;
    launch(
        sum_choices_kernel<T, N>, grid_of(row_blocks(call.tokens, given.packs, SUM_UNROLL)), ROW_THREADS, 0,
        given);
  });
}

Tensor permute_backward(Tensor grad, Tensor position) {
  const SumCall call(grad, position, {}, {});
  with_type(call.rows, "grad", [&](auto zero) { launch_sum<decltype(zero)>(call); });
  return call.out;
}

Tensor combine(Tensor rows, Tensor /*order*/, Tensor position, Tensor weights, MaybeTensor residual) {
  const SumCall call(rows, position, weights, residual);
  with_type(call.rows, "rows", [&](auto zero) { launch_sum<decltype(zero)>(call); });
  return call.out;
}

std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor rows, Tensor order, Tensor position, Tensor weights) {
  const CombineBackwardCall call(grad, rows, order, position, weights);
  const Launcher launch(call.rows);
  with_type(call.rows, "rows", [&](auto zero) {
    using T = decltype(zero);
    using P = precise_t<T>;
    CombineBackwardTensors<T> given = {};
    given.grad = data<T>(call.grad);
    given.rows = data<T>(call.rows);
    given.order = data<int64_t>(call.order);
    given.position = data<int64_t>(call.position);
    given.weights = data<P>(call.weights);
    given.grad_rows = mutable_data<T>(call.grad_rows);
    given.grad_weights = mutable_data<P>(call.grad_weights);
    given.tokens = call.tokens;
    given.num_rows = call.num_rows;
    given.k = static_cast<int>(call.k);
    given.streaming = is_large(call.grad_rows, sizeof(T));
    with_pack<T>(call.dim, {given.grad, given.rows, given.grad_rows}, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      given.packs = call.dim / N;
      launch(
          combine_backward_kernel<T, N>, grid_of(ceil_div(call.tokens + call.num_rows, ROW_WARPS)), ROW_THREADS,
          0, given);
    });
  });
  return {call.grad_rows, call.grad_weights};
}

Tensor swiglu(Tensor gate_up) {
  const SwigluCall call(gate_up, {});
  const Launcher launch(call.gate_up);
  with_type(call.gate_up, "gate_up", [&](auto zero) {
    using T = decltype(zero);
    with_pack<T>(call.hidden, {data<T>(call.gate_up), data<T>(call.out)}, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const int64_t packs = call.hidden / N;
      launch(
          swiglu_kernel<T, N>, grid_of(ceil_div(call.rows * packs, FFN_THREADS)), FFN_THREADS, 0,
          data<T>(call.gate_up), mutable_data<T>(call.out), call.rows, packs);
    });
  });
  return call.out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up) {
  const SwigluCall call(gate_up, grad);
  const Launcher launch(call.gate_up);
  with_type(call.gate_up, "gate_up", [&](auto zero) {
    using T = decltype(zero);
    const T* above = data<T>(*call.grad);
    with_pack<T>(call.hidden, {above, data<T>(call.gate_up), data<T>(call.out)}, [&](auto pack) {
      constexpr int N = decltype(pack)::value;
      const int64_t packs = call.hidden / N;
      launch(
          swiglu_backward_kernel<T, N>, grid_of(ceil_div(call.rows * packs, FFN_THREADS)), FFN_THREADS, 0, above,
          data<T>(call.gate_up), mutable_data<T>(call.out), call.rows, packs);
    });
  });
  return call.out;
}

// The tokens from `first` on, as many as one launch takes.
template <class T, int N, int COUNT>
void launch_decode(
    const Launcher& launch, DecodeTensors<T> given, const T* tokens, const T* gate_up, T* hidden) {
  const int n = given.tokens * given.k;
  launch(
      decode_hidden_kernel<T, N, COUNT>,
      grid_of(ceil_div(given.hidden_dim, FFN_WARPS), std::min(n, given.num_experts)), FFN_THREADS, 0, tokens,
      given.experts, gate_up, hidden, n, given.k, given.num_experts, given.dim, given.hidden_dim);
  launch(
      decode_down_kernel<T, N, COUNT>, grid_of(ceil_div(given.dim, FFN_WARPS)), FFN_THREADS, 0, given);
}

Tensor decode_ffn(
    Tensor tokens, Tensor experts, Tensor weights, Tensor gate_up, Tensor down, MaybeTensor residual) {
  check_dim(tokens, 2, "tokens");
  check_dim(experts, 2, "experts");
  check_type(experts, ScalarType::Long, "experts");
  check_dim(down, 3, "down");
  check_devices(tokens, {experts, weights, gate_up, down, residual});
  tokens = packed(tokens);
  experts = packed(experts);
  weights = packed(weights);
  gate_up = packed(gate_up);
  down = packed(down);
  residual = packed(residual);
  const int64_t num_tokens = tokens.size(0), dim = tokens.size(1), k = experts.size(1);
  const int64_t num_experts = down.size(0), hidden_dim = down.size(2);
  check_shape(experts, {num_tokens, k}, "experts");
  check_shape(weights, {num_tokens, k}, "weights");
  check_type(weights, precise_type(tokens), "weights");
  check_shape(gate_up, {num_experts, 2 * hidden_dim, dim}, "gate_up");
  check_shape(down, {num_experts, dim, hidden_dim}, "down");
  check_type(gate_up, tokens.scalar_type(), "gate_up");
  check_type(down, tokens.scalar_type(), "down");
  STD_TORCH_CHECK(k <= DECODE_MAX, "medplib: decode_ffn takes at most ", DECODE_MAX, " experts per token, got ", k);
  if (residual) {
    check_shape(*residual, {num_tokens, dim}, "residual");
    check_type(*residual, tokens.scalar_type(), "residual");
  }
  Tensor out = allocate({num_tokens, dim}, tokens.scalar_type(), tokens);
  const int64_t at_a_time = std::max<int64_t>(1, DECODE_MAX / std::max<int64_t>(1, k));
  Tensor hidden =
      allocate({std::min(at_a_time, num_tokens) * k, hidden_dim}, tokens.scalar_type(), tokens);
  const Launcher launch(tokens);
  with_type(tokens, "tokens", [&](auto zero) {
    using T = decltype(zero);
    for (int64_t first = 0; first < num_tokens; first += at_a_time) {
      DecodeTensors<T> given = {};
      given.hidden = data<T>(hidden);
      given.experts = data<int64_t>(experts) + first * k;
      given.weights = data<precise_t<T>>(weights) + first * k;
      given.down = data<T>(down);
      given.residual = residual ? data<T>(*residual) + first * dim : nullptr;
      given.out = mutable_data<T>(out) + first * dim;
      given.tokens = static_cast<int>(std::min(at_a_time, num_tokens - first));
      given.k = static_cast<int>(k);
      given.num_experts = static_cast<int>(num_experts);
      given.dim = dim;
      given.hidden_dim = hidden_dim;
      const T* from = data<T>(tokens) + first * dim;
      const bool wide = is_wide<T>(dim, {from, data<T>(gate_up)}) && is_wide<T>(hidden_dim, {given.hidden, given.down});
      if (wide && given.tokens * k == 1) {
        launch_decode<T, WIDE<T>, 1>(launch, given, from, data<T>(gate_up), mutable_data<T>(hidden));
      } else if (wide) {
        launch_decode<T, WIDE<T>, 4>(launch, given, from, data<T>(gate_up), mutable_data<T>(hidden));
      } else {
        launch_decode<T, 1, 4>(launch, given, from, data<T>(gate_up), mutable_data<T>(hidden));
      }
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medplib, MEDPLIB_DEVICE_KEY, m) {
  m.impl("gate_logits", TORCH_BOX(&gate_logits));
  m.impl("gate_logits_backward", TORCH_BOX(&gate_logits_backward));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("counter_bits", TORCH_BOX(&counter_bits));
  m.impl("drop", TORCH_BOX(&drop));
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("permute_backward", TORCH_BOX(&permute_backward));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
  m.impl("swiglu", TORCH_BOX(&swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&swiglu_backward));
  m.impl("decode_ffn", TORCH_BOX(&decode_ffn));
}

}  // namespace medplib
