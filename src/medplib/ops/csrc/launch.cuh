// How kernels are started and what they share: the stream, 16-byte packs, sums over a warp.
//
// The guard is a macro so that a test can put in place of this file another one, which runs the same kernels
// thread by thread on the CPU.
#ifndef MEDPLIB_LAUNCH_CUH
#define MEDPLIB_LAUNCH_CUH

#include "common.h"

#include <cuda_runtime.h>

#define MEDPLIB_DEVICE_KEY CUDA

namespace medplib {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) cudaGetLastError();  // else the next launch would report it again
  STD_TORCH_CHECK(error == cudaSuccess, "medplib: ", what, ": ", cudaGetErrorString(error));
}

// Kernels of one call go to the current stream of the device of `like`.
class Launcher {
 public:
  explicit Launcher(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  // Nothing is started for an empty grid.
  template <class... Parameters, class... Arguments>
  void operator()(
      void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, Arguments... arguments) const {
    if (grid.x == 0 || grid.y == 0) return;
    if (shared_bytes > 48 * 1024) {
      check_cuda(
          cudaFuncSetAttribute(
              reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
              static_cast<int>(shared_bytes)),
          "the shared memory of this device is too small");
    }
    kernel<<<grid, threads, shared_bytes, stream_>>>(static_cast<Parameters>(arguments)...);
    check_cuda(cudaGetLastError(), "kernel launch");
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The block's dynamic shared memory.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
}

// Read 16 bytes that are needed once; write 16 bytes in one piece, with or without keeping them in the cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* from) { return __ldcs(from); }
__device__ __forceinline__ void store_kept(uint4* to, uint4 value) { __stwb(to, value); }
__device__ __forceinline__ void store_streaming(uint4* to, uint4 value) { __stcs(to, value); }

}  // namespace medplib

#endif  // MEDPLIB_LAUNCH_CUH
