// The CUDA kernels of the elementwise families, with V = float of families.h.
//
// One launch goes over x once, every thread 8 neighbouring elements at a time, of which the next are on their way while it
// computes. Every block first turns the packed parameters into its group's table (in float64, rounded once). Backward keeps
// its sums in registers and adds them up within the block; a second, small launch adds up the blocks. All sums are taken in
// a fixed order, without atomics: the same bits every time on the same model of GPU, whose number of multiprocessors
// decides the number of blocks.
#pragma once
#include <type_traits>

#include "cuda_elements.cuh"

namespace polytrope {

struct Call {
  const void *gradient, *x;  // no gradient: forward
  Parameters parameters;
  void* result;
  double* partial;  // groups * (sums + tail_sums) * blocks; null: nobody wants the parameters' gradients
  Parameters parameter_gradients;
  cudaStream_t stream;
};

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
  static constexpr int most_parameters = 3 * max_pieces;  // of any family
  double raw[most_parameters], wide[Family::largest_table];  // packed parameters; the table in float64, for tails
  float table[Family::largest_table];
  float ends[4];  // value and slope of the left tangent, and of the right one
};

// Hermite differs from Polynomial in its table and in what stands after its kernels only, so they share these.
template <class Family, class S>
__device__ __forceinline__ void prepare_table(const Problem& p, const double* raw, S* table, Share share) {
  if constexpr (std::is_same_v<Family, Polynomial>)
    if (p.family == family_hermite) return Hermite::prepare(raw, table, p.degree, 0, share);
  Family::prepare(raw, table, p.degree, p.second_degree, share);
}

template <class Family>
__device__ __forceinline__ void load_parameters(const Problem& p, const Parameters& parameters, int64_t group, double* raw,
                                                Share share) {
  for (int k = share.first; k < Family::parameters(p.degree, p.second_degree); k += share.step)
    raw[k] = parameters.get(group, k);
}

template <class Family>
__device__ __forceinline__ void load_function(const Problem& p, const Parameters& parameters, int64_t group, bool tails,
                                              Function<Family>& function) {
  const Share share{int(threadIdx.x), threads};
  __syncthreads();  // others may still be at the group before
  load_parameters<Family>(p, parameters, group, function.raw, share);
  __syncthreads();
  prepare_table<Family>(p, function.raw, function.table, share);
  if (tails) {
    prepare_table<Family>(p, function.raw, function.wide, share);
    __syncthreads();
    const int end = threadIdx.x / 32;
    if (end < 2 && threadIdx.x % 32 == 0) {
      const Tangent at = tangent_of_table<Family>(function.wide, end_of(p, end ? p.high : p.low), p.degree, p.second_degree);
      function.ends[2 * end] = float(at.value);
      function.ends[2 * end + 1] = float(at.slope);
    }
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

// Families that know no interval.
template <class Family>
constexpr bool never_has_tails = std::is_same_v<Family, Tropical> || std::is_same_v<Family, TropicalRational> ||
                                 std::is_same_v<Family, PiecewiseLinear>;

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

// F with its tails.
template <class Family>
struct Evaluation {
  const float *table, *ends;  // of Function
  float low, high, shift, rate;  // rate: the derivative of the family's variable by x
  int n, m;
  bool tails;

  __device__ __forceinline__ Evaluation(const Function<Family>& function, const Problem& p, int n, int m, bool tails)
      : table(function.table), ends(function.ends), low(float(p.low)), high(float(p.high)), shift(float(p.shift)),
        rate(float(p.inverse_scale)), n(n), m(m), tails(tails) {}

  // The family's variable, of `count` elements limited to the interval.
  template <int count>
  __device__ __forceinline__ void limit(const float* xs, float* inside) const {
#pragma unroll
    for (int k = 0; k < count; ++k) inside[k] = xs[k];
    if (!tails) return;
#pragma unroll
    for (int k = 0; k < count; ++k) inside[k] = ((xs[k] < low ? low : xs[k] > high ? high : xs[k]) - shift) * rate;
  }

  template <int count>
  __device__ __forceinline__ void values(const float* xs, float* ys) const {
    limit<count>(xs, ys);
#pragma unroll
    for (int k = 0; k < count; ++k) ys[k] = Family::value(ys[k], table, n, m);
    if (!tails) return;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (xs[k] < low) ys[k] = (xs[k] - low) * ends[1] + ends[0];
      if (xs[k] > high) ys[k] = (xs[k] - high) * ends[3] + ends[2];
    }
  }

  // ds = g F'(x); adds to the family's own sums and, after them, to those of the tails.
  template <int count>
  __device__ __forceinline__ void gradients(const float* xs, const float* gs, float* ds, float* sums, float* tail) const {
    float seeds[count];
    limit<count>(xs, ds);
#pragma unroll
    for (int k = 0; k < count; ++k) seeds[k] = gs[k];
    if (tails) {
#pragma unroll
      for (int k = 0; k < count; ++k) seeds[k] = xs[k] < low || xs[k] > high ? 0.0f : gs[k];
    }
#pragma unroll
    for (int k = 0; k < count; ++k) ds[k] = Family::backward(ds[k], seeds[k], table, sums, n, m);
    if (!tails) return;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      ds[k] *= rate;
      if (xs[k] < low) {
        tail[0] += gs[k];
        tail[1] += gs[k] * (xs[k] - low);
        ds[k] = gs[k] * ends[1];
      }
      if (xs[k] > high) {
        tail[2] += gs[k];
        tail[3] += gs[k] * (xs[k] - high);
        ds[k] = gs[k] * ends[3];
      }
    }
  }
};

// Elements far from 0 that `Family::backward` passes over.
template <class Family>
constexpr bool has_far = std::is_same_v<Family, Rational>;

// Notes whether there are any among `count` elements.
template <class Family, int count>
__device__ __forceinline__ void note_far(const float* xs, bool& far) {
  if constexpr (has_far<Family>) {
#pragma unroll
    for (int k = 0; k < count; ++k) far |= absolute(xs[k]) > Rational::far;
  }
}

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
    const auto compute = [&](int64_t in, int64_t out) {
      const float at = read(x, type, in);
      if (!(absolute(at) > Rational::far) || (tails && (at < float(p.low) || at > float(p.high)))) return;
      double own[Rational::largest_table];
      for (int k = 0; k <= n + m; ++k) own[k] = function->table[k];
      const FarRational f(at, own, n, m);
      const float gate = p.gated ? read(x, type, in + s.half) : 1.0f;
      if (!g) return write(result, type, out, float(f.value) * gate);
      const float seed = read(g, type, out);
      if (p.gated) write(result, type, in + s.half, float(f.value) * seed);
      write(result, type, in, float(seed * gate * f.slope));
      for (int k = 0; k <= n + m; ++k) sums[k] += float(seed * gate * f.sums[k]);
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

// Blocks that a multiprocessor is to hold: bounds the registers of a thread, many of which are sums.
template <class Family, int D, int E>
constexpr int backward_blocks(Form form) {
  const bool many = Family::sums(D, E) > 14 || (form == general && never_has_tails<Family>);  // maxima need more besides
  return (form == plain ? 3 : 2) - (many ? 1 : 0);
}

// Only where all elements lie side by side are there registers to spare for elements that are on their way.
template <class Family, int D, int E, Form form>
__global__ void __launch_bounds__(threads, form == plain ? 4 : 2)
    forward_kernel(Problem p, const void* x, Parameters parameters, void* y) {
  __shared__ Function<Family> function;
  constexpr bool flat = form != general;
  const bool gated = !flat && p.gated, tails = form != plain && !never_has_tails<Family> && p.tails;
  const int n = D ? D : p.degree, m = D ? E : p.second_degree;
  const Evaluation<Family> f(function, p, n, m, tails);
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
      note_far<Family, width>(xs, far);
      f.template values<width>(xs, ys);
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
      note_far<Family, 1>(&value, far);
      f.template values<1>(&value, &result);
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
  const bool gated = !flat && p.gated, tails = form != plain && !never_has_tails<Family> && p.tails;
  const int n = D ? D : p.degree, m = D ? E : p.second_degree;
  const Evaluation<Family> f(function, p, n, m, tails);
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
        f.template values<width>(xs, results);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          results[k] *= gs[k];
          gs[k] *= gates[k];
        }
        write_eight(dx, type, in + s.half, results);
      }
      note_far<Family, width>(xs, far);
      f.template gradients<width>(xs, gs, results, a, tail);
      write_eight(dx, type, in, results);
    }
    for (Walk<flat> one(s, s.packed + thread, all_threads); one.at < s.count; one.advance()) {
      const float value = read(x, type, one.in_x());
      float seed = read(g, type, one.in_result()), result;
      note_far<Family, 1>(&value, far);
      if (gated) {
        f.template values<1>(&value, &result);
        write(dx, type, one.in_x() + s.half, result * seed);
        seed *= read(x, type, one.in_x() + s.half);
      }
      f.template gradients<1>(&value, &seed, &result, a, tail);
      write(dx, type, one.in_x(), result);
    }
    double* own = partial + group * row * gridDim.x + blockIdx.x;
    if (!partial) continue;
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
  __shared__ double total[Family::largest_sums + tail_sums], gradient[Function<Family>::most_parameters];
  __shared__ double beyond[2][Family::largest_sums];
  const int n = p.degree, m = p.second_degree, sums = Family::sums(n, m), row = sums + tail_sums;
  const Share share{int(threadIdx.x), finish_threads};
  for (int64_t group = blockIdx.x; group < p.groups; group += gridDim.x) {
    load_parameters<Family>(p, parameters, group, function.raw, share);
    add_up_blocks(partial + group * row * blocks, p.tails ? row : sums, blocks, total);
    if (p.tails) {
      prepare_table<Family>(p, function.raw, function.wide, share);
      for (int k = threadIdx.x; k < 2 * Family::largest_sums; k += finish_threads) (&beyond[0][0])[k] = 0;
      __syncthreads();
      const int end = threadIdx.x / 32;
      if (end < 2 && threadIdx.x % 32 == 0)
        add_tail_of_table<Family>(function.wide, end_of(p, end ? p.high : p.low), total[sums + 2 * end],
                                  total[sums + 2 * end + 1], beyond[end], n, m);
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
