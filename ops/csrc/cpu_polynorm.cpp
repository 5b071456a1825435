// PolyNorm on the CPU: y = b + sum_k a_k r_k x^k with r_k = 1 / sqrt(mean(x^2k) + epsilon) over a row, k = 1…n.
//
// Within a row this is a polynomial. Backward, with S_k = sum over the row of g x^k and N columns:
//   dx = g sum_k k a_k r_k x^(k-1) - sum_k (k / N) a_k r_k^3 S_k x^(2k-1),   da_k = sum of r_k S_k,   db = sum of g.
// Where powers leave the range of float, a row is computed in z = x / s, s a power of two about as large as its largest
// element: x^k r_k = z^k / sqrt(mean(z^2k) + epsilon / s^2k).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>

#include "cpu_call.h"
#include "cpu_elements.h"
#include "cpu_threads.h"

namespace polytrope {
namespace {

// `block` columns of a matrix, or as many as are left, from the column `at` on.
template <class S>
Strip<S, block> columns_of(const Problem& problem, int64_t at) {
  return {problem.data_type, int(std::min<int64_t>(block, problem.inner - at)), at, problem.inner};
}

constexpr int moments = max_degree + 1;

// Adds sum x^2k to squares[k * lanes …] and, with g, sum g x^k to products[k * lanes …] (k = 0: sum g), each lane by itself.
// D: the degree; 0: n.
template <class S, int D>
void add_moments(const S* x, const S* g, int width, int n, double* squares, double* products) {
  using V = Vector<S>;
  if (D) n = D;
  V square_sums[moments] = {}, product_sums[moments] = {};
  for (int i = 0; i < width; i += lanes<S>) {
    const V v = load<V>(x + i), squared = v * v;
    V power = squared;
    POLYTROPE_UNROLL
    for (int k = 1; k <= n; ++k) {
      square_sums[k] += power;
      power *= squared;
    }
    if (!g) continue;
    power = load<V>(g + i);
    POLYTROPE_UNROLL
    for (int k = 0; k <= n; ++k) {
      product_sums[k] += power;
      power *= v;
    }
  }
  for (int k = 0; k <= n; ++k) {
    accumulate(square_sums[k], squares + k * lanes<S>);
    if (g) accumulate(product_sums[k], products + k * lanes<S>);
  }
}

// The sums over lanes.
template <class S>
void fold_moments(const double* by_lane, int n, double* sums) {
  for (int k = 0; k <= n; ++k) sums[k] = std::accumulate(by_lane + k * lanes<S>, by_lane + (k + 1) * lanes<S>, 0.0);
}

// A row as it passes through the kernels: in blocks of z = x scale.
template <class S>
struct Row {
  const Problem& problem;
  const void* x;
  int64_t row;
  double scale = 1;

  const S* read(const Strip<S, block>& strip, S* buffer) const {
    const S* const from = strip.read(x, row, 1, buffer);
    if (scale == 1) return from;
    const int width = padded(strip.columns, lanes<S>);
    for (int i = 0; i < width; ++i) buffer[i] = from[i] * S(scale);
    return buffer;
  }
  // visit(first column, strip, elements in whole vectors)
  template <class Visit>
  void each(const Visit& visit) const {
    for (int64_t at = 0; at < problem.inner; at += block) {
      const Strip<S, block> strip = columns_of<S>(problem, at);
      visit(strip, padded(strip.columns, lanes<S>));
    }
  }
  // mean(z^2k) + epsilon / s^2k
  double mean(const double* squares, int k) const {
    const double mean = squares[k] / double(problem.inner), epsilon = problem.epsilon;
    return mean + (scale == 1 || epsilon == 0 ? epsilon : epsilon * std::pow(scale, 2 * k));
  }
  // Sets the scale, where it must be another: squares or their inverses have left the range in which all that is computed
  // from them stays in that of float. Rows of zeros, and those with ±inf or NaN, stay as they are.
  bool rescale(const double* squares, S* buffer) {
    bool in_range = true;
    for (int k = 1; k <= problem.degree; ++k) {
      const double own = mean(squares, k);
      in_range &= own < 1e20 && own > 1e-20;
    }
    if (in_range) return false;
    double largest = 0;
    each([&](const Strip<S, block>& strip, int width) {
      const S* const from = read(strip, buffer);
      for (int i = 0; i < width; ++i) largest = std::abs(from[i]) <= largest ? largest : std::abs(double(from[i]));
    });
    if (!(largest > 0 && largest < INFINITY)) return false;
    // Between 2 and 4 at most, as 2^-126 is the smallest float that no processor takes for 0.
    const int most = sizeof(S) == 4 ? 126 : 1020;
    scale = std::ldexp(1.0, std::max(-most, std::min(most, 1 - std::ilogb(largest))));
    return scale != 1;
  }
};

inline int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, chunk / columns); }

// D: the degree; 0: read at run time.
template <class S, int D>
int polynorm_forward(const Call& call, const void* x, const void* const* parts, void* y, int threads) {
  using V = Vector<S>;
  const int64_t rows = call.problem.outer, columns = call.problem.inner, step = rows_per_task(columns);
  const std::unique_ptr<double[]> parameters = pack(call.parts, 1, parts);
  if (!parameters) return 2;
  run_tasks((rows + step - 1) / step, 1, threads, call.parallel_region, [&](int64_t task) {
    const int n = D ? D : call.problem.degree;
    alignas(64) S xs[block], ys[block];
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      double squares[moments];
      Row<S> own{call.problem, x, row};
      do {
        alignas(64) double by_lane[moments * lanes<S>] = {};
        own.each([&](const Strip<S, block>& strip, int width) {
          add_moments<S, D>(own.read(strip, xs), nullptr, width, n, by_lane, nullptr);
        });
        fold_moments<S>(by_lane, n, squares);
      } while (own.scale == 1 && own.rescale(squares, xs));
      S t[moments];
      t[0] = S(parameters[0]);
      for (int k = 1; k <= n; ++k) t[k] = S(parameters[k] / std::sqrt(own.mean(squares, k)));
      own.each([&](const Strip<S, block>& strip, int width) {
        const S* from = own.read(strip, xs);
        S* to = strip.place(y, row, ys);
        for (int i = 0; i < width; i += lanes<S>) store(to + i, Polynomial::value(load<V>(from + i), t, n, 0));
        strip.write(y, row, 1, ys);
      });
    }
  });
  return 0;
}

template <class S, int D>
int polynorm_backward(const Call& call, const void* g, const void* x, const void* const* parts, void* dx,
                      void* const* part_gradients, int threads) {
  using V = Vector<S>;
  const int degree = call.problem.degree;
  const int64_t rows = call.problem.outer, columns = call.problem.inner, step = rows_per_task(columns);
  const int64_t tasks = (rows + step - 1) / step;
  const std::unique_ptr<double[]> parameters = pack(call.parts, 1, parts);
  const std::unique_ptr<double[]> partial(new (std::nothrow) double[size_t(tasks * (degree + 1))]());
  if (!parameters || !partial) return 2;
  run_tasks(tasks, 1, threads, call.parallel_region, [&](int64_t task) {
    const int n = D ? D : degree;
    alignas(64) S xs[block], gs[block], dxs[block];
    double* total = partial.get() + task * (n + 1);
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      double squares[moments], products[moments];
      Row<S> own{call.problem, x, row};
      do {
        alignas(64) double squares_by_lane[moments * lanes<S>] = {}, products_by_lane[moments * lanes<S>] = {};
        own.each([&](const Strip<S, block>& strip, int width) {
          const S *from = own.read(strip, xs), *seed = strip.read(g, row, 1, gs);
          add_moments<S, D>(from, seed, width, n, squares_by_lane, products_by_lane);
        });
        fold_moments<S>(squares_by_lane, n, squares);
        fold_moments<S>(products_by_lane, n, products);
      } while (own.scale == 1 && own.rescale(squares, xs));
      S direct[moments], through[moments];  // of z^(k-1), and of z^(2k-1)
      total[0] += products[0];
      for (int k = 1; k <= n; ++k) {
        const double r = 1 / std::sqrt(own.mean(squares, k));
        total[k] += r * products[k];
        direct[k - 1] = S(k * parameters[k] * r);
        through[k - 1] = S(-k / double(columns) * parameters[k] * r * r * r * products[k]);
      }
      own.each([&](const Strip<S, block>& strip, int width) {
        const S *from = own.read(strip, xs), *seed = strip.read(g, row, 1, gs);
        S* to = strip.place(dx, row, dxs);
        for (int i = 0; i < width; i += lanes<S>) {
          const V v = load<V>(from + i);
          const V slope = load<V>(seed + i) * Polynomial::value(v, static_cast<const S*>(direct), n - 1, 0);
          store(to + i, (slope + v * Polynomial::value(v * v, static_cast<const S*>(through), n - 1, 0)) * S(own.scale));
        }
        strip.write(dx, row, 1, dxs);
      });
    }
  });
  if (!part_gradients) return 0;
  double gradient[moments] = {};
  for (int64_t task = 0; task < tasks; ++task)
    for (int k = 0; k <= degree; ++k) gradient[k] += partial[task * (degree + 1) + k];
  unpack(call.parts, 1, gradient, part_gradients);
  return 0;
}

}  // namespace
}  // namespace polytrope

extern "C" {

// The same interface as that of cpu_float32.cpp.
int polytrope_forward_polynorm(const polytrope::Call* call, const void* x, const void* const* parts, void* y, int threads) {
  using namespace polytrope;
  const int degree = call->problem.degree;
  if (degree < 1 || degree > max_degree || width_of(call->parts) != degree + 1) return 1;
  const auto narrow = degree == 3 ? polynorm_forward<float, 3> : polynorm_forward<float, 0>;
  const auto run = call->problem.data_type == type_float64 ? polynorm_forward<double, 0> : narrow;
  return run(*call, x, parts, y, threads);
}

int polytrope_backward_polynorm(const polytrope::Call* call, const void* gradient, const void* x, const void* const* parts,
                                void* x_gradient, void* const* part_gradients, int threads) {
  using namespace polytrope;
  const int degree = call->problem.degree;
  if (degree < 1 || degree > max_degree || width_of(call->parts) != degree + 1) return 1;
  const auto narrow = degree == 3 ? polynorm_backward<float, 3> : polynorm_backward<float, 0>;
  const auto run = call->problem.data_type == type_float64 ? polynorm_backward<double, 0> : narrow;
  return run(*call, gradient, x, parts, x_gradient, part_gradients, threads);
}

}  // extern "C"
