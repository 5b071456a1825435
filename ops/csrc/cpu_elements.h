// Vectors of the widest registers that the compiler may use, and the element types of tensors on their way in and out.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX__)
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

// Whether `store_past_cache` can write here.
inline bool can_pass_cache(const void* target) {
#if defined(__AVX__)
  return reinterpret_cast<uintptr_t>(target) % vector_bytes == 0;
#else
  return false;
#endif
}

// To memory without reading the cache line before; `finish_stores` must follow before another thread reads it.
template <class V>
POLYTROPE_FUNCTION void store_past_cache(void* target, V v) {
#if defined(__AVX512F__)
  __m512i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm512_stream_si512(static_cast<__m512i*>(target), bits);
#elif defined(__AVX__)
  __m256i bits;
  std::memcpy(&bits, &v, sizeof(bits));
  _mm256_stream_si256(static_cast<__m256i*>(target), bits);
#else
  std::memcpy(target, &v, sizeof(V));
#endif
}

inline void finish_stores() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

// Adds the lanes to float64 sums of their own.
template <class V>
POLYTROPE_FUNCTION void accumulate(V v, double* sums) {
  constexpr int count = sizeof(V) / sizeof(v[0]);
  typedef double Wide __attribute__((vector_size(count * sizeof(double))));
  Wide wide;
  std::memcpy(&wide, sums, sizeof(Wide));
  wide += __builtin_convertvector(v, Wide);
  std::memcpy(sums, &wide, sizeof(Wide));
}

constexpr int padded(int count, int width) { return (count + width - 1) / width * width; }

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

// ---- pairs of vectors of bfloat16 ----

typedef uint32_t WordVector __attribute__((vector_size(vector_bytes)));

// The even and the odd elements of two vectors' worth of bfloat16: which lane an element is in makes no difference.
POLYTROPE_FUNCTION void widen_pair(const uint16_t* source, FloatVector& even, FloatVector& odd) {
  WordVector both, low, high;
  std::memcpy(&both, source, sizeof(both));
  low = both << 16;
  high = both & 0xffff0000u;
  std::memcpy(&even, &low, sizeof(even));
  std::memcpy(&odd, &high, sizeof(odd));
}

// bfloat16_of in each lane, in its upper half; the lower half is left as it comes.
POLYTROPE_FUNCTION WordVector rounded_lanes(FloatVector v) {
  WordVector bits;
  std::memcpy(&bits, &v, sizeof(v));
  return v == v ? bits + ((bits >> 16 & 1) + 0x7fff) : bits | 0x400000;
}

// Rounds what widen_pair has made; the same numbers as bfloat16_of gives.
POLYTROPE_FUNCTION WordVector round_pair(FloatVector even, FloatVector odd) {
#ifdef __AVX512BF16__
  // One instruction rounds, but takes numbers below 2^-126 for 0.
  const __mmask16 small = _mm512_fpclass_ps_mask(__m512(even), 0x20) | _mm512_fpclass_ps_mask(__m512(odd), 0x20);
  if (__builtin_expect(small == 0, 1)) {
    const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(__m512(odd), __m512(even)));
    alignas(64) static constexpr uint16_t interleaved[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                             8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return WordVector(_mm512_permutexvar_epi16(_mm512_load_si512(interleaved), halves));
  }
#endif
  return (rounded_lanes(even) >> 16) | (rounded_lanes(odd) & 0xffff0000u);
}

constexpr int element_size(int type) { return type == type_float64 ? 8 : type == type_float32 ? 4 : 2; }

// ---- runs of elements ----

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

// ---- rows of a matrix ----

// Some columns, from the element `first` of the first row on; `stride`: elements from row to row. Those that kernels do not
// take as they lie, of another type than S or too few for whole vectors, pass through a buffer of rows of
// `buffer_columns`.
template <class S, int buffer_columns>
struct Strip {
  int type, columns;
  int64_t first, stride;

  bool direct() const { return type == (sizeof(S) == 4 ? type_float32 : type_float64) && columns % lanes<S> == 0; }
  // Of what `read` and `place` return.
  int64_t kernel_stride() const { return direct() ? stride : buffer_columns; }
  // Asks for rows that will be read, or written. A load waits for an earlier store whose address ends in the same 12 bits,
  // as rows of x and y often do, and a store for its cache line: fetched before, neither waits for memory.
  template <int written>
  void fetch(const void* base, int64_t row, int rows) const {
    const int size = element_size(type);
    for (int i = 0; i < rows; ++i) {
      const char* const start = static_cast<const char*>(base) + (first + (row + i) * stride) * size;
      for (int byte = 0; byte < columns * size; byte += 64) __builtin_prefetch(start + byte, written);
    }
  }
  // Whole vectors, in the buffer padded with zeros.
  const S* read(const void* base, int64_t row, int rows, S* buffer) const {
    if (direct()) return static_cast<const S*>(base) + first + row * stride;
    for (int i = 0; i < rows; ++i) {
      S* const target = buffer + i * buffer_columns;
      read_elements(type, base, first + (row + i) * stride, 1, target, columns);
      for (int c = columns; c < padded(columns, lanes<S>); ++c) target[c] = S(0);
    }
    return buffer;
  }
  // Where to put results, which `write` then brings to their place if it is the buffer.
  S* place(void* base, int64_t row, S* buffer) const {
    return direct() ? static_cast<S*>(base) + first + row * stride : buffer;
  }
  void write(void* base, int64_t row, int rows, const S* buffer) const {
    for (int i = 0; !direct() && i < rows; ++i)
      write_elements(type, base, first + (row + i) * stride, 1, buffer + i * buffer_columns, columns);
  }
};

}  // namespace
}  // namespace polytrope
