// The operators for the CPU, as medplib::* on the CPU key: what reference says, with the same bits.
//
// T tokens, D width, H hidden width, E experts, K experts per token, n = T*K assignments, R rows. Matrix products
// (gate_logits, decode_ffn) stay with PyTorch, whose libraries do them better.
#include "calls.h"

#include <algorithm>
#include <numeric>

namespace medplib {
namespace {

using torch::stable::parallel_for;

constexpr int64_t GRAIN = 16384;  // numbers per thread worth starting a thread for

int64_t grain_of(int64_t width) { return std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, width)); }

template <class T>
void gate_statistics(const GateCall& call) {
  const int64_t num_experts = call.num_experts;
  const bool* real = data<bool>(call.mask);
  const int64_t* experts = data<int64_t>(call.experts);
  int64_t* counts = mutable_data<int64_t>(call.counts);
  std::fill_n(counts, num_experts, int64_t(0));
  std::vector<double> sums(num_experts + 3, 0.0);  // one thread, so that the order is always the same
  for (int64_t t = 0; t < call.tokens; ++t) {
    if (real != nullptr && !real[t]) continue;
    const T* row = data<T>(call.probabilities) + t * num_experts;
    for (int64_t expert = 0; expert < num_experts; ++expert) sums[expert] += row[expert];
    for (int64_t choice = 0; choice < call.k; ++choice) ++counts[experts[t * call.k + choice]];
    const auto token =
        token_statistics<T>(data<T>(call.logits) + t * num_experts, row, static_cast<int>(num_experts));
    sums[num_experts] += token.entropy;
    sums[num_experts + 1] += token.margin;
    sums[num_experts + 2] += token.square;
  }
  std::transform(sums.begin(), sums.end(), mutable_data<T>(call.sums), [](double x) { return static_cast<T>(x); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gate(
    Tensor logits, MaybeTensor selection, MaybeTensor mask, int64_t k, bool sigmoid, bool renormalize,
    bool statistics) {
  const GateCall call(logits, selection, mask, k, sigmoid, renormalize, statistics);
  with_precise_type(call.logits, "logits", [&](auto zero) {
    using T = decltype(zero);
    const T* from = data<T>(call.logits);
    const T* scores = call.selection ? data<T>(*call.selection) : from;
    const bool* real = data<bool>(call.mask);
    T* p = mutable_data<T>(call.probabilities);
    int64_t* e = mutable_data<int64_t>(call.experts);
    T* w = mutable_data<T>(call.weights);
    parallel_for(0, call.tokens, grain_of(16 * call.num_experts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * call.num_experts;
        const bool hidden = real != nullptr && !real[t];
        gate_token<T>(call.shape(), from + row, scores + row, hidden, p + row, e + t * k, w + t * k);
      }
    });
    if (statistics) gate_statistics<T>(call);
  });
  return call.results();
}

Tensor gate_backward(
    MaybeTensor grad_probabilities, MaybeTensor grad_weights, Tensor probabilities, Tensor experts, bool sigmoid,
    bool renormalize) {
  const GateBackwardCall call(grad_probabilities, grad_weights, probabilities, experts, sigmoid, renormalize);
  with_precise_type(call.probabilities, "probabilities", [&](auto zero) {
    using T = decltype(zero);
    const GateShape shape = call.shape();
    const T* gp = data<T>(call.grad_probabilities);
    const T* gw = data<T>(call.grad_weights);
    parallel_for(0, shape.tokens, grain_of(8 * shape.num_experts), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t row = t * shape.num_experts, choice = t * shape.k;
        gate_token_backward<T>(
            shape, gp == nullptr ? gp : gp + row, gw == nullptr ? gw : gw + choice,
            data<T>(call.probabilities) + row, data<int64_t>(call.experts) + choice,
            mutable_data<T>(call.grad_logits) + row);
      }
    });
  });
  return call.grad_logits;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plan(Tensor experts, int64_t num_experts) {
  const PlanCall call(experts, num_experts);
  const int64_t* e = data<int64_t>(call.experts);
  std::vector<int64_t> next(num_experts + 2, 0);  // next[b]: the next row of bucket b
  for (int64_t a = 0; a < call.n; ++a) ++next[bucket_of(e[a], num_experts) + 1];
  std::copy_n(next.begin() + 1, num_experts, mutable_data<int64_t>(call.counts));
  std::partial_sum(next.begin(), next.end(), next.begin());
  std::copy_n(next.begin() + 1, num_experts, mutable_data<int32_t>(call.ends));
  int64_t* order = mutable_data<int64_t>(call.order);
  int64_t* position = mutable_data<int64_t>(call.position);
  for (int64_t a = 0; a < call.n; ++a) {
    const int64_t bucket = bucket_of(e[a], num_experts), row = next[bucket]++;
    order[row] = bucket < num_experts ? a : -1;
    position[a] = bucket < num_experts ? row : -1;
  }
  return call.results();
}

Tensor counter_bits(Tensor seed, int64_t count) {
  check_seed(seed);
  Tensor bits = allocate({count}, ScalarType::Long, seed);
  const int64_t key = *data<int64_t>(seed);
  int64_t* to = mutable_data<int64_t>(bits);
  for (int64_t i = 0; i < count; ++i) to[i] = counter_hash(key, i);
  return bits;
}

// The priority of every assignment as whole numbers: from the priority, or hashed under the seed.
std::vector<int64_t> drop_keys(const DropCall& call) {
  std::vector<int64_t> keys(call.n);
  if (!call.priority) {
    for (int64_t a = 0; a < call.n; ++a) keys[a] = counter_hash(*data<int64_t>(*call.seed), a);
    return keys;
  }
  with_precise_type(*call.priority, "priority", [&](auto zero) {
    const auto* from = data<decltype(zero)>(*call.priority);
    std::transform(from, from + call.n, keys.begin(), [](auto x) { return order_key(x); });
  });
  return keys;
}

Tensor drop(Tensor experts, MaybeTensor priority, MaybeTensor seed, int64_t num_experts, int64_t capacity) {
  const DropCall call(experts, priority, seed, num_experts, capacity);
  std::vector<int64_t> ranked(call.n);  // assignments: first choices before second ones, then by key
  for (int64_t i = 0; i < call.n; ++i) ranked[i] = i % call.tokens * call.k + i / call.tokens;
  if (priority || seed) {
    const std::vector<int64_t> keys = drop_keys(call);
    std::stable_sort(ranked.begin(), ranked.end(), [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
  }
  std::vector<int64_t> served(num_experts + 1, 0);
  for (const int64_t a : ranked) {
    const int64_t bucket = bucket_of(data<int64_t>(call.experts)[a], num_experts);
    mutable_data<int64_t>(call.kept)[a] = served[bucket]++ < capacity ? bucket : num_experts;
  }
  return call.kept;
}

void check_index(int64_t index, int64_t size, const char* name) {
  STD_TORCH_CHECK(index < size, "medplib: ", name, " has the index ", index, ", but there are ", size);
}

Tensor permute(Tensor tokens, Tensor order, MaybeTensor /*position*/, int64_t k) {
  const PermuteCall call(tokens, order, k);
  const int64_t dim = call.dim;
  const int64_t* o = data<int64_t>(call.order);
  with_type(call.tokens, "tokens", [&](auto zero) {
    using T = decltype(zero);
    const T* from = data<T>(call.tokens);
    T* to = mutable_data<T>(call.rows);
    parallel_for(0, call.num_rows, grain_of(dim), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        check_index(o[r], call.assignments, "order");
        if (o[r] >= 0) {
          std::copy_n(from + o[r] / k * dim, dim, to + r * dim);
        } else {
          std::fill_n(to + r * dim, dim, T(0.0f));
        }
      }
    });
  });
  return call.rows;
}

// Sum over the choices of weight * row, in order, plus the residual; weights may be absent.
template <class T>
void sum_choices(const SumCall& call) {
  using P = precise_t<T>;
  const int64_t k = call.k, dim = call.dim;
  const T* rows = data<T>(call.rows);
  const int64_t* position = data<int64_t>(call.position);
  const P* weights = data<P>(call.weights);
  const T* residual = data<T>(call.residual);
  T* out = mutable_data<T>(call.out);
  parallel_for(0, call.tokens, grain_of(k * dim), [&](int64_t begin, int64_t end) {
    std::vector<P> total(dim);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t a = t * k; a < t * k + k; ++a) {
        check_index(position[a], call.num_rows, "position");
        const T* row = rows + position[a] * dim;
        for (int64_t d = 0; d < dim; ++d) {
          P term = 0;
          if (position[a] >= 0) term = weights == nullptr ? P(row[d]) : times(weights[a], P(row[d]));
          total[d] = a == t * k ? term : plus(total[d], term);
        }
      }
      for (int64_t d = 0; d < dim; ++d) {
        const P sum = residual == nullptr ? total[d] : plus(total[d], P(residual[t * dim + d]));
        out[t * dim + d] = static_cast<T>(sum);
      }
    }
  });
}

Tensor permute_backward(Tensor grad, Tensor position) {
  const SumCall call(grad, position, {}, {});
  with_type(call.rows, "grad", [&](auto zero) { sum_choices<decltype(zero)>(call); });
  return call.out;
}

Tensor combine(Tensor rows, Tensor /*order*/, Tensor position, Tensor weights, MaybeTensor residual) {
  const SumCall call(rows, position, weights, residual);
  with_type(call.rows, "rows", [&](auto zero) { sum_choices<decltype(zero)>(call); });
  return call.out;
}

std::tuple<Tensor, Tensor> combine_backward(
    Tensor grad, Tensor rows, Tensor order, Tensor position, Tensor weights) {
  const CombineBackwardCall call(grad, rows, order, position, weights);
  const int64_t k = call.k, dim = call.dim;
  with_type(call.rows, "rows", [&](auto zero) {
    using T = decltype(zero);
    using P = precise_t<T>;
    const T* g = data<T>(call.grad);
    const T* z = data<T>(call.rows);
    const P* w = data<P>(call.weights);
    const int64_t* o = data<int64_t>(call.order);
    const int64_t* p = data<int64_t>(call.position);
    T* grad_rows = mutable_data<T>(call.grad_rows);
    P* grad_weights = mutable_data<P>(call.grad_weights);
    parallel_for(0, call.num_rows, grain_of(dim), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        check_index(o[r], call.tokens * k, "order");
        for (int64_t d = 0; d < dim; ++d) {
          grad_rows[r * dim + d] = o[r] < 0 ? T(0.0f) : static_cast<T>(times(P(g[o[r] / k * dim + d]), w[o[r]]));
        }
      }
    });
    parallel_for(0, call.tokens * k, grain_of(dim), [&](int64_t begin, int64_t end) {
      for (int64_t a = begin; a < end; ++a) {
        check_index(p[a], call.num_rows, "position");
        P dot = 0;
        for (int64_t d = 0; p[a] >= 0 && d < dim; ++d) dot += P(g[a / k * dim + d]) * P(z[p[a] * dim + d]);
        grad_weights[a] = dot;
      }
    });
  });
  return {call.grad_rows, call.grad_weights};
}

Tensor swiglu(Tensor gate_up) {
  const SwigluCall call(gate_up, {});
  const int64_t hidden = call.hidden;
  with_type(call.gate_up, "gate_up", [&](auto zero) {
    using T = decltype(zero);
    using P = precise_t<T>;
    const T* from = data<T>(call.gate_up);
    T* to = mutable_data<T>(call.out);
    parallel_for(0, call.rows, grain_of(8 * hidden), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t h = 0; h < hidden; ++h) {
          const P g = P(from[2 * r * hidden + h]), u = P(from[(2 * r + 1) * hidden + h]);
          to[r * hidden + h] = static_cast<T>(g / (P(1) + exponential(-g)) * u);
        }
      }
    });
  });
  return call.out;
}

Tensor swiglu_backward(Tensor grad, Tensor gate_up) {
  const SwigluCall call(gate_up, grad);
  const int64_t hidden = call.hidden;
  with_type(call.gate_up, "gate_up", [&](auto zero) {
    using T = decltype(zero);
    using P = precise_t<T>;
    const T* from = data<T>(call.gate_up);
    const T* above = data<T>(*call.grad);
    T* to = mutable_data<T>(call.out);
    parallel_for(0, call.rows, grain_of(8 * hidden), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        for (int64_t h = 0; h < hidden; ++h) {
          const int64_t first = 2 * r * hidden + h, second = first + hidden;
          const P g = P(from[first]), u = P(from[second]), dy = P(above[r * hidden + h]);
          const P sigmoid = P(1) / (P(1) + exponential(-g));
          to[first] = static_cast<T>(dy * u * sigmoid * (P(1) + g * (P(1) - sigmoid)));
          to[second] = static_cast<T>(dy * g * sigmoid);
        }
      }
    });
  });
  return call.out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(medplib, CPU, m) {
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
}

}  // namespace medplib
