// Vectors of L numbers in the compiler's own notation: one source for every instruction set. All is
// local to the file that includes it, since each is compiled for another one.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lesa {
namespace {

struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };

template <class N, int L>
struct Vector {
  typedef N type __attribute__((vector_size(sizeof(N) * L)));
};
template <class N, int L>
using vec = typename Vector<N, L>::type;

template <class To, class From>
inline To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V read(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Around the caches, where the machine can and `to` is aligned: no line is read to be overwritten.
template <class V>
inline void write(void* to, const V& value, bool stream) {
#if defined(__x86_64__)
  if (stream) {
    if constexpr (sizeof(V) == 8) {
      return _mm_stream_si64(static_cast<long long*>(to), reinterpret<long long>(value));
    }
    if constexpr (sizeof(V) == 16) {
      return _mm_stream_si128(static_cast<__m128i*>(to), reinterpret<__m128i>(value));
    }
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32) {
      return _mm256_stream_si256(static_cast<__m256i*>(to), reinterpret<__m256i>(value));
    }
#endif
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      return _mm512_stream_si512(static_cast<__m512i*>(to), reinterpret<__m512i>(value));
    }
#endif
  }
#endif
  std::memcpy(to, &value, sizeof value);
}

// 16 to 32 bits and back; gcc 12 makes 4 instructions of __builtin_convertvector where 1 does.
template <int L>
inline vec<uint32_t, L> extend(const vec<uint16_t, L>& half) {
  using U = vec<uint32_t, L>;
#if defined(__AVX2__)
  if constexpr (L == 8) return reinterpret<U>(_mm256_cvtepu16_epi32(reinterpret<__m128i>(half)));
#endif
#if defined(__AVX512F__)
  if constexpr (L == 16) return reinterpret<U>(_mm512_cvtepu16_epi32(reinterpret<__m256i>(half)));
#endif
  return __builtin_convertvector(half, U);
}

template <int L>
inline vec<uint16_t, L> truncate(const vec<uint32_t, L>& bits) {
  using U = vec<uint16_t, L>;
#if defined(__AVX2__)
  if constexpr (L == 8) {
    const auto whole = reinterpret<__m256i>(bits);
    const auto upper = _mm256_extracti128_si256(whole, 1);
    return reinterpret<U>(_mm_packus_epi32(_mm256_castsi256_si128(whole), upper));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (L == 16) return reinterpret<U>(_mm512_cvtepi32_epi16(reinterpret<__m512i>(bits)));
#endif
  return __builtin_convertvector(bits, U);
}

template <int L>
inline vec<float, L> widen(const vec<uint16_t, L>& half, BFloat16) {
  return reinterpret<vec<float, L>>(extend<L>(half) << 16);
}

// To nearest even, in the upper half of each number's bits.
template <int L>
inline vec<uint32_t, L> round_upper(const vec<float, L>& value) {
  const auto bits = reinterpret<vec<uint32_t, L>>(value);
  const auto even = bits + 0x7fff + ((bits >> 16) & 1);
  return value == value ? even : even * 0 + 0x7fc00000;
}

template <int L>
inline vec<uint16_t, L> narrow(const vec<float, L>& value, BFloat16) {
  return truncate<L>(round_upper<L>(value) >> 16);
}

// 2 L numbers as the even and the odd ones: no shuffle on the way in or out.
template <int L>
inline void add_pair(vec<float, L>& even, vec<float, L>& odd, const BFloat16* from, float weight) {
  using V = vec<float, L>;
  const auto both = read<vec<uint32_t, L>>(from);
  even += weight * reinterpret<V>(both << 16);
  odd += weight * reinterpret<V>(both & 0xffff0000);
}

template <int L>
inline void store_pair(BFloat16* to, const vec<float, L>& even, const vec<float, L>& odd,
                       bool stream) {
  write(to, (round_upper<L>(even) >> 16) | (round_upper<L>(odd) & 0xffff0000), stream);
}

template <int L>
inline vec<float, L> widen(const vec<uint16_t, L>& half, Half) {
#if defined(__F16C__)
  if constexpr (L == 8) {
    return reinterpret<vec<float, L>>(_mm256_cvtph_ps(reinterpret<__m128i>(half)));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    return reinterpret<vec<float, L>>(_mm512_cvtph_ps(reinterpret<__m256i>(half)));
  }
#endif
  using U = vec<uint32_t, L>;
  const U bits = extend<L>(half);
  const U rest = (bits & 0x7fff) << 13, exponent = rest & 0x0f800000;
  const U normal = rest + (exponent == 0x0f800000 ? rest * 0 + 0x70000000 : rest * 0 + 0x38000000);
  const auto tiny = reinterpret<vec<float, L>>(rest + 0x38800000) - 0x1p-14f;
  const U magnitude = exponent == 0 ? reinterpret<U>(tiny) : normal;
  return reinterpret<vec<float, L>>(magnitude | ((bits & 0x8000) << 16));
}

template <int L>
inline vec<uint16_t, L> narrow(const vec<float, L>& value, Half) {
#if defined(__F16C__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  if constexpr (L == 8) {
    return reinterpret<vec<uint16_t, L>>(_mm256_cvtps_ph(reinterpret<__m256>(value), kNearest));
  }
#endif
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    return reinterpret<vec<uint16_t, L>>(_mm512_cvtps_ph(reinterpret<__m512>(value), kNearest));
  }
#endif
  using U = vec<uint32_t, L>;
  const U bits = reinterpret<U>(value), rest = bits & 0x7fffffff;
  const U even = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  // Adding 0.5 puts a subnormal half's last bit into the float's last one: the sum rounds it.
  const U tiny = reinterpret<U>(reinterpret<vec<float, L>>(rest) + 0.5f) - 0x3f000000;
  const U large = rest > 0x7f800000 ? rest * 0 + 0x7e00 : rest * 0 + 0x7c00;
  const U small = rest < 0x38800000 ? tiny : even;
  const U magnitude = rest >= 0x477ff000 ? large : small;
  return truncate<L>(magnitude | ((bits >> 16) & 0x8000));
}

// L numbers of type T as W, float or double.
template <class W, int L, class T>
inline vec<W, L> load(const T* from) {
  if constexpr (sizeof(T) > 2) {
    return __builtin_convertvector(read<vec<T, L>>(from), vec<W, L>);
  } else {
    return __builtin_convertvector(widen<L>(read<vec<uint16_t, L>>(from), T{}), vec<W, L>);
  }
}

// One rounding, to nearest even.
template <int L, class W, class T>
inline void store(T* to, const vec<W, L>& value, bool stream = false) {
  if constexpr (sizeof(T) > 2) {
    write(to, __builtin_convertvector(value, vec<T, L>), stream);
  } else {
    write(to, narrow<L>(value, T{}), stream);
  }
}

}  // namespace
}  // namespace lesa
