// The CUDA kernels of the elementwise families, with V = float of families.h.
//
// One launch goes over x once, every thread 8 neighbouring elements at a time, of which the next are on their way while it
// computes. Every block first turns the packed parameters into its group's table (in float64, rounded once). Backward keeps
// its sums in registers and adds them up within the block; a second, small launch adds up the blocks. All sums are taken in
// a fixed order, without atomics: the same bits every time on the same model of GPU, whose number of multiprocessors
// decides the number of blocks.
#pragma once
#include "cuda_columns.cuh"
#include "cuda_function.cuh"

namespace polytrope {

// Blocks along y, each of which takes one group after the other.
#ifdef POLYTROPE_CUDA_ROWS
constexpr int64_t most_rows = POLYTROPE_CUDA_ROWS;
#else
constexpr int64_t most_rows = 4096;
#endif
inline unsigned rows_of(const Problem& p) { return unsigned(p.groups < most_rows ? p.groups : most_rows); }

// The blocks along x that a group gets out of `all`.
inline unsigned columns_of(const Problem& p, int64_t all) {
  const int64_t each = threads * width, tiles = (p.outer * p.inner + each - 1) / each;
  const int64_t most = all / rows_of(p) > 1 ? all / rows_of(p) : 1;
  return unsigned(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

// A group's function, in shared memory.
template <class Family>
struct Function {
  double raw[most_parameters], wide[Family::largest_table];  // packed parameters; the table in float64, for tails
  float table[Family::largest_table];
  float slopes[2];  // at the low and at the high end
};

template <class Family>
__device__ __forceinline__ void load_function(const Problem& p, const Parameters& parameters, int64_t group, bool tails,
                                              Function<Family>& function) {
  const Share share{int(threadIdx.x), threads};
  const int n = p.degree, m = p.second_degree;
  __syncthreads();  // others may still be at the group before
  load_parameters<Family>(parameters, group, function.raw, n, m, share);
  __syncthreads();
  prepare_table<Family>(p, function.raw, function.table, n, m, share);
  if (tails) {
    prepare_table<Family>(p, function.raw, function.wide, n, m, share);
    __syncthreads();
    const int end = threadIdx.x / 32;
    if (end < 2 && threadIdx.x % 32 == 0) function.slopes[end] = end_slope<Family>(p, function.wide, end == 1, n, m);
  }
  __syncthreads();
}

// Where a group's elements lie; x is [outer, groups, inner] or, gated, [outer, 2, groups, inner], the result in both cases
// [outer, groups, inner].
struct Sequence {
  int64_t count, inner, half, in_row, start;
  int64_t packed;  // so many of the elements are taken eight at a time: these lie side by side, from a multiple of eight on

  __device__ __forceinline__ Sequence(const Problem& p, int64_t group)
      : count(p.outer * p.inner), inner(p.inner), half(p.groups * p.inner), in_row(p.gated ? 2 * half : half),
        start(group * p.inner), packed(inner % width == 0 || half == inner && !p.gated ? count / width * width : 0) {}
};

// What a kernel is made for: one group, no gate and no tails; the same with tails; anything.
enum Form { plain, with_tails, general };

inline Form form_of(const Problem& p) { return p.groups > 1 || p.gated ? general : p.tails ? with_tails : plain; }

// A function of its own, as the compiler would put its many instructions in each place.
static __device__ __noinline__ int64_t quotient(int64_t a, int64_t b) { return a / b; }

// The places in x and in the result of the elements first, first + step, … of a sequence, without a division for each.
// Flat: there is one group and no gate.
template <bool Flat>
struct Walk {
  const Sequence& s;
  int64_t at, step, in, out, column, step_in, step_out, step_column;

  __device__ __forceinline__ Walk(const Sequence& s, int64_t first, int64_t step) : s(s), at(first), step(step) {
    if (Flat) return;
    const int64_t row = quotient(first, s.inner), step_row = quotient(step, s.inner);
    column = first - row * s.inner;
    in = row * s.in_row + s.start + column;
    out = row * s.half + s.start + column;
    step_column = step - step_row * s.inner;
    step_in = step_row * s.in_row + step_column;
    step_out = step_row * s.half + step_column;
  }
  __device__ __forceinline__ int64_t in_x() const { return Flat ? at : in; }
  __device__ __forceinline__ int64_t in_result() const { return Flat ? at : out; }
  __device__ __forceinline__ void advance() {
    at += step;
    if (Flat) return;
    in += step_in;
    out += step_out;
    column += step_column;
    if (column < s.inner) return;
    column -= s.inner;
    in += s.in_row - s.inner;
    out += s.half - s.inner;
  }
};

// These are computed one by one after all others, by the thread that has left something else in their places. With g, backward:
// the result is dx, and what they add to the sums of a block is added to `partial`, unless nobody wants these. A function of
// its own, which takes no registers from the kernel; all threads of a block call it together.
template <bool flat>
__device__ __noinline__ void compute_far(Problem p, Parameters parameters, bool tails, const void* g, const void* x,
                                         void* result, double* partial, Function<Rational>* function, double* shared) {
  const int n = p.degree, m = p.second_degree, type = p.data_type;
  const int64_t all_threads = int64_t(gridDim.x) * threads, thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    const Sequence s(p, group);
    load_function(p, parameters, group, tails, *function);
    float sums[Rational::largest_sums] = {};
    const Evaluation<Rational> f(function->table, function->slopes, p, n, m, tails);
    const auto compute = [&](int64_t in, int64_t out) {
      const float at = read(x, type, in);
      float c;
      f.enter<1>(&at, &c);
      if (!f.any_far<1>(&c)) return;
      const FarRational far = far_rational(c, function->table, n, m);
      const float beyond = at - c, end = tails ? f.slope_of(0, beyond) : 0.0f, gate = p.gated ? read(x, type, in + s.half) : 1.0f;
      const float value = float(far.value) + (absolute(beyond) > 0 ? end * beyond : 0.0f);
      if (!g) return write(result, type, out, value * gate);
      const float seed = read(g, type, out);
      if (p.gated) write(result, type, in + s.half, value * seed);
      write(result, type, in, seed * gate * (absolute(beyond) > 0 ? end : float(far.slope)));
      for (int k = 0; k <= n + m; ++k) sums[k] += float(seed * gate * far.sums[k]);
    };
    for (Walk<flat> walk(s, thread * width, all_threads * width); walk.at < s.packed; walk.advance())
      for (int k = 0; k < width; ++k) compute(walk.in_x() + k, walk.in_result() + k);
    for (Walk<flat> one(s, s.packed + thread, all_threads); one.at < s.count; one.advance())
      compute(one.in_x(), one.in_result());
    if (!partial) continue;
    double* own = partial + group * (n + 1 + m + tail_sums) * gridDim.x + blockIdx.x;
    block_sums(sums, n + 1 + m, shared, [&](int k, double total) { own[int64_t(k) * gridDim.x] += total; });
  }
}

// Whether any thread of the block has found one. All threads of a block call it together.
__device__ __forceinline__ bool any_thread(bool found) {
  __shared__ bool any;
  if (threadIdx.x == 0) any = false;
  __syncthreads();
  if (found) any = true;
  __syncthreads();
  return any;
}

// Whether 80 registers are enough for a kernel with tails.
template <class Family>
constexpr bool has_light_tails(Form form) {
  return form == with_tails && std::is_same_v<Family, Polynomial>;
}

// Blocks that a multiprocessor is to hold: bounds the registers of a thread, many of which are sums.
template <class Family, int D, int E>
constexpr int backward_blocks(Form form) {
  const bool many = Family::sums(D, E) > 14 || (form == general && never_has_tails<Family>);  // maxima need more besides
  return (form == plain || has_light_tails<Family>(form) ? 3 : 2) - (many ? 1 : 0);
}
template <class Family, int D, int E>
constexpr int forward_blocks(Form form) {
  return form == plain ? (Family::sums(D, E) > 20 ? 3 : 4) : has_light_tails<Family>(form) ? 3 : 2;
}

// Only where all elements lie side by side are there registers to spare for elements that are on their way.
template <class Family, int D, int E, Form form>
__global__ void __launch_bounds__(threads, forward_blocks<Family, D, E>(form))
    forward_kernel(Problem p, const void* x, Parameters parameters, void* y) {
  __shared__ Function<Family> function;
  constexpr bool flat = form != general;
  const bool gated = !flat && p.gated, tails = form == with_tails || (form == general && !never_has_tails<Family> && p.tails);
  const int n = D ? D : p.degree, m = D ? E : p.second_degree;
  const Evaluation<Family> f(function.table, function.slopes, p, n, m, tails);
  const int type = p.data_type;
  const int64_t all_threads = int64_t(gridDim.x) * threads, thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  bool far = false;  // whether this thread has met such elements
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    const Sequence s(p, group);
    Walk<flat> walk(s, thread * width, all_threads * width);
    Packet next;
    if (flat && walk.at < s.packed) next = fetch(x, type, walk.in_x());
    load_function(p, parameters, group, tails, function);
    while (walk.at < s.packed) {
      const int64_t in = walk.in_x(), out = walk.in_result();
      float xs[width], ys[width];
      if (!flat) next = fetch(x, type, in);
      unpack(next, type, xs);
      walk.advance();
      if (flat && walk.at < s.packed) next = fetch(x, type, walk.in_x());
      f.template values<width>(xs, ys, far);
      if (gated) {
        float gates[width];
        unpack(fetch(x, type, in + s.half), type, gates);
#pragma unroll
        for (int k = 0; k < width; ++k) ys[k] *= gates[k];
      }
      write_eight(y, type, out, ys);
    }
    for (Walk<flat> one(s, s.packed + thread, all_threads); one.at < s.count; one.advance()) {
      const float value = read(x, type, one.in_x());
      float result;
      f.template values<1>(&value, &result, far);
      if (gated) result *= read(x, type, one.in_x() + s.half);
      write(y, type, one.in_result(), result);
    }
  }
  if constexpr (has_far<Family>)
    if (any_thread(far)) compute_far<flat>(p, parameters, tails, nullptr, x, y, nullptr, &function, nullptr);
}

template <class Family, int D, int E, Form form>
__global__ void __launch_bounds__(threads, backward_blocks<Family, D, E>(form))
    backward_kernel(Problem p, const void* g, const void* x, Parameters parameters, void* dx, double* partial) {
  constexpr int most = Family::largest_sums;
  __shared__ Function<Family> function;
  __shared__ double shared[warps * most];
  constexpr bool flat = form != general;
  const bool gated = !flat && p.gated, tails = form == with_tails || (form == general && !never_has_tails<Family> && p.tails);
  const int n = D ? D : p.degree, m = D ? E : p.second_degree;
  const Evaluation<Family> f(function.table, function.slopes, p, n, m, tails);
  const int sums = Family::sums(n, m), row = sums + tail_sums, type = p.data_type;
  const int64_t all_threads = int64_t(gridDim.x) * threads, thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  bool far = false;  // whether this thread has met such elements
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    const Sequence s(p, group);
    Walk<flat> walk(s, thread * width, all_threads * width);
    Packet next_x, next_g;
    if (flat && walk.at < s.packed) {
      next_x = fetch(x, type, walk.in_x());
      next_g = fetch(g, type, walk.in_result());
    }
    load_function(p, parameters, group, tails, function);
    float a[most] = {}, tail[tail_sums] = {};
    while (walk.at < s.packed) {
      const int64_t in = walk.in_x();
      float xs[width], gs[width], results[width];
      if (!flat) {
        next_x = fetch(x, type, in);
        next_g = fetch(g, type, walk.in_result());
      }
      unpack(next_x, type, xs);
      unpack(next_g, type, gs);
      walk.advance();
      if (flat && walk.at < s.packed) {
        next_x = fetch(x, type, walk.in_x());
        next_g = fetch(g, type, walk.in_result());
      }
      if (gated) {
        float gates[width];
        unpack(fetch(x, type, in + s.half), type, gates);
        f.template values<width>(xs, results, far);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          results[k] *= gs[k];
          gs[k] *= gates[k];
        }
        write_eight(dx, type, in + s.half, results);
      }
      f.template gradients<width>(xs, gs, results, a, tail, far);
      write_eight(dx, type, in, results);
    }
    for (Walk<flat> one(s, s.packed + thread, all_threads); one.at < s.count; one.advance()) {
      const float value = read(x, type, one.in_x());
      float seed = read(g, type, one.in_result()), result;
      if (gated) {
        f.template values<1>(&value, &result, far);
        write(dx, type, one.in_x() + s.half, result * seed);
        seed *= read(x, type, one.in_x() + s.half);
      }
      f.template gradients<1>(&value, &seed, &result, a, tail, far);
      write(dx, type, one.in_x(), result);
    }
    if (!partial) continue;
    settle<Family>(a, n);
    double* own = partial + group * row * gridDim.x + blockIdx.x;
    block_sums(a, sums, shared, [&](int k, double total) { own[int64_t(k) * gridDim.x] = total; });
    if (tails)
      block_sums(tail, tail_sums, shared, [&](int k, double total) { own[int64_t(sums + k) * gridDim.x] = total; });
  }
  if constexpr (has_far<Family>)
    if (any_thread(far)) compute_far<flat>(p, parameters, tails, g, x, dx, partial, &function, shared);
}

template <class Family>
__global__ void __launch_bounds__(finish_threads)
    finish_kernel(Problem p, Parameters parameters, const double* partial, int blocks, Parameters gradients) {
  __shared__ Function<Family> function;
  __shared__ double total[Family::largest_sums + tail_sums], gradient[most_parameters];
  __shared__ double beyond[2][Family::largest_sums];
  const int n = p.degree, m = p.second_degree, sums = Family::sums(n, m), row = sums + tail_sums;
  const Share share{int(threadIdx.x), finish_threads};
  for (int64_t group = blockIdx.x; group < p.groups; group += gridDim.x) {
    load_parameters<Family>(parameters, group, function.raw, n, m, share);
    add_up_blocks(partial + group * row * blocks, p.tails ? row : sums, blocks, total);
    if (p.tails) {
      prepare_table<Family>(p, function.raw, function.wide, n, m, share);
      for (int k = threadIdx.x; k < 2 * Family::largest_sums; k += finish_threads) (&beyond[0][0])[k] = 0;
      __syncthreads();
      const int end = threadIdx.x / 32;
      if (end < 2 && threadIdx.x % 32 == 0)
        add_tail_of_table<Family>(function.wide, end_of(p, end ? p.high : p.low), 0, total[sums + end], beyond[end], n, m);
      __syncthreads();
      for (int k = threadIdx.x; k < sums; k += finish_threads) total[k] += beyond[0][k] + beyond[1][k];
      __syncthreads();
    }
    Family::finish(total, function.raw, gradient, n, m, share);
    __syncthreads();
    for (int k = threadIdx.x; k < Family::parameters(n, m); k += finish_threads) gradients.set(group, k, gradient[k]);
    __syncthreads();
  }
}

// Family: what stands after; Inner: the same function from its table.
template <class Family, class Inner, int D, int E, Form form>
int launch_form(const Problem& p, const Call& c) {
  if (!c.gradient) {
    const int64_t resident = resident_blocks(forward_kernel<Inner, D, E, form>);
    const dim3 grid(columns_of(p, resident), rows_of(p));
    forward_kernel<Inner, D, E, form><<<grid, threads, 0, c.stream>>>(p, c.x, c.parameters, c.result);
  } else {
    const int64_t resident = resident_blocks(backward_kernel<Inner, D, E, form>);
    const dim3 grid(columns_of(p, resident), rows_of(p));
    backward_kernel<Inner, D, E, form><<<grid, threads, 0, c.stream>>>(p, c.gradient, c.x, c.parameters, c.result,
                                                                        c.partial);
    if (c.partial)
      finish_kernel<Family><<<rows_of(p), finish_threads, 0, c.stream>>>(p, c.parameters, c.partial, int(grid.x),
                                                                c.parameter_gradients);
  }
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

template <class Family, class Inner, int D, int E>
int launch(const Problem& p, const Call& c) {
  if constexpr (!never_by_column<Inner>)
    if (is_by_column(p)) return launch_columns<Family, Inner, D, E>(p, c);
  if constexpr (D > 0) {  // kernels of any degree have one form
    const Form form = form_of(p);
    if (form == plain) return launch_form<Family, Inner, D, E, plain>(p, c);
    if constexpr (!never_has_tails<Family>)
      if (form == with_tails) return launch_form<Family, Inner, D, E, with_tails>(p, c);
  }
  return launch_form<Family, Inner, D, E, general>(p, c);
}

// With POLYTROPE_FEW_DEGREES, a quick compilation to see that all of it compiles.
#ifdef POLYTROPE_FEW_DEGREES
constexpr int first_degree(int, int last) { return last; }
#else
constexpr int first_degree(int first, int) { return first; }
#endif

// Degrees First … Last have kernels of their own; with `Others`, another is read at run time, more slowly.
template <class Family, class Inner, int First, int Last, bool Others = true>
int launch_degree(const Problem& p, const Call& c) {
  if constexpr (First > Last) {
    if constexpr (Others) return launch<Family, Inner, 0, 0>(p, c);
    return 1;
  } else if constexpr (First != first_degree(First, Last)) {
    return launch_degree<Family, Inner, first_degree(First, Last), Last, Others>(p, c);
  } else {
    return p.degree == First ? launch<Family, Inner, First, 0>(p, c)
                             : launch_degree<Family, Inner, First + 1, Last, Others>(p, c);
  }
}

// One function for each source file, so that they compile at the same time.
int launch_polynomial(const Problem& p, const Call& c);
int launch_recurrence(const Problem& p, const Call& c);
int launch_waves(const Problem& p, const Call& c);
int launch_lines(const Problem& p, const Call& c);
int launch_quotients(const Problem& p, const Call& c);
int launch_polynorm(const Problem& p, const Call& c);
int64_t polynorm_partial_bytes(const Problem& p);

}  // namespace polytrope
