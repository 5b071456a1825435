// The CPU kernels over one block of elements that lie side by side, for every elementwise family and degree, and `Pass`:
// what one group's elements go through, tails included.
//
// Whole blocks of bfloat16 are converted on the way through registers. Results may be written past the cache: a line that
// is written in the cache is read from memory before, and where the tensors of a call are larger than the cache, it will
// have left it when somebody wants it.
#pragma once
#include <cstdint>
#include <type_traits>

#include "cpu_elements.h"
#include "cpu_harmonic.h"
#include "families.h"
#include "problem.h"

namespace polytrope {
namespace {

constexpr int prefetch_distance = 512;  // elements
constexpr int unrolled_degree = 8;  // kernels for higher degrees read the degree at run time

// How a kernel reads and writes: `narrow`: bfloat16, not S; `past_cache`: results go to memory at once.
struct Access {
  bool narrow, past_cache;
};

// y = body(x, g, k) for each vector, k the number of its first element; g and y may be null, and body then gets and gives
// anything. Narrow elements are converted two vectors at a time. count is a multiple of the lanes, if narrow of twice the
// lanes.
template <class S, class Body>
POLYTROPE_FUNCTION void each_vector(const void* __restrict x, const void* __restrict g, void* __restrict y, int count,
                                    Access access, const Body& body) {
  using V = Vector<S>;
  const bool past_cache = access.past_cache && can_pass_cache(y);
  const S *xs = static_cast<const S*>(x), *gs = static_cast<const S*>(g);
  S* ys = static_cast<S*>(y);
  if constexpr (std::is_same_v<S, float>)
    if (access.narrow) {
      const uint16_t *x16 = static_cast<const uint16_t*>(x), *g16 = static_cast<const uint16_t*>(g);
      for (int i = 0; i < count; i += 2 * lanes<S>) {
        // Processors look no further ahead than a page of memory, which with bfloat16 costs more.
        __builtin_prefetch(x16 + i + prefetch_distance, 0);
        if (g) __builtin_prefetch(g16 + i + prefetch_distance, 0);
        if (y && !past_cache) __builtin_prefetch(static_cast<uint16_t*>(y) + i + prefetch_distance, 1);
        V x_even, x_odd, g_even{}, g_odd{};
        widen_pair(x16 + i, x_even, x_odd);
        if (g) widen_pair(g16 + i, g_even, g_odd);
        const V even = body(x_even, g_even, i), odd = body(x_odd, g_odd, i + lanes<S>);
        if (!y) continue;
        const WordVector both = round_pair(even, odd);
        uint16_t* const target = static_cast<uint16_t*>(y) + i;
        if (past_cache) store_past_cache(target, both);
        else store(target, both);
      }
      return;
    }
  for (int i = 0; i < count; i += lanes<S>) {
    __builtin_prefetch(xs + i + prefetch_distance, 0);
    if (g) __builtin_prefetch(gs + i + prefetch_distance, 0);
    if (y && !past_cache) __builtin_prefetch(ys + i + prefetch_distance, 1);
    const V value = body(load<V>(xs + i), g ? load<V>(gs + i) : V{}, i);
    if (y && past_cache) store_past_cache(ys + i, value);
    else if (y) store(ys + i, value);
  }
}

// A copy that the compiler knows nobody else writes to; vector by vector, which is faster than what it makes of std::copy.
template <class Family, class S>
POLYTROPE_FUNCTION void copy_table(const S* table, S* t) {
  for (int k = 0; k < Family::largest_table; k += lanes<S>) store(t + k, load<Vector<S>>(table + k));
}

// Families whose elements far from 0 are computed otherwise. `near_value` and `near_backward` are for those that are not; a
// block in which there were others is computed again with `value` and `backward`, which ask for each vector.
template <class Family>
constexpr bool has_far = std::is_same_v<Family, Rational>;

// The largest absolute values of a block so far.
template <class Family, class V>
struct Reach {
  V largest{};
  POLYTROPE_FUNCTION void note(V v) {
    if constexpr (has_far<Family>) largest = larger(absolute(v), largest);
  }
  POLYTROPE_FUNCTION bool is_far() const {
    if constexpr (has_far<Family>) return any(largest > Number<V>(Family::far));
    return false;
  }
};

template <class Family, class V, class T>
POLYTROPE_FUNCTION V value_near(V v, const T* t, int n, int m) {
  if constexpr (has_far<Family>) return Family::near_value(v, t, n, m);
  else return Family::value(v, t, n, m);
}
template <class Family, class V, class T, class Sums>
POLYTROPE_FUNCTION V backward_near(V v, V seed, const T* t, Sums sums, int n, int m) {
  if constexpr (has_far<Family>) return Family::near_backward(v, seed, t, sums, n, m);
  else return Family::backward(v, seed, t, sums, n, m);
}

// x limited to the interval, and the family's variable of that. A copy of the problem's numbers, as the compiler reads
// these again after each store.
template <class S>
struct Entrance {
  S low, high, shift, rate;
  explicit Entrance(const Problem& problem)
      : low(S(problem.low)), high(S(problem.high)), shift(S(problem.shift)), rate(S(problem.inverse_scale)) {}
  template <class V>
  POLYTROPE_FUNCTION V variable(V x) const {
    return (smaller(broadcast<V>(high), larger(broadcast<V>(low), x)) - shift) * rate;
  }
};


constexpr int tail_sums = 4;

// How a family's function goes on outside the interval. Copies of numbers, as in `Entrance`.
template <class S>
struct Tails {
  using V = Vector<S>;
  Entrance<S> entrance;
  S low, low_slope, low_value, high, high_slope, high_value;
  Tails(const Problem& problem, Tangent left, Tangent right)
      : entrance(problem), low(S(left.at)), low_slope(S(left.slope)), low_value(S(left.value)), high(S(right.at)),
        high_slope(S(right.slope)), high_value(S(right.value)) {}

  // F(x), where the family's function of the variable is `inner`.
  POLYTROPE_FUNCTION V value(V x, V inner) const {
    inner = x < low ? (x - low) * low_slope + low_value : inner;
    return x > high ? (x - high) * high_slope + high_value : inner;
  }
  // The gradient of x, where that of the variable is `inner`.
  POLYTROPE_FUNCTION V slope(V x, V g, V inner) const {
    inner = inner * entrance.rate;
    inner = x < low ? g * low_slope : inner;
    return x > high ? g * high_slope : inner;
  }
  // What of g is inside; the rest is added to sums: of g and of g (x - low) below, then the same above.
  POLYTROPE_FUNCTION V split(V x, V g, V* sums) const {
    const auto below = x < low, above = x > high;
    sums[0] = below ? sums[0] + g : sums[0];
    sums[1] += below ? g * (x - low) : V{};
    sums[2] = above ? sums[2] + g : sums[2];
    sums[3] += above ? g * (x - high) : V{};
    return below ? V{} : (above ? V{} : g);
  }
};

// Families whose kernels take the tails along in one pass; around the others', three passes do, which is as fast where there
// is more to compute, and compiled sooner.
template <class Family>
constexpr bool takes_tails = std::is_same_v<Family, Polynomial>;

// D, E: degree and second degree; 0: read at run time.
template <class Family, class S, int D, int E>
void forward_block(const void* __restrict x, void* __restrict y, int count, Access access, const S* table, int degree,
                   int second, const Tails<S>* tails) {
  using V = Vector<S>;
  const int n = D ? D : degree, m = D ? E : second;
  alignas(64) S t[padded(Family::largest_table, lanes<S>)];
  copy_table<Family>(table, t);
  if constexpr (takes_tails<Family>)
    if (tails) {
      const Tails<S> own = *tails;
      each_vector<S>(x, nullptr, y, count, Access{}, [&](V v, V, int) {
        return own.value(v, Family::value(own.entrance.variable(v), t, n, m));
      });
      return;
    }
  Reach<Family, V> reach;
  each_vector<S>(x, nullptr, y, count, access, [&](V v, V, int) {
    reach.note(v);
    return value_near<Family>(v, t, n, m);
  });
  if constexpr (has_far<Family>)
    if (reach.is_far())
      each_vector<S>(x, nullptr, y, count, access, [&](V v, V, int) { return Family::value(v, t, n, m); });
}

// Adds to total[k * lanes …] the sums over lanes, with `tails` those of these after the family's.
template <class Family, class S, int D, int E>
void backward_block(const void* __restrict x, const void* __restrict g, void* __restrict dx, int count, Access access,
                    const S* table, double* __restrict total, int degree, int second, const Tails<S>* tails) {
  using V = Vector<S>;
  const int n = D ? D : degree, m = D ? E : second, sums = Family::sums(n, m);
  alignas(64) S t[padded(Family::largest_table, lanes<S>)];
  copy_table<Family>(table, t);
  V a[Family::largest_sums];
  for (int k = 0; k < sums; ++k) a[k] = V{};
  if constexpr (takes_tails<Family>)
    if (tails) {
      const Tails<S> own = *tails;
      V outside[tail_sums] = {};
      each_vector<S>(x, g, dx, count, Access{}, [&](V v, V seed, int) {
        const V inside = own.split(v, seed, outside);
        return own.slope(v, seed, Family::backward(own.entrance.variable(v), inside, t, a, n, m));
      });
      for (int k = 0; k < sums; ++k) accumulate(a[k], total + k * lanes<S>);
      for (int k = 0; k < tail_sums; ++k) accumulate(outside[k], total + (sums + k) * lanes<S>);
      return;
    }
  if constexpr (std::is_same_v<Family, TropicalRational>) {
    alignas(64) S slopes[block];
    each_vector<S>(x, g, nullptr, count, access, [&](V v, V seed, int k) {
      store(slopes + k, Family::descend_numerator(v, seed, t, a, n));
      return V{};
    });
    each_vector<S>(x, g, dx, count, access, [&](V v, V seed, int k) {
      return Family::descend_denominator(v, seed, load<V>(slopes + k), t, a, n);
    });
  } else if constexpr (std::is_same_v<Family, HarmonicPieces>) {
    alignas(64) S sines[block], cosines[block];
    each_vector<S>(x, g, dx, count, access, [&](V v, V seed, int k) {
      V sine, cosine;
      const V slope = Family::find_slope(v, seed, t, a, sine, cosine, n);
      store(sines + k, sine);
      store(cosines + k, cosine);
      return slope;
    });
    each_vector<S>(g, nullptr, nullptr, count, access, [&](V seed, V, int k) {
      Family::add(seed, load<V>(sines + k), load<V>(cosines + k), a, n);
      return V{};
    });
  } else {
    Reach<Family, V> reach;
    each_vector<S>(x, g, dx, count, access, [&](V v, V seed, int) {
      reach.note(v);
      return backward_near<Family>(v, seed, t, a, n, m);
    });
    if constexpr (has_far<Family>)
      if (reach.is_far()) {
        for (int k = 0; k < sums; ++k) a[k] = V{};
        each_vector<S>(x, g, dx, count, access, [&](V v, V seed, int) { return Family::backward(v, seed, t, a, n, m); });
      }
  }
  for (int k = 0; k < sums; ++k) accumulate(a[k], total + k * lanes<S>);
}

// The same without sums.
template <class Family, class S, int D, int E>
void slope_block(const void* __restrict x, const void* __restrict g, void* __restrict dx, int count, Access access,
                 const S* table, int degree, int second, const Tails<S>* tails) {
  using V = Vector<S>;
  const int n = D ? D : degree, m = D ? E : second;
  alignas(64) S t[padded(Family::largest_table, lanes<S>)];
  copy_table<Family>(table, t);
  if constexpr (takes_tails<Family>)
    if (tails) {
      const Tails<S> own = *tails;
      each_vector<S>(x, g, dx, count, Access{}, [&](V v, V seed, int) {
        return own.slope(v, seed, Family::backward(own.entrance.variable(v), seed, t, NoSums{}, n, m));
      });
      return;
    }
  Reach<Family, V> reach;
  each_vector<S>(x, g, dx, count, access, [&](V v, V seed, int) {
    if constexpr (std::is_same_v<Family, HarmonicPieces>) {
      V sine, cosine;
      return Family::find_slope(v, seed, t, NoSums{}, sine, cosine, n);
    } else {
      reach.note(v);
      return backward_near<Family>(v, seed, t, NoSums{}, n, m);
    }
  });
  if constexpr (has_far<Family>)
    if (reach.is_far())
      each_vector<S>(x, g, dx, count, access,
                     [&](V v, V seed, int) { return Family::backward(v, seed, t, NoSums{}, n, m); });
}

template <class S>
struct Kernel {
  // `Tails` null: there are none, or, unless the kernel takes them along (`with_tails`), they are not its business.
  void (*forward)(const void*, void*, int, Access, const S*, int, int, const Tails<S>*);
  void (*backward)(const void*, const void*, void*, int, Access, const S*, double*, int, int, const Tails<S>*);
  void (*slope)(const void*, const void*, void*, int, Access, const S*, int, int, const Tails<S>*);
  void (*prepare)(const double*, S*, int, int, Share);
  void (*finish)(const double*, const double*, double*, int, int, Share);
  Tangent (*tangent)(const double*, End, int, int);
  void (*add_tail)(const double*, End, double, double, double*, int, int);
  int parameters, sums;
  bool with_tails;
};

template <class Family, class S, int D = 0, int E = 0>
Kernel<S> kernel_of(int n, int m) {
  return {forward_block<Family, S, D, E>, backward_block<Family, S, D, E>, slope_block<Family, S, D, E>,
          Family::template prepare<S>, Family::finish, tangent<Family>, add_tail<Family>, Family::parameters(n, m),
          Family::sums(n, m), takes_tails<Family>};
}

// Float64 kernels serve checks; they read the degree at run time.
template <class Family, class S, int D = 1>
Kernel<S> kernel_of_degree(int n, int m) {
  if constexpr (std::is_same_v<S, double> || D > unrolled_degree) {
    return kernel_of<Family, S>(n, m);
  } else {
    return n == D ? kernel_of<Family, S, D>(n, m) : kernel_of_degree<Family, S, D + 1>(n, m);
  }
}

// Hermite differs from Polynomial in what stands before and after its kernels only.
template <class S>
Kernel<S> hermite_kernel(int n, int m) {
  Kernel<S> kernel = kernel_of_degree<Polynomial, S>(n, m);
  kernel.prepare = Hermite::prepare<S>;
  kernel.finish = Hermite::finish;
  kernel.tangent = tangent<Hermite>;
  kernel.add_tail = add_tail<Hermite>;
  return kernel;
}

// Whether groups are so narrow that their channels may share a vector (cpu_channels.h).
inline bool may_be_by_channel(const Problem& problem) { return problem.groups > 1 && problem.inner < 1024; }

template <class S>
Kernel<S> find_kernel(const Problem& problem) {
  const int n = problem.degree, m = problem.second_degree;
  if (n < 1 || n > largest_degree(problem.family)) return {};
  if (m < (problem.family == family_rational ? 1 : 0) || m > (problem.family == family_rational ? max_degree : 0)) return {};
  switch (problem.family) {
    case family_polynomial: return kernel_of_degree<Polynomial, S>(n, m);
    case family_hermite: return hermite_kernel<S>(n, m);
    case family_chebyshev: return kernel_of_degree<Chebyshev, S>(n, m);
    case family_legendre: return kernel_of_degree<Legendre, S>(n, m);
    case family_fourier: return kernel_of_degree<Fourier, S>(n, m);
    case family_harmonic:
      if constexpr (std::is_same_v<S, float>)
        if (n <= HarmonicPowers::highest) {
          // Groups that are computed by channel where there are many rows: a row's bits are the same with few.
          const bool by_powers = vector_bytes < 64 || may_be_by_channel(problem);
          if constexpr (vector_bytes == 64)
            if (!by_powers) return kernel_of_degree<HarmonicPieces, S>(n, m);
          return kernel_of_degree<HarmonicPowers, S>(n, m);
        }
      return kernel_of<Harmonic, S>(n, m);
    case family_tropical: return kernel_of_degree<Tropical, S>(n, m);
    case family_tropical_rational: return kernel_of_degree<TropicalRational, S>(n, m);
    case family_polyrelu: return kernel_of_degree<PolyReLU, S>(n, m);
    case family_rational:
      if (n == 5 && m == 4) return kernel_of<Rational, S, 5, 4>(n, m);
      if (n == 3 && m == 2) return kernel_of<Rational, S, 3, 2>(n, m);
      return kernel_of<Rational, S>(n, m);
    case family_piecewise_linear: return kernel_of<PiecewiseLinear, S>(n, m);
    case family_rational_spline: return kernel_of<RationalSpline, S>(n, m);
    default: return {};
  }
}

// ---- passes ----

constexpr int largest_table = padded(RationalSpline::largest_table, 16), largest_sums = RationalSpline::largest_sums;
constexpr int largest_channel_table = RationalSpline::largest_table;

// What one group's elements pass through.
template <class S>
struct Pass {
  using V = Vector<S>;
  const Problem& problem;
  const Kernel<S>& kernel;
  alignas(64) S table[largest_table] = {};
  Tangent left{}, right{};

  Pass(const Problem& problem, const Kernel<S>& kernel, const double* parameters) : problem(problem), kernel(kernel) {
    kernel.prepare(parameters, table, problem.degree, problem.second_degree, {});
    if (!problem.tails) return;
    left = kernel.tangent(parameters, end_of(problem, problem.low), problem.degree, problem.second_degree);
    right = kernel.tangent(parameters, end_of(problem, problem.high), problem.degree, problem.second_degree);
  }

  // Where a problem has tails, the elements are of S and results stay in the cache, whatever `access` says.
  void value(const void* from, void* to, int count, Access access = {}) const {
    if (!problem.tails) {
      kernel.forward(from, to, count, access, table, problem.degree, problem.second_degree, nullptr);
      return;
    }
    const Tails<S> tails(problem, left, right);
    if (kernel.with_tails) {
      kernel.forward(from, to, count, {}, table, problem.degree, problem.second_degree, &tails);
      return;
    }
    const S* x = static_cast<const S*>(from);
    S* y = static_cast<S*>(to);
    alignas(64) S inside[block];
    enter(x, inside, count);
    kernel.forward(inside, y, count, {}, table, problem.degree, problem.second_degree, nullptr);
    for (int i = 0; i < count; i += lanes<S>) store(y + i, tails.value(load<V>(x + i), load<V>(y + i)));
  }

  // Sums over each lane: the family's own, then of g and of g (x - low) below the interval, and the same above it; null:
  // nobody wants them.
  void gradient(const void* from, const void* seed, void* to, int count, double* sums, Access access = {}) const {
    const int n = problem.degree, m = problem.second_degree;
    if (!problem.tails) {
      if (!sums) return kernel.slope(from, seed, to, count, access, table, n, m, nullptr);
      kernel.backward(from, seed, to, count, access, table, sums, n, m, nullptr);
      return;
    }
    const Tails<S> tails(problem, left, right);
    if (kernel.with_tails) {
      if (!sums) return kernel.slope(from, seed, to, count, {}, table, n, m, &tails);
      kernel.backward(from, seed, to, count, {}, table, sums, n, m, &tails);
      return;
    }
    const S *x = static_cast<const S*>(from), *g = static_cast<const S*>(seed);
    S* dx = static_cast<S*>(to);
    alignas(64) S inside[block], inner_g[block];
    enter(x, inside, count);
    V outside[tail_sums] = {};
    for (int i = 0; sums && i < count; i += lanes<S>)
      store(inner_g + i, tails.split(load<V>(x + i), load<V>(g + i), outside));
    if (sums) kernel.backward(inside, inner_g, dx, count, {}, table, sums, n, m, nullptr);
    else kernel.slope(inside, g, dx, count, {}, table, n, m, nullptr);
    for (int i = 0; i < count; i += lanes<S>)
      store(dx + i, tails.slope(load<V>(x + i), load<V>(g + i), load<V>(dx + i)));
    for (int k = 0; sums && k < tail_sums; ++k) accumulate(outside[k], sums + (kernel.sums + k) * lanes<S>);
  }

 private:
  // The family's variable, of x limited to the interval.
  void enter(const S* x, S* inside, int count) const {
    const Entrance<S> entrance(problem);
    for (int i = 0; i < count; i += lanes<S>) store(inside + i, entrance.variable(load<V>(x + i)));
  }
};

}  // namespace
}  // namespace polytrope
