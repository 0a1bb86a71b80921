// What an operator refuses, each in one sentence, and what it passes on to a kernel.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>

#include "native.h"

namespace lesa {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

struct Shape {
  const Tensor& tensor;
};

inline std::ostream& operator<<(std::ostream& stream, const Shape& shape) {
  const char* separator = "[";
  for (const int64_t size : shape.tensor.sizes()) {
    stream << separator << size;
    separator = ", ";
  }
  return stream << (shape.tensor.dim() ? "]" : "[]");
}

inline bool same_sizes(const Tensor& a, const Tensor& b, int64_t skipped = 0) {
  if (a.dim() != b.dim() + skipped) return false;
  for (int64_t d = 0; d < b.dim(); ++d) {
    if (a.sizes()[d + skipped] != b.sizes()[d]) return false;
  }
  return true;
}

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    default: break;
  }
  require(false, name, " is of a dtype without a kernel; use float32, float64, float16, bfloat16");
  return Dtype::f32;
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Contiguous, and on the device of `like`.
inline void check_plain(const char* name, const Tensor& tensor, const Tensor& like) {
  require(tensor.is_contiguous(), name, " of shape ", Shape{tensor},
          " is not contiguous in memory; pass ", name, ".contiguous()");
  require(same_device(tensor, like), name, " is on another device; move it to where the ring is");
}

// A tensor of a feature's shape and dtype.
inline void check_feature(const char* name, const Tensor& feature, const Tensor& ring) {
  check_plain(name, feature, ring);
  require(same_sizes(ring, feature, 1), "ring has shape ", Shape{ring}, ", but ", name, " ",
          Shape{feature}, "; the ring must be [K, *", name, ".shape]");
  require(feature.scalar_type() == ring.scalar_type(), name,
          " has another dtype than the ring; they must agree");
}

// K, where ring, slots and coefficients fit together.
inline int check_ring(const Tensor& ring, const Tensor& slots, const Tensor* coefficients) {
  check_plain("ring", ring, ring);
  require(ring.dim() && ring.size(0), "ring has shape ", Shape{ring}, "; it must be [K, ...]");
  check_plain("slots", slots, ring);
  require(slots.scalar_type() == ScalarType::Int, "slots must be int32");
  const int64_t history = slots.numel();
  require(slots.dim() == 1 && history >= 1 && history <= kMaxHistory, "slots has shape ",
          Shape{slots}, "; it must be [K] with K = 1..", kMaxHistory);
  if (coefficients) {
    check_plain("coefficients", *coefficients, ring);
    require(same_sizes(*coefficients, slots), "coefficients has shape ", Shape{*coefficients},
            "; with these slots it must be [", history, "]");
    const auto dtype = coefficients->scalar_type();
    require(dtype == ScalarType::Float || dtype == ScalarType::Double,
            "coefficients must be float32 or float64");
  }
  return int(history);
}

inline int64_t bytes_of(const Tensor& tensor) {
  return tensor.numel() * int64_t(tensor.element_size());
}

inline const char* begin_of(const Tensor& tensor) {
  return static_cast<const char*>(tensor.data_ptr());
}

inline bool overlap(const Tensor& a, const Tensor& b) {
  const char *first = begin_of(a), *second = begin_of(b);
  return first < second + bytes_of(b) && second < first + bytes_of(a);
}

// Whether `out` is one of the ring's slots; half in one is refused.
inline bool check_overlap(const char* name, const Tensor& out, const Tensor& ring) {
  if (!overlap(out, ring)) return false;
  const int64_t offset = begin_of(out) - begin_of(ring);
  require(offset % bytes_of(out) == 0, name, " begins ", offset,
          " bytes into the ring, whose slots have ", bytes_of(out),
          "; pass one of its slots or a tensor outside it");
  return true;
}

// The shape of a modulated feature: rows of the last dimension, scale and shift per sample.
inline Modulation check_modulation(const Tensor& scale, const Tensor& shift, const Tensor& out,
                                   double eps) {
  require(out.dim() >= 2, "out has shape ", Shape{out}, "; modulated features are [B, ..., C]");
  Modulation m{};
  const int64_t samples = out.size(0);
  m.columns = out.size(out.dim() - 1);
  m.rows = m.columns ? out.numel() / m.columns : 0;
  m.rows_per_sample = samples ? m.rows / samples : 0;
  for (const Tensor* row : {&scale, &shift}) {
    const char* name = row == &scale ? "scale" : "shift";
    require(row->dim() == 2 && row->size(0) == samples && row->size(1) == m.columns, name,
            " has shape ", Shape{*row}, "; it must be [", samples, ", ", m.columns, "]");
    require(row->stride(1) == 1 || m.columns <= 1, name, " has a last stride of ", row->stride(1),
            "; its rows must be contiguous");
    require(same_device(*row, out), name, " is on another device; move it to where out is");
  }
  m.dtype = dtype_of("scale", scale);
  require(m.dtype == dtype_of("shift", shift) && scale.stride(0) == shift.stride(0),
          "scale and shift differ in dtype or strides; make them two chunks of one tensor");
  m.scale = scale.data_ptr();
  m.shift = shift.data_ptr();
  m.stride = scale.stride(0);
  m.eps = eps;
  m.out = out.data_ptr();
  m.feature = nullptr;
  return m;
}

}  // namespace lesa
