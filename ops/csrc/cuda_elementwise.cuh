// The CUDA kernels of the elementwise families, with V = float of families.h.
//
// A small launch first turns the packed parameters into each group's table (in float64, rounded once). The main launch
// then goes over x once, every thread 8 neighbouring elements at a time. Backward keeps its sums in registers and adds
// them up within the block; a last launch adds up the blocks. All sums are taken in a fixed order, without atomics: the
// same bits every time on the same model of GPU, whose number of multiprocessors decides the number of blocks.
#pragma once
#include <type_traits>

#include "cuda_elements.cuh"

namespace polytrope {

struct Call {
  const void *gradient, *x;  // no gradient: forward
  const double* parameters;
  void* result;
  float* functions;           // groups * function_size
  double* partial;            // groups * (sums + tail_sums) * blocks
  double* parameter_gradient;
  cudaStream_t stream;
};

// A group's function: table, then value and slope of the left tangent, and of the right one.
template <class Family>
constexpr int function_size = Family::largest_table + 4;

inline unsigned rows_of(const Problem& p) { return unsigned(p.groups < 4096 ? p.groups : 4096); }

// The blocks along x that a group gets out of `all`.
inline unsigned columns_of(const Problem& p, int64_t all) {
  const int64_t each = threads * width, tiles = (p.outer * p.inner + each - 1) / each;
  const int64_t most = all / rows_of(p) > 1 ? all / rows_of(p) : 1;
  return unsigned(tiles < 1 ? 1 : tiles < most ? tiles : most);
}

template <class Family>
__global__ void prepare_kernel(Problem p, const double* parameters, float* functions) {
  const int n = p.degree, m = p.second_degree;
  for (int64_t group = blockIdx.x; group < p.groups; group += gridDim.x) {
    const double* own = parameters + group * Family::parameters(n, m);
    float* function = functions + group * function_size<Family>;
    float* ends = function + Family::largest_table;
    if (threadIdx.x == 0) Family::prepare(own, function, n, m);
    if (!p.tails || threadIdx.x % 32 != 0 || threadIdx.x == 0) continue;
    const bool left = threadIdx.x == 32;
    const Tangent end = tangent<Family>(own, left ? p.low : p.high, n, m);
    ends[left ? 0 : 2] = float(end.value);
    ends[left ? 1 : 3] = float(end.slope);
  }
}

// Where a group's elements lie; x is [outer, groups, inner] or, gated, [outer, 2, groups, inner].
struct Sequence {
  int64_t count, inner, half, in_row, start;
  bool flat, aligned;

  __device__ __forceinline__ Sequence(const Problem& p, int64_t group)
      : count(p.outer * p.inner), inner(p.inner), half(p.groups * p.inner), in_row(p.gated ? 2 * half : half),
        start(group * p.inner), flat(p.groups == 1 && !p.gated), aligned(flat || p.inner % width == 0) {}
  // Whether eight elements from i on, a multiple of eight, are neighbours in memory and begin at a multiple of eight.
  __device__ __forceinline__ bool whole(int64_t i) const { return aligned && i + width <= count; }
  __device__ __forceinline__ int64_t in(int64_t i) const { return flat ? i : i / inner * in_row + start + i % inner; }
  __device__ __forceinline__ int64_t out(int64_t i) const { return flat ? i : i / inner * half + start + i % inner; }
};

// Eight elements of x (or, `ahead` = half, of its gates) or of the result's layout; zeros beyond the end.
__device__ __forceinline__ void read_in(const Sequence& s, const void* x, int type, int64_t i, int64_t ahead, float* values) {
  if (s.whole(i)) return read_eight(x, type, s.in(i) + ahead, values);
#pragma unroll
  for (int k = 0; k < width; ++k) values[k] = i + k < s.count ? read(x, type, s.in(i + k) + ahead) : 0.0f;
}
__device__ __forceinline__ void read_out(const Sequence& s, const void* g, int type, int64_t i, float* values) {
  if (s.whole(i)) return read_eight(g, type, s.out(i), values);
#pragma unroll
  for (int k = 0; k < width; ++k) values[k] = i + k < s.count ? read(g, type, s.out(i + k)) : 0.0f;
}
__device__ __forceinline__ void write_in(const Sequence& s, void* dx, int type, int64_t i, int64_t ahead, const float* values) {
  if (s.whole(i)) return write_eight(dx, type, s.in(i) + ahead, values);
#pragma unroll
  for (int k = 0; k < width; ++k)
    if (i + k < s.count) write(dx, type, s.in(i + k) + ahead, values[k]);
}
__device__ __forceinline__ void write_out(const Sequence& s, void* y, int type, int64_t i, const float* values) {
  if (s.whole(i)) return write_eight(y, type, s.out(i), values);
#pragma unroll
  for (int k = 0; k < width; ++k)
    if (i + k < s.count) write(y, type, s.out(i + k), values[k]);
}

// F with its tails, for `width` elements; `function` is as function_size says.
template <class Family>
struct Evaluation {
  const float* function;
  float low, high;
  int n, m;
  bool tails;

  // What the family is evaluated at.
  __device__ __forceinline__ void limit(const float* xs, float* inside) const {
#pragma unroll
    for (int k = 0; k < width; ++k) inside[k] = xs[k];
    if (!tails) return;
#pragma unroll
    for (int k = 0; k < width; ++k) inside[k] = xs[k] < low ? low : xs[k] > high ? high : xs[k];
  }

  __device__ __forceinline__ void values(const float* xs, float* ys) const {
    limit(xs, ys);
#pragma unroll
    for (int k = 0; k < width; ++k) ys[k] = Family::value(ys[k], function, n, m);
    if (!tails) return;
    const float* ends = function + Family::largest_table;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      if (xs[k] < low) ys[k] = (xs[k] - low) * ends[1] + ends[0];
      if (xs[k] > high) ys[k] = (xs[k] - high) * ends[3] + ends[2];
    }
  }

  // ds = g F'(x); adds to the family's own sums and, after them, to those of the tails.
  __device__ __forceinline__ void gradients(const float* xs, const float* gs, float* ds, float* sums, float* tail) const {
    float seeds[width];
    limit(xs, ds);
#pragma unroll
    for (int k = 0; k < width; ++k) seeds[k] = tails && (xs[k] < low || xs[k] > high) ? 0.0f : gs[k];
#pragma unroll
    for (int k = 0; k < width; ++k) ds[k] = Family::backward(ds[k], seeds[k], function, sums, n, m);
    if (!tails) return;
    const float* ends = function + Family::largest_table;
#pragma unroll
    for (int k = 0; k < width; ++k) {
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

template <class Family>
__device__ __forceinline__ void load_function(const float* functions, int64_t group, float* function) {
  __syncthreads();
  for (int k = threadIdx.x; k < function_size<Family>; k += threads)
    function[k] = functions[group * function_size<Family> + k];
  __syncthreads();
}

template <class Family, int D, int E>
__global__ void __launch_bounds__(threads) forward_kernel(Problem p, const void* x, const float* functions, void* y) {
  __shared__ float function[function_size<Family>];
  const Evaluation<Family> f{function, float(p.low), float(p.high), D ? D : p.degree, D ? E : p.second_degree, p.tails != 0};
  const int64_t step = int64_t(gridDim.x) * threads * width;
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    const Sequence s(p, group);
    load_function<Family>(functions, group, function);
    for (int64_t i = first; i < s.count; i += step) {
      float xs[width], values[width];
      read_in(s, x, p.data_type, i, 0, xs);
      f.values(xs, values);
      if (p.gated) {
        float gates[width];
        read_in(s, x, p.data_type, i, s.half, gates);
#pragma unroll
        for (int k = 0; k < width; ++k) values[k] *= gates[k];
      }
      write_out(s, y, p.data_type, i, values);
    }
  }
}

template <class Family, int D, int E>
__global__ void __launch_bounds__(threads)
    backward_kernel(Problem p, const void* g, const void* x, const float* functions, void* dx, double* partial) {
  constexpr int most = Family::largest_sums + tail_sums;
  __shared__ float function[function_size<Family>];
  __shared__ double shared[warps * most];
  const Evaluation<Family> f{function, float(p.low), float(p.high), D ? D : p.degree, D ? E : p.second_degree, p.tails != 0};
  const int sums = Family::sums(f.n, f.m), row = sums + tail_sums, type = p.data_type;
  const int64_t step = int64_t(gridDim.x) * threads * width;
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    const Sequence s(p, group);
    load_function<Family>(functions, group, function);
    float a[most] = {}, tail[tail_sums] = {};
    for (int64_t i = first; i < s.count; i += step) {
      float xs[width], gs[width], results[width];
      read_in(s, x, type, i, 0, xs);
      read_out(s, g, type, i, gs);
      if (p.gated) {
        float gates[width];
        read_in(s, x, type, i, s.half, gates);
        f.values(xs, results);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          results[k] *= gs[k];
          gs[k] *= gates[k];
        }
        write_in(s, dx, type, i, s.half, results);
      }
      f.gradients(xs, gs, results, a, tail);
      write_in(s, dx, type, i, 0, results);
    }
#pragma unroll
    for (int k = 0; k < tail_sums; ++k) a[sums + k] = tail[k];
    double* own = partial + group * row * gridDim.x + blockIdx.x;
    block_sums(a, row, shared, [&](int k, double total) { own[int64_t(k) * gridDim.x] = total; });
  }
}

template <class Family>
__global__ void __launch_bounds__(threads)
    finish_kernel(Problem p, const double* parameters, const double* partial, int blocks, double* gradient) {
  __shared__ double total[Family::largest_sums + tail_sums];
  const int n = p.degree, m = p.second_degree, sums = Family::sums(n, m), row = sums + tail_sums;
  for (int64_t group = blockIdx.x; group < p.groups; group += gridDim.x) {
    add_up_blocks(partial + group * row * blocks, row, blocks, total);
    if (threadIdx.x == 0) {
      const double* own = parameters + group * Family::parameters(n, m);
      if (p.tails) {
        const double tail[tail_sums] = {total[sums], total[sums + 1], total[sums + 2], total[sums + 3]};
        add_tail<Family>(own, p.low, tail[0], tail[1], total, n, m);
        add_tail<Family>(own, p.high, tail[2], tail[3], total, n, m);
      }
      Family::finish(total, own, gradient + group * Family::parameters(n, m), n, m);
    }
    __syncthreads();
  }
}

// Family: what stands before and after; Inner: the same function from its table.
template <class Family, class Inner, int D, int E>
int launch(const Problem& p, const Call& c) {
  prepare_kernel<Family><<<rows_of(p), 96, 0, c.stream>>>(p, c.parameters, c.functions);
  if (!c.gradient) {
    static const int64_t resident = resident_blocks(forward_kernel<Inner, D, E>);
    const dim3 grid(columns_of(p, resident), rows_of(p));
    forward_kernel<Inner, D, E><<<grid, threads, 0, c.stream>>>(p, c.x, c.functions, c.result);
  } else {
    static const int64_t resident = resident_blocks(backward_kernel<Inner, D, E>);
    const dim3 grid(columns_of(p, resident), rows_of(p));
    backward_kernel<Inner, D, E><<<grid, threads, 0, c.stream>>>(p, c.gradient, c.x, c.functions, c.result, c.partial);
    finish_kernel<Family>
        <<<rows_of(p), threads, 0, c.stream>>>(p, c.parameters, c.partial, int(grid.x), c.parameter_gradient);
  }
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

// With POLYTROPE_FEW_DEGREES, a quick compilation to see that all of it compiles.
#ifdef POLYTROPE_FEW_DEGREES
constexpr int first_degree(int, int last) { return last; }
#else
constexpr int first_degree(int first, int) { return first; }
#endif

// Degrees First … Last have kernels of their own; another is read at run time, more slowly.
template <class Family, class Inner, int First, int Last>
int launch_degree(const Problem& p, const Call& c) {
  if constexpr (First > Last) {
    return launch<Family, Inner, 0, 0>(p, c);
  } else if constexpr (First != first_degree(First, Last)) {
    return launch_degree<Family, Inner, first_degree(First, Last), Last>(p, c);
  } else {
    return p.degree == First ? launch<Family, Inner, First, 0>(p, c) : launch_degree<Family, Inner, First + 1, Last>(p, c);
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
