// What the operators tell the kernels. No torch in here: the kernels compile without it.
#pragma once

#include <cstdint>

namespace lesa {

enum class Dtype { f32, f64, f16, bf16 };

constexpr int kMaxHistory = 16;

// h[i] = sum_t weights[t] * features[t][i] + latent_weight * latent[i] + bias
struct Terms {
  int count = 0;
  const void* features[kMaxHistory + 1];  // of the result's dtype
  double weights[kMaxHistory + 1];
  const void* latent = nullptr;  // only where its dtype is another one
  Dtype latent_dtype = Dtype::f32;
  double latent_weight = 0;
  double bias = 0;
};

// out = layer_norm(h) * (1 + scale) + shift over rows of `columns` numbers
struct Modulation {
  int64_t rows, columns, rows_per_sample;
  const void *scale, *shift;  // one row per sample, `stride` numbers apart
  Dtype dtype;                // of scale and shift
  int64_t stride;
  double eps;
  void* out;
  void* feature;  // where h goes too, or null
};

}  // namespace lesa
