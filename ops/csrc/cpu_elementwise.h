// The CPU kernels of all elementwise families, for cpu_float32.cpp and cpu_float64.cpp: blocks that fit the first-level
// cache are converted to float, pass through a family of families.h, and are converted back; whole blocks of bfloat16
// that lie side by side are converted on the way through registers. Sums over elements are added in an order that
// depends on the shape only, never on the number of threads, so gradients are bitwise reproducible.
// Where the tensors of a call are larger than the cache, whole blocks are written past it: a line that is written in the
// cache is read from memory before, and will have left the cache when somebody wants it.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <type_traits>

#include "cpu_call.h"
#include "cpu_elements.h"
#include "cpu_harmonic.h"
#include "cpu_threads.h"
#include "families.h"
#include "problem.h"

namespace polytrope {
namespace {

constexpr int prefetch_distance = 512;  // elements
constexpr int unrolled_degree = 8;  // kernels for higher degrees read the degree at run time

// ---- kernels over one block ----

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

// D, E: degree and second degree; 0: read at run time.
template <class Family, class S, int D, int E>
void forward_block(const void* __restrict x, void* __restrict y, int count, Access access, const S* table, int degree,
                   int second) {
  using V = Vector<S>;
  const int n = D ? D : degree, m = D ? E : second;
  alignas(64) S t[padded(Family::largest_table, lanes<S>)];
  copy_table<Family>(table, t);
  each_vector<S>(x, nullptr, y, count, access, [&](V v, V, int) { return Family::value(v, t, n, m); });
}

// Adds to total[k * lanes …] the sums over lanes.
template <class Family, class S, int D, int E>
void backward_block(const void* __restrict x, const void* __restrict g, void* __restrict dx, int count, Access access,
                    const S* table, double* __restrict total, int degree, int second) {
  using V = Vector<S>;
  const int n = D ? D : degree, m = D ? E : second, sums = Family::sums(n, m);
  alignas(64) S t[padded(Family::largest_table, lanes<S>)];
  copy_table<Family>(table, t);
  V a[Family::largest_sums];
  for (int k = 0; k < sums; ++k) a[k] = V{};
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
    each_vector<S>(x, g, dx, count, access, [&](V v, V seed, int) { return Family::backward(v, seed, t, a, n, m); });
  }
  for (int k = 0; k < sums; ++k) accumulate(a[k], total + k * lanes<S>);
}

template <class S>
struct Kernel {
  void (*forward)(const void*, void*, int, Access, const S*, int, int);
  void (*backward)(const void*, const void*, void*, int, Access, const S*, double*, int, int);
  void (*prepare)(const double*, S*, int, int);
  void (*finish)(const double*, const double*, double*, int, int);
  Tangent (*tangent)(const double*, double, int, int);
  void (*add_tail)(const double*, double, double, double, double*, int, int);
  int parameters, sums;
};

template <class Family, class S, int D = 0, int E = 0>
Kernel<S> kernel_of(int n, int m) {
  return {forward_block<Family, S, D, E>, backward_block<Family, S, D, E>, Family::template prepare<S>, Family::finish,
          tangent<Family>, add_tail<Family>, Family::parameters(n, m), Family::sums(n, m)};
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

template <class S>
Kernel<S> find_kernel(const Problem& problem) {
  const int n = problem.degree, m = problem.second_degree;
  switch (problem.family) {
    case family_polynomial: return kernel_of_degree<Polynomial, S>(n, m);
    case family_hermite: return hermite_kernel<S>(n, m);
    case family_chebyshev: return kernel_of_degree<Chebyshev, S>(n, m);
    case family_legendre: return kernel_of_degree<Legendre, S>(n, m);
    case family_fourier: return kernel_of_degree<Fourier, S>(n, m);
    case family_harmonic:
      if constexpr (std::is_same_v<S, float>)
        if (n <= HarmonicPowers::highest)
          return kernel_of_degree<std::conditional_t<vector_bytes == 64, HarmonicPieces, HarmonicPowers>, S>(n, m);
      return kernel_of<Harmonic, S>(n, m);
    case family_tropical: return kernel_of_degree<Tropical, S>(n, m);
    case family_tropical_rational: return kernel_of_degree<TropicalRational, S>(n, m);
    case family_polyrelu: return kernel_of_degree<PolyReLU, S>(n, m);
    case family_rational:
      if (n == 5 && m == 4) return kernel_of<Rational, S, 5, 4>(n, m);
      if (n == 3 && m == 2) return kernel_of<Rational, S, 3, 2>(n, m);
      return kernel_of<Rational, S>(n, m);
    case family_piecewise_linear: return kernel_of<PiecewiseLinear, S>(n, m);
    default: return {};
  }
}

// ---- passes ----

// Elements first … first + count of a group's sequence, which is [outer, inner] out of [outer, groups, inner].
struct Layout {
  int64_t inner, row;  // row: elements from one outer index to the next

  template <class Visit>  // visit(position in the block, memory index, memory stride, count)
  void runs(int64_t start, int64_t first, int count, Visit visit) const {
    if (inner == 1) {
      visit(0, start + first * row, row, count);
      return;
    }
    int64_t outer_index = first / inner, inner_index = first % inner;
    for (int done = 0; done < count;) {
      const int run = int(std::min<int64_t>(inner - inner_index, count - done));
      visit(done, start + outer_index * row + inner_index, int64_t(1), run);
      done += run;
      inner_index = 0;
      ++outer_index;
    }
  }

  bool contiguous(int64_t first, int count) const { return inner > 1 && first % inner + count <= inner; }
  int64_t index(int64_t start, int64_t first) const { return start + first / inner * row + first % inner; }
};

template <class S>
void read_block(const Layout& layout, int type, const void* base, int64_t start, int64_t first, int count, S* target) {
  layout.runs(start, first, count, [&](int position, int64_t index, int64_t stride, int run) {
    read_elements(type, base, index, stride, target + position, run);
  });
}

template <class S>
void write_block(const Layout& layout, int type, void* base, int64_t start, int64_t first, int count, const S* source) {
  layout.runs(start, first, count, [&](int position, int64_t index, int64_t stride, int run) {
    write_elements(type, base, index, stride, source + position, run);
  });
}

constexpr int largest_table = 384, largest_sums = 2 * max_pieces;  // of HarmonicPieces and of PiecewiseLinear
constexpr int tail_sums = 4;

// What one group's elements pass through.
template <class S>
struct Pass {
  using V = Vector<S>;
  const Problem& problem;
  const Kernel<S>& kernel;
  alignas(64) S table[largest_table] = {};
  Tangent left{}, right{};

  Pass(const Problem& problem, const Kernel<S>& kernel, const double* parameters) : problem(problem), kernel(kernel) {
    kernel.prepare(parameters, table, problem.degree, problem.second_degree);
    if (!problem.tails) return;
    left = kernel.tangent(parameters, problem.low, problem.degree, problem.second_degree);
    right = kernel.tangent(parameters, problem.high, problem.degree, problem.second_degree);
  }

  // Where a problem has tails, the elements are of S and results stay in the cache, whatever `access` says.
  void value(const void* from, void* to, int count, Access access = {}) const {
    if (!problem.tails) {
      kernel.forward(from, to, count, access, table, problem.degree, problem.second_degree);
      return;
    }
    const S* x = static_cast<const S*>(from);
    S* y = static_cast<S*>(to);
    alignas(64) S inside[block];
    enter(x, inside, count);
    kernel.forward(inside, y, count, {}, table, problem.degree, problem.second_degree);
    const S low = S(left.at), high = S(right.at);
    for (int i = 0; i < count; i += lanes<S>) {
      const V v = load<V>(x + i);
      V value = load<V>(y + i);
      value = v < low ? (v - low) * S(left.slope) + S(left.value) : value;
      value = v > high ? (v - high) * S(right.slope) + S(right.value) : value;
      store(y + i, value);
    }
  }

  // Sums over each lane: the family's own, then of g and of g (x - low) below the interval, and the same above it.
  void gradient(const void* from, const void* seed, void* to, int count, double* sums, Access access = {}) const {
    if (!problem.tails) {
      kernel.backward(from, seed, to, count, access, table, sums, problem.degree, problem.second_degree);
      return;
    }
    const S *x = static_cast<const S*>(from), *g = static_cast<const S*>(seed);
    S* dx = static_cast<S*>(to);
    alignas(64) S inside[block], inner_g[block];
    enter(x, inside, count);
    const S low = S(left.at), high = S(right.at);
    V low_values = V{}, low_slopes = V{}, high_values = V{}, high_slopes = V{};
    for (int i = 0; i < count; i += lanes<S>) {
      const V v = load<V>(x + i), gv = load<V>(g + i);
      low_values += v < low ? gv : V{};
      high_values += v > high ? gv : V{};
      low_slopes += v < low ? gv * (v - low) : V{};
      high_slopes += v > high ? gv * (v - high) : V{};
      store(inner_g + i, v < low ? V{} : (v > high ? V{} : gv));
    }
    kernel.backward(inside, inner_g, dx, count, {}, table, sums, problem.degree, problem.second_degree);
    for (int i = 0; i < count; i += lanes<S>) {
      const V v = load<V>(x + i), gv = load<V>(g + i);
      V slope = load<V>(dx + i);
      slope = v < low ? gv * S(left.slope) : slope;
      slope = v > high ? gv * S(right.slope) : slope;
      store(dx + i, slope);
    }
    const V tails[tail_sums] = {low_values, low_slopes, high_values, high_slopes};
    for (int k = 0; k < tail_sums; ++k) accumulate(tails[k], sums + (kernel.sums + k) * lanes<S>);
  }

 private:
  // x limited to the interval.
  void enter(const S* x, S* inside, int count) const {
    const S low = S(left.at), high = S(right.at);
    for (int i = 0; i < count; i += lanes<S>) {
      const V v = load<V>(x + i);
      store(inside + i, smaller(broadcast<V>(high), larger(broadcast<V>(low), v)));
    }
  }
};

struct Tasks {
  int64_t sequence, chunks, batch;  // elements of one group, tasks per group, tasks taken at once
  explicit Tasks(const Problem& problem)
      : sequence(problem.outer * problem.inner), chunks((sequence + chunk - 1) / chunk),
        batch(problem.groups == 1 ? 1 : std::max<int64_t>(1, std::min<int64_t>(64, chunk / std::max<int64_t>(1, sequence)))) {}
};

// Whether the kernels take elements as they lie in memory: what they compute with, or bfloat16 that they convert.
template <class S>
bool is_direct(const Problem& problem) {
  if (problem.gated) return false;
  if constexpr (std::is_same_v<S, float>)
    return problem.data_type == type_float32 || (problem.data_type == type_bfloat16 && !problem.tails);
  else return problem.data_type == type_float64;
}

// The address of an element.
template <class S>
const void* address(const void* base, int64_t index, bool narrow) {
  return static_cast<const char*>(base) + index * int64_t(narrow ? sizeof(uint16_t) : sizeof(S));
}
template <class S>
void* address(void* base, int64_t index, bool narrow) {
  return static_cast<char*>(base) + index * int64_t(narrow ? sizeof(uint16_t) : sizeof(S));
}

// Of kernels that read and write `tensors` tensors.
template <class S>
Access find_access(const Call& call, int tensors) {
  const Problem& problem = call.problem;
  const bool narrow = problem.data_type == type_bfloat16;
  const int64_t bytes = problem.outer * problem.groups * problem.inner * int64_t(narrow ? sizeof(uint16_t) : sizeof(S));
  return {narrow, tensors * bytes > call.cache_size};
}

template <class S>
int forward(const Call& call, const void* x, const void* const* parts, void* y, int threads) {
  const Problem& problem = call.problem;
  const Kernel<S> kernel = find_kernel<S>(problem);
  if (!kernel.forward || kernel.parameters != call.parts.width()) return 1;
  const std::unique_ptr<double[]> packed = call.parts.pack(problem.groups, parts);
  const double* const parameters = packed.get();
  if (!parameters) return 2;
  const Tasks tasks(problem);
  const int64_t half = problem.groups * problem.inner;
  const Layout in{problem.inner, problem.gated ? 2 * half : half}, out{problem.inner, half};
  const int type = problem.data_type;
  const Access access = find_access<S>(call, 2);
  const bool direct = is_direct<S>(problem), narrow = access.narrow;
  const Pass<S> first_pass(problem, kernel, parameters);  // of the first group, often the only one
  run_tasks(tasks.chunks * problem.groups, tasks.batch, threads, call.parallel_region, [&](int64_t task) {
    const int64_t group = task % problem.groups, first = task / problem.groups * chunk;
    const int64_t last = std::min(first + chunk, tasks.sequence), start = group * problem.inner;
    alignas(64) S xs[block], ys[block], gates[block];
    std::optional<Pass<S>> own;
    const Pass<S>& pass = group == 0 ? first_pass : own.emplace(problem, kernel, parameters + group * kernel.parameters);
    for (int64_t at = first; at < last; at += block) {
      const int count = int(std::min<int64_t>(block, last - at)), width = padded(count, lanes<S>);
      if (direct && count % (narrow ? 2 * lanes<S> : lanes<S>) == 0 && in.contiguous(at, count)) {
        pass.value(address<S>(x, in.index(start, at), narrow), address<S>(y, out.index(start, at), narrow), count, access);
        continue;
      }
      read_block(in, type, x, start, at, count, xs);
      std::fill(xs + count, xs + width, S(0));
      pass.value(xs, ys, width);
      if (problem.gated) {
        read_block(in, type, x, start + half, at, count, gates);
        for (int i = 0; i < count; ++i) ys[i] *= gates[i];
      }
      write_block(out, type, y, start, at, count, ys);
    }
    if (access.past_cache) finish_stores();
  });
  return 0;
}

template <class S>
int backward(const Call& call, const void* g, const void* x, const void* const* parts, void* dx, void* const* part_gradients,
             int threads) {
  const Problem& problem = call.problem;
  const Kernel<S> kernel = find_kernel<S>(problem);
  if (!kernel.backward || kernel.parameters != call.parts.width()) return 1;
  const Tasks tasks(problem);
  const int64_t half = problem.groups * problem.inner;
  const Layout in{problem.inner, problem.gated ? 2 * half : half}, out{problem.inner, half};
  const int sums = kernel.sums + (problem.tails ? tail_sums : 0), type = problem.data_type;
  const Access access = find_access<S>(call, 3);
  const bool direct = is_direct<S>(problem), narrow = access.narrow;
  const std::unique_ptr<double[]> packed = call.parts.pack(problem.groups, parts);
  const double* const parameters = packed.get();
  const std::unique_ptr<double[]> gradient(new (std::nothrow) double[size_t(problem.groups * kernel.parameters) + 1]);
  const std::unique_ptr<double[]> partial(new (std::nothrow) double[size_t(tasks.chunks * problem.groups * sums) + 1]);
  if (!packed || !gradient || !partial) return 2;
  const Pass<S> first_pass(problem, kernel, parameters);  // of the first group, often the only one
  run_tasks(tasks.chunks * problem.groups, tasks.batch, threads, call.parallel_region, [&](int64_t task) {
    const int64_t group = task % problem.groups, first = task / problem.groups * chunk;
    const int64_t last = std::min(first + chunk, tasks.sequence), start = group * problem.inner;
    alignas(64) S xs[block], gs[block], dxs[block], gates[block], values[block];
    alignas(64) double total[(largest_sums + tail_sums) * lanes<S>];
    std::fill(total, total + sums * lanes<S>, 0.0);
    std::optional<Pass<S>> own;
    const Pass<S>& pass = group == 0 ? first_pass : own.emplace(problem, kernel, parameters + group * kernel.parameters);
    for (int64_t at = first; at < last; at += block) {
      const int count = int(std::min<int64_t>(block, last - at)), width = padded(count, lanes<S>);
      if (direct && count % (narrow ? 2 * lanes<S> : lanes<S>) == 0 && in.contiguous(at, count)) {
        const int64_t index = in.index(start, at);
        pass.gradient(address<S>(x, index, narrow), address<S>(g, index, narrow), address<S>(dx, index, narrow), count,
                      total, access);
        continue;
      }
      read_block(in, type, x, start, at, count, xs);
      read_block(out, type, g, start, at, count, gs);
      std::fill(xs + count, xs + width, S(0));
      std::fill(gs + count, gs + width, S(0));
      if (problem.gated) {
        read_block(in, type, x, start + half, at, count, gates);
        pass.value(xs, values, width);
        for (int i = 0; i < count; ++i) {
          values[i] *= gs[i];
          gs[i] *= gates[i];
        }
        write_block(in, type, dx, start + half, at, count, values);
      }
      pass.gradient(xs, gs, dxs, width, total);
      write_block(in, type, dx, start, at, count, dxs);
    }
    if (access.past_cache) finish_stores();
    for (int k = 0; k < sums; ++k)
      partial[task * sums + k] = std::accumulate(total + k * lanes<S>, total + (k + 1) * lanes<S>, 0.0);
  });
  for (int64_t group = 0; group < problem.groups; ++group) {
    double total[largest_sums + tail_sums] = {};
    for (int64_t at = 0; at < tasks.chunks; ++at) {
      const double* part = partial.get() + (at * problem.groups + group) * sums;
      for (int k = 0; k < sums; ++k) total[k] += part[k];
    }
    const double* own = parameters + group * kernel.parameters;
    if (problem.tails) {
      const double* tail = total + kernel.sums;
      const double values[4] = {tail[0], tail[1], tail[2], tail[3]};
      kernel.add_tail(own, problem.low, values[0], values[1], total, problem.degree, problem.second_degree);
      kernel.add_tail(own, problem.high, values[2], values[3], total, problem.degree, problem.second_degree);
    }
    kernel.finish(total, own, gradient.get() + group * kernel.parameters, problem.degree, problem.second_degree);
  }
  call.parts.unpack(problem.groups, gradient.get(), part_gradients);
  return 0;
}

}  // namespace
}  // namespace polytrope
