// Small pieces that all CUDA kernels use: packs of numbers that move as 16 bytes, sums over a warp, grids.
#pragma once

#include "gate.h"
#include "launch.cuh"

namespace medplib {

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;
constexpr int64_t MAX_BLOCKS = 0x7fffffff;

// As many T as fill 16 bytes, the widest load.
template <class T>
constexpr int WIDE = 16 / static_cast<int>(sizeof(T));

// N numbers of T, read and written as numbers of the precise type. They stay in the words that memory gave, since
// numbers of 16 bits on their own would take a register each.
template <class T, int N>
struct Pack {
  static constexpr int WORDS = N * static_cast<int>(sizeof(T)) / 4;
  static_assert(WORDS % 4 == 0, "a pack is one number or whole 16 bytes");
  uint32_t words[WORDS];

  __device__ __forceinline__ precise_t<T> operator[](int i) const {
    if constexpr (sizeof(T) == 2) {
      const uint32_t word = words[i / 2];
      if constexpr (std::is_same_v<T, c10::BFloat16>) {
        const uint32_t bits = i % 2 ? word & 0xffff0000u : word << 16;
        float number = 0;
        memcpy(&number, &bits, sizeof(number));
        return number;
      } else {
        return static_cast<float>(T(static_cast<unsigned short>(i % 2 ? word >> 16 : word & 0xffffu), T::from_bits()));
      }
    } else {
      T number = 0;
      memcpy(&number, &words[i * sizeof(T) / 4], sizeof(T));
      return number;
    }
  }

  // Numbers are set in order, 0 first.
  __device__ __forceinline__ void set(int i, precise_t<T> number) {
    const T rounded = static_cast<T>(number);
    if constexpr (sizeof(T) == 2) {
      if (i % 2 == 0) {
        words[i / 2] = rounded.x;
      } else {
        words[i / 2] |= static_cast<uint32_t>(rounded.x) << 16;
      }
    } else {
      memcpy(&words[i * sizeof(T) / 4], &rounded, sizeof(T));
    }
  }
};

template <class T>
struct Pack<T, 1> {
  T number;

  __device__ __forceinline__ precise_t<T> operator[](int) const { return number; }
  __device__ __forceinline__ void set(int, precise_t<T> value) { number = static_cast<T>(value); }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack(const T* from, bool streaming = false) {
  Pack<T, N> pack;
  if constexpr (N == 1) {
    pack.number = *from;
  } else {
    const uint4* source = reinterpret_cast<const uint4*>(from);
#pragma unroll
    for (int i = 0; i < Pack<T, N>::WORDS / 4; ++i) {
      const uint4 words = streaming ? load_streaming(source + i) : source[i];
      pack.words[4 * i] = words.x;
      pack.words[4 * i + 1] = words.y;
      pack.words[4 * i + 2] = words.z;
      pack.words[4 * i + 3] = words.w;
    }
  }
  return pack;
}

template <class T, int N>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, N>& pack, bool streaming = false) {
  if constexpr (N == 1) {
    *to = pack.number;
  } else {
    static_assert(Pack<T, N>::WORDS == 4, "one store of 16 bytes");
    const uint4 words = {pack.words[0], pack.words[1], pack.words[2], pack.words[3]};
    if (streaming) {
      store_streaming(reinterpret_cast<uint4*>(to), words);
    } else {
      store_kept(reinterpret_cast<uint4*>(to), words);
    }
  }
}

// The sum over the lanes of a warp, in every lane, always in the same order.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(FULL, value, offset);
  return value;
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % WARP; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / WARP; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline dim3 grid_of(int64_t x, int64_t y = 1) {
  STD_TORCH_CHECK(x <= MAX_BLOCKS && y <= 65535, "medplib: too many rows for one launch");
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y));
}

// Whether rows of `width` numbers of T, all beginning at these places, can move 16 bytes at a time.
template <class T>
bool is_wide(int64_t width, std::initializer_list<const void*> places) {
  bool wide = width % WIDE<T> == 0;
  for (const void* place : places) wide = wide && reinterpret_cast<uintptr_t>(place) % 16 == 0;
  return wide;
}

// Beyond this many bytes the result will not stay in the cache, and is written past it.
constexpr int64_t CACHE_BYTES = 40ll << 20;

}  // namespace medplib
