// The CUDA implementations of the operators that cpu/ops.cpp defines.
#include <optional>

#include "../checks.h"
#include "kernels.h"

// Weak: a CPU-only torch does not have it, and the library must load beside that one too.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace lesa {
namespace {

constexpr int64_t kMostColumns = 12000;  // in 48 KiB of shared memory, which no device refuses

Dtype check_dtype(const char* name, const Tensor& tensor) {
  const Dtype dtype = dtype_of(name, tensor);
  require(dtype != Dtype::f64, name,
          " is float64; the CUDA kernels take float32, float16 and bfloat16");
  return dtype;
}

DeviceTerms gather(const Tensor& ring, const Tensor& slots, const Tensor& coefficients,
                   double bias, const Tensor& out) {
  DeviceTerms terms{};
  terms.history = check_ring(ring, slots, &coefficients);
  check_feature("out", out, ring);
  terms.ring = ring.data_ptr();
  terms.size = out.numel();
  terms.ring_slots = ring.size(0);
  terms.slots = static_cast<const int*>(slots.data_ptr());
  terms.coefficients = coefficients.data_ptr();
  terms.wide = coefficients.scalar_type() == ScalarType::Double;
  terms.bias = float(bias);
  return terms;
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  require(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  require(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == 0,
          "torch gives no CUDA stream for the ring's device");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(cudaError_t error) {
  require(error == cudaSuccess, "the CUDA kernel was not launched: ", cudaGetErrorString(error),
          "; build with LESA_CUDA_ARCHS set to this device's architecture");
}

void mix_out(const Tensor& ring, const Tensor& slots, const Tensor& coefficients,
             std::optional<Tensor> latent, double latent_coefficient, double bias, Tensor out) {
  DeviceTerms terms = gather(ring, slots, coefficients, bias, out);
  const Dtype dtype = check_dtype("out", out);
  check_overlap("out", out, ring);
  if (!terms.size) return;
  if (latent && latent_coefficient != 0) {
    check_plain("latent", *latent, out);
    require(same_sizes(*latent, out) && latent->scalar_type() == out.scalar_type(),
            "latent has shape ", Shape{*latent}, "; it must have out's, ", Shape{out},
            ", and its dtype");
    require(!overlap(*latent, out) || latent->data_ptr() == out.data_ptr(),
            "latent and out overlap in memory; pass another out");
    terms.latent = latent->data_ptr();
    terms.latent_weight = float(latent_coefficient);
  }
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  check_launch(launch_mix(dtype, terms, out.data_ptr(), current_stream(out)));
}

void mix_modulate_out(const Tensor& ring, const Tensor& slots, const Tensor& coefficients,
                      double bias, const Tensor& scale, const Tensor& shift, double eps, Tensor out,
                      std::optional<Tensor> feature) {
  const DeviceTerms terms = gather(ring, slots, coefficients, bias, out);
  const Dtype dtype = check_dtype("out", out);
  Modulation m = check_modulation(scale, shift, out, eps);
  check_dtype("scale", scale);
  require(m.columns <= kMostColumns, "out has ", m.columns,
          " columns; the CUDA kernel takes at most ", kMostColumns);
  check_overlap("out", out, ring);
  if (feature) {
    check_feature("feature", *feature, ring);
    check_overlap("feature", *feature, ring);
    require(!overlap(*feature, out), "feature and out overlap in memory; pass another one");
    m.feature = feature->data_ptr();
  }
  if (!terms.size) return;
  const torch::stable::accelerator::DeviceGuard guard(out.get_device_index());
  check_launch(launch_mix_modulate(dtype, terms, m, current_stream(out)));
}

}  // namespace
}  // namespace lesa

STABLE_TORCH_LIBRARY_IMPL(lesa_native, CUDA, library) {
  library.impl("mix_out", TORCH_BOX(&lesa::mix_out));
  library.impl("mix_modulate_out", TORCH_BOX(&lesa::mix_modulate_out));
}
