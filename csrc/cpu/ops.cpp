// The operators of lesa_native and their CPU implementations, on PyTorch's own threads.
#include <algorithm>
#include <atomic>
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

void mix_out(const Tensor& ring, const Tensor& slots, const Tensor& coefficients,
             std::optional<Tensor> latent, double latent_coefficient, double bias, Tensor out) {
  Terms terms = gather(ring, slots, coefficients, bias);
  check_feature("out", out, ring);
  const Dtype dtype = dtype_of("out", out);
  const int64_t size = out.numel(), bytes = bytes_of(out);
  if (!size) return;
  if (latent) add_latent(terms, *latent, latent_coefficient, out, dtype);
  void* to = out.data_ptr();
  const bool in_place = check_overlap("out", out, ring);
  const bool lines = reinterpret_cast<uintptr_t>(to) % 64 == 0;
  const bool stream = !in_place && bytes >= kStreamBytes && lines;
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  share(blocks, (terms.count + 1) * kBlock * (bytes / size), [&](int64_t begin, int64_t end) {
    kernels().mix(dtype, terms, to, stream, begin * kBlock, std::min(end * kBlock, size));
  });
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
  library.def("vector_bytes(int limit=64) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(lesa_native, CPU, library) {
  library.impl("mix_out", TORCH_BOX(&lesa::mix_out));
  library.impl("mix_modulate_out", TORCH_BOX(&lesa::mix_modulate_out));
  library.impl("gram_out", TORCH_BOX(&lesa::gram_out));
}

STABLE_TORCH_LIBRARY_IMPL(lesa_native, CompositeExplicitAutograd, library) {
  library.impl("vector_bytes", TORCH_BOX(&lesa::vector_bytes));
}
