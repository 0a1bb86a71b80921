// The operators of lesa_native and their CPU implementations, on PyTorch's own threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

#include "../checks.h"
#include "kernels.h"

namespace lesa {
namespace {

constexpr int64_t kSerialBytes = 1 << 18;   // less is done before a second thread has woken up
constexpr int64_t kStreamBytes = 8 << 20;   // an output that a cache would not keep anyway
constexpr int64_t kBlock = 1024;            // elements; threads meet at multiples of cache lines
constexpr int64_t kDotBlock = 8192;         // elements; stays in the first cache, fixes the order

const Kernels* widest(int64_t limit) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (limit >= 64 && avx512) return &kernels_64;
  if (limit >= 32 && avx2) return &kernels_32;
#endif
  return &kernels_16;
}

std::atomic<const Kernels*> active{widest(64)};

const Kernels& kernels() { return *active.load(std::memory_order_relaxed); }

int64_t vector_bytes(int64_t limit) {
  active.store(widest(limit));
  return kernels().vector_bytes;
}

// f(begin, end) over [0, count), on several threads where one alone would take long.
template <class F>
void share(int64_t count, int64_t bytes_each, const F& f) {
  if (count * bytes_each <= 2 * kSerialBytes) {
    if (count) f(0, count);
    return;
  }
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, kSerialBytes / bytes_each), f);
}

const char* slot(const Tensor& ring, const Tensor& slots, int k) {
  const int64_t index = static_cast<const int32_t*>(slots.data_ptr())[k];
  require(index >= 0 && index < ring.size(0), "slots[", k, "] is ", index, "; the ring has ",
          ring.size(0), " slots");
  return static_cast<const char*>(ring.data_ptr()) + index * (bytes_of(ring) / ring.size(0));
}

// What has no weight is not read, NaN or not.
Terms gather(const Tensor& ring, const Tensor& slots, const Tensor& coefficients, double bias) {
  const int history = check_ring(ring, slots, &coefficients);
  const void* weights = coefficients.data_ptr();
  const bool single = coefficients.scalar_type() == ScalarType::Float;
  Terms terms;
  terms.bias = bias;
  for (int k = 0; k < history; ++k) {
    const double weight = single ? static_cast<const float*>(weights)[k]
                                 : static_cast<const double*>(weights)[k];
    const char* feature = slot(ring, slots, k);
    if (weight == 0) continue;
    terms.features[terms.count] = feature;
    terms.weights[terms.count++] = weight;
  }
  return terms;
}

void add_latent(Terms& terms, const Tensor& latent, double weight, const Tensor& out, Dtype dtype) {
  check_plain("latent", latent, out);
  require(same_sizes(latent, out), "latent has shape ", Shape{latent}, ", but out ", Shape{out},
          "; they must agree");
  const Dtype own = dtype_of("latent", latent);
  require(!overlap(latent, out) || (own == dtype && latent.data_ptr() == out.data_ptr()),
          "latent and out overlap in memory; pass another out");
  if (weight == 0) return;
  if (own == dtype) {
    terms.features[terms.count] = latent.data_ptr();
    terms.weights[terms.count++] = weight;
  } else {
    terms.latent = latent.data_ptr();
    terms.latent_dtype = own;
    terms.latent_weight = weight;
  }
}

// Writes the sum of the terms to `out`, which may be one of the ring's slots.
void write_mix(const Terms& terms, const Tensor& ring, const Tensor& out, Dtype dtype) {
  const int64_t size = out.numel(), bytes = bytes_of(out);
  void* to = out.data_ptr();
  const bool in_place = check_overlap("out", out, ring);
  const bool lines = reinterpret_cast<uintptr_t>(to) % 64 == 0;
  const bool stream = !in_place && bytes >= kStreamBytes && lines;
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  share(blocks, (terms.count + 1) * kBlock * (bytes / size), [&](int64_t begin, int64_t end) {
    kernels().mix(dtype, terms, to, stream, begin * kBlock, std::min(end * kBlock, size));
  });
}

void mix_out(const Tensor& ring, const Tensor& slots, const Tensor& coefficients,
             std::optional<Tensor> latent, double latent_coefficient, double bias, Tensor out) {
  Terms terms = gather(ring, slots, coefficients, bias);
  check_feature("out", out, ring);
  const Dtype dtype = dtype_of("out", out);
  if (!out.numel()) return;
  if (latent) add_latent(terms, *latent, latent_coefficient, out, dtype);
  write_mix(terms, ring, out, dtype);
}

// The gate of one expert at tau [T]: sum_m base_m silu(z_m) + sum_g spline_gm B_g(z_m) with
// z = tau projection + shift. Cubic B-splines in closed form: four of them are not zero at z.
double gate_value(const Tensor& tau, const Tensor& projection, const Tensor& shift,
                  const Tensor& base, const Tensor& spline, double low, double high) {
  const int64_t inputs = tau.numel(), nodes = shift.numel(), intervals = spline.size(0) - 3;
  const auto* t = static_cast<const float*>(tau.data_ptr());
  const auto* p = static_cast<const float*>(projection.data_ptr());
  const auto* q = static_cast<const float*>(shift.data_ptr());
  const auto* a = static_cast<const float*>(base.data_ptr());
  const auto* c = static_cast<const float*>(spline.data_ptr());
  double alpha = 0;
  for (int64_t m = 0; m < nodes; ++m) {
    double z = q[m];
    for (int64_t i = 0; i < inputs; ++i) z += double(t[i]) * p[i * nodes + m];
    const double place = (std::clamp(z, low, high) - low) * (intervals / (high - low));
    const int64_t g = std::min<int64_t>(int64_t(place), intervals - 1);
    const double u = place - g, v = 1 - u;
    const double basis[4] = {v * v * v, 3 * u * u * (u - 2) + 4, 3 * v * v * (v - 2) + 4, u * u * u};
    for (int j = 0; j < 4; ++j) alpha += basis[j] / 6 * c[(g + j) * nodes + m];
    alpha += a[m] * z / (1 + std::exp(-z));
  }
  return alpha;
}

void check_gate(const Tensor& tau, const Tensor& projection, const Tensor& shift,
                const Tensor& base, const Tensor& spline, double low, double high) {
  for (const Tensor* part : {&tau, &projection, &shift, &base, &spline}) {
    require(part->scalar_type() == ScalarType::Float && part->is_contiguous() && part->is_cpu(),
            "the gate's tensors must be contiguous float32 on the CPU, like tau");
  }
  const int64_t nodes = shift.numel();
  require(tau.dim() == 1 && projection.dim() == 2 && projection.size(0) == tau.size(0) &&
              projection.size(1) == nodes && base.numel() == nodes && spline.dim() == 2 &&
              spline.size(0) > 3 && spline.size(1) == nodes && low < high,
          "the gate's tensors do not fit together: projection has shape ", Shape{projection},
          ", spline ", Shape{spline}, ", tau ", Shape{tau});
}

// out = h + alpha (sum_k weights[k] ring[slots[k]] + bias), h = ring[slots[0]]
void spline_mix_out(const Tensor& ring, const Tensor& slots, const Tensor& weights,
                    const Tensor& tau, const Tensor& projection, const Tensor& shift,
                    const Tensor& base, const Tensor& spline, double low, double high, double bias,
                    Tensor out) {
  Terms terms = gather(ring, slots, weights, bias);
  check_feature("out", out, ring);
  check_gate(tau, projection, shift, base, spline, low, high);
  if (!out.numel()) return;
  const double alpha = gate_value(tau, projection, shift, base, spline, low, high);
  const void* newest = slot(ring, slots, 0);
  terms.bias *= alpha;
  for (int k = 0; k < terms.count; ++k) terms.weights[k] *= alpha;
  int at = 0;
  while (at < terms.count && terms.features[at] != newest) ++at;
  if (at == terms.count) {
    terms.features[terms.count++] = newest;
    terms.weights[at] = 0;
  }
  terms.weights[at] += 1;
  write_mix(terms, ring, out, dtype_of("out", out));
}

void mix_modulate_out(const Tensor& ring, const Tensor& slots, const Tensor& coefficients,
                      double bias, const Tensor& scale, const Tensor& shift, double eps, Tensor out,
                      std::optional<Tensor> feature) {
  const Terms terms = gather(ring, slots, coefficients, bias);
  check_feature("out", out, ring);
  const Dtype dtype = dtype_of("out", out);
  Modulation m = check_modulation(scale, shift, out, eps);
  check_overlap("out", out, ring);
  if (feature) {
    check_feature("feature", *feature, ring);
    check_overlap("feature", *feature, ring);
    require(!overlap(*feature, out), "feature and out overlap in memory; pass another one");
    m.feature = feature->data_ptr();
  }
  const int64_t row_bytes = (terms.count + 1) * m.columns * int64_t(out.element_size());
  share(m.rows, row_bytes, [&](int64_t begin, int64_t end) {
    std::vector<double> scratch(3 * m.columns);
    kernels().mix_modulate(dtype, terms, m, begin, end, scratch.data());
  });
}

// One row of `out` per sample; fixed blocks are added in a fixed order, whatever the threads.
void gram_out(const Tensor& feature, const Tensor& ring, const Tensor& slots,
              std::optional<Tensor> base, Tensor out) {
  const int history = check_ring(ring, slots, nullptr);
  check_feature("feature", feature, ring);
  if (base) check_feature("base", *base, ring);
  check_plain("out", out, ring);
  const int64_t size = feature.numel(), count = history + 2 + (base ? 1 : 0);
  require(out.scalar_type() == ScalarType::Double && out.dim() == 2 && out.size(1) == count &&
              out.size(0) > 0 && size % out.size(0) == 0,
          "out has shape ", Shape{out}, "; it must be float64 [P, ", count,
          "] with P a divisor of ", size);
  const Dtype dtype = dtype_of("feature", feature);
  std::vector<const void*> others = {nullptr, feature.data_ptr()};
  for (int k = 0; k < history; ++k) others.push_back(slot(ring, slots, k));
  if (base) others.push_back(base->data_ptr());
  const int64_t samples = out.size(0), length = size / samples;
  const int64_t blocks = (length + kDotBlock - 1) / kDotBlock;
  std::vector<double> parts(samples * blocks * count);
  const int64_t bytes = count * kDotBlock * int64_t(feature.element_size());
  share(samples * blocks, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sample = i / blocks, from = sample * length + i % blocks * kDotBlock;
      const int64_t to = std::min(from + kDotBlock, (sample + 1) * length);
      for (int64_t j = 0; j < count; ++j) {
        parts[i * count + j] = kernels().dot(dtype, feature.data_ptr(), others[j], from, to);
      }
    }
  });
  double* sums = static_cast<double*>(out.data_ptr());
  std::fill(sums, sums + samples * count, 0.0);
  for (int64_t i = 0; i < samples * blocks * count; ++i) {
    sums[i / (blocks * count) * count + i % count] += parts[i];
  }
}

}  // namespace
}  // namespace lesa

STABLE_TORCH_LIBRARY(lesa_native, library) {
  library.def(
      "mix_out(Tensor ring, Tensor slots, Tensor coefficients, Tensor? latent, "
      "float latent_coefficient, float bias, Tensor(a!) out) -> ()");
  library.def(
      "mix_modulate_out(Tensor ring, Tensor slots, Tensor coefficients, float bias, Tensor scale, "
      "Tensor shift, float eps, Tensor(a!) out, Tensor(b!)? feature=None) -> ()");
  library.def(
      "gram_out(Tensor feature, Tensor ring, Tensor slots, Tensor? base, Tensor(a!) out) -> ()");
  library.def(
      "spline_mix_out(Tensor ring, Tensor slots, Tensor weights, Tensor tau, Tensor projection, "
      "Tensor shift, Tensor base, Tensor spline, float low, float high, float bias, "
      "Tensor(a!) out) -> ()");
  library.def("vector_bytes(int limit=64) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lesa_native, CPU, library) {
  library.impl("mix_out", TORCH_BOX(&lesa::mix_out));
  library.impl("mix_modulate_out", TORCH_BOX(&lesa::mix_modulate_out));
  library.impl("gram_out", TORCH_BOX(&lesa::gram_out));
  library.impl("spline_mix_out", TORCH_BOX(&lesa::spline_mix_out));
}

STABLE_TORCH_LIBRARY_IMPL(lesa_native, CompositeExplicitAutograd, library) {
  library.impl("vector_bytes", TORCH_BOX(&lesa::vector_bytes));
}
