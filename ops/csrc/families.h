// The mathematics of every activation family, written once: the CPU and the CUDA kernels include this header.
//
// Every function is generic in V, which is one float (CUDA), a vector of floats (CPU, a GCC vector type) or a Dual; in S,
// its element; and in T, an entry of a table: S, or V where each element has a function of its own. A family offers
//   parameters(n, m)   how many packed parameters a group has (problem.h), float64
//   table(n, m)        how many entries its table has
//   sums(n, m)         how many sums over all elements `backward` accumulates
//   prepare(raw, t, share)   packed parameters -> table, in float64 before the last rounding
//   value(x, t)        F(x), from the table alone
//   backward(x, g, t, a)   returns g F'(x) and adds this element's contributions to the sums a, unless these are NoSums
//   finish(sums, raw, grad, share)   sums -> gradient of the packed parameters, in float64; linear in the sums
// Threads of a GPU divide the entries that prepare and finish write among themselves: each of them takes its share.
// n is the degree, m the second degree (of a denominator); where they are constants the compiler unrolls.
#pragma once
#include <math.h>

#include <cstdint>
#include <type_traits>

#include "problem.h"
#ifdef __CUDACC__
#define POLYTROPE_HOST_DEVICE __host__ __device__
#define POLYTROPE_FUNCTION __host__ __device__ __forceinline__
#define POLYTROPE_NOT_INLINE __noinline__
#else
#define POLYTROPE_HOST_DEVICE
#define POLYTROPE_FUNCTION inline __attribute__((always_inline))
#define POLYTROPE_NOT_INLINE __attribute__((noinline))
#endif
#if defined(__CUDA_ARCH__)
#define POLYTROPE_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__) || defined(__clang__)
#define POLYTROPE_UNROLL
#else
#define POLYTROPE_UNROLL _Pragma("GCC unroll 17")
#endif

namespace polytrope {

constexpr int max_degree = 16;
constexpr int max_pieces = 64;

// Family numbers, the same as in ops/families.py.
enum FamilyNumber {
  family_polynomial = 0,
  family_hermite = 1,
  family_chebyshev = 2,
  family_legendre = 3,
  family_fourier = 4,
  family_harmonic = 5,
  family_tropical = 6,
  family_tropical_rational = 7,
  family_rational = 8,
  family_polyrelu = 9,
  family_piecewise_linear = 10,
  family_polynorm = 11,
  family_rational_spline = 12,
};

// What tables have room for.
POLYTROPE_FUNCTION constexpr int largest_degree(int family) {
  return family == family_piecewise_linear || family == family_rational_spline ? max_pieces : max_degree;
}

// An element of a vector; of a number, itself.
template <class T, class = void>
struct ElementOf {
  using type = T;
};
template <class T>
struct ElementOf<T, decltype(void(T{}[0]))> {
  using type = std::remove_reference_t<decltype(T{}[0])>;
};
template <class T>
using Number = typename ElementOf<T>::type;
template <class T>
constexpr bool is_vector = !std::is_same_v<T, Number<T>>;

// 0, or NaN where one of these is: a maximum would pass over it.
POLYTROPE_FUNCTION double nan_among(const double* raw, int count) {
  double found = 0;
  for (int k = 0; k < count; ++k) found = raw[k] == raw[k] ? found : raw[k];
  return found;
}

// Entries first, first + step, …
struct Share {
  int first = 0, step = 1;
};

// 1 / k! for k up to 16.
POLYTROPE_FUNCTION double inverse_factorial(int k) {
  static const double values[] = {
      1.0,       1.0,        1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,        1.0 / 720,        1.0 / 5040,
      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200,
      1.0 / 1307674368000, 1.0 / 20922789888000};
  return values[k];
}

template <class V, class S>
POLYTROPE_FUNCTION V broadcast(S scalar) {
  return V{} + scalar;
}

template <class V>
POLYTROPE_FUNCTION V absolute(V x) {
  return x < 0 ? -x : x;
}

// a > b ? a : b and a < b ? a : b, so b where one of them is NaN: single instructions, which compilers do not find.
template <class V>
POLYTROPE_FUNCTION V larger(V a, V b) {
  return a > b ? a : b;
}
template <class V>
POLYTROPE_FUNCTION V smaller(V a, V b) {
  return a < b ? a : b;
}

// Of floats on a GPU: one instruction, which gives NaN where either is NaN.
#ifdef __CUDACC__
POLYTROPE_FUNCTION float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("max.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return a > b ? a : b;
#endif
}
POLYTROPE_FUNCTION float smaller(float a, float b) {
#ifdef __CUDA_ARCH__
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(a) : "f"(b));
  return a;
#else
  return a < b ? a : b;
#endif
}
#endif

// The largest number of this type that is at most x.
template <class S>
POLYTROPE_FUNCTION S rounded_down(double x) {
  const S near = S(x);
  if constexpr (std::is_same_v<S, float>) return double(near) > x ? nextafterf(near, -INFINITY) : near;
  else return near;
}

// Stands for sums that nobody wants: nothing is computed for them.
struct NoSums {
  struct None {
    template <class V>
    POLYTROPE_FUNCTION void operator+=(V) const {}
  };
  POLYTROPE_FUNCTION None operator[](int) const { return {}; }
  POLYTROPE_FUNCTION NoSums operator+(int) const { return {}; }
};
template <class V, class S>
POLYTROPE_FUNCTION void add_where(V, S, V, NoSums::None) {}

// Adds v to the sum where the indices are k: one masked addition, which compilers do not find.
template <class V, class S>
POLYTROPE_FUNCTION void add_where(V index, S k, V v, V& sum) {
#ifdef __CUDA_ARCH__
  if (index == k) sum += v;
#else
  sum += index == k ? v : V{};
#endif
}

// The entry of a table of n + 1, with room for 16, at the index, which is a whole number: one permutation for 16 entries.
template <class V, class T>
POLYTROPE_FUNCTION V entry(V index, const T* table, int n) {
  using S = Number<T>;
  V found = broadcast<V>(table[0]);
  POLYTROPE_UNROLL
  for (int k = 1; k <= n; ++k) found = index == S(k) ? broadcast<V>(table[k]) : found;
  return found;
}

// These are written in assembly because GCC takes the intrinsics of some of them for accesses to memory, and then keeps no
// sum in a register.
#if defined(__AVX__) && !defined(__CUDACC__)
#define POLYTROPE_LARGER_AND_SMALLER(V)                            \
  POLYTROPE_FUNCTION V larger(V a, V b) {                          \
    __asm__("vmaxps %1, %2, %0" : "=v"(a) : "vm"(b), "v"(a));      \
    return a;                                                      \
  }                                                                \
  POLYTROPE_FUNCTION V smaller(V a, V b) {                         \
    __asm__("vminps %1, %2, %0" : "=v"(a) : "vm"(b), "v"(a));      \
    return a;                                                      \
  }
typedef float Float8 __attribute__((vector_size(32)));
POLYTROPE_LARGER_AND_SMALLER(Float8)
#endif
#if defined(__AVX512F__) && !defined(__CUDACC__)
typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));
POLYTROPE_LARGER_AND_SMALLER(Float16)
POLYTROPE_FUNCTION void add_where(Float16 index, float k, Float16 v, Float16& sum) {
  uint16_t here;
  Float16 total = sum;
  __asm__("vcmpeqps %2, %1, %0" : "=Yk"(here) : "v"(index), "v"(broadcast<Float16>(k)));
  __asm__("vaddps %2, %0, %0 %{%1%}" : "+v"(total) : "Yk"(here), "v"(v));
  sum = total;
}
POLYTROPE_FUNCTION Float16 entry(Float16 index, const float* table, int n) {
  Float16 found, low;
  __builtin_memcpy(&low, table, sizeof(low));
  __asm__("vpermps %2, %1, %0" : "=v"(found) : "v"(__builtin_convertvector(index, Int16)), "v"(low));
  return n < 16 ? found : (index == 16.0f ? broadcast<Float16>(table[16]) : found);
}
// The same of a table of any length, with room for whole vectors: a permutation for each 16 entries.
POLYTROPE_FUNCTION Float16 entry_of_many(Float16 index, const float* table, int n) {
  Float16 found = entry(index, table, 0);
  const Int16 whole = __builtin_convertvector(index, Int16);
  for (int first = 16; first <= n; first += 16) {
    Float16 low;
    __builtin_memcpy(&low, table + first, sizeof(low));
    __asm__("vpermps %1, %2, %0" : "=v"(low) : "v"(low), "v"(whole));  // by the last four bits of each number
    found = index >= float(first) ? low : found;
  }
  return found;
}
#endif

// A number and its derivative with respect to x: gives the tangents of any family from its own `value` and `backward`.
struct Dual {
  double value, slope;
  POLYTROPE_FUNCTION Dual& operator+=(Dual b) { return *this = {value + b.value, slope + b.slope}; }
  POLYTROPE_FUNCTION Dual& operator-=(Dual b) { return *this = {value - b.value, slope - b.slope}; }
  POLYTROPE_FUNCTION Dual& operator*=(Dual b) { return *this = {value * b.value, value * b.slope + slope * b.value}; }
};
POLYTROPE_FUNCTION Dual operator+(Dual a, Dual b) { return {a.value + b.value, a.slope + b.slope}; }
POLYTROPE_FUNCTION Dual operator-(Dual a, Dual b) { return {a.value - b.value, a.slope - b.slope}; }
POLYTROPE_FUNCTION Dual operator-(Dual a) { return {-a.value, -a.slope}; }
POLYTROPE_FUNCTION Dual operator*(Dual a, Dual b) { return {a.value * b.value, a.value * b.slope + a.slope * b.value}; }
POLYTROPE_FUNCTION Dual operator/(Dual a, Dual b) {
  const double ratio = a.value / b.value;
  return {ratio, (a.slope - ratio * b.slope) / b.value};
}
POLYTROPE_FUNCTION Dual operator+(Dual a, double b) { return {a.value + b, a.slope}; }
POLYTROPE_FUNCTION Dual operator-(Dual a, double b) { return {a.value - b, a.slope}; }
POLYTROPE_FUNCTION Dual operator-(double a, Dual b) { return {a - b.value, -b.slope}; }
POLYTROPE_FUNCTION Dual operator*(Dual a, double b) { return {a.value * b, a.slope * b}; }
POLYTROPE_FUNCTION Dual operator*(double a, Dual b) { return b * a; }
POLYTROPE_FUNCTION Dual operator/(double a, Dual b) { return Dual{a, 0} / b; }
POLYTROPE_FUNCTION bool operator<(Dual a, double b) { return a.value < b; }
POLYTROPE_FUNCTION bool operator<=(Dual a, double b) { return a.value <= b; }
POLYTROPE_FUNCTION bool operator>(Dual a, double b) { return a.value > b; }
POLYTROPE_FUNCTION bool operator==(Dual a, double b) { return a.value == b; }
POLYTROPE_FUNCTION bool operator>(Dual a, Dual b) { return a.value > b.value; }
POLYTROPE_FUNCTION bool operator<(Dual a, Dual b) { return a.value < b.value; }
POLYTROPE_FUNCTION bool operator==(Dual a, Dual b) { return a.value == b.value; }

// sum_k p_k x^k by Horner's rule.
struct Polynomial {
  static constexpr int largest_table = 2 * max_degree + 1, largest_sums = max_degree + 1;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return n + 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 2 * n + 1; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return n + 1; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k <= 2 * n; k += share.step) t[k] = S(k <= n ? raw[k] : (k - n) * raw[k - n]);
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    V y = broadcast<V>(t[n]);
    POLYTROPE_UNROLL
    for (int k = n - 1; k >= 0; --k) y = y * x + t[k];
    return y;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    V slope = broadcast<V>(t[n + n]), power = g;
    POLYTROPE_UNROLL
    for (int k = n - 1; k >= 1; --k) slope = slope * x + t[n + k];
    sums[0] += power;
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      power *= x;
      sums[k] += power;
    }
    return g * slope;
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share share = {}) {
    for (int k = share.first; k <= n; k += share.step) gradient[k] = sums[k];
  }
};

// sum_k p_k He_k(x) / k! with the probabilists' Hermite polynomials, evaluated in powers of x.
struct Hermite {
  static constexpr int largest_table = Polynomial::largest_table, largest_sums = Polynomial::largest_sums;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return n + 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 2 * n + 1; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return n + 1; }
  // He_k / k! = sum_i (-1)^i / (2^i i! (k - 2i)!) x^(k - 2i), so p_k contributes to every second power from x^k down.
  POLYTROPE_FUNCTION static double power(const double* raw, int j, int n) {
    double sum = 0, sign = 1;
    for (int k = j, i = 0; k <= n; k += 2, ++i, sign *= -0.5) sum += sign * inverse_factorial(i) * raw[k];
    return sum * inverse_factorial(j);
  }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k <= 2 * n; k += share.step)
      t[k] = S(k <= n ? power(raw, k, n) : (k - n) * power(raw, k - n, n));
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int m) {
    return Polynomial::value(x, t, n, m);
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int m) {
    return Polynomial::backward(x, g, t, sums, n, m);
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share share = {}) {
    for (int k = share.first; k <= n; k += share.step) {
      double sum = 0, sign = 1;
      for (int power = k, i = 0; power >= 0; power -= 2, ++i, sign *= -0.5)
        sum += sign * inverse_factorial(i) * inverse_factorial(power) * sums[power];
      gradient[k] = sum;
    }
  }
};

// p_k = scale(k) q_k with q_{k+1} = a_k x q_k - c_k q_{k-1}; the series in q is summed by Clenshaw's rule, its derivative
// as a series in the same basis. Scales that make a_k 1, or 2, leave two operations for each term.
struct ChebyshevBasis {
  POLYTROPE_FUNCTION static constexpr double a(int k) { return k == 0 ? 1.0 : 2.0; }
  POLYTROPE_FUNCTION static constexpr double c(int) { return 1.0; }
  POLYTROPE_FUNCTION static constexpr double scale(int) { return 1.0; }
  // T'_k = 2k (T_{k-1} + T_{k-3} + …), the T_0 term halved.
  POLYTROPE_FUNCTION static constexpr double derivative(int row, int column) {
    return (row > column && (row - column) % 2 == 1) ? (column == 0 ? 1.0 : 2.0) * row : 0.0;
  }
};

// P_k over its leading coefficient.
struct LegendreBasis {
  POLYTROPE_FUNCTION static constexpr double a(int) { return 1.0; }
  POLYTROPE_FUNCTION static constexpr double c(int k) { return k * k / (4.0 * k * k - 1.0); }
  POLYTROPE_FUNCTION static constexpr double scale(int k) {
    double top = 1, below = 1;
    for (int j = 2; j <= k; ++j) top *= 2.0 * j - 1.0, below *= j;
    return top / below;
  }
  // P'_k = (2k-1) P_{k-1} + (2k-5) P_{k-3} + …
  POLYTROPE_FUNCTION static constexpr double derivative(int row, int column) {
    return (row > column && (row - column) % 2 == 1) ? 2.0 * column + 1.0 : 0.0;
  }
};

template <class Basis>
struct Recurrence {
  static constexpr int largest_table = 2 * max_degree + 1, largest_sums = max_degree + 1;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return n + 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 2 * n + 1; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return n + 1; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k <= 2 * n; k += share.step) {
      const int column = k <= n ? k : k - n - 1;
      double coefficient = k <= n ? raw[k] : 0;
      if (k > n)
        for (int row = column + 1; row <= n; row += 2) coefficient += Basis::derivative(row, column) * raw[row];
      t[k] = S(coefficient * Basis::scale(column));
    }
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V clenshaw(V x, const T* t, int n) {
    using S = Number<T>;
    if (n == 0) return broadcast<V>(t[0]);
    V next = broadcast<V>(t[n]), after = V{};
    POLYTROPE_UNROLL
    for (int k = n - 1; k >= 0; --k) {
      V now = (x * S(Basis::a(k))) * next + (t[k] - S(Basis::c(k + 1)) * after);
      after = next;
      next = now;
    }
    // Where an intermediate result overflows, inf - inf: F is ±inf with the sign of its leading term.
    V leading = t[n] * (n % 2 ? x : absolute(x));
    return next == next ? next : leading * S(INFINITY);
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    return clenshaw(x, t, n);
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    using S = Number<T>;
    V before = g, now = g * x;
    sums[0] += before;
    sums[1] += now;
    POLYTROPE_UNROLL
    for (int k = 1; k < n; ++k) {
      V next = (x * S(Basis::a(k))) * now - S(Basis::c(k)) * before;
      before = now;
      now = next;
      sums[k + 1] += now;
    }
    return g * clenshaw(x, t + n + 1, n - 1);
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share share = {}) {
    for (int k = share.first; k <= n; k += share.step) gradient[k] = sums[k] * Basis::scale(k);
  }
};
using Chebyshev = Recurrence<ChebyshevBasis>;
using Legendre = Recurrence<LegendreBasis>;

// sum_k p_k max(x, 0)^k.
struct PolyReLU {
  static constexpr int largest_table = Polynomial::largest_table, largest_sums = Polynomial::largest_sums;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return n + 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 2 * n + 1; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return n + 1; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int m, Share share = {}) {
    Polynomial::prepare(raw, t, n, m, share);
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int m) {
    return Polynomial::value(larger(V{}, x), t, n, m);
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int m) {
    V slope = Polynomial::backward(larger(V{}, x), g, t, sums, n, m);
    return x <= 0 ? V{} : slope;
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double* raw, double* gradient, int n, int m,
                                        Share share = {}) {
    Polynomial::finish(sums, raw, gradient, n, m, share);
  }
};

// Integers of the size of V's elements.
template <class V>
struct Integers {
  using type = decltype(V{} < V{});
};
template <>
struct Integers<float> {
  using type = int32_t;
};

// x y - turns for turns near x y, as one fused operation gives it. Where there is none (x86 before AVX2): Dekker's product
// (T. J. Dekker, 1971), whose halves of 12 bits multiply exactly.
template <class V, class T>
POLYTROPE_FUNCTION V fraction(V x, T y, V turns) {
#if defined(__x86_64__) && !defined(__FMA__) && !defined(__CUDA_ARCH__)
  const V limited = larger(broadcast<V>(-1e30f), smaller(broadcast<V>(1e30f), x));  // the spread must be finite
  const V product = x * y, spread = limited * 4097.0f, x_high = spread - (spread - limited), x_low = limited - x_high;
  const T y_spread = y * 4097.0f, y_high = y_spread - (y_spread - y), y_low = y - y_high;
  const V error = ((x_high * y_high - product) + x_high * y_low + x_low * y_high) + x_low * y_low;
  return (product - turns) + error;
#else
  return x * y - turns;
#endif
}

// sin πu and cos πu of the turns u = x w - φ, in units of half a circle. w comes as high + low: for |x w| below 2^19 the
// fraction u - n is then exact to an ulp of itself, so the error does not grow with x. Rounding x w may choose
// an n beside the nearest, so u - n may be a little beyond 1/2. Polynomials on [-1/2, 1/2]: absolute error 2.2e-10
// (cosine) and 3.4e-9 (sine) before rounding. ±inf and NaN give NaN; any other result lies in [-1, 1].
template <class V, class T>
POLYTROPE_FUNCTION std::enable_if_t<std::is_same_v<Number<T>, float>> sine_cosine(V x, T high, T low, T phase, V& sine,
                                                                                  V& cosine) {
  // Adding 1.5 * 2^23 leaves no place for a fraction, and the lowest bit says whether the number of half turns is odd.
  const V shifted = (x * high - phase) + 12582912.0f;
  V turns = shifted - 12582912.0f;
  V f = fraction(x, high, turns);
  f = x * low + (f - phase);
  f = larger(broadcast<V>(-0.5625f), smaller(broadcast<V>(0.5625f), f));
  typename Integers<V>::type sign, bits;
  __builtin_memcpy(&sign, &shifted, sizeof(V));
  sign <<= 31;
  V q = f * f;
  V c = q * -0.024396716658671216f + 0.2349375589827164f;
  c = c * q - 1.3352120566732397f;
  c = c * q + 4.0587091643432183f;
  c = c * q - 4.9348021372283841f;
  c = c * q + 0.99999999978065198f;
  V s = q * 0.077222248054117838f - 0.59804644989729883f;
  s = s * q + 2.550031640785322f;
  s = s * q - 5.1677069001945736f;
  s = s * q + 3.1415925805689401f;
  s *= f;
  __builtin_memcpy(&bits, &s, sizeof(V));
  bits ^= sign;
  __builtin_memcpy(&sine, &bits, sizeof(V));
  __builtin_memcpy(&bits, &c, sizeof(V));
  bits ^= sign;
  __builtin_memcpy(&cosine, &bits, sizeof(V));
}

// What sine_cosine takes: half turns in two floats and a phase of at most half a turn.
POLYTROPE_FUNCTION void set_frequency(double w, float& high, float& low) {
  const double half_turns = w * 0.31830988618379067;
  high = float(half_turns);
  low = float(half_turns - high);
}
POLYTROPE_FUNCTION void set_phase(double phase, float& t) { t = float(remainder(phase * 0.31830988618379067, 2.0)); }

// In float64 the C library's sine and cosine of x high - phase, lane by lane.
template <class V, class T>
POLYTROPE_FUNCTION std::enable_if_t<std::is_same_v<Number<T>, double>> sine_cosine(V x, T high, T, T phase, V& sine,
                                                                                   V& cosine) {
  constexpr int lanes = sizeof(V) / sizeof(double);
  V angle = x * high - phase;
  double buffer[lanes], sines[lanes], cosines[lanes];
  __builtin_memcpy(buffer, &angle, sizeof(V));
  for (int lane = 0; lane < lanes; ++lane) {
    sines[lane] = sin(buffer[lane]);
    cosines[lane] = cos(buffer[lane]);
  }
  __builtin_memcpy(&sine, sines, sizeof(V));
  __builtin_memcpy(&cosine, cosines, sizeof(V));
}
inline POLYTROPE_HOST_DEVICE void sine_cosine(Dual x, double high, double, double phase, Dual& sine, Dual& cosine) {
  const Dual angle = x * high - phase;
  const double s = sin(angle.value), c = cos(angle.value);
  sine = {s, c * angle.slope};
  cosine = {c, -s * angle.slope};
}
POLYTROPE_FUNCTION void set_frequency(double w, double& high, double& low) { high = w, low = 0; }
POLYTROPE_FUNCTION void set_phase(double phase, double& t) { t = phase; }

// sine_cosine, to full accuracy, and what it takes.
struct ExactWaves {
  template <class S>
  POLYTROPE_FUNCTION static void set(double w, double phase, S& high, S& low, S& t) {
    set_frequency(w, high, low);
    set_phase(phase, t);
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static void evaluate(V x, T high, T low, T phase, V& sine, V& cosine) {
    sine_cosine(x, high, low, phase, sine, cosine);
  }
};

// bias + sum_k A_k cos(w_k x - φ_k); packed: bias, A[n], w[n], φ[n].
template <class Waves>
struct FourierSeries {
  static constexpr int largest_table = 5 * max_degree + 1, largest_sums = 3 * max_degree + 1;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return 3 * n + 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 5 * n + 1; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return 3 * n + 1; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k <= n; k += share.step) {
      t[k] = S(raw[k]);
      if (k == 0) continue;
      Waves::set(raw[n + k], raw[2 * n + k], t[n + k], t[2 * n + k], t[3 * n + k]);
      t[4 * n + k] = S(raw[k] * raw[n + k]);
    }
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    V y = broadcast<V>(t[0]), sine, cosine;
    POLYTROPE_UNROLL
    for (int k = 0; k < n; ++k) {
      Waves::evaluate(x, t[1 + n + k], t[1 + 2 * n + k], t[1 + 3 * n + k], sine, cosine);
      y += cosine * t[1 + k];
    }
    return y;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    V slope = V{}, sine, cosine;
    sums[0] += g;
    POLYTROPE_UNROLL
    for (int k = 0; k < n; ++k) {
      Waves::evaluate(x, t[1 + n + k], t[1 + 2 * n + k], t[1 + 3 * n + k], sine, cosine);
      sums[1 + k] += g * cosine;
      sine *= g;
      sums[1 + n + k] += sine * x;
      sums[1 + 2 * n + k] += sine;
      slope += sine * t[1 + 4 * n + k];
    }
    return -slope;
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double* raw, double* gradient, int n, int,
                                        Share share = {}) {
    for (int k = share.first; k <= n; k += share.step) {
      gradient[k] = sums[k];
      if (k == 0) continue;
      gradient[n + k] = -raw[k] * sums[n + k];
      gradient[2 * n + k] = raw[k] * sums[2 * n + k];
    }
  }
};

using Fourier = FourierSeries<ExactWaves>;

// bias + sum_k (α_k cos kθ + β_k sin kθ) with θ = w x; packed: bias, w, α[n], β[n]. One sine and cosine for all terms:
// cos (k+1)θ = 2 cos θ cos kθ - cos (k-1)θ.
template <class Waves>
struct HarmonicSeries {
  static constexpr int largest_table = 2 * max_degree + 4, largest_sums = 2 * max_degree + 2;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return 2 * n + 2; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 2 * n + 4; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return 2 * n + 2; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k < 2 * n + 2; k += share.step) {
      t[k < 2 ? k : 2 + k] = S(raw[k]);
      S none;
      if (k == 1) Waves::set(raw[1], 0, t[2], t[3], none);
    }
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    using S = Number<T>;
    V s, c, s_before = V{}, c_before = broadcast<V>(S(1)), y = broadcast<V>(t[0]);
    Waves::evaluate(x, t[2], t[3], T{}, s, c);
    V twice = c + c;
    POLYTROPE_UNROLL
    for (int k = 0; k < n; ++k) {
      y = c * t[4 + k] + (s * t[4 + n + k] + y);
      V c_next = twice * c - c_before, s_next = twice * s - s_before;
      c_before = c;
      s_before = s;
      c = c_next;
      s = s_next;
    }
    return y;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    using S = Number<T>;
    V s, c, s_before = V{}, c_before = g, slope = V{};
    Waves::evaluate(x, t[2], t[3], T{}, s, c);
    V twice = c + c;
    c *= g;
    s *= g;
    sums[0] += g;
    POLYTROPE_UNROLL
    for (int k = 0; k < n; ++k) {
      sums[2 + k] += c;
      sums[2 + n + k] += s;
      slope = c * (S(k + 1) * t[4 + n + k]) + (slope - s * (S(k + 1) * t[4 + k]));
      V c_next = twice * c - c_before, s_next = twice * s - s_before;
      c_before = c;
      s_before = s;
      c = c_next;
      s = s_next;
    }
    sums[1] += slope * x;
    return slope * t[1];
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share share = {}) {
    for (int k = share.first; k < 2 * n + 2; k += share.step) gradient[k] = sums[k];
  }
};
using Harmonic = HarmonicSeries<ExactWaves>;

// Harmonic for degrees up to 8, in fewer operations: with w = cos 2θ, each cos kθ and sin kθ is a polynomial in w, times
// 1, cos θ, sin θ or sin θ cos θ. Up to degree 8 these polynomials have coefficients of at most 8, so powers lose little.
struct HarmonicPowers {
  static constexpr int highest = 8, largest_table = 4 * highest + 5, largest_sums = 2 * highest + 2;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return 2 * n + 2; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 4 * n + 5; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return 2 * n + 2; }
  // visit(packed index of cos kθ, of its slope's coefficient, k or -k, power's place, coefficient) for every term.
  template <class Visit>
  POLYTROPE_FUNCTION static void terms(int n, Visit visit) {
    // p_0 and the two coefficients of p_{-1} of p_{j+1} = 2 w p_j - p_{j-1}.
    constexpr double starts[4][3] = {{1, 0, 1}, {1, 1, 0}, {1, -1, 0}, {2, 0, 0}};
    int place = 0;
    for (int kind = 0; kind < 4; ++kind) {
      const int first = kind == 0 ? 0 : (kind == 3 ? 2 : 1), shift = kind < 2 ? 1 : n + 1;
      double now[highest] = {starts[kind][0]}, before[highest] = {starts[kind][1], starts[kind][2]};
      int count = 0;
      for (int k = first; k <= n; k += 2, ++count) {
        for (int j = 0; j <= count; ++j) visit(k == 0 ? 0 : shift + k, k, place + j, now[j]);
        for (int j = count + 1; j >= 0; --j) {
          const double next = (j > 0 ? 2 * now[j - 1] : 0.0) - before[j];
          before[j] = now[j];
          now[j] = next;
        }
      }
      place += count;
    }
  }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share = {}) {
    double powers[4 * highest + 2] = {};
    terms(n, [&](int index, int k, int place, double coefficient) {
      powers[place] += coefficient * raw[index];
      if (k > 0) powers[2 * n + 1 + place] += coefficient * (index > n + 1 ? -k * raw[index - n] : k * raw[index + n]);
    });
    for (int k = 0; k < 4 * n + 2; ++k) t[k] = S(powers[k]);
    t[4 * n + 2] = S(raw[1]);
    set_frequency(raw[1], t[4 * n + 3], t[4 * n + 4]);
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V series(V w, const T* t, int count) {
    if (count == 0) return V{};
    V y = broadcast<V>(t[count - 1]);
    POLYTROPE_UNROLL
    for (int j = count - 2; j >= 0; --j) y = y * w + t[j];
    return y;
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V combine(V w, V s, V c, const T* t, int n) {
    const int half = n / 2, odd = (n + 1) / 2;
    V even = series(w, t, half + 1) + c * series(w, t + half + 1, odd);
    return even + s * (series(w, t + half + 1 + odd, odd) + c * series(w, t + half + 1 + 2 * odd, half));
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    using S = Number<T>;
    V s, c;
    sine_cosine(x, t[4 * n + 3], t[4 * n + 4], T{}, s, c);
    return combine((c + c) * c - S(1), s, c, t, n);
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    using S = Number<T>;
    V s, c;
    sine_cosine(x, t[4 * n + 3], t[4 * n + 4], T{}, s, c);
    const V slope = g * combine((c + c) * c - S(1), s, c, t + 2 * n + 1, n);
    sums[2 * n + 1] += slope * x;
    add(g, s, c, sums, n);
    return slope * t[4 * n + 2];
  }
  // Adds to all sums but the last, of g x dF/dθ.
  template <class V, class Sums>
  POLYTROPE_FUNCTION static void add(V g, V s, V c, Sums sums, int n) {
    const int half = n / 2, odd = (n + 1) / 2;
    const V w = (c + c) * c - 1.0f, gc = g * c, gs = g * s, gsc = gs * c;
    V power = w;
    sums[0] += g;
    sums[half + 1] += gc;
    sums[half + 1 + odd] += gs;
    if (half > 0) sums[half + 1 + 2 * odd] += gsc;
    POLYTROPE_UNROLL
    for (int j = 1; j <= half; ++j) {
      sums[j] += g * power;
      if (j < odd) sums[half + 1 + j] += gc * power;
      if (j < odd) sums[half + 1 + odd + j] += gs * power;
      if (j < half) sums[half + 1 + 2 * odd + j] += gsc * power;
      if (j < half) power *= w;
    }
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share = {}) {
    for (int k = 0; k < 2 * n + 2; ++k) gradient[k] = 0;
    terms(n, [&](int index, int, int place, double coefficient) { gradient[index] += coefficient * sums[place]; });
    gradient[1] = sums[2 * n + 1];
  }
};

// 1 where a < b, else 0, also where one is NaN. On a GPU without a comparison, whose results the compiler would keep in bits of
// registers until it has loaded more elements; what is between 0 and 2^-126 counts in part.
POLYTROPE_FUNCTION float is_below(float a, float b) {
#ifdef __CUDA_ARCH__
  return __saturatef((b - a) * 8.5070592e37f);
#else
  return a < b ? 1.0f : 0.0f;
#endif
}

// step(k, weight) for every k from 1 to n, of the weight 1 up to the lowest k whose line(k) is the highest of n + 1, and 0
// after it (on a GPU). What is added up with these weights belongs to that k and all below, until `separate` has taken
// away that of the next.
template <class Line, class Step>
POLYTROPE_FUNCTION void climb(int n, Line line, Step step) {
  float highest[max_degree + 1];  // of the lines so far
  highest[0] = line(0);
  POLYTROPE_UNROLL
  for (int k = 1; k <= n; ++k) highest[k] = larger(line(k), highest[k - 1]);
  POLYTROPE_UNROLL
  for (int k = 1; k <= n; ++k) step(k, is_below(highest[k - 1], highest[n]));
}
template <class Sums>
POLYTROPE_FUNCTION void separate(Sums sums, int n) {
  POLYTROPE_UNROLL
  for (int k = 0; k < n; ++k) sums[k] -= sums[k + 1];
}

// (√2 / n) max_k (k x + c_k), k = 0…n. The lowest k wins a tie; F(-∞) = √2 c_0 / n.
struct Tropical {
  static constexpr int largest_table = max_degree + 2, largest_sums = max_degree + 1;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return n + 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return n + 2; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return n + 1; }
  POLYTROPE_FUNCTION static double scale(int n) { return 1.4142135623730951 / n; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k <= n + 1; k += share.step) t[k] = S(k <= n ? raw[k] : scale(n) + nan_among(raw, n + 1));
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    using S = Number<T>;
    V best = broadcast<V>(t[0]);
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      V line = x * S(k) + t[k];
      best = larger(line, best);
    }
    return x == x ? best * t[n + 1] : x;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    using S = Number<T>;
    V best = broadcast<V>(t[0]), slope = V{};
    const V inside = smaller(broadcast<V>(S(1e30)), x);  // beyond, lines overflow and would tie
    if constexpr (std::is_same_v<V, float>) {
      sums[0] += g;
      climb(n, [&](int k) { return k == 0 ? t[0] : inside * float(k) + t[k]; },
            [&](int k, float weight) { sums[k] += weight * g, slope += weight; });
      return x == x ? g * slope * t[n + 1] : x;
    }
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      V line = inside * S(k) + t[k];
      slope = line > best ? broadcast<V>(S(k)) : slope;
      best = larger(line, best);
    }
    POLYTROPE_UNROLL
    for (int k = 0; k <= n; ++k) add_where(slope, S(k), g, sums[k]);
    return x == x ? g * slope * t[n + 1] : x;
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share share = {}) {
    for (int k = share.first; k <= n; k += share.step) gradient[k] = sums[k] * scale(n);
  }
};

// max_k (p_k x + c_k) - max_k (q_k x + d_k); packed: p, c, q, d, each [n + 1]. The lowest k wins a tie. The maxima are
// taken at x limited to ±1e30 and continued linearly, so ±inf gives ±inf or a finite number, not inf - inf.
struct TropicalRational {
  static constexpr int largest_table = 4 * (max_degree + 1), largest_sums = 4 * (max_degree + 1);
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return 4 * (n + 1); }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 4 * (n + 1); }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return 4 * (n + 1); }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    for (int k = share.first; k < 4 * (n + 1); k += share.step) t[k] = S(k ? raw[k] : raw[0] + nan_among(raw, 4 * (n + 1)));
  }
  template <class V, class S>
  POLYTROPE_FUNCTION static V limited(V x) {
    return larger(broadcast<V>(S(-1e30)), smaller(broadcast<V>(S(1e30)), x));
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V maximum(V x, const T* slopes, const T* intercepts, int n) {
    V best = x * slopes[0] + intercepts[0];
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      V line = x * slopes[k] + intercepts[k];
      best = larger(line, best);
    }
    return best;
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    using S = Number<T>;
    V inside = limited<V, S>(x);
    V y = maximum(inside, t, t + n + 1, n) - maximum(inside, t + 2 * (n + 1), t + 3 * (n + 1), n);
    if constexpr (std::is_same_v<V, float>)
      if (x == inside) return y;
    V far = absolute(y) > S(1e20) ? y * (absolute(x) * S(1e-30)) : y;
    return x == inside ? y : far;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V descend(V x, V g, const T* slopes, const T* intercepts, Sums sums, int n) {
    using S = Number<T>;
    if constexpr (std::is_same_v<V, float>) {
      const float weighted = g * x;
      float slope = slopes[0];
      sums[0] += weighted;
      sums[n + 1] += g;
      climb(n, [&](int k) { return x * slopes[k] + intercepts[k]; }, [&](int k, float weight) {
        sums[k] += weight * weighted;
        sums[n + 1 + k] += weight * g;
        slope += weight * (slopes[k] - slopes[k - 1]);
      });
      return slope;
    }
    V best = x * slopes[0] + intercepts[0], index = V{};
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      V line = x * slopes[k] + intercepts[k];
      index = line > best ? broadcast<V>(S(k)) : index;
      best = larger(line, best);
    }
    V product = g * x;
    POLYTROPE_UNROLL
    for (int k = 0; k <= n; ++k) {
      add_where(index, S(k), product, sums[k]);
      add_where(index, S(k), g, sums[n + 1 + k]);
    }
    return entry(index, slopes, n);
  }
  // The slope of the numerator, and from it the result of `backward`: a CPU's registers hold the sums of one of the two.
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V descend_numerator(V x, V g, const T* t, Sums sums, int n) {
    using S = Number<T>;
    return descend(limited<V, S>(x), g, t, t + n + 1, sums, n);
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V descend_denominator(V x, V g, V slope, const T* t, Sums sums, int n) {
    using S = Number<T>;
    slope -= descend(limited<V, S>(x), g, t + 2 * (n + 1), t + 3 * (n + 1), sums + 2 * (n + 1), n);
    return x == x ? g * slope : x;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    return descend_denominator(x, g, descend_numerator(x, g, t, sums, n), t, sums, n);
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int, Share share = {}) {
    for (int k = share.first; k < 4 * (n + 1); k += share.step) gradient[k] = k < 2 * (n + 1) ? sums[k] : -sums[k];
  }
};

// Whether a condition holds for any element.
POLYTROPE_FUNCTION bool any(bool condition) { return condition; }
template <class M>
POLYTROPE_FUNCTION std::enable_if_t<(sizeof(M) > 8), bool> any(M condition) {
#if defined(__AVX512F__) && !defined(__CUDACC__)
  if constexpr (sizeof(M) == 64) return _mm512_test_epi32_mask(__m512i(condition), __m512i(condition)) != 0;
#elif defined(__AVX__) && !defined(__CUDACC__)
  if constexpr (sizeof(M) == 32) return _mm256_movemask_ps(__m256(condition)) != 0;
#endif
  uint64_t words[sizeof(M) / 8], all = 0;
  __builtin_memcpy(words, &condition, sizeof(M));
  for (uint64_t word : words) all |= word;
  return all != 0;
}

// A number of a table: its own of an element, or the same for all.
template <class S>
POLYTROPE_FUNCTION std::enable_if_t<!is_vector<S>, S> number_of(S number, int) {
  return number;
}
template <class V>
POLYTROPE_FUNCTION std::enable_if_t<is_vector<V>, Number<V>> number_of(V numbers, int lane) {
  return numbers[lane];
}

// A rational function far from 0, ±inf too, in powers of 1/x up from its leading terms: nothing overflows but what F does.
struct FarRational {
  double value, slope;          // F and dF/dx
  double sums[2 * max_degree + 1];  // x^k / B, then F x^j sign(B's inner part) / B, for a denominator B

  // v |x|^exponent, step by step: what lies between is between v and the result.
  POLYTROPE_FUNCTION static double scaled(double v, double size, double inverse, int exponent) {
    for (; exponent > 0; --exponent) v *= size;
    for (; exponent < 0; ++exponent) v *= inverse;
    return v;
  }

  // own: the coefficients of this element's function.
  POLYTROPE_HOST_DEVICE POLYTROPE_NOT_INLINE FarRational(double x, const double* own, int n, int m) : sums{} {
    const double *a = own, *b = own + n, size = absolute(x), u = 1 / x, inverse = absolute(u);
    int top = n, low = m;  // the degrees without leading zeros
    while (top > 0 && a[top] == 0) --top;
    while (low > 0 && b[low] == 0) --low;
    double p = a[0], p_slope = 0, q = low > 0 ? b[1] : 0;
    for (int k = 1; k <= top; ++k) p = p * u + a[k], p_slope = p_slope * u + k * a[k];
    for (int j = 2; j <= low; ++j) q = q * u + b[j];
    // |x|^low below is B. `mixed` is p' q - p q' without the terms that cancel.
    const double below = scaled(1, size, inverse, -low) + absolute(q), sign = q < 0 ? -1 : q > 0 ? 1 : 0;
    double mixed = 0;
    for (int k = 0; k <= top; ++k) {
      double row = 0;
      for (int j = 1; j <= low; ++j) row = row * u + (k - j) * b[j];
      mixed = mixed * u + a[k] * row;
    }
    const auto odd = [&](int power) { return x < 0 && power % 2 ? -1.0 : 1.0; };
    value = odd(top) * scaled(p / below, size, inverse, top - low);
    slope = odd(top + 1) * scaled((scaled(p_slope, size, inverse, -low) + sign * mixed) / below / below, size, inverse,
                                  top - low - 1);
    for (int k = 0; k <= n; ++k) sums[k] = odd(k) * scaled(1 / below, size, inverse, k - low);
    for (int j = 1; j <= m; ++j)
      sums[n + j] = odd(top + low + j) * scaled(sign * p / below / below, size, inverse, top + j - 2 * low);
  }
};

// 1 / (size + 1) for a size of at least 0: of a float on a GPU with an error of at most two ulps (its own reciprocal has one, of
// a number in whose range no reciprocal is subnormal), where a division takes more than ten instructions.
POLYTROPE_FUNCTION float inverse_of_more(float size) {
#ifdef __CUDA_ARCH__
  float inverse, quarter = size * 0.25f + 0.25f;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(quarter));
  return inverse * 0.25f;
#else
  return 1.0f / (size + 1.0f);
#endif
}

// (sum_k a_k x^k) / (1 + |sum_{j≥1} b_j x^j|), k = 0…n, j = 1…m: no poles. packed: a[n + 1], b[m]. Elements far from 0 are
// computed by FarRational: on a CPU one by one where a vector holds any, on a GPU (V is float) by what calls this.
struct Rational {
  static constexpr int largest_table = 2 * max_degree + 1, largest_sums = 2 * max_degree + 1;
  static constexpr int far = 16;  // no power of what is nearer to 0 overflows
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int m) { return n + 1 + m; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int m) { return n + 1 + m; }
  POLYTROPE_FUNCTION static constexpr int sums(int n, int m) { return n + 1 + m; }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int m, Share share = {}) {
    for (int k = share.first; k < n + 1 + m; k += share.step) t[k] = S(raw[k]);
  }
  // visit(lane, FarRational) for each element of a vector that is far from 0.
  template <class V, class T, class Visit>
  POLYTROPE_FUNCTION static void each_far(V x, const T* t, int n, int m, const Visit& visit) {
    for (int lane = 0; lane < int(sizeof(V) / sizeof(x[0])); ++lane) {
      const double at = x[lane];
      if (!(absolute(at) > far)) continue;
      double own[largest_table];
      for (int k = 0; k <= n + m; ++k) own[k] = number_of(t[k], lane);
      visit(lane, FarRational(at, own, n, m));
    }
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V near_value(V x, const T* t, int n, int m) {
    using S = Number<T>;
    V top = broadcast<V>(t[n]), below = broadcast<V>(t[n + m]);
    POLYTROPE_UNROLL
    for (int k = n - 1; k >= 0; --k) top = top * x + t[k];
    POLYTROPE_UNROLL
    for (int j = m - 1; j >= 1; --j) below = below * x + t[n + j];
    if constexpr (std::is_same_v<V, float>) return top * inverse_of_more(absolute(below * x));
    else return top / (absolute(below * x) + S(1));
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int m) {
    V y = near_value(x, t, n, m);
    if constexpr (is_vector<V>)
      if (__builtin_expect(any(absolute(x) > Number<V>(far)), 0))
        each_far(x, t, n, m, [&](int lane, const FarRational& f) { y[lane] = Number<V>(f.value); });
    return y;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int m) {
    using S = Number<V>;
    if constexpr (!is_vector<V>) {
      return near_backward(x, g, t, sums, n, m);
    } else {
      const bool some = __builtin_expect(any(absolute(x) > S(far)), 0);
      const V all = x, seeds = g;
      if (some) {
        x = absolute(all) > S(far) ? V{} : x;
        g = absolute(all) > S(far) ? V{} : g;
      }
      V slope = near_backward(x, g, t, sums, n, m);
      if (some)
        each_far(all, t, n, m, [&](int lane, const FarRational& f) {
          slope[lane] = S(seeds[lane] * f.slope);
          for (int k = 0; k <= n + m; ++k) {
            V own = V{};
            own[lane] = S(seeds[lane] * f.sums[k]);
            sums[k] += own;
          }
        });
      return slope;
    }
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V near_backward(V x, V g, const T* t, Sums sums, int n, int m) {
    using S = Number<T>;
    V top = broadcast<V>(t[n]), top_slope = V{}, below = broadcast<V>(t[n + m]), below_slope = V{};
    POLYTROPE_UNROLL
    for (int k = n - 1; k >= 0; --k) {
      top_slope = top_slope * x + top;
      top = top * x + t[k];
    }
    POLYTROPE_UNROLL
    for (int j = m - 1; j >= 1; --j) {
      below_slope = below_slope * x + below;
      below = below * x + t[n + j];
    }
    below_slope = below_slope * x + below;
    below *= x;
    if constexpr (std::is_same_v<V, float>) return sum_near(x, g, top, top_slope, below, below_slope, sums, n, m);
    V sign = below < 0 ? broadcast<V>(S(-1)) : (below > 0 ? broadcast<V>(S(1)) : V{});
    V scale = S(1) / (absolute(below) + S(1));
    V power = g * scale, share = power * (top * scale) * sign;
    V slope = power * top_slope - share * below_slope;
    sums[0] += power;
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      power *= x;
      sums[k] += power;
    }
    POLYTROPE_UNROLL
    for (int j = 1; j <= m; ++j) {
      share *= x;
      sums[n + j] += share;
    }
    return slope;
  }
  // What near_backward ends with, on a GPU: both kinds of sums take the same powers of x.
  template <class Sums>
  POLYTROPE_FUNCTION static float sum_near(float x, float g, float top, float top_slope, float below, float below_slope,
                                           Sums sums, int n, int m) {
    const float scale = inverse_of_more(absolute(below)), seed = g * scale, part = seed * (top * scale);
    const float share = below == 0 ? 0.0f : below < 0 ? -part : part;
    float power = 1.0f;
    sums[0] += seed;
    POLYTROPE_UNROLL
    for (int k = 1; k <= (n > m ? n : m); ++k) {
      power *= x;
      if (k <= n) sums[k] += seed * power;
      if (k <= m) sums[n + k] += share * power;
    }
    return seed * top_slope - share * below_slope;
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double*, double* gradient, int n, int m,
                                        Share share = {}) {
    for (int k = share.first; k <= n + m; k += share.step) gradient[k] = k <= n ? sums[k] : -sums[k];
  }
};

// Lines b_k + s_k x on the n pieces between rising breakpoints t_1 … t_{n-1}; packed: t[n - 1], b[n], s[n].
// A breakpoint belongs to the piece on its left. The breakpoints get no gradient of their own. Lines are computed from an
// anchor, 0 or the breakpoint nearest to it where all lie on one side: far from 0 an intercept is larger than the function.
struct PiecewiseLinear {
  static constexpr int largest_table = 3 * max_pieces, largest_sums = 2 * max_pieces;
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return 3 * n - 1; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return 3 * n; }  // the anchor last
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return 2 * n; }   // of g and of g (x - anchor)
  // A float, so that it is the same in any table.
  POLYTROPE_FUNCTION static double anchor(const double* raw, int n) {
    return n > 1 ? double(rounded_down<float>(fmin(fmax(0.0, raw[0]), raw[n - 2]))) : 0;
  }
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    const double from = anchor(raw, n);
    for (int k = share.first; k < 3 * n; k += share.step) {
      if (k < n - 1) t[k] = rounded_down<S>(raw[k]);
      else if (k < 2 * n - 1) t[k] = S(from == 0 ? raw[k] : raw[k] + raw[n + k] * from);
      else t[k] = k < 3 * n - 1 ? S(raw[k]) : S(from);
    }
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    V intercept = broadcast<V>(t[n - 1]), slope = broadcast<V>(t[2 * n - 1]);
    for (int k = 1; k < n; ++k) {
      intercept = x > t[k - 1] ? broadcast<V>(t[n - 1 + k]) : intercept;
      slope = x > t[k - 1] ? broadcast<V>(t[2 * n - 1 + k]) : slope;
    }
    V y = slope * (x - t[3 * n - 1]) + intercept;
    return slope == 0 ? (x == x ? intercept : x) : y;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    using S = Number<T>;
    V slope = broadcast<V>(t[2 * n - 1]), index = V{}, product = g * (x - t[3 * n - 1]);
    for (int k = 1; k < n; ++k) {
      slope = x > t[k - 1] ? broadcast<V>(t[2 * n - 1 + k]) : slope;
      index = x > t[k - 1] ? broadcast<V>(S(k)) : index;
    }
    for (int k = 0; k < n; ++k) {
      add_where(index, S(k), g, sums[k]);
      add_where(index, S(k), product, sums[n + k]);
    }
    return x == x ? g * slope : x;
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double* raw, double* gradient, int n, int,
                                        Share share = {}) {
    const double from = anchor(raw, n);
    for (int k = share.first; k < 3 * n - 1; k += share.step) {
      gradient[k] = k < n - 1 ? 0 : sums[k - n + 1];
      if (k >= 2 * n - 1 && from != 0) gradient[k] += from * sums[k - 2 * n + 1];
    }
  }
};

// S(x) - c x: between knots x_k < x_{k+1}, with t = (x - x_k) / w from 0 to 1, u = t (1 - t), w = x_{k+1} - x_k, the rise
// r = y_{k+1} - y_k, p = d_k w / r - 1 and q = (d_k + d_{k+1}) w / r - 2,
//   S = chord + r u (p - q t) / B,  B = 1 + q u,
// and straight lines outside; packed: knots[n + 1], heights y[n + 1], slopes d[n + 1], c. A knot belongs to the piece on its
// left. Whatever a piece's parameters are, the derivative of S by them is a combination of t^j / B², j = 0…4, so sums over
// elements are of these.
//
// Far from 0 nothing is subtracted that is larger than what is left: the chord less c x is level + slope (x - anchor), the
// anchor is the knot or 0, whichever loses less, and t is (x - knot) / w + shift, where the shift is by what the knot was
// rounded. It is rounded down, so that no x lies between it and what it stands for.
struct RationalSpline {
  enum Entry { level, slope, anchor, knot, inverse, shift, rise, left, bend, entries };  // inverse: 1 / w; r, p, q
  static constexpr int moments = 5;  // for each piece
  static constexpr int largest_table = entries * (max_pieces + 2) + 16, largest_sums = moments * (max_pieces + 1);
  POLYTROPE_FUNCTION static constexpr int parameters(int n, int) { return 3 * n + 4; }
  POLYTROPE_FUNCTION static constexpr int table(int n, int) { return entries * (n + 2); }
  // After the moments: of g and g (x - x_0) below the knots, of g and g (x - x_n) above them, of g x.
  POLYTROPE_FUNCTION static constexpr int sums(int n, int) { return moments * n + 5; }
  // The lines outside, first and last, are pieces too, of width 1 and without a rise, in which t may be anything.
  template <class S>
  POLYTROPE_FUNCTION static void prepare(const double* raw, S* t, int n, int, Share share = {}) {
    const double *x = raw, *y = raw + n + 1, *d = raw + 2 * (n + 1), c = raw[3 * (n + 1)];
    for (int k = share.first; k < n + 2; k += share.step) {
      const bool inside = k > 0 && k <= n;
      const int at = k > 0 ? k - 1 : 0;
      const double width = inside ? x[k] - x[at] : 1, height = inside ? y[k] - y[at] : 0;
      const double chord = inside ? height / width : d[at], p = inside ? (d[at] - chord) / chord : 0;
      const double place = double(rounded_down<S>(x[at])), steep = chord - c;
      const double there = fma(-c, x[at], y[at]), origin = fma(-chord, x[at], y[at]);  // of the line at the knot, at 0
      const double reach = fmax(fabs(x[at]), fabs(x[inside ? k : at])), length = inside ? width : 0;
      const bool from_zero =
          fabs(origin) + fabs(steep) * reach <= (fabs(there) + fabs(steep) * length) * (1 + 1e-9);  // x itself: equal
      const double row[entries] = {from_zero ? origin : there + steep * (place - x[at]), steep, from_zero ? 0 : place, place,
                                   1 / width, (place - x[at]) / width, height, p,
                                   inside ? p + (d[k] - chord) / chord : 0};
      for (int entry = 0; entry < entries; ++entry) t[entry * (n + 2) + k] = S(row[entry]);
    }
  }
  template <class V>
  struct Piece {
    V index, row[entries];
  };
  template <class V, class T>
  POLYTROPE_FUNCTION static Piece<V> piece_of(V x, const T* t, int n) {
    using S = Number<T>;
    const int count = n + 2;
    const T* const knots = t + knot * count + 1;
    Piece<V> found;
    if constexpr (!is_vector<V>) {
      int k = 0;
      for (int j = 0; j <= n; ++j) k += x > knots[j] ? 1 : 0;
      found.index = broadcast<V>(S(k));
      for (int entry = 0; entry < entries; ++entry) found.row[entry] = broadcast<V>(t[entry * count + k]);
      return found;
    } else {
      found.index = V{};
#if defined(__AVX512F__) && !defined(__CUDACC__)
      if constexpr (std::is_same_v<T, float>) {
        for (int j = 0; j <= n; ++j) found.index += x > knots[j] ? broadcast<V>(1.0f) : V{};
        for (int entry = 0; entry < entries; ++entry) found.row[entry] = entry_of_many(found.index, t + entry * count, n + 1);
        return found;
      }
#endif
      for (int entry = 0; entry < entries; ++entry) found.row[entry] = broadcast<V>(t[entry * count]);
      for (int k = 1; k < count; ++k) {
        const auto beyond = x > knots[k - 1];
        found.index = beyond ? broadcast<V>(S(k)) : found.index;
        for (int entry = 0; entry < entries; ++entry)
          found.row[entry] = beyond ? broadcast<V>(t[entry * count + k]) : found.row[entry];
      }
      return found;
    }
  }
  // t; outside it is the distance from the knot, unlimited.
  template <class V>
  POLYTROPE_FUNCTION static V place(V x, const Piece<V>& piece) {
    return (x - piece.row[knot]) * piece.row[inverse] + piece.row[shift];
  }
  template <class S, class V>
  POLYTROPE_FUNCTION static V limited(V t) {
    return smaller(broadcast<V>(S(1)), larger(broadcast<V>(S(0)), t));
  }
  template <class V, class T>
  POLYTROPE_FUNCTION static V value(V x, const T* t, int n, int) {
    using S = Number<T>;
    const Piece<V> piece = piece_of(x, t, n);
    const V at = limited<S>(place(x, piece)), u = at * (S(1) - at), below = piece.row[bend] * u + S(1);
    const V above = piece.row[rise] * u * (piece.row[left] - piece.row[bend] * at) / below;
    const V along = piece.row[slope] == 0 ? V{} : piece.row[slope] * (x - piece.row[anchor]);  // not 0 times infinity
    return x == x ? along + piece.row[level] + above : x;
  }
  template <class V, class T, class Sums>
  POLYTROPE_FUNCTION static V backward(V x, V g, const T* t, Sums sums, int n, int) {
    using S = Number<T>;
    const Piece<V> piece = piece_of(x, t, n);
    const V along = place(x, piece), at = limited<S>(along), u = at * (S(1) - at), below = piece.row[bend] * u + S(1);
    const V scale = S(1) / (below * below);
    const V turn = (S(1) - (at + at)) * (piece.row[left] - piece.row[bend] * at) - piece.row[bend] * u * below;
    const V rate = piece.row[slope] + piece.row[rise] * piece.row[inverse] * turn * scale;
    const V m0 = g * scale, m1 = m0 * at, m2 = m1 * at, m3 = m2 * at, m4 = m3 * at, outside = g * along;
    if constexpr (!is_vector<V> && !std::is_same_v<V, Dual>) {
      const int k = int(piece.index);
      const auto own = sums + moments * (k - 1), outer = sums + moments * n;
      if (k > 0 && k <= n) {
        own[0] += m0;
        own[1] += m1;
        own[2] += m2;
        own[3] += m3;
        own[4] += m4;
      } else if (k == 0) {
        outer[0] += g;
        outer[1] += outside;
      } else {
        outer[2] += g;
        outer[3] += outside;
      }
    } else {
      for (int k = 1; k <= n; ++k) {
        const auto own = sums + moments * (k - 1);
        add_where(piece.index, S(k), m0, own[0]);
        add_where(piece.index, S(k), m1, own[1]);
        add_where(piece.index, S(k), m2, own[2]);
        add_where(piece.index, S(k), m3, own[3]);
        add_where(piece.index, S(k), m4, own[4]);
      }
      const auto outer = sums + moments * n;
      add_where(piece.index, S(0), g, outer[0]);
      add_where(piece.index, S(0), outside, outer[1]);
      add_where(piece.index, S(n + 1), g, outer[2]);
      add_where(piece.index, S(n + 1), outside, outer[3]);
    }
    sums[moments * n + 4] += g * x;
    return x == x ? g * rate : x;
  }
  // The derivatives of the sum of g S over a piece's elements by what stands at its left and its right end.
  struct Ends {
    double knots[2], heights[2], slopes[2];
    POLYTROPE_HOST_DEVICE Ends(const double* raw, const double* sums, int k, int n) {
      const double *x = raw + k, *y = x + n + 1, *d = y + n + 1, *m = sums + moments * k;
      const double width = x[1] - x[0], height = y[1] - y[0], mean = height / width;
      const double p = d[0] / mean - 1, q = d[0] / mean + d[1] / mean - 2;
      // Of g; of g h with S = y + r h; of g times the derivatives of h by p, by q, by t; of the last times t.
      const double all = m[0] + 2 * q * m[1] + (q * q - 2 * q) * m[2] - 2 * q * q * m[3] + q * q * m[4];
      const double h = (1 + p) * m[1] + (q * (1 + p) - p) * m[2] - q * (1 + 2 * p) * m[3] + p * q * m[4];
      const double by_p = m[1] + (q - 1) * m[2] - 2 * q * m[3] + q * m[4];
      const double by_q = (1 + 2 * p) * m[3] - (1 + p) * m[2] - p * m[4];
      const double by_t = (1 + p) * m[0] - 2 * p * m[1] + q * m[2];
      const double by_t_t = (1 + p) * m[1] - 2 * p * m[2] + q * m[3];
      const double by_mean = -(d[0] * (by_p + by_q) + d[1] * by_q) * width / mean;
      slopes[0] = width * (by_p + by_q);
      slopes[1] = width * by_q;
      heights[1] = h + by_mean / width;
      heights[0] = all - heights[1];
      knots[0] = mean * (by_t_t - by_t) + by_mean * mean / width;
      knots[1] = -mean * by_t_t - by_mean * mean / width;
    }
  };
  POLYTROPE_FUNCTION static void finish(const double* sums, const double* raw, double* gradient, int n, int,
                                        Share share = {}) {
    const double *d = raw + 2 * (n + 1), *outer = sums + moments * n;
    for (int k = share.first; k <= n; k += share.step) {
      double knots = 0, heights = 0, slopes = 0;
      if (k > 0) {
        const Ends piece(raw, sums, k - 1, n);
        knots += piece.knots[1], heights += piece.heights[1], slopes += piece.slopes[1];
      }
      if (k < n) {
        const Ends piece(raw, sums, k, n);
        knots += piece.knots[0], heights += piece.heights[0], slopes += piece.slopes[0];
      }
      if (k == 0) knots -= d[0] * outer[0], heights += outer[0], slopes += outer[1];
      if (k == n) knots -= d[n] * outer[2], heights += outer[2], slopes += outer[3];
      gradient[k] = knots;
      gradient[n + 1 + k] = heights;
      gradient[2 * (n + 1) + k] = slopes;
      if (k == 0) gradient[3 * (n + 1)] = -outer[4];
    }
  }
};

// The tangent of F at the end of an interval.
struct Tangent {
  double at, value, slope;
};

// One end of the interval: x there, the family's variable there, and the derivative of this by x.
struct End {
  double at, variable, rate;
  POLYTROPE_FUNCTION bool is_finite() const { return at - at == 0; }
};
POLYTROPE_FUNCTION End end_of(const Problem& p, double at) { return {at, (at - p.shift) * p.inverse_scale, p.inverse_scale}; }

template <class Family>
POLYTROPE_FUNCTION Tangent tangent_of_table(const double* table, End end, int n, int m) {
  const Dual y = Family::value(Dual{end.variable, end.rate}, table, n, m);
  return {end.at, y.value, y.slope};
}

template <class Family>
POLYTROPE_FUNCTION Tangent tangent(const double* raw, End end, int n, int m) {
  double t[Family::largest_table] = {};
  Family::prepare(raw, t, n, m);
  return tangent_of_table<Family>(t, end, n, m);
}

// Adds to the sums what the elements beyond an end contribute: `values` = sum of g, `slopes` = sum of g (x - end).
template <class Family>
POLYTROPE_FUNCTION void add_tail_of_table(const double* table, End end, double values, double slopes, double* total,
                                          int n, int m) {
  if (!end.is_finite()) return;  // there are none
  Dual sums[Family::largest_sums] = {};
  Family::backward(Dual{end.variable, end.rate}, Dual{1, 0}, table, sums, n, m);
  for (int k = 0; k < Family::sums(n, m); ++k) total[k] += values * sums[k].value + slopes * sums[k].slope;
}

template <class Family>
POLYTROPE_FUNCTION void add_tail(const double* raw, End end, double values, double slopes, double* total, int n, int m) {
  double t[Family::largest_table] = {};
  Family::prepare(raw, t, n, m);
  add_tail_of_table<Family>(t, end, values, slopes, total, n, m);
}

}  // namespace polytrope
