// The arguments of each operator, checked and packed, with its results allocated: the same for CPU and CUDA.
//
// T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows.
#pragma once

#include "common.h"
#include "gate.h"

#include <array>

namespace medplib {

inline void check_long(const Tensor& tensor, int64_t dim, const char* name) {
  check_dim(tensor, dim, name);
  check_type(tensor, ScalarType::Long, name);
}

inline void check_seed(const Tensor& seed) {
  check_type(seed, ScalarType::Long, "seed");
  STD_TORCH_CHECK(seed.numel() == 1, "medplib: seed must be one number");
}

// gate: logits (T, E), selection (T, E), mask (T,).
struct GateCall {
  Tensor logits;
  MaybeTensor selection, mask;
  int64_t tokens, num_experts, k;
  bool sigmoid, renormalize, statistics;
  Tensor probabilities, experts, weights, counts, sums;

  GateCall(
      const Tensor& logits_, const MaybeTensor& selection_, const MaybeTensor& mask_, int64_t k_, bool sigmoid_,
      bool renormalize_, bool statistics_)
      : logits(packed(logits_)), selection(packed(selection_)), mask(packed(mask_)), k(k_), sigmoid(sigmoid_),
        renormalize(renormalize_), statistics(statistics_) {
    check_devices(logits, {selection, mask});
    check_dim(logits, 2, "logits");
    tokens = logits.size(0);
    num_experts = logits.size(1);
    const ScalarType type = logits.scalar_type();
    STD_TORCH_CHECK(k >= 1 && k <= num_experts, "medplib: k must be between 1 and E, got ", k);
    if (selection) {
      check_shape(*selection, {tokens, num_experts}, "selection");
      check_type(*selection, type, "selection");
    }
    if (mask) {
      check_shape(*mask, {tokens}, "mask");
      check_type(*mask, ScalarType::Bool, "mask");
    }
    probabilities = allocate({tokens, num_experts}, type, logits);
    experts = allocate({tokens, k}, ScalarType::Long, logits);
    weights = allocate({tokens, k}, type, logits);
    counts = allocate({statistics ? num_experts : 0}, ScalarType::Long, logits);
    sums = allocate({statistics ? num_experts + 3 : 0}, type, logits);
  }

  GateShape shape() const {
    return {tokens, static_cast<int>(num_experts), static_cast<int>(k), sigmoid, renormalize};
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> results() const {
    return {probabilities, experts, weights, counts, sums};
  }
};

// gate_backward: probabilities (T, E), experts (T, K), and a gradient of each, which may be absent.
struct GateBackwardCall {
  MaybeTensor grad_probabilities, grad_weights;
  Tensor probabilities, experts;
  bool sigmoid, renormalize;
  Tensor grad_logits;

  GateBackwardCall(
      const MaybeTensor& grad_probabilities_, const MaybeTensor& grad_weights_, const Tensor& probabilities_,
      const Tensor& experts_, bool sigmoid_, bool renormalize_)
      : grad_probabilities(packed(grad_probabilities_)), grad_weights(packed(grad_weights_)),
        probabilities(packed(probabilities_)), experts(packed(experts_)), sigmoid(sigmoid_),
        renormalize(renormalize_) {
    check_devices(probabilities, {experts, grad_probabilities, grad_weights});
    check_dim(probabilities, 2, "probabilities");
    check_long(experts, 2, "experts");
    const int64_t tokens = probabilities.size(0), k = experts.size(1);
    check_shape(experts, {tokens, k}, "experts");
    if (grad_probabilities) {
      check_shape(*grad_probabilities, {tokens, probabilities.size(1)}, "grad_probabilities");
      check_type(*grad_probabilities, probabilities.scalar_type(), "grad_probabilities");
    }
    if (grad_weights) {
      check_shape(*grad_weights, {tokens, k}, "grad_weights");
      check_type(*grad_weights, probabilities.scalar_type(), "grad_weights");
    }
    grad_logits = allocate({tokens, probabilities.size(1)}, probabilities.scalar_type(), probabilities);
  }

  GateShape shape() const {
    return {
        probabilities.size(0), static_cast<int>(probabilities.size(1)), static_cast<int>(experts.size(1)), sigmoid,
        renormalize};
  }
};

// plan: experts (T, K).
struct PlanCall {
  Tensor experts;
  int64_t n, num_experts;
  Tensor order, position, counts, ends;

  PlanCall(const Tensor& experts_, int64_t num_experts_) : experts(packed(experts_)), num_experts(num_experts_) {
    check_long(experts, 2, "experts");
    STD_TORCH_CHECK(num_experts >= 1, "medplib: num_experts must be at least 1, got ", num_experts);
    n = experts.numel();
    order = allocate({n}, ScalarType::Long, experts);
    position = allocate({experts.size(0), experts.size(1)}, ScalarType::Long, experts);
    counts = allocate({num_experts}, ScalarType::Long, experts);
    ends = allocate({num_experts}, ScalarType::Int, experts);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {order, position, counts, ends}; }
};

// drop: experts (T, K), and a priority (T, K) or a seed (), or neither.
struct DropCall {
  Tensor experts;
  MaybeTensor priority, seed;
  int64_t n, tokens, k, num_experts, capacity;
  Tensor kept;

  DropCall(
      const Tensor& experts_, const MaybeTensor& priority_, const MaybeTensor& seed_, int64_t num_experts_,
      int64_t capacity_)
      : experts(packed(experts_)), priority(packed(priority_)), seed(seed_), num_experts(num_experts_),
        capacity(capacity_) {
    check_devices(experts, {priority, seed});
    check_long(experts, 2, "experts");
    n = experts.numel();
    tokens = experts.size(0);
    k = experts.size(1);
    if (priority) check_shape(*priority, {tokens, k}, "priority");
    if (seed) check_seed(*seed);
    kept = allocate({tokens, k}, ScalarType::Long, experts);
  }
};

// permute: tokens (T, D), order (R,).
struct PermuteCall {
  Tensor tokens, order;
  int64_t assignments, k, num_rows, dim;
  Tensor rows;

  PermuteCall(const Tensor& tokens_, const Tensor& order_, int64_t k_)
      : tokens(packed(tokens_)), order(packed(order_)), k(k_) {
    check_devices(tokens, {order});
    check_dim(tokens, 2, "tokens");
    check_long(order, 1, "order");
    STD_TORCH_CHECK(k >= 1, "medplib: k must be at least 1, got ", k);
    assignments = tokens.size(0) * k;
    num_rows = order.size(0);
    dim = tokens.size(1);
    rows = allocate({num_rows, dim}, tokens.scalar_type(), tokens);
  }
};

// combine, and permute_backward, which has no weights: rows (R, D), position (T, K), weights (T, K),
// residual (T, D).
struct SumCall {
  Tensor rows, position;
  MaybeTensor weights, residual;
  int64_t tokens, k, num_rows, dim;
  Tensor out;

  SumCall(const Tensor& rows_, const Tensor& position_, const MaybeTensor& weights_, const MaybeTensor& residual_)
      : rows(packed(rows_)), position(packed(position_)), weights(packed(weights_)), residual(packed(residual_)) {
    check_devices(rows, {position, weights, residual});
    check_dim(rows, 2, "rows");
    check_long(position, 2, "position");
    tokens = position.size(0);
    k = position.size(1);
    num_rows = rows.size(0);
    dim = rows.size(1);
    if (weights) {
      check_shape(*weights, {tokens, k}, "weights");
      check_type(*weights, precise_type(rows), "weights");
    }
    if (residual) {
      check_shape(*residual, {tokens, dim}, "residual");
      check_type(*residual, rows.scalar_type(), "residual");
    }
    out = allocate({tokens, dim}, rows.scalar_type(), rows);
  }
};

// combine_backward: grad (T, D), rows (R, D), order (R,), position (T, K), weights (T, K).
struct CombineBackwardCall {
  Tensor grad, rows, order, position, weights;
  int64_t tokens, k, num_rows, dim;
  Tensor grad_rows, grad_weights;

  CombineBackwardCall(
      const Tensor& grad_, const Tensor& rows_, const Tensor& order_, const Tensor& position_,
      const Tensor& weights_)
      : grad(packed(grad_)), rows(packed(rows_)), order(packed(order_)), position(packed(position_)),
        weights(packed(weights_)) {
    check_devices(rows, {grad, order, position, weights});
    check_dim(rows, 2, "rows");
    check_long(position, 2, "position");
    check_long(order, 1, "order");
    tokens = position.size(0);
    k = position.size(1);
    num_rows = rows.size(0);
    dim = rows.size(1);
    check_shape(grad, {tokens, dim}, "grad");
    check_type(grad, rows.scalar_type(), "grad");
    check_shape(order, {num_rows}, "order");
    check_shape(weights, {tokens, k}, "weights");
    check_type(weights, precise_type(rows), "weights");
    grad_rows = allocate({num_rows, dim}, rows.scalar_type(), rows);
    grad_weights = allocate({tokens, k}, weights.scalar_type(), weights);
  }
};

// swiglu: gate_up (..., 2H) -> (..., H); with a gradient (..., H) -> (..., 2H).
struct SwigluCall {
  MaybeTensor grad;
  Tensor gate_up;
  int64_t rows, hidden;
  Tensor out;

  SwigluCall(const Tensor& gate_up_, const MaybeTensor& grad_)
      : grad(packed(grad_)), gate_up(packed(gate_up_)) {
    check_devices(gate_up, {grad});
    std::vector<int64_t> sizes(gate_up.sizes().begin(), gate_up.sizes().end());
    STD_TORCH_CHECK(!sizes.empty() && sizes.back() % 2 == 0, "medplib: swiglu needs (..., 2H)");
    hidden = sizes.back() / 2;
    rows = hidden == 0 ? 0 : gate_up.numel() / (2 * hidden);
    if (grad) {
      STD_TORCH_CHECK(2 * grad->numel() == gate_up.numel(), "medplib: grad must be half as large as gate_up");
      check_type(*grad, gate_up.scalar_type(), "grad");
    } else {
      sizes.back() = hidden;
    }
    out = allocate(sizes, gate_up.scalar_type(), gate_up);
  }
};

}  // namespace medplib
