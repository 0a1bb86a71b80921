// The CPU kernels, compiled once per vector width: kernels_16 runs anywhere, kernels_32 needs AVX2,
// FMA and F16C, kernels_64 AVX-512.
#pragma once

#include "../native.h"

namespace lesa {

struct Kernels {
  int vector_bytes;
  // Elements [begin, end) of h, into `out`; `stream` goes around the caches.
  void (*mix)(Dtype, const Terms&, void* out, bool stream, int64_t begin, int64_t end);
  // Rows [begin, end); `scratch` holds 3 * columns doubles.
  void (*mix_modulate)(Dtype, const Terms&, const Modulation&, int64_t begin, int64_t end,
                       double* scratch);
  // Inner product of elements [begin, end); with ones where b is null.
  double (*dot)(Dtype, const void* a, const void* b, int64_t begin, int64_t end);
};

extern const Kernels kernels_16, kernels_32, kernels_64;

}  // namespace lesa
