// PolyNorm on the CPU: y = b + sum_k a_k r_k x^k with r_k = 1 / sqrt(mean(x^2k) + epsilon) over a row, k = 1…n.
//
// Within a row this is a polynomial. Backward, with S_k = sum over the row of g x^k and N columns:
//   dx = g sum_k k a_k r_k x^(k-1) - sum_k (k / N) a_k r_k^3 S_k x^(2k-1),   da_k = sum of r_k S_k,   db = sum of g.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu_elements.h"
#include "cpu_threads.h"

namespace polytrope {
namespace {

// Row r of a matrix, `block` columns at a time, padded with zeros to whole vectors: visit(values, first column, width).
template <class S>
struct Rows {
  int type;
  int64_t columns;

  int read(const void* base, int64_t row, int64_t at, S* target) const {
    const int count = int(std::min<int64_t>(block, columns - at)), width = padded(count, lanes<S>);
    read_elements(type, base, row * columns + at, 1, target, count);
    std::fill(target + count, target + width, S(0));
    return width;
  }
  void write(void* base, int64_t row, int64_t at, const S* source) const {
    write_elements(type, base, row * columns + at, 1, source, int(std::min<int64_t>(block, columns - at)));
  }
};

// Adds sum x^2k to squares[k] and, with g, sum g x^k to products[k] (k = 0: sum g).
template <class S>
void add_moments(const S* x, const S* g, int width, int n, double* squares, double* products) {
  using V = Vector<S>;
  V square_sums[max_degree + 1] = {}, product_sums[max_degree + 1] = {};
  for (int i = 0; i < width; i += lanes<S>) {
    const V v = load<V>(x + i), squared = v * v;
    V power = squared;
    for (int k = 1; k <= n; ++k) {
      square_sums[k] += power;
      power *= squared;
    }
    if (!g) continue;
    power = load<V>(g + i);
    for (int k = 0; k <= n; ++k) {
      product_sums[k] += power;
      power *= v;
    }
  }
  for (int k = 0; k <= n; ++k) {
    squares[k] += fold(square_sums[k]);
    if (g) products[k] += fold(product_sums[k]);
  }
}


inline int64_t rows_per_task(int64_t columns) { return std::max<int64_t>(1, chunk / columns); }

template <class S>
int polynorm_forward(int type, int64_t rows, int64_t columns, int n, double epsilon, const void* x, const double* parameters,
                     void* y, int threads, ParallelRegion region) {
  using V = Vector<S>;
  const Rows<S> layout{type, columns};
  const int64_t step = rows_per_task(columns);
  run_tasks((rows + step - 1) / step, 1, threads, region, [&](int64_t task) {
    alignas(64) S xs[block];
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      double squares[max_degree + 1] = {};
      for (int64_t at = 0; at < columns; at += block)
        add_moments<S>(xs, nullptr, layout.read(x, row, at, xs), n, squares, nullptr);
      S t[max_degree + 1];
      t[0] = S(parameters[0]);
      for (int k = 1; k <= n; ++k) t[k] = S(parameters[k] / std::sqrt(squares[k] / double(columns) + epsilon));
      for (int64_t at = 0; at < columns; at += block) {
        const int width = layout.read(x, row, at, xs);
        for (int i = 0; i < width; i += lanes<S>) store(xs + i, Polynomial::value(load<V>(xs + i), t, n, 0));
        layout.write(y, row, at, xs);
      }
    }
  });
  return 0;
}

template <class S>
int polynorm_backward(int type, int64_t rows, int64_t columns, int n, double epsilon, const void* g, const void* x,
                      const double* parameters, void* dx, double* gradient, int threads, ParallelRegion region) {
  using V = Vector<S>;
  const Rows<S> layout{type, columns};
  const int64_t step = rows_per_task(columns), tasks = (rows + step - 1) / step;
  std::unique_ptr<double[]> partial(new (std::nothrow) double[size_t(tasks * (n + 1))]());
  if (!partial) return 2;
  run_tasks(tasks, 1, threads, region, [&](int64_t task) {
    alignas(64) S xs[block], gs[block];
    double* total = partial.get() + task * (n + 1);
    for (int64_t row = task * step; row < std::min(rows, (task + 1) * step); ++row) {
      double squares[max_degree + 1] = {}, products[max_degree + 1] = {};
      for (int64_t at = 0; at < columns; at += block) {
        const int width = layout.read(x, row, at, xs);
        layout.read(g, row, at, gs);
        add_moments(xs, gs, width, n, squares, products);
      }
      S direct[max_degree + 1], through[max_degree + 1];  // of x^(k-1), and of x^(2k-1)
      total[0] += products[0];
      for (int k = 1; k <= n; ++k) {
        const double r = 1 / std::sqrt(squares[k] / double(columns) + epsilon);
        total[k] += r * products[k];
        direct[k - 1] = S(k * parameters[k] * r);
        through[k - 1] = S(-k / double(columns) * parameters[k] * r * r * r * products[k]);
      }
      for (int64_t at = 0; at < columns; at += block) {
        const int width = layout.read(x, row, at, xs);
        layout.read(g, row, at, gs);
        for (int i = 0; i < width; i += lanes<S>) {
          const V v = load<V>(xs + i);
          const V own = load<V>(gs + i) * Polynomial::value(v, static_cast<const S*>(direct), n - 1, 0);
          store(xs + i, own + v * Polynomial::value(v * v, static_cast<const S*>(through), n - 1, 0));
        }
        layout.write(dx, row, at, xs);
      }
    }
  });
  for (int64_t task = 0; task < tasks; ++task)
    for (int k = 0; k <= n; ++k) gradient[k] += partial[task * (n + 1) + k];
  return 0;
}

}  // namespace
}  // namespace polytrope

extern "C" {

// `parameters`: b, a_1 … a_n; `parameter_gradient` comes in as zeros. Status as for polytrope_forward.
int polytrope_polynorm_forward(int type, int64_t rows, int64_t columns, int degree, double epsilon, const void* x,
                               const double* parameters, void* y, int threads, void* parallel_region) {
  const auto region = reinterpret_cast<polytrope::ParallelRegion>(parallel_region);
  const auto run = type == polytrope::type_float64 ? polytrope::polynorm_forward<double> : polytrope::polynorm_forward<float>;
  return run(type, rows, columns, degree, epsilon, x, parameters, y, threads, region);
}

int polytrope_polynorm_backward(int type, int64_t rows, int64_t columns, int degree, double epsilon, const void* gradient,
                                const void* x, const double* parameters, void* x_gradient, double* parameter_gradient,
                                int threads, void* parallel_region) {
  const auto region = reinterpret_cast<polytrope::ParallelRegion>(parallel_region);
  const auto run =
      type == polytrope::type_float64 ? polytrope::polynorm_backward<double> : polytrope::polynorm_backward<float>;
  return run(type, rows, columns, degree, epsilon, gradient, x, parameters, x_gradient, parameter_gradient, threads, region);
}

}  // extern "C"
