// The elementwise families on the CPU where groups are of few channels, which lie side by side: a vector holds elements of
// as many channels, and each entry of its table their numbers. The degree is read at run time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu_call.h"
#include "cpu_elements.h"
#include "cpu_kernels.h"
#include "cpu_threads.h"
#include "families.h"
#include "problem.h"

namespace polytrope {
namespace {

constexpr int strip_channels = 128;  // of which a task computes rows
constexpr int patch_rows = 16;       // at a time

// Rows of a task, and of a partial sum. Few, so that their pages of memory serve the task of the next strip as well, but not
// so few that partial sums take more memory than the tensors.
inline int64_t strip_rows(const Problem& problem) { return std::max<int64_t>(256, (problem.outer + 15) / 16); }
inline int64_t strip_parts(const Problem& problem) { return (problem.outer + strip_rows(problem) - 1) / strip_rows(problem); }

// Whether x is computed so: [outer, channels], where channels are [groups, inner]. Each channel needs a table of its own,
// which must serve a number of rows.
inline bool is_by_channel(const Problem& problem) {
  return may_be_by_channel(problem) && (problem.inner == 1 || problem.outer >= 256);
}

// ---- kernels over a patch of rows and whole vectors of channels; strides from row to row ----

template <class Family, class S>
void forward_patch(const S* x, int64_t x_stride, S* y, int64_t y_stride, int rows, int channels, const Vector<S>* tables,
                   int n, int m) {
  using V = Vector<S>;
  for (int c = 0; c < channels; c += lanes<S>, tables += Family::largest_table) {
    Reach<Family, V> reach;
    for (int i = 0; i < rows; ++i) {
      const V v = load<V>(x + i * x_stride + c);
      reach.note(v);
      store(y + i * y_stride + c, value_near<Family>(v, tables, n, m));
    }
    for (int i = 0; reach.is_far() && i < rows; ++i)
      store(y + i * y_stride + c, Family::value(load<V>(x + i * x_stride + c), tables, n, m));
  }
}

// One vector of channels of what follows.
template <class Family, class S, class Sums>
POLYTROPE_FUNCTION bool slope_column(const S* x, int64_t x_stride, const S* g, int64_t g_stride, S* dx, int64_t dx_stride,
                                     int rows, const Vector<S>* table, Sums sums, int n, int m) {
  using V = Vector<S>;
  Reach<Family, V> reach;
  for (int i = 0; i < rows; ++i) {
    const V v = load<V>(x + i * x_stride);
    reach.note(v);
    store(dx + i * dx_stride, backward_near<Family>(v, load<V>(g + i * g_stride), table, sums, n, m));
  }
  return reach.is_far();
}
template <class Family, class S, class Sums>
void far_column(const S* x, int64_t x_stride, const S* g, int64_t g_stride, S* dx, int64_t dx_stride, int rows,
                const Vector<S>* table, Sums sums, int n, int m) {
  using V = Vector<S>;
  for (int i = 0; i < rows; ++i)
    store(dx + i * dx_stride, Family::backward(load<V>(x + i * x_stride), load<V>(g + i * g_stride), table, sums, n, m));
}

// Adds to totals[sum, channel].
template <class Family, class S>
void backward_patch(const S* x, int64_t x_stride, const S* g, int64_t g_stride, S* dx, int64_t dx_stride, int rows,
                    int channels, const Vector<S>* tables, double* totals, int n, int m) {
  using V = Vector<S>;
  const int sums = Family::sums(n, m);
  for (int c = 0; c < channels; c += lanes<S>, tables += Family::largest_table) {
    V a[Family::largest_sums];
    for (int k = 0; k < sums; ++k) a[k] = V{};
    if (slope_column<Family>(x + c, x_stride, g + c, g_stride, dx + c, dx_stride, rows, tables, a, n, m)) {
      for (int k = 0; k < sums; ++k) a[k] = V{};
      far_column<Family>(x + c, x_stride, g + c, g_stride, dx + c, dx_stride, rows, tables, a, n, m);
    }
    for (int k = 0; k < sums; ++k) accumulate(a[k], totals + k * strip_channels + c);
  }
}

// The same without totals.
template <class Family, class S>
void slope_patch(const S* x, int64_t x_stride, const S* g, int64_t g_stride, S* dx, int64_t dx_stride, int rows, int channels,
                 const Vector<S>* tables, int n, int m) {
  for (int c = 0; c < channels; c += lanes<S>, tables += Family::largest_table)
    if (slope_column<Family>(x + c, x_stride, g + c, g_stride, dx + c, dx_stride, rows, tables, NoSums{}, n, m))
      far_column<Family>(x + c, x_stride, g + c, g_stride, dx + c, dx_stride, rows, tables, NoSums{}, n, m);
}

template <class S>
struct ChannelKernel {
  void (*forward)(const S*, int64_t, S*, int64_t, int, int, const Vector<S>*, int, int);
  void (*backward)(const S*, int64_t, const S*, int64_t, S*, int64_t, int, int, const Vector<S>*, double*, int, int);
  void (*slope)(const S*, int64_t, const S*, int64_t, S*, int64_t, int, int, const Vector<S>*, int, int);
  void (*prepare)(const double*, S*, int, int, Share);
  int table;  // entries
};

template <class Family, class S>
ChannelKernel<S> channel_kernel_of() {
  return {forward_patch<Family, S>, backward_patch<Family, S>, slope_patch<Family, S>, Family::template prepare<S>,
          Family::largest_table};
}

// Of the same sums as the kernel that find_kernel finds.
template <class S>
ChannelKernel<S> find_channel_kernel(const Problem& problem) {
  switch (problem.family) {
    case family_polynomial: return channel_kernel_of<Polynomial, S>();
    case family_hermite: {
      ChannelKernel<S> kernel = channel_kernel_of<Polynomial, S>();
      kernel.prepare = Hermite::prepare<S>;
      return kernel;
    }
    case family_chebyshev: return channel_kernel_of<Chebyshev, S>();
    case family_legendre: return channel_kernel_of<Legendre, S>();
    case family_fourier: return channel_kernel_of<Fourier, S>();
    case family_harmonic:
      if constexpr (std::is_same_v<S, float>)
        if (problem.degree <= HarmonicPowers::highest) return channel_kernel_of<HarmonicPowers, S>();
      return channel_kernel_of<Harmonic, S>();
    case family_tropical: return channel_kernel_of<Tropical, S>();
    case family_tropical_rational: return channel_kernel_of<TropicalRational, S>();
    case family_polyrelu: return channel_kernel_of<PolyReLU, S>();
    case family_rational: return channel_kernel_of<Rational, S>();
    case family_piecewise_linear: return channel_kernel_of<PiecewiseLinear, S>();
    case family_rational_spline: return channel_kernel_of<RationalSpline, S>();
    default: return {};
  }
}

// ---- strips ----

template <class S>
using Patch = S[patch_rows * strip_channels];

// What the channels of a strip pass through: their tables and tangents.
template <class S>
struct StripPass {
  using V = Vector<S>;
  Problem problem;
  ChannelKernel<S> kernel;
  int sums, width;  // sums: the family's; width: channels in whole vectors
  alignas(64) V tables[strip_channels / lanes<S> * largest_channel_table];
  alignas(64) S low_values[strip_channels], low_slopes[strip_channels];
  alignas(64) S high_values[strip_channels], high_slopes[strip_channels];

  // Of so many channels from the first one on; `parameters`: of all groups.
  void prepare(const Problem& of, const Kernel<S>& group_kernel, const double* parameters, int64_t first, int channels) {
    problem = of;
    kernel = find_channel_kernel<S>(problem);
    sums = group_kernel.sums;
    width = padded(channels, lanes<S>);
    const int n = problem.degree, m = problem.second_degree;
    S table[largest_channel_table] = {};
    Tangent low{}, high{};
    const double* prepared = nullptr;
    for (int c = 0; c < width; ++c) {
      // What pads the last vector computes as the last channel does.
      const int64_t group = (first + std::min(c, channels - 1)) / problem.inner;
      const double* const own = parameters + group * group_kernel.parameters;
      if (own != prepared) {
        kernel.prepare(own, table, n, m, {});
        if (problem.tails) {
          low = group_kernel.tangent(own, end_of(problem, problem.low), n, m);
          high = group_kernel.tangent(own, end_of(problem, problem.high), n, m);
        }
        prepared = own;
      }
      S* const entries = reinterpret_cast<S*>(tables + c / lanes<S> * kernel.table) + c % lanes<S>;
      for (int k = 0; k < kernel.table; ++k) entries[k * lanes<S>] = table[k];
      low_values[c] = S(low.value);
      low_slopes[c] = S(low.slope);
      high_values[c] = S(high.value);
      high_slopes[c] = S(high.slope);
    }
  }

  void value(const S* x, int64_t x_stride, S* y, int64_t y_stride, int rows) const {
    const int n = problem.degree, m = problem.second_degree;
    if (!problem.tails) return kernel.forward(x, x_stride, y, y_stride, rows, width, tables, n, m);
    alignas(64) Patch<S> inside;
    const Entrance<S> entrance(problem);
    const S low = entrance.low, high = entrance.high;
    each(rows, [&](int i, int c) {
      store(inside + i * strip_channels + c, entrance.variable(load<V>(x + i * x_stride + c)));
    });
    kernel.forward(inside, strip_channels, y, y_stride, rows, width, tables, n, m);
    each(rows, [&](int i, int c) {
      const V v = load<V>(x + i * x_stride + c);
      V value = load<V>(y + i * y_stride + c);
      value = v < low ? (v - low) * load<V>(low_slopes + c) + load<V>(low_values + c) : value;
      value = v > high ? (v - high) * load<V>(high_slopes + c) + load<V>(high_values + c) : value;
      store(y + i * y_stride + c, value);
    });
  }

  // Adds to totals[sum, channel], those of the tails (as Pass has them) after the family's; null: nobody wants them.
  void gradient(const S* x, int64_t x_stride, const S* g, int64_t g_stride, S* dx, int64_t dx_stride, int rows,
                double* totals) const {
    const int n = problem.degree, m = problem.second_degree;
    if (!problem.tails) {
      if (!totals) return kernel.slope(x, x_stride, g, g_stride, dx, dx_stride, rows, width, tables, n, m);
      return kernel.backward(x, x_stride, g, g_stride, dx, dx_stride, rows, width, tables, totals, n, m);
    }
    alignas(64) Patch<S> inside, inner_g;
    const Entrance<S> entrance(problem);
    const S low = entrance.low, high = entrance.high, rate = entrance.rate;
    double* const tails = totals ? totals + sums * strip_channels : nullptr;
    each(rows, [&](int i, int c) {
      const V v = load<V>(x + i * x_stride + c), gv = load<V>(g + i * g_stride + c);
      if (tails) {
        accumulate(v < low ? gv : V{}, tails + c);
        accumulate(v < low ? gv * (v - low) : V{}, tails + strip_channels + c);
        accumulate(v > high ? gv : V{}, tails + 2 * strip_channels + c);
        accumulate(v > high ? gv * (v - high) : V{}, tails + 3 * strip_channels + c);
      }
      store(inside + i * strip_channels + c, entrance.variable(v));
      store(inner_g + i * strip_channels + c, v < low ? V{} : (v > high ? V{} : gv));
    });
    if (!totals) kernel.slope(inside, strip_channels, inner_g, strip_channels, dx, dx_stride, rows, width, tables, n, m);
    else kernel.backward(inside, strip_channels, inner_g, strip_channels, dx, dx_stride, rows, width, tables, totals, n, m);
    each(rows, [&](int i, int c) {
      const V v = load<V>(x + i * x_stride + c), gv = load<V>(g + i * g_stride + c);
      V slope = load<V>(dx + i * dx_stride + c) * rate;
      slope = v < low ? gv * load<V>(low_slopes + c) : slope;
      slope = v > high ? gv * load<V>(high_slopes + c) : slope;
      store(dx + i * dx_stride + c, slope);
    });
  }

 private:
  template <class Visit>
  void each(int rows, const Visit& visit) const {
    for (int i = 0; i < rows; ++i)
      for (int c = 0; c < width; c += lanes<S>) visit(i, c);
  }
};

// visit(pass, first channel, channels, first row, last row, number of these rows' part) for every task. 0: done; 2: out of
// memory.
template <class S, class Visit>
int each_strip(const Call& call, const Kernel<S>& kernel, const double* parameters, int threads, const Visit& visit) {
  const int64_t channel_count = call.problem.groups * call.problem.inner;
  const int64_t strips = (channel_count + strip_channels - 1) / strip_channels;
  const int64_t rows = strip_rows(call.problem);
  const std::unique_ptr<StripPass<S>[]> passes(new (std::nothrow) StripPass<S>[size_t(strips)]);
  if (!passes) return 2;
  const auto channels = [&](int64_t strip) {
    return int(std::min<int64_t>(strip_channels, channel_count - strip * strip_channels));
  };
  run_tasks(strips, 1, threads, call.parallel_region, [&](int64_t strip) {
    passes[size_t(strip)].prepare(call.problem, kernel, parameters, strip * strip_channels, channels(strip));
  });
  run_tasks(strip_parts(call.problem) * strips, 1, threads, call.parallel_region, [&](int64_t task) {
    const int64_t strip = task % strips, part = task / strips;
    visit(passes[size_t(strip)], strip * strip_channels, channels(strip), part * rows,
          std::min(call.problem.outer, (part + 1) * rows), part);
  });
  return 0;
}

template <class S>
int forward_channels(const Call& call, const Kernel<S>& kernel, const double* parameters, const void* x, void* y,
                     int threads) {
  const Problem& problem = call.problem;
  const int64_t channel_count = problem.groups * problem.inner, stride = problem.gated ? 2 * channel_count : channel_count;
  return each_strip(call, kernel, parameters, threads,
                    [&](const StripPass<S>& pass, int64_t channel, int channels, int64_t first, int64_t last, int64_t) {
    const Strip<S, strip_channels> in{problem.data_type, channels, channel, stride};
    const Strip<S, strip_channels> out{problem.data_type, channels, channel, channel_count};
    const Strip<S, strip_channels> factor{problem.data_type, channels, channel_count + channel, stride};
    alignas(64) Patch<S> x_buffer, y_buffer, gate_buffer;
    for (int64_t row = first; row < last; row += patch_rows) {
      const int rows = int(std::min<int64_t>(patch_rows, last - row));
      in.template fetch<0>(x, row + rows, rows);
      out.template fetch<1>(y, row, rows);
      const S* const xs = in.read(x, row, rows, x_buffer);
      S* const ys = out.place(y, row, y_buffer);
      pass.value(xs, in.kernel_stride(), ys, out.kernel_stride(), rows);
      if (problem.gated) {
        const S* const gates = factor.read(x, row, rows, gate_buffer);
        for (int i = 0; i < rows; ++i)
          for (int c = 0; c < channels; ++c) ys[i * out.kernel_stride() + c] *= gates[i * factor.kernel_stride() + c];
      }
      out.write(y, row, rows, ys);
    }
  });
}

// Gives partial[part of the rows, channel, sum], unless that is null.
template <class S>
int backward_channels(const Call& call, const Kernel<S>& kernel, const double* parameters, int sums, const void* g,
                      const void* x, void* dx, double* partial, int threads) {
  const Problem& problem = call.problem;
  const int64_t channel_count = problem.groups * problem.inner, stride = problem.gated ? 2 * channel_count : channel_count;
  return each_strip(call, kernel, parameters, threads,
                    [&](const StripPass<S>& pass, int64_t channel, int channels, int64_t first, int64_t last, int64_t part) {
    const Strip<S, strip_channels> in{problem.data_type, channels, channel, stride};
    const Strip<S, strip_channels> out{problem.data_type, channels, channel, channel_count};
    const Strip<S, strip_channels> factor{problem.data_type, channels, channel_count + channel, stride};
    alignas(64) Patch<S> x_buffer, g_buffer, dx_buffer, gate_buffer, values, seeds;
    alignas(64) double totals[(largest_sums + tail_sums) * strip_channels];
    if (partial) std::fill(totals, totals + sums * strip_channels, 0.0);
    for (int64_t row = first; row < last; row += patch_rows) {
      const int rows = int(std::min<int64_t>(patch_rows, last - row));
      in.template fetch<0>(x, row + rows, rows);
      out.template fetch<0>(g, row + rows, rows);
      in.template fetch<1>(dx, row, rows);
      const S *const xs = in.read(x, row, rows, x_buffer), *gs = out.read(g, row, rows, g_buffer);
      int64_t g_stride = out.kernel_stride();
      if (problem.gated) {
        const S* const gates = factor.read(x, row, rows, gate_buffer);
        S* const gate_gradients = factor.place(dx, row, dx_buffer);
        pass.value(xs, in.kernel_stride(), values, strip_channels, rows);
        for (int i = 0; i < rows; ++i)
          for (int c = 0; c < pass.width; ++c) {
            const S seed = gs[i * g_stride + c];
            gate_gradients[i * factor.kernel_stride() + c] = values[i * strip_channels + c] * seed;
            seeds[i * strip_channels + c] = seed * gates[i * factor.kernel_stride() + c];
          }
        factor.write(dx, row, rows, gate_gradients);
        gs = seeds;
        g_stride = strip_channels;
      }
      S* const dxs = in.place(dx, row, dx_buffer);
      pass.gradient(xs, in.kernel_stride(), gs, g_stride, dxs, in.kernel_stride(), rows, partial ? totals : nullptr);
      in.write(dx, row, rows, dxs);
    }
    for (int c = 0; partial && c < channels; ++c)
      for (int k = 0; k < sums; ++k) partial[(part * channel_count + channel + c) * sums + k] = totals[k * strip_channels + c];
  });
}

}  // namespace
}  // namespace polytrope
