// What the CUDA operators launch. No torch in here: nvcc never sees its headers.
#pragma once

#include <cuda_runtime.h>

#include "../native.h"

namespace lesa {

// As Terms, on the device: slots and coefficients are read there, so that a CUDA graph can replay.
struct DeviceTerms {
  const void* ring;
  int64_t size, ring_slots;  // elements of a slot, number of slots
  const int* slots;
  const void* coefficients;
  bool wide;  // the coefficients are float64
  int history;
  const void* latent;  // of the ring's dtype, or null
  float latent_weight, bias;
};

cudaError_t launch_mix(Dtype, const DeviceTerms&, void* out, cudaStream_t);
cudaError_t launch_mix_modulate(Dtype, const DeviceTerms&, const Modulation&, cudaStream_t);

}  // namespace lesa
