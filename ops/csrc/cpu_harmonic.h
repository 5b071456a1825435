// The harmonic series in float32 with AVX-512, degrees up to 8: fewer operations than HarmonicPowers takes. A turn falls
// into 16 pieces, and in each of them F and dF/dθ are polynomials of the distance from its middle. One register holds a
// coefficient of all pieces; a permutation gives each element that of its piece.
#pragma once
#include <type_traits>

#include "families.h"

namespace polytrope {
namespace {

struct HarmonicPieces;  // where there is no AVX-512, nothing more

#if defined(__AVX512F__)
struct HarmonicPieces {
  static constexpr int pieces = 16, highest = HarmonicPowers::highest, most = 10;  // most: coefficients of a polynomial
  // The table: F's coefficients, those of dF/dθ, sine and cosine of the middles, w, and pieces per unit of x, high and low.
  static constexpr int slopes = most * pieces, sines = 2 * slopes, cosines = sines + pieces, frequency = cosines + pieces;
  static constexpr int largest_table = frequency + 3, largest_sums = HarmonicPowers::largest_sums;
  POLYTROPE_FUNCTION static int parameters(int n, int m) { return HarmonicPowers::parameters(n, m); }
  POLYTROPE_FUNCTION static int sums(int n, int m) { return HarmonicPowers::sums(n, m); }
  // So many leave an error below 5e-8 of a term's weight.
  POLYTROPE_FUNCTION static constexpr int coefficients(int n) { return n <= 6 ? 9 : 10; }

  // of[k]: the even coefficients of cos kφ and the odd ones of sin kφ as polynomials of f, for φ = 2π f / 16 and |f| <= 1/2:
  // their Chebyshev series, whose weights are values of Bessel functions (Jacobi and Anger), cut off after `count` terms.
  struct Waves {
    double of[highest + 1][most] = {};
    constexpr explicit Waves(int count) {
      for (int k = 1; k <= highest; ++k) {
        const double half = k * 0.09817477042468103;               // kφ / 2 at f = 1/2
        double first = 1, before[most] = {}, now[most] = {1};      // half^m / m!, T_{m-1}(2f), T_m(2f)
        for (int m = 0; m < count; ++m) {
          double bessel = 0, term = first;  // J_m(2 half)
          for (int i = 1; i <= 12; ++i) {
            bessel += term;
            term *= -half * half / (i * (m + i));
          }
          const double weight = (m == 0 ? 1 : 2) * (m % 4 < 2 ? 1 : -1) * bessel;
          for (int p = most - 1; p >= 0; --p) {
            of[k][p] += weight * now[p];
            const double next = (p == 0 ? 0 : (m == 0 ? 2 : 4) * now[p - 1]) - before[p];
            before[p] = now[p];
            now[p] = next;
          }
          first *= half / (m + 1);
        }
      }
    }
  };

  // cos 2πj/16
  static double cosine(int j) {
    constexpr double a = 0.9238795325112867, b = 0.7071067811865476, c = 0.3826834323650898;
    static constexpr double values[pieces] = {1, a, b, c, 0, -c, -b, -a, -1, -a, -b, -c, 0, c, b, a};
    return values[j & (pieces - 1)];
  }
  static double sine(int j) { return cosine(j - pieces / 4); }

  // constant + sum_k (α_k cos kθ + β_k sin kθ) in every piece.
  static void prepare_series(double constant, const double* alpha, const double* beta, float* t, int n) {
    static constexpr Waves waves[2] = {Waves(9), Waves(10)};
    double total[most][pieces] = {};
    for (int j = 0; j < pieces; ++j) total[0][j] = constant;
    for (int k = 1; k <= n; ++k) {
      const double* wave = waves[coefficients(n) - 9].of[k];
      double even[pieces], odd[pieces];
      for (int j = 0; j < pieces; ++j) {
        even[j] = alpha[k - 1] * cosine(k * j) + beta[k - 1] * sine(k * j);
        odd[j] = beta[k - 1] * cosine(k * j) - alpha[k - 1] * sine(k * j);
      }
      for (int p = 0; p < most; p += 2)
        for (int j = 0; j < pieces; ++j) {
          total[p][j] += even[j] * wave[p];
          total[p + 1][j] += odd[j] * wave[p + 1];
        }
    }
    for (int p = 0; p < most; ++p)
      for (int j = 0; j < pieces; ++j) t[p * pieces + j] = float(total[p][j]);
  }
  template <class S>
  static void prepare(const double* raw, S* t, int n, int m, Share share = {}) {
    if constexpr (std::is_same_v<S, double>) {
      HarmonicPowers::prepare(raw, t, n, m, share);
    } else {
      double alpha[highest], beta[highest];
      for (int k = 1; k <= n; ++k) {
        alpha[k - 1] = k * raw[1 + n + k];
        beta[k - 1] = -k * raw[1 + k];
      }
      prepare_series(raw[0], raw + 2, raw + 2 + n, t, n);
      prepare_series(0, alpha, beta, t + slopes, n);
      for (int j = 0; j < pieces; ++j) {
        t[sines + j] = float(sine(j));
        t[cosines + j] = float(cosine(j));
      }
      t[frequency] = float(raw[1]);
      set_frequency(raw[1] * (pieces / 2), t[frequency + 1], t[frequency + 2]);
    }
  }

  // Where an element lies: its piece, in the lowest four bits, and its distance from the middle, in pieces; computed and
  // limited as in sine_cosine.
  struct Place {
    Int16 piece;
    Float16 f;
    POLYTROPE_FUNCTION Place(Float16 x, const float* t) {
      const Float16 shifted = x * t[frequency + 1] + 12582912.0f;
      f = x * t[frequency + 1] - (shifted - 12582912.0f);
      f = x * t[frequency + 2] + f;
      f = larger(broadcast<Float16>(-0.5625f), smaller(broadcast<Float16>(0.5625f), f));
      __builtin_memcpy(&piece, &shifted, sizeof(piece));
    }
    POLYTROPE_FUNCTION Float16 own(const float* table) const {
      Float16 all, found;
      __builtin_memcpy(&all, table, sizeof(all));
      __asm__("vpermps %2, %1, %0" : "=v"(found) : "v"(piece), "vm"(all));
      return found;
    }
    POLYTROPE_FUNCTION Float16 polynomial(const float* t, int n) const {
      Float16 y = own(t + (coefficients(n) - 1) * pieces);
      POLYTROPE_UNROLL
      for (int p = coefficients(n) - 2; p >= 0; --p) y = y * f + own(t + p * pieces);
      return y;
    }
  };
  POLYTROPE_FUNCTION static Float16 value(Float16 x, const float* t, int n, int) { return Place(x, t).polynomial(t, n); }

  // `backward` in two steps, over a block each: a processor looks too short a way ahead to overlap them.
  // The first returns g dF/dx and gives sin θ and cos θ to the second; their error is below 1e-8 before rounding.
  template <class Sums>
  POLYTROPE_FUNCTION static Float16 find_slope(Float16 x, Float16 g, const float* t, Sums sums, Float16& s, Float16& c, int n) {
    const Place place(x, t);
    const Float16 q = place.f * place.f, middle_s = place.own(t + sines), middle_c = place.own(t + cosines);
    const Float16 near_s = ((q * 7.7715597e-05f - 0.0100931786f) * q + 0.392699082f) * place.f;
    const Float16 near_c = (q * 0.00098894974f - 0.0771060983f) * q + 1.0f;
    s = middle_s * near_c + middle_c * near_s;
    c = middle_c * near_c - middle_s * near_s;
    const Float16 slope = g * place.polynomial(t + slopes, n);
    sums[2 * n + 1] += slope * x;
    return slope * t[frequency];
  }
  POLYTROPE_FUNCTION static void add(Float16 g, Float16 s, Float16 c, Float16* sums, int n) {
    HarmonicPowers::add(g, s, c, sums, n);
  }
  POLYTROPE_FUNCTION static void finish(const double* sums, const double* raw, double* gradient, int n, int m,
                                        Share share = {}) {
    HarmonicPowers::finish(sums, raw, gradient, n, m, share);
  }

  // For the tangents outside an interval, in float64.
  POLYTROPE_FUNCTION static Dual value(Dual x, const double* t, int n, int m) { return HarmonicPowers::value(x, t, n, m); }
  POLYTROPE_FUNCTION static Dual backward(Dual x, Dual g, const double* t, Dual* sums, int n, int m) {
    return HarmonicPowers::backward(x, g, t, sums, n, m);
  }
};
#endif

}  // namespace
}  // namespace polytrope
