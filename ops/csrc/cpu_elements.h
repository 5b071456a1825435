// Vectors of the widest registers that the compiler may use, and the element types of tensors on their way in and out.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "families.h"
#include "problem.h"

namespace polytrope {
namespace {

constexpr int block = 1024;               // elements per pass through a kernel
constexpr int64_t chunk = 32 * block;     // elements per task and per partial sum
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

typedef float FloatVector __attribute__((vector_size(vector_bytes)));
typedef double DoubleVector __attribute__((vector_size(vector_bytes)));
template <class S>
using Vector = std::conditional_t<std::is_same_v<S, float>, FloatVector, DoubleVector>;
template <class S>
constexpr int lanes = vector_bytes / sizeof(S);

template <class V, class S>
POLYTROPE_FUNCTION V load(const S* source) {
  V v;
  std::memcpy(&v, source, sizeof(V));
  return v;
}

template <class V, class S>
POLYTROPE_FUNCTION void store(S* target, V v) {
  std::memcpy(target, &v, sizeof(V));
}

// The sum of the lanes in float64, always in the same order.
template <class V>
POLYTROPE_FUNCTION double fold(V v) {
  using S = std::remove_reference_t<decltype(v[0])>;
  double sum = 0;
  for (int lane = 0; lane < lanes<std::remove_cv_t<S>>; ++lane) sum += double(v[lane]);
  return sum;
}

inline int padded(int count, int width) { return (count + width - 1) / width * width; }

// ---- element types ----

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline uint16_t bfloat16_of(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

inline float float_of_half(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  // Multiplying by 2^112 moves the exponent, subnormal numbers included; infinity and NaN get their exponent back.
  float value = float_of(magnitude) * 5.192296858534828e33f;
  if (magnitude >= 0x0f800000) value = float_of(magnitude | 0x7f800000);
  return float_of(bits_of(value) | uint32_t(half & 0x8000) << 16);
}

inline uint16_t half_of(float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds at 2^-24
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  return uint16_t(half | (bits >> 16 & 0x8000));
}

template <class S>
void read_elements(int type, const void* base, int64_t index, int64_t stride, S* target, int count) {
  switch (type) {
    case type_float32: {
      const float* source = static_cast<const float*>(base) + index;
      if (stride == 1) for (int i = 0; i < count; ++i) target[i] = S(source[i]);
      else for (int i = 0; i < count; ++i) target[i] = S(source[i * stride]);
      return;
    }
    case type_float64: {
      const double* source = static_cast<const double*>(base) + index;
      for (int i = 0; i < count; ++i) target[i] = S(source[i * stride]);
      return;
    }
    case type_bfloat16: {
      const uint16_t* source = static_cast<const uint16_t*>(base) + index;
      if (stride == 1) for (int i = 0; i < count; ++i) target[i] = S(float_of(uint32_t(source[i]) << 16));
      else for (int i = 0; i < count; ++i) target[i] = S(float_of(uint32_t(source[i * stride]) << 16));
      return;
    }
    default: {
      const uint16_t* source = static_cast<const uint16_t*>(base) + index;
      int i = 0;
#ifdef __F16C__
      if constexpr (std::is_same_v<S, float>)
        if (stride == 1)
          for (; i + 8 <= count; i += 8)
            _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
#endif
      for (; i < count; ++i) target[i] = S(float_of_half(source[i * stride]));
    }
  }
}

template <class S>
void write_elements(int type, void* base, int64_t index, int64_t stride, const S* source, int count) {
  switch (type) {
    case type_float32: {
      float* target = static_cast<float*>(base) + index;
      if (stride == 1) for (int i = 0; i < count; ++i) target[i] = float(source[i]);
      else for (int i = 0; i < count; ++i) target[i * stride] = float(source[i]);
      return;
    }
    case type_float64: {
      double* target = static_cast<double*>(base) + index;
      for (int i = 0; i < count; ++i) target[i * stride] = double(source[i]);
      return;
    }
    case type_bfloat16: {
      uint16_t* target = static_cast<uint16_t*>(base) + index;
#ifdef __AVX512BF16__
      if constexpr (std::is_same_v<S, float>)
        if (stride == 1) {
          // Rounds to nearest even as bfloat16_of does, but takes numbers below 2^-126 for 0.
          int i = 0;
          for (; i + 16 <= count; i += 16) {
            const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(source + i));
            std::memcpy(target + i, &rounded, 32);
          }
          for (; i < count; ++i) target[i] = bfloat16_of(source[i]);
          return;
        }
#endif
      if (stride == 1) for (int i = 0; i < count; ++i) target[i] = bfloat16_of(float(source[i]));
      else for (int i = 0; i < count; ++i) target[i * stride] = bfloat16_of(float(source[i]));
      return;
    }
    default: {
      uint16_t* target = static_cast<uint16_t*>(base) + index;
      int i = 0;
#ifdef __F16C__
      if constexpr (std::is_same_v<S, float>)
        if (stride == 1)
          for (; i + 8 <= count; i += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i),
                             _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT));
#endif
      for (; i < count; ++i) target[i * stride] = half_of(float(source[i]));
    }
  }
}

}  // namespace
}  // namespace polytrope
