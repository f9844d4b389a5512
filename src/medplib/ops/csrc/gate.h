// The arithmetic that CPU and CUDA kernels share, one token at a time: ordering of numbers, the counter-based
// hash, the choice of the best experts, its gradient.
//
// E experts, K experts per token.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEDPLIB_BOTH __host__ __device__ __forceinline__
#else
#define MEDPLIB_BOTH inline
#endif

namespace medplib {

// Products and sums that no compiler may fuse (the CPU library is compiled with -ffp-contract=off).
#if defined(__CUDA_ARCH__)
MEDPLIB_BOTH float times(float a, float b) { return __fmul_rn(a, b); }
MEDPLIB_BOTH double times(double a, double b) { return __dmul_rn(a, b); }
MEDPLIB_BOTH float plus(float a, float b) { return __fadd_rn(a, b); }
MEDPLIB_BOTH double plus(double a, double b) { return __dadd_rn(a, b); }
#else
MEDPLIB_BOTH float times(float a, float b) { return a * b; }
MEDPLIB_BOTH double times(double a, double b) { return a * b; }
MEDPLIB_BOTH float plus(float a, float b) { return a + b; }
MEDPLIB_BOTH double plus(double a, double b) { return a + b; }
#endif

MEDPLIB_BOTH float exponential(float x) { return expf(x); }
MEDPLIB_BOTH double exponential(double x) { return exp(x); }
MEDPLIB_BOTH float logarithm(float x) { return logf(x); }
MEDPLIB_BOTH double logarithm(double x) { return log(x); }

// A whole number that orders as the float does: NaN above all, -0 equal to 0.
MEDPLIB_BOTH int64_t order_key(float x) {
  if (x != x) return INT64_MAX;
  if (x == 0) return 0;
  int32_t bits = 0;
  memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 31) & INT32_MAX);
}

MEDPLIB_BOTH int64_t order_key(double x) {
  if (x != x) return INT64_MAX;
  if (x == 0) return 0;
  int64_t bits = 0;
  memcpy(&bits, &x, sizeof(bits));
  return bits ^ ((bits >> 63) & INT64_MAX);
}

// splitmix64 (Steele, Lea and Flood, 2014).
MEDPLIB_BOTH uint64_t mix_bits(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9ull;
  bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBull;
  return bits ^ (bits >> 31);
}

// The hash of a counter under a seed, 0 <= hash < 2^63.
MEDPLIB_BOTH int64_t counter_hash(int64_t seed, int64_t counter) {
  const uint64_t key = mix_bits(static_cast<uint64_t>(seed));
  return static_cast<int64_t>(mix_bits(key + static_cast<uint64_t>(counter + 1) * 0x9E3779B97F4A7C15ull) >> 1);
}

// The bucket of an assignment: its expert, or E if it is dropped.
MEDPLIB_BOTH int64_t bucket_of(int64_t expert, int64_t num_experts) {
  return expert >= 0 && expert < num_experts ? expert : num_experts;
}

struct GateShape {
  int64_t tokens;
  int num_experts;
  int k;
  bool sigmoid;
  bool renormalize;
};

// The K best of E scores, the best first; of equal scores the lowest index.
template <class T>
MEDPLIB_BOTH void choose_best(const T* scores, int num_experts, int k, int64_t* experts) {
  int64_t last_key = 0;
  int last = -1;
  for (int choice = 0; choice < k; ++choice) {
    int best = -1;
    int64_t best_key = 0;
    for (int expert = 0; expert < num_experts; ++expert) {
      const int64_t key = order_key(scores[expert]);
      const bool open = last < 0 || key < last_key || (key == last_key && expert > last);
      if (open && (best < 0 || key > best_key)) {
        best = expert;
        best_key = key;
      }
    }
    experts[choice] = best;
    last = best;
    last_key = best_key;
  }
}

// One token: logits (E,), selection (E,) -> probabilities (E,), experts (K,), weights (K,).
template <class T>
MEDPLIB_BOTH void gate_token(
    const GateShape& shape, const T* logits, const T* selection, bool hidden, T* probabilities,
    int64_t* experts, T* weights) {
  const int num_experts = shape.num_experts;
  if (hidden) {
    for (int expert = 0; expert < num_experts; ++expert) probabilities[expert] = 0;
    for (int choice = 0; choice < shape.k; ++choice) {
      experts[choice] = num_experts;
      weights[choice] = 0;
    }
    return;
  }
  if (shape.sigmoid) {
    for (int expert = 0; expert < num_experts; ++expert) {
      probabilities[expert] = T(1) / (T(1) + exponential(-logits[expert]));
    }
  } else {
    T largest = logits[0];
    for (int expert = 1; expert < num_experts; ++expert) {
      if (logits[expert] > largest || logits[expert] != logits[expert]) largest = logits[expert];
    }
    T total = 0;
    for (int expert = 0; expert < num_experts; ++expert) {
      probabilities[expert] = exponential(logits[expert] - largest);
      total += probabilities[expert];
    }
    for (int expert = 0; expert < num_experts; ++expert) probabilities[expert] /= total;
  }
  choose_best(selection, num_experts, shape.k, experts);
  T total = 0;
  for (int choice = 0; choice < shape.k; ++choice) {
    weights[choice] = probabilities[experts[choice]];
    total += weights[choice];
  }
  if (shape.renormalize && total != 0) {  // sigmoids that are all 0 stay 0
    for (int choice = 0; choice < shape.k; ++choice) weights[choice] /= total;
  }
}

template <class T>
struct TokenStatistics {
  T entropy, margin, square;
};

// The entropy of a token's distribution, its margin, and the square of its logsumexp.
template <class T>
MEDPLIB_BOTH TokenStatistics<T> token_statistics(const T* logits, const T* probabilities, int num_experts) {
  T total = 0, best = 0, second = 0, largest = logits[0];
  for (int expert = 0; expert < num_experts; ++expert) {
    const T probability = probabilities[expert];
    total += probability;
    if (probability > best) {
      second = best;
      best = probability;
    } else if (probability > second) {
      second = probability;
    }
    if (logits[expert] > largest) largest = logits[expert];
  }
  T entropy = 0, sum = 0;
  for (int expert = 0; expert < num_experts; ++expert) {
    const T share = probabilities[expert] / (total > T(1e-20) ? total : T(1e-20));
    if (share > 0) entropy -= share * logarithm(share);
    sum += exponential(logits[expert] - largest);
  }
  const T logsumexp = largest + logarithm(sum);
  return {entropy, best - second, logsumexp * logsumexp};
}

// One token: gradients of its probabilities (E,) and weights (K,), either may be absent -> of its logits (E,).
template <class T>
MEDPLIB_BOTH void gate_token_backward(
    const GateShape& shape, const T* grad_probabilities, const T* grad_weights, const T* probabilities,
    const int64_t* experts, T* grad_logits) {
  const int num_experts = shape.num_experts;
  for (int expert = 0; expert < num_experts; ++expert) {
    grad_logits[expert] = grad_probabilities == nullptr ? T(0) : grad_probabilities[expert];
  }
  if (grad_weights != nullptr) {
    T total = 1, shared = 0;
    if (shape.renormalize) {
      total = 0;
      for (int choice = 0; choice < shape.k; ++choice) {
        if (bucket_of(experts[choice], num_experts) < num_experts) total += probabilities[experts[choice]];
      }
      if (total == 0) total = 1;
      for (int choice = 0; choice < shape.k; ++choice) {
        if (bucket_of(experts[choice], num_experts) < num_experts) {
          shared += grad_weights[choice] * (probabilities[experts[choice]] / total / total);
        }
      }
    }
    for (int choice = 0; choice < shape.k; ++choice) {
      if (bucket_of(experts[choice], num_experts) < num_experts) {
        grad_logits[experts[choice]] += grad_weights[choice] / total - shared;
      }
    }
  }
  if (shape.sigmoid) {
    for (int expert = 0; expert < num_experts; ++expert) {
      grad_logits[expert] *= probabilities[expert] * (T(1) - probabilities[expert]);
    }
    return;
  }
  T dot = 0;
  for (int expert = 0; expert < num_experts; ++expert) dot += probabilities[expert] * grad_logits[expert];
  for (int expert = 0; expert < num_experts; ++expert) {
    grad_logits[expert] = probabilities[expert] * (grad_logits[expert] - dot);
  }
}

}  // namespace medplib
