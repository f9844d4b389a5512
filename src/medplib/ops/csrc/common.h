// Tensors of the libtorch stable ABI as the CPU and the CUDA kernels use them: checked, contiguous, allocated.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

namespace medplib {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The type that sums are taken in.
template <class T>
struct Precise {
  using type = float;
};
template <>
struct Precise<double> {
  using type = double;
};
template <class T>
using precise_t = typename Precise<T>::type;

inline Tensor packed(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline MaybeTensor packed(const MaybeTensor& tensor) {
  return tensor ? MaybeTensor(packed(*tensor)) : MaybeTensor();
}

inline int32_t device_type(const Tensor& tensor) {
  int32_t type = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &type));
  return type;
}

// An uninitialised contiguous tensor on the device of `like`.
inline Tensor allocate(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= sizes[axis];
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), code, device_type(like), like.get_device_index(),
      &handle));
  return Tensor(handle);
}

template <class T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const MaybeTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The others, where they are given, lie where `like` does: a kernel would read a wrong address and end the process.
inline void check_devices(const Tensor& like, std::initializer_list<MaybeTensor> others) {
  for (const MaybeTensor& other : others) {
    STD_TORCH_CHECK(
        !other || (device_type(*other) == device_type(like) && other->get_device_index() == like.get_device_index()),
        "medplib: all tensors must be on the same device");
  }
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> sizes, const char* name) {
  bool right = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t axis = 0; right && axis < tensor.dim(); ++axis) {
    right = tensor.size(axis) == *(sizes.begin() + axis);
  }
  STD_TORCH_CHECK(right, "medplib: ", name, " has a shape that does not fit the other arguments");
}

inline void check_dim(const Tensor& tensor, int64_t dim, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dim, "medplib: ", name, " must have ", dim, " dimensions, got ", tensor.dim());
}

inline void check_type(const Tensor& tensor, ScalarType type, const char* name) {
  STD_TORCH_CHECK(
      tensor.scalar_type() == type, "medplib: ", name, " must be ", torch::headeronly::toString(type), ", got ",
      torch::headeronly::toString(tensor.scalar_type()));
}

// Call `use` with a value of the tensor's type: use(float()), use(c10::Half()), ...
template <class Use>
void with_type(const Tensor& tensor, const char* name, Use use) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return use(float());
    case ScalarType::Double:
      return use(double());
    case ScalarType::Half:
      return use(c10::Half());
    case ScalarType::BFloat16:
      return use(c10::BFloat16());
    default:
      STD_TORCH_CHECK(
          false, "medplib: ", name, " must be float32, float64, float16 or bfloat16, got ",
          torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The same for float32 and float64 alone.
template <class Use>
void with_precise_type(const Tensor& tensor, const char* name, Use use) {
  if (tensor.scalar_type() == ScalarType::Double) {
    use(double());
  } else {
    check_type(tensor, ScalarType::Float, name);
    use(float());
  }
}

// The type that numbers of this tensor are summed in.
inline ScalarType precise_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

}  // namespace medplib
