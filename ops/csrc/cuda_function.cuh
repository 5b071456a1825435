// A group's function on the GPU: its table out of the packed parameters, its value and gradients with the tails.
#pragma once
#include <type_traits>

#include "cuda_elements.cuh"

namespace polytrope {

struct Call {
  const void *gradient, *x;  // no gradient: forward
  Parameters parameters;
  void* result;
  double* partial;  // room for the sums of each block (polytrope_cuda_workspace); null: nobody wants the parameters' gradients
  Parameters parameter_gradients;
  cudaStream_t stream;
};

constexpr int most_parameters = 3 * max_pieces + 4;  // of any family

// Families that know no interval.
template <class Family>
constexpr bool never_has_tails = std::is_same_v<Family, Tropical> || std::is_same_v<Family, TropicalRational> ||
                                 std::is_same_v<Family, PiecewiseLinear> || std::is_same_v<Family, RationalSpline>;

// Families whose derivative may jump at an end of the interval, where `backward` takes the one side, tangents the other.
template <class Family>
constexpr bool may_jump = std::is_same_v<Family, PolyReLU> || std::is_same_v<Family, Rational>;

// Elements far from 0 that `Family::backward` does not compute.
template <class Family>
constexpr bool has_far = std::is_same_v<Family, Rational>;

// Hermite differs from Polynomial in its table and in what stands after its kernels only, so they share these.
template <class Family, class S>
__device__ __forceinline__ void prepare_table(const Problem& p, const double* raw, S* table, int n, int m, Share share) {
  if constexpr (std::is_same_v<Family, Polynomial>)
    if (p.family == family_hermite) return Hermite::prepare(raw, table, n, 0, share);
  Family::prepare(raw, table, n, m, share);
}

template <class Family>
__device__ __forceinline__ void load_parameters(const Parameters& parameters, int64_t group, double* raw, int n, int m,
                                                Share share) {
  for (int k = share.first; k < Family::parameters(n, m); k += share.step) raw[k] = parameters.get(group, k);
}

// After the last element: the sums as `Family::finish` takes them.
template <class Family>
__device__ __forceinline__ void settle(float* sums, int n) {
  if constexpr (std::is_same_v<Family, Tropical>) separate(sums, n);
  if constexpr (std::is_same_v<Family, TropicalRational>) {
#pragma unroll
    for (int kind = 0; kind < 4; ++kind) separate(sums + kind * (n + 1), n);
  }
}

// Whether the family's variable is another than x.
__device__ __forceinline__ bool is_scaled(const Problem& p) { return p.shift != 0 || p.inverse_scale != 1; }

// F with its tails: F(x) = F(c) + slope (x - c) with c = x limited to the interval, and the slope of the end that it is at.
// Element k is of function k mod `own`; tables and sums of these lie so many numbers apart.
template <class Family, int own = 1, int table_step = 0, int sums_step = 0>
struct Evaluation {
  const float *table, *slopes;          // slopes: at the low and at the high end, by x
  float low, high, rate, offset;  // the family's variable is c rate + offset
  int n, m;
  bool tails, scaled, bounded;

  __device__ __forceinline__ Evaluation(const float* table, const float* slopes, const Problem& p, int n, int m, bool tails)
      : table(table), slopes(slopes), low(float(p.low)), high(float(p.high)), rate(float(p.inverse_scale)),
        offset(float(-p.shift * p.inverse_scale)), n(n), m(m), tails(tails), scaled(is_scaled(p)),
        bounded(float(p.low) > -INFINITY || float(p.high) < INFINITY) {}

  __device__ __forceinline__ float limited(float x) const { return smaller(high, larger(low, x)); }
  __device__ __forceinline__ const float* table_of(int k) const { return table + k % own * table_step; }
  __device__ __forceinline__ float slope_of(int k, float beyond) const {
    const float left = slopes[k % own * 2], right = slopes[k % own * 2 + 1];
    return beyond > 0 ? right : left;
  }

  // The family's variable.
  template <int count>
  __device__ __forceinline__ void enter(const float* xs, float* inside) const {
#pragma unroll
    for (int k = 0; k < count; ++k) inside[k] = xs[k];
    if (!tails) return;
#pragma unroll
    for (int k = 0; k < count; ++k) inside[k] = limited(xs[k]);
    if (!scaled) return;
#pragma unroll
    for (int k = 0; k < count; ++k) inside[k] = inside[k] * rate + offset;
  }

  // Whether any is far from 0.
  template <int count>
  __device__ __forceinline__ static bool any_far(const float* inside) {
    bool found = false;
    if constexpr (has_far<Family>) {
#pragma unroll
      for (int k = 0; k < count; ++k) found |= absolute(inside[k]) > Rational::far;
    }
    return found;
  }

  // far: set where there are elements far from 0, which have got another value.
  template <int count>
  __device__ __forceinline__ void values(const float* xs, float* ys, bool& far) const {
    enter<count>(xs, ys);
    far |= any_far<count>(ys);
#pragma unroll
    for (int k = 0; k < count; ++k) ys[k] = Family::value(ys[k], table_of(k), n, m);
    if (!tails || !bounded) return;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float beyond = xs[k] - limited(xs[k]);
      ys[k] += slope_of(k, beyond) * beyond;
    }
  }

  // ds = g F'(x); adds to the family's own sums, and to those of the tails: of g (x - c) on the left and on the right.
  template <int count>
  __device__ __forceinline__ void gradients(const float* xs, const float* gs, float* ds, float* sums, float* tail,
                                            bool& far) const {
    float seeds[count];
    enter<count>(xs, ds);
#pragma unroll
    for (int k = 0; k < count; ++k) seeds[k] = gs[k];
    if (any_far<count>(ds)) {
      far = true;
#pragma unroll
      for (int k = 0; k < count; ++k) {
        const bool near = !(absolute(ds[k]) > Rational::far);
        seeds[k] = near ? seeds[k] : 0.0f;
        ds[k] = near ? ds[k] : 0.0f;
      }
    }
#pragma unroll
    for (int k = 0; k < count; ++k)
      ds[k] = Family::backward(ds[k], seeds[k], table_of(k), sums + k % own * sums_step, n, m);
    if (!tails) return;
    if (scaled) {
#pragma unroll
      for (int k = 0; k < count; ++k) ds[k] *= rate;
    }
    if (!bounded) return;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float beyond = xs[k] - limited(xs[k]);
      tail[k % own * tail_sums] += gs[k] * fminf(beyond, 0.0f);
      tail[k % own * tail_sums + 1] += gs[k] * fmaxf(beyond, 0.0f);
      if constexpr (may_jump<Family>) ds[k] = absolute(beyond) > 0 ? gs[k] * slope_of(k, beyond) : ds[k];
    }
  }
};

// The slope of the tangent at an end, by x, out of the table in float64.
template <class Family>
__device__ __forceinline__ float end_slope(const Problem& p, const double* wide, bool right, int n, int m) {
  return float(tangent_of_table<Family>(wide, end_of(p, right ? p.high : p.low), n, m).slope);
}

// A rational function far from 0, from its table in float32.
__device__ __forceinline__ FarRational far_rational(float x, const float* table, int n, int m) {
  double own[Rational::largest_table];
  for (int k = 0; k <= n + m; ++k) own[k] = table[k];
  return FarRational(x, own, n, m);
}

}  // namespace polytrope
