// A latent batch as rows: row = one sample, width = its elements, in one memory order that all operands share.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "half.h"
#include "parallel.h"

namespace hypersd {

using torch::stable::Tensor;

constexpr int64_t kChunk = 1024;         // elements converted and computed at a time: buffers stay in the first cache
constexpr int64_t kGrain = 64 * kChunk;  // elements below which waking a second thread costs more than it gives

enum class Type : int { float64, float32, float16, bfloat16, other };

// torch's dtype codes, asked for once: the stable ABI gives them by function, and asking costs as much as a small kernel.
struct TypeCodes {
  int32_t code[4] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_float16(),
                     aoti_torch_dtype_bfloat16()};
};
inline const TypeCodes& type_codes() {
  static const TypeCodes codes;
  return codes;
}
inline Type type_of(const Tensor& t) {
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  const TypeCodes& known = type_codes();
  for (int i = 0; i < 4; ++i)
    if (known.code[i] == code) return static_cast<Type>(i);
  return Type::other;
}

// Sizes, strides and memory of a tensor, borrowed: valid while the tensor lives.
struct View {
  const int64_t* size;
  const int64_t* stride;
  int64_t dim;
  int64_t numel;
  Type type;
  char* data;

  explicit View(const Tensor& t)
      : size(t.sizes().data()), stride(t.strides().data()), dim(t.dim()), numel(t.numel()), type(type_of(t)),
        data(static_cast<char*>(t.data_ptr())) {}

  bool same_size(const View& o) const {
    return dim == o.dim && std::memcmp(size, o.size, sizeof(int64_t) * dim) == 0;
  }
  bool same_layout(const View& o) const {
    for (int64_t d = 0; d < dim; ++d)
      if (size[d] != 1 && stride[d] != o.stride[d]) return false;
    return true;
  }
  // Whether the elements (of each sample, with samples one after the other) fill memory without gaps, in any order.
  bool dense(bool per_sample) const {
    const int64_t first = per_sample;
    if (numel == 0) return true;
    int64_t expected = 1;
    uint64_t used = 0;
    for (int64_t round = first; round < dim; ++round) {
      for (int64_t d = dim - 1; d >= first; --d) {
        if (!(used >> d & 1) && size[d] != 1 && stride[d] == expected) {
          used |= uint64_t{1} << d;
          expected *= size[d];
          break;
        }
      }
    }
    const int64_t width = per_sample ? numel / size[0] : numel;
    return expected == width && (!per_sample || size[0] == 1 || stride[0] == width);
  }
};

inline Tensor empty_strided(const View& like, const int64_t* stride, Type type) {
  STD_TORCH_CHECK(type != Type::other, "expected a floating-point tensor");
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(
      like.dim, like.size, stride, type_codes().code[static_cast<int>(type)], aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline char* data_of(const Tensor& t) { return static_cast<char*>(t.data_ptr()); }

// Calls run(begin, end) over all elements, in parallel where that pays.
template <class F>
inline void over_elements(int64_t count, const F& run) {
  if (count > kGrain) {
    parallel_for(count, kGrain, run);
  } else if (count > 0) {
    run(0, count);
  }
}

// An output like `x`, and where to compute it: in place, or in a contiguous stand-in copied back at the end when the
// output's memory order does not keep samples apart. (A default-constructed stable Tensor costs two allocations.)
struct Output {
  Tensor result;
  std::optional<Tensor> stand_in;

  Output(const Tensor& x, const View& view, bool per_sample)
      : result(view.dense(per_sample) ? empty_strided(view, view.stride, view.type)
                                      : torch::stable::empty_like(x)) {  // torch's own strides, as the fake says
    if (!view.dense(per_sample) && !View(result).dense(per_sample)) {
      int64_t stride[64], running = 1;
      for (int64_t d = view.dim - 1; d >= 0; --d) stride[d] = running, running *= view.size[d] ? view.size[d] : 1;
      stand_in = empty_strided(view, stride, view.type);
    }
  }
  const Tensor& work() const { return stand_in ? *stand_in : result; }
  Tensor finish() {
    if (stand_in) torch::stable::copy_(result, *stand_in);
    return result;
  }
};

// The data of `t` in the memory order of `layout`: its own, or that of a copy kept in `copy`.
inline const char* matched(const Tensor& t, const View& view, const View& layout, std::optional<Tensor>& copy) {
  if (view.same_layout(layout)) return view.data;
  copy = empty_strided(layout, layout.stride, view.type);
  torch::stable::copy_(*copy, t);
  return data_of(*copy);
}

// The data of input `name` as `matched` gives it, once it is known to be a floating-point CPU tensor of the shape of
// the input called `like`; its dtype goes to `type`.
inline const char* read_input(const Tensor& t, const char* name, const View& shape, const char* like,
                              const View& layout, std::optional<Tensor>& copy, Type& type) {
  const View view(t);
  STD_TORCH_CHECK(view.same_size(shape), name, ": its shape is not that of ", like);
  STD_TORCH_CHECK(view.type != Type::other, name, ": not a floating-point tensor");
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  type = view.type;
  return matched(t, view, layout, copy);
}

// Numbers on the host: float64 or float32, any strides.
struct Numbers {
  View view;

  Numbers(const Tensor& t, const char* name) : view(t) {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
    STD_TORCH_CHECK(view.type == Type::float64 || view.type == Type::float32, name,
                    ": expected float64 or float32");
  }
  double read(int64_t offset) const {
    return view.type == Type::float64 ? reinterpret_cast<const double*>(view.data)[offset]
                                           : reinterpret_cast<const float*>(view.data)[offset];
  }
};

// (columns,), the same for every sample, or (batch, columns).
struct Coefficients : Numbers {
  int64_t rows, row_stride, column_stride;

  Coefficients(const Tensor& t, const char* name, int64_t batch, int64_t columns) : Numbers(t, name) {
    const bool batched = view.dim == 2 && view.size[0] == batch;
    STD_TORCH_CHECK((view.dim == 1 || batched) && view.size[view.dim - 1] == columns, name, ": wrong shape");
    rows = batched && batch > 0 ? batch : 1;
    row_stride = rows > 1 ? view.stride[0] : 0;
    column_stride = view.stride[view.dim - 1];
    bool finite = true;
    for (int64_t row = 0; row < (view.numel ? rows : 0); ++row)
      for (int64_t column = 0; column < columns; ++column) finite = finite && std::isfinite(at(row, column));
    STD_TORCH_CHECK(finite, name, ": expected finite numbers");
  }
  double at(int64_t row, int64_t column) const { return read(row * row_stride + column * column_stride); }
};

// (batch,), or one number for all.
struct Vector : Numbers {
  int64_t stride;

  Vector(const Tensor& t, const char* name, int64_t batch) : Numbers(t, name) {
    STD_TORCH_CHECK(view.dim == 0 || (view.dim == 1 && view.size[0] == batch), name, ": wrong shape");
    stride = view.dim ? view.stride[0] : 0;
  }
  double at(int64_t row) const { return read(row * stride); }
};

template <class C>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr Type value = Type::float32;
};
template <>
struct TypeOf<double> {
  static constexpr Type value = Type::float64;
};

// `count` elements from `offset` on as C: in place when they are C already, else converted into `buffer`.
template <class C>
HYPERSD_INLINE const C* load(const char* data, Type type, int64_t offset, int64_t count, C* HYPERSD_RESTRICT buffer) {
  if (type == TypeOf<C>::value) return reinterpret_cast<const C*>(data) + offset;
  if (type == Type::bfloat16) {
    const uint16_t* HYPERSD_RESTRICT p = reinterpret_cast<const uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_bfloat16(p[i]);
  } else if (type == Type::float16) {
    const uint16_t* HYPERSD_RESTRICT p = reinterpret_cast<const uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_half(p[i]);
  } else if (type == Type::float32) {
    const float* HYPERSD_RESTRICT p = reinterpret_cast<const float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<C>(p[i]);
  } else {
    const double* HYPERSD_RESTRICT p = reinterpret_cast<const double*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) buffer[i] = static_cast<C>(p[i]);
  }
  return buffer;
}

// Where to compute `count` elements: in place when the output is C, else in `buffer`, for `store` to convert.
template <class C>
HYPERSD_INLINE C* target(char* data, Type type, int64_t offset, C* buffer) {
  return type == TypeOf<C>::value ? reinterpret_cast<C*>(data) + offset : buffer;
}
template <class C>
HYPERSD_INLINE void store(char* data, Type type, int64_t offset, int64_t count, const C* HYPERSD_RESTRICT buffer) {
  if (type == TypeOf<C>::value) return;
  if (type == Type::bfloat16) {
    uint16_t* HYPERSD_RESTRICT p = reinterpret_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(static_cast<float>(buffer[i]));
  } else if (type == Type::float16) {
    uint16_t* HYPERSD_RESTRICT p = reinterpret_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = to_half(static_cast<float>(buffer[i]));
  } else {
    float* HYPERSD_RESTRICT p = reinterpret_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = static_cast<float>(buffer[i]);
  }
}

}  // namespace hypersd
