// For hosts where Triton cannot compile. fp32 accumulation, one rounding at the store.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace lesa {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 4;
template <int K>
constexpr int kBlocks = K > 8 ? 1 : 4;

// N numbers that begin at a multiple of 16 bytes, or of their size where that is less.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T values[N];
};

template <class T, int N>
__device__ Pack<T, N> fetch(const T* from) {  // read once: the first cache is spared
  Pack<T, N> pack;
  if constexpr (sizeof pack == 16) {
    int4 bits;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w) : "l"(from));
    memcpy(&pack, &bits, sizeof pack);
  } else {
    pack = *reinterpret_cast<const Pack<T, N>*>(from);
  }
  return pack;
}

__device__ float wide(float x) { return x; }
__device__ float wide(__half x) { return __half2float(x); }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void round_to(float x, float& to) { to = x; }
__device__ void round_to(float x, __half& to) { to = __float2half_rn(x); }
__device__ void round_to(float x, __nv_bfloat16& to) { to = __float2bfloat16_rn(x); }

// Each thread keeps the K pointers and weights of its launch in registers.
template <class T, int K>
struct Sum {
  const T* features[K];
  float weights[K];
  const T* latent;
  float latent_weight, bias;

  __device__ explicit Sum(const DeviceTerms& terms)
      : latent(static_cast<const T*>(terms.latent)),
        latent_weight(terms.latent_weight),
        bias(terms.bias) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const bool used = k < terms.history;  // K is rounded up
      int64_t slot = used ? terms.slots[k] : 0;
      weights[k] = !used ? 0.f
                   : terms.wide ? float(static_cast<const double*>(terms.coefficients)[k])
                                : static_cast<const float*>(terms.coefficients)[k];
      if (slot < 0 || slot >= terms.ring_slots) {  // seen in the result, and no stray read
        slot = 0;
        weights[k] = __int_as_float(0x7fc00000);
      }
      features[k] = static_cast<const T*>(terms.ring) + slot * terms.size;
    }
  }

  // kGroup loads are under way before their first product; what has no weight is not read, NaN or
  // not.
  template <int N>
  __device__ void at(int64_t i, float (&sum)[N]) const {
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] = bias;
    if (latent) add(fetch<T, N>(latent + i), latent_weight, sum);
#pragma unroll
    for (int first = 0; first < K; first += kGroup) {
      Pack<T, N> packs[kGroup]{};
#pragma unroll
      for (int k = first; k < K && k < first + kGroup; ++k) {
        if (weights[k] != 0.f) packs[k - first] = fetch<T, N>(features[k] + i);
      }
#pragma unroll
      for (int k = first; k < K && k < first + kGroup; ++k) add(packs[k - first], weights[k], sum);
    }
  }

  template <int N>
  static __device__ void add(const Pack<T, N>& pack, float weight, float (&sum)[N]) {
#pragma unroll
    for (int n = 0; n < N; ++n) sum[n] = fmaf(weight, wide(pack.values[n]), sum[n]);
  }
};

template <class T, int N>
__device__ void write(T* to, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int n = 0; n < N; ++n) round_to(values[n], pack.values[n]);
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

template <class T, int K, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<K>) mix(const DeviceTerms terms, T* out) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * N;
  if (i >= terms.size) return;
  float sum[N];
  Sum<T, K>(terms).template at<N>(i, sum);
  write(out + i, sum);
}

__device__ float block_sum(float x, float* shared) {
  for (int d = 16; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = shared[threadIdx.x % (kThreads / 32)];
  for (int d = kThreads / 64; d; d /= 2) x += __shfl_xor_sync(~0u, x, d);
  return x;
}

template <class S, int N>
__device__ void widen(const void* row, int64_t place, float (&to)[N]) {
  const S* from = static_cast<const S*>(row) + place;
  const Pack<S, N> pack = *reinterpret_cast<const Pack<S, N>*>(from);
#pragma unroll
  for (int n = 0; n < N; ++n) to[n] = wide(pack.values[n]);
}

template <int N>
__device__ void widen(Dtype dtype, const void* row, int64_t place, float (&to)[N]) {
  switch (dtype) {
    case Dtype::f16: return widen<__half, N>(row, place, to);
    case Dtype::bf16: return widen<__nv_bfloat16, N>(row, place, to);
    default: return widen<float, N>(row, place, to);
  }
}

// One block per row, which stays in shared memory in fp32. A thread meets its own numbers only, and
// they lie `width` apart, so that a warp's accesses fall into different banks.
template <class T, int K, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<K>)
    mix_modulate(const DeviceTerms terms, const Modulation m) {
  extern __shared__ float row[];
  __shared__ float partial[kThreads / 32];
  const int width = int(m.columns) / N;
  const int64_t start = int64_t(blockIdx.x) * m.columns;
  const int64_t sample = blockIdx.x / m.rows_per_sample * m.stride;
  Sum<T, K> h(terms);
  h.latent = nullptr;  // has another shape where a feature has a norm: registers saved
  float total = 0.f, square = 0.f;
  for (int j = threadIdx.x; j < width; j += kThreads) {
    float sum[N];
    h.template at<N>(start + j * N, sum);
    if (m.feature) write(static_cast<T*>(m.feature) + start + j * N, sum);
#pragma unroll
    for (int n = 0; n < N; ++n) total += row[n * width + j] = sum[n];
  }
  const float mean = block_sum(total, partial) / float(m.columns);
  for (int j = threadIdx.x; j < width; j += kThreads) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const float centred = row[n * width + j] - mean;
      square = fmaf(centred, centred, square);
    }
  }
  const float inverse = rsqrtf(block_sum(square, partial) / float(m.columns) + float(m.eps));
  for (int j = threadIdx.x; j < width; j += kThreads) {
    float gain[N], result[N];
    widen<N>(m.dtype, m.scale, sample + j * N, gain);
    widen<N>(m.dtype, m.shift, sample + j * N, result);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      result[n] = fmaf((row[n * width + j] - mean) * inverse, 1.f + gain[n], result[n]);
    }
    write(static_cast<T*>(m.out) + start + j * N, result);
  }
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

int64_t bytes_of(Dtype dtype, int64_t count) { return count * (dtype == Dtype::f32 ? 4 : 2); }

// K rounded up to a compiled one, 16 bytes or one number per access.
template <class T, class F>
cudaError_t with_history(int history, bool packed, const F& f) {
  constexpr int kPack = 16 / sizeof(T);
  if (history > kMaxHistory) return cudaErrorInvalidValue;
  if (!packed) return history <= 4 ? f.template run<T, 4, 1>() : f.template run<T, 16, 1>();
  if (history == 1) return f.template run<T, 1, kPack>();
  if (history == 2) return f.template run<T, 2, kPack>();
  if (history == 3) return f.template run<T, 3, kPack>();
  if (history == 4) return f.template run<T, 4, kPack>();
  return history <= 8 ? f.template run<T, 8, kPack>() : f.template run<T, 16, kPack>();
}

template <class F>
cudaError_t dispatch(Dtype dtype, int history, bool packed, const F& f) {
  switch (dtype) {
    case Dtype::f32: return with_history<float>(history, packed, f);
    case Dtype::f16: return with_history<__half>(history, packed, f);
    case Dtype::bf16: return with_history<__nv_bfloat16>(history, packed, f);
    default: return cudaErrorInvalidValue;
  }
}

struct Mix {
  const DeviceTerms& terms;
  void* out;
  cudaStream_t stream;

  template <class T, int K, int N>
  cudaError_t run() const {
    const int64_t blocks = (terms.size + int64_t(kThreads) * N - 1) / (int64_t(kThreads) * N);
    mix<T, K, N><<<unsigned(blocks), kThreads, 0, stream>>>(terms, static_cast<T*>(out));
    return cudaGetLastError();
  }
};

struct MixModulate {
  const DeviceTerms& terms;
  const Modulation& m;
  cudaStream_t stream;

  template <class T, int K, int N>
  cudaError_t run() const {
    const unsigned bytes = unsigned(m.columns * sizeof(float));
    mix_modulate<T, K, N><<<unsigned(m.rows), kThreads, bytes, stream>>>(terms, m);
    return cudaGetLastError();
  }
};

}  // namespace

cudaError_t launch_mix(Dtype dtype, const DeviceTerms& terms, void* out, cudaStream_t stream) {
  const bool packed = bytes_of(dtype, terms.size) % 16 == 0 && aligned(terms.ring) &&
                      aligned(terms.latent) && aligned(out);
  return dispatch(dtype, terms.history, packed, Mix{terms, out, stream});
}

cudaError_t launch_mix_modulate(Dtype dtype, const DeviceTerms& terms, const Modulation& m,
                                cudaStream_t stream) {
  const bool rows = bytes_of(m.dtype, m.stride) % 16 == 0 && aligned(m.scale) && aligned(m.shift);
  const bool packed = rows && bytes_of(dtype, m.columns) % 16 == 0 && aligned(terms.ring) &&
                      aligned(m.out) && aligned(m.feature);
  return dispatch(dtype, terms.history, packed, MixModulate{terms, m, stream});
}

}  // namespace lesa
