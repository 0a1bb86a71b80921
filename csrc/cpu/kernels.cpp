// LESA_VECTOR_BYTES and the compiler's flags choose the instruction set. Nothing of the standard
// library is used that the linker could share with a file compiled for less.
#include "kernels.h"

#include "vector.h"

namespace lesa {
namespace {

template <class T>
struct Accumulator { using type = float; };
template <>
struct Accumulator<double> { using type = double; };
template <class T>
using wide = typename Accumulator<T>::type;

template <class W>
constexpr int kLanes = LESA_VECTOR_BYTES / sizeof(W);
constexpr int kUnroll = 4;  // bf16 at 32 bytes: 4 stores fill one cache line

template <int lanes, int vectors>
struct Chunk {
  static constexpr int L = lanes, U = vectors;
};

// Calls f(chunk, i) over [begin, end) in chunks of U vectors, then one vector, then one number.
template <class W, class F>
inline void sweep(int64_t begin, int64_t end, const F& f) {
  constexpr int L = kLanes<W>;
  int64_t i = begin;
  for (; i + kUnroll * L <= end; i += kUnroll * L) f(Chunk<L, kUnroll>{}, i);
  for (; i + L <= end; i += L) f(Chunk<L, 1>{}, i);
  for (; i < end; ++i) f(Chunk<1, 1>{}, i);
}

template <class T>
struct Type {
  using type = T;
};

template <class F>
inline auto with_type(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f(Type<float>{});
    case Dtype::f64: return f(Type<double>{});
    case Dtype::f16: return f(Type<Half>{});
    default: return f(Type<BFloat16>{});
  }
}

// With `pairs`, neighbouring vectors hold the even and the odd numbers of both.
template <bool pairs, int L, int U, class T, class W>
inline void add(vec<W, L> (&sum)[U], const T* from, W weight) {
#pragma GCC unroll 4
  for (int u = 0; u < U; u += 1 + pairs) {
    if constexpr (pairs) {
      add_pair<L>(sum[u], sum[u + 1], from + u * L, weight);
    } else {
      sum[u] += weight * load<W, L>(from + u * L);
    }
  }
}

// The terms with their weights in the accumulator's type.
template <class T>
struct Sum {
  using W = wide<T>;
  const Terms& terms;
  W weights[kMaxHistory + 1];

  explicit Sum(const Terms& t) : terms(t) {
    for (int k = 0; k < t.count; ++k) weights[k] = W(t.weights[k]);
  }

  template <int L, int U, bool pairs = false>
  inline void at(int64_t i, vec<W, L> (&sum)[U]) const {
    for (int u = 0; u < U; ++u) sum[u] = vec<W, L>{} + W(terms.bias);
    for (int k = 0; k < terms.count; ++k) {
      add<pairs, L, U>(sum, static_cast<const T*>(terms.features[k]) + i, weights[k]);
    }
    if (!pairs && terms.latent) {
      with_type(terms.latent_dtype, [&](auto type) {
        using N = typename decltype(type)::type;
        add<false, L, U>(sum, static_cast<const N*>(terms.latent) + i, W(terms.latent_weight));
      });
    }
  }
};

template <bool even_odd, class T>
void mix(const Terms& terms, T* out, bool stream, int64_t begin, int64_t end) {
  using W = wide<T>;
  const Sum<T> h(terms);
  sweep<W>(begin, end, [&](auto chunk, int64_t i) {
    constexpr int L = decltype(chunk)::L, U = decltype(chunk)::U;
    constexpr bool pairs = even_odd && U > 1;
    vec<W, L> sum[U];
    h.template at<L, U, pairs>(i, sum);
#pragma GCC unroll 4
    for (int u = 0; u < U; u += 1 + pairs) {
      if constexpr (pairs) {
        store_pair<L>(out + i + u * L, sum[u], sum[u + 1], stream);
      } else {
        store<L, W>(out + i + u * L, sum[u], L > 1 && stream);
      }
    }
  });
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

template <class T>
void mix(const Terms& terms, T* out, bool stream, int64_t begin, int64_t end) {
  mix<false>(terms, out, stream, begin, end);
}

void mix(const Terms& terms, BFloat16* out, bool stream, int64_t begin, int64_t end) {
  if (terms.latent) return mix<false>(terms, out, stream, begin, end);
  mix<true>(terms, out, stream, begin, end);
}

// sum of f(chunk, i) over one row
template <class W, class F>
inline W total(int64_t columns, const F& f) {
  vec<W, kLanes<W>> lanes{};
  W rest = 0;
  sweep<W>(0, columns, [&](auto chunk, int64_t i) {
    constexpr int L = decltype(chunk)::L, U = decltype(chunk)::U;
    for (int u = 0; u < U; ++u) {
      const auto part = f(Chunk<L, 1>{}, i + u * L);
      if constexpr (L > 1) lanes += part; else rest += part[0];
    }
  });
  for (int l = 0; l < kLanes<W>; ++l) rest += lanes[l];
  return rest;
}

template <class W>
void widen_row(Dtype dtype, const void* from, int64_t offset, int64_t columns, W plus, W* to) {
  with_type(dtype, [&](auto type) {
    const auto* row = static_cast<const typename decltype(type)::type*>(from) + offset;
    sweep<W>(0, columns, [&](auto chunk, int64_t i) {
      constexpr int L = decltype(chunk)::L, U = decltype(chunk)::U;
      for (int u = 0; u < U; ++u) store<L, W>(to + i + u * L, load<W, L>(row + i + u * L) + plus);
    });
  });
}

template <class T>
void mix_row(const Sum<T>& h, int64_t start, int64_t columns, wide<T>* row, T* feature) {
  using W = wide<T>;
  sweep<W>(0, columns, [&](auto chunk, int64_t i) {
    constexpr int L = decltype(chunk)::L, U = decltype(chunk)::U;
    vec<W, L> sum[U];
    h.template at<L, U>(start + i, sum);
    for (int u = 0; u < U; ++u) {
      store<L, W>(row + i + u * L, sum[u]);
      if (feature) store<L, W>(feature + start + i + u * L, sum[u]);
    }
  });
}

template <class W>
inline W root(W x) {
  return sizeof(W) == 8 ? W(__builtin_sqrt(x)) : W(__builtin_sqrtf(float(x)));
}

template <class T>
void mix_modulate(const Terms& terms, const Modulation& m, int64_t begin, int64_t end,
                  double* scratch) {
  using W = wide<T>;
  const Sum<T> h(terms);
  const int64_t columns = m.columns;
  W *row = reinterpret_cast<W*>(scratch), *gain = row + columns, *shift = gain + columns;
  int64_t widened = -1;
  for (int64_t r = begin; r < end; ++r) {
    if (const int64_t sample = r / m.rows_per_sample; sample != widened) {
      widen_row(m.dtype, m.scale, sample * m.stride, columns, W(1), gain);
      widen_row(m.dtype, m.shift, sample * m.stride, columns, W(0), shift);
      widened = sample;
    }
    mix_row(h, r * columns, columns, row, static_cast<T*>(m.feature));
    const W mean = total<W>(columns, [&](auto chunk, int64_t i) {
      return load<W, decltype(chunk)::L>(row + i);
    }) / W(columns);
    const W variance = total<W>(columns, [&](auto chunk, int64_t i) {
      const auto centred = load<W, decltype(chunk)::L>(row + i) - mean;
      return centred * centred;
    }) / W(columns);
    const W inverse = 1 / root(variance + W(m.eps));
    T* out = static_cast<T*>(m.out) + r * columns;
    sweep<W>(0, columns, [&](auto chunk, int64_t i) {
      constexpr int L = decltype(chunk)::L, U = decltype(chunk)::U;
      for (int64_t j = i; j < i + U * L; j += L) {
        const auto normed = (load<W, L>(row + j) - mean) * inverse;
        store<L, W>(out + j, normed * load<W, L>(gain + j) + load<W, L>(shift + j));
      }
    });
  }
}

template <class T>
double dot(const T* a, const T* b, int64_t begin, int64_t end) {
  vec<double, kLanes<double>> lanes[kUnroll]{};
  double rest = 0;
  sweep<double>(begin, end, [&](auto chunk, int64_t i) {
    constexpr int L = decltype(chunk)::L, U = decltype(chunk)::U;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) {
      const auto x = load<double, L>(a + i + u * L);
      const auto part = b ? x * load<double, L>(b + i + u * L) : x;
      if constexpr (L > 1) lanes[u] += part; else rest += part[0];
    }
  });
  for (int u = 1; u < kUnroll; ++u) lanes[0] += lanes[u];
  for (int l = 0; l < kLanes<double>; ++l) rest += lanes[0][l];
  return rest;
}

}  // namespace

#define LESA_JOIN(name, bytes) name##bytes
#define LESA_NAME(bytes) LESA_JOIN(kernels_, bytes)

const Kernels LESA_NAME(LESA_VECTOR_BYTES) = {
    LESA_VECTOR_BYTES,
    [](Dtype dtype, const Terms& terms, void* out, bool stream, int64_t begin, int64_t end) {
      with_type(dtype, [&](auto type) {
        mix(terms, static_cast<typename decltype(type)::type*>(out), stream, begin, end);
      });
    },
    [](Dtype dtype, const Terms& terms, const Modulation& m, int64_t begin, int64_t end,
       double* scratch) {
      with_type(dtype, [&](auto type) {
        mix_modulate<typename decltype(type)::type>(terms, m, begin, end, scratch);
      });
    },
    [](Dtype dtype, const void* a, const void* b, int64_t begin, int64_t end) {
      return with_type(dtype, [&](auto type) {
        using P = const typename decltype(type)::type*;
        return dot(static_cast<P>(a), static_cast<P>(b), begin, end);
      });
    },
};

}  // namespace lesa
