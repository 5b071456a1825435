// The CUDA kernels behind a plain C interface (no torch headers): the families of families.h with V = float.
//
// Forward and backward are one launch each over blocks of `threads`; every thread takes 8 neighbouring elements at a time,
// as 16 bytes of bfloat16 where x has one group. Backward keeps its sums in registers, adds them up within the block in a
// fixed order, and a second launch adds up the blocks, again in a fixed order: no atomics, the same bits every time. The
// number of blocks depends on the shape only.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "families.h"
#include "problem.h"

namespace polytrope {
namespace {

constexpr int threads = 256;
constexpr int width = 8;
constexpr int tail_sums = 4;
constexpr int64_t most_blocks = 1024;

__device__ __forceinline__ float read(const void* base, int type, int64_t index) {
  if (type == type_float32) return static_cast<const float*>(base)[index];
  if (type == type_bfloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(base)[index]);
  return __half2float(static_cast<const __half*>(base)[index]);
}

__device__ __forceinline__ void write(void* base, int type, int64_t index, float value) {
  if (type == type_float32) static_cast<float*>(base)[index] = value;
  else if (type == type_bfloat16) static_cast<__nv_bfloat16*>(base)[index] = __float2bfloat16_rn(value);
  else static_cast<__half*>(base)[index] = __float2half_rn(value);
}

// Eight elements from `index` on, which is a multiple of eight; the tensors begin at multiples of 16 bytes.
__device__ __forceinline__ void read_eight(const void* base, int type, int64_t index, float* values) {
  if (type == type_float32) {
    const float4* source = reinterpret_cast<const float4*>(static_cast<const float*>(base) + index);
    *reinterpret_cast<float4*>(values) = source[0];
    *reinterpret_cast<float4*>(values + 4) = source[1];
    return;
  }
  const uint4 packed = *reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(base) + index);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    float2 pair;
    if (type == type_bfloat16) pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&words[k]));
    else pair = __half22float2(*reinterpret_cast<const __half2*>(&words[k]));
    values[2 * k] = pair.x;
    values[2 * k + 1] = pair.y;
  }
}

__device__ __forceinline__ void write_eight(void* base, int type, int64_t index, const float* values) {
  if (type == type_float32) {
    float4* target = reinterpret_cast<float4*>(static_cast<float*>(base) + index);
    target[0] = *reinterpret_cast<const float4*>(values);
    target[1] = *reinterpret_cast<const float4*>(values + 4);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (type == type_bfloat16) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * k], values[2 * k + 1]);
      words[k] = *reinterpret_cast<const uint32_t*>(&pair);
    } else {
      const __half2 pair = __floats2half2_rn(values[2 * k], values[2 * k + 1]);
      words[k] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  *reinterpret_cast<uint4*>(static_cast<uint16_t*>(base) + index) = make_uint4(words[0], words[1], words[2], words[3]);
}

// One group's function: table and tangents, in shared memory.
template <class Family>
struct Function {
  float table[Family::largest_table];
  Tangent left, right;

  __device__ void prepare(const Problem& problem, const double* own, int n, int m) {
    bool done = false;
    if constexpr (std::is_same_v<Family, Polynomial>) {
      if (problem.family == family_hermite) {
        fill<Hermite>(problem, own, n, m);
        done = true;
      }
    }
    if (!done) fill<Family>(problem, own, n, m);
  }

  template <class Own>
  __device__ void fill(const Problem& problem, const double* own, int n, int m) {
    Own::prepare(own, table, n, m);
    if (!problem.tails) return;
    left = tangent<Own>(own, problem.low, n, m);
    right = tangent<Own>(own, problem.high, n, m);
  }

  __device__ __forceinline__ float value(float x, bool tails, int n, int m) const {
    if (!tails) return Family::value(x, static_cast<const float*>(table), n, m);
    const float low = float(left.at), high = float(right.at);
    if (x < low) return (x - low) * float(left.slope) + float(left.value);
    if (x > high) return (x - high) * float(right.slope) + float(right.value);
    return Family::value(x, static_cast<const float*>(table), n, m);
  }

  // sums: the family's own, then those of the tails.
  __device__ __forceinline__ float gradient(float x, float g, bool tails, float* sums, float* tail, int n, int m) const {
    if (tails) {
      const float low = float(left.at), high = float(right.at);
      if (x < low) {
        tail[0] += g;
        tail[1] += g * (x - low);
        return g * float(left.slope);
      }
      if (x > high) {
        tail[2] += g;
        tail[3] += g * (x - high);
        return g * float(right.slope);
      }
    }
    return Family::backward(x, g, static_cast<const float*>(table), sums, n, m);
  }
};

// Where element i of a group's sequence lies; x is [outer, groups, inner] or, gated, [outer, 2, groups, inner].
struct Place {
  int64_t in, out;
};

__device__ __forceinline__ Place place(const Problem& p, int64_t group, int64_t i) {
  const int64_t outer = i / p.inner, inner = i % p.inner, half = p.groups * p.inner;
  return {outer * (p.gated ? 2 * half : half) + group * p.inner + inner, outer * half + group * p.inner + inner};
}

// Eight elements one by one, zeros beyond the end; `ahead` leads to the gating half.
__device__ __forceinline__ void read_each(const Problem& p, const void* x, int64_t group, int64_t i, int64_t count,
                                          int64_t ahead, float* values) {
#pragma unroll
  for (int k = 0; k < width; ++k)
    values[k] = i + k < count ? read(x, p.data_type, place(p, group, i + k).in + ahead) : 0.0f;
}

template <class Family, int D, int E>
__global__ void __launch_bounds__(threads) forward_kernel(Problem p, const void* x, const double* parameters, void* y) {
  __shared__ Function<Family> function;
  const int n = D ? D : p.degree, m = D ? E : p.second_degree, type = p.data_type;
  const int64_t count = p.outer * p.inner, half = p.groups * p.inner;
  const int64_t step = int64_t(gridDim.x) * threads * width;
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
  const bool flat = p.groups == 1 && !p.gated, tails = p.tails;
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    __syncthreads();
    if (threadIdx.x == 0) function.prepare(p, parameters + group * Family::parameters(n, m), n, m);
    __syncthreads();
    for (int64_t i = first; i < count; i += step) {
      float values[width];
      const bool whole = flat && i + width <= count;
      if (whole) read_eight(x, type, i, values);
      else read_each(p, x, group, i, count, 0, values);
#pragma unroll
      for (int k = 0; k < width; ++k) values[k] = function.value(values[k], tails, n, m);
      if (p.gated) {
        float gates[width];
        read_each(p, x, group, i, count, half, gates);
#pragma unroll
        for (int k = 0; k < width; ++k) values[k] *= gates[k];
      }
      if (whole) {
        write_eight(y, type, i, values);
        continue;
      }
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (i + k < count) write(y, type, place(p, group, i + k).out, values[k]);
    }
  }
}

// The sum over the block, the same order every time; valid in thread 0.
__device__ __forceinline__ double block_sum(double value, double* shared) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < threads / 32; ++warp) total += shared[warp];
  return total;
}

template <class Family, int D, int E>
__global__ void __launch_bounds__(threads)
    backward_kernel(Problem p, const void* g, const void* x, const double* parameters, void* dx, double* partial) {
  __shared__ Function<Family> function;
  __shared__ double shared[threads / 32];
  const int n = D ? D : p.degree, m = D ? E : p.second_degree, type = p.data_type, sums = Family::sums(n, m);
  const int64_t count = p.outer * p.inner, half = p.groups * p.inner;
  const int64_t step = int64_t(gridDim.x) * threads * width;
  const int64_t first = (int64_t(blockIdx.x) * threads + threadIdx.x) * width;
  const bool flat = p.groups == 1 && !p.gated, tails = p.tails;
  for (int64_t group = blockIdx.y; group < p.groups; group += gridDim.y) {
    __syncthreads();
    if (threadIdx.x == 0) function.prepare(p, parameters + group * Family::parameters(n, m), n, m);
    __syncthreads();
    float a[Family::largest_sums] = {}, tail[tail_sums] = {};
    for (int64_t i = first; i < count; i += step) {
      float values[width], seeds[width];
      const bool whole = flat && i + width <= count;
      if (whole) {
        read_eight(x, type, i, values);
        read_eight(g, type, i, seeds);
      } else {
        read_each(p, x, group, i, count, 0, values);
#pragma unroll
        for (int k = 0; k < width; ++k) seeds[k] = i + k < count ? read(g, type, place(p, group, i + k).out) : 0.0f;
      }
      if (p.gated) {
        float gates[width];
        read_each(p, x, group, i, count, half, gates);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const float gate_gradient = seeds[k] * function.value(values[k], tails, n, m);
          if (i + k < count) write(dx, type, place(p, group, i + k).in + half, gate_gradient);
          seeds[k] *= gates[k];
        }
      }
#pragma unroll
      for (int k = 0; k < width; ++k) values[k] = function.gradient(values[k], seeds[k], tails, a, tail, n, m);
      if (whole) {
        write_eight(dx, type, i, values);
        continue;
      }
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (i + k < count) write(dx, type, place(p, group, i + k).in, values[k]);
    }
    double* own = partial + (group * gridDim.x + blockIdx.x) * (sums + tail_sums);
#pragma unroll
    for (int k = 0; k < sums; ++k) {
      const double total = block_sum(a[k], shared);
      if (threadIdx.x == 0) own[k] = total;
    }
    for (int k = 0; k < tail_sums; ++k) {
      const double total = block_sum(tail[k], shared);
      if (threadIdx.x == 0) own[sums + k] = total;
    }
  }
}

template <class Family>
__global__ void __launch_bounds__(threads)
    finish_kernel(Problem p, const double* parameters, const double* partial, int blocks, double* gradient) {
  __shared__ double shared[threads / 32];
  __shared__ double total[Family::largest_sums + tail_sums];
  const int n = p.degree, m = p.second_degree, sums = Family::sums(n, m), row = sums + tail_sums;
  for (int64_t group = blockIdx.x; group < p.groups; group += gridDim.x) {
    for (int k = 0; k < row; ++k) {
      double part = 0;
      for (int block = threadIdx.x; block < blocks; block += threads) part += partial[(group * blocks + block) * row + k];
      const double sum = block_sum(part, shared);
      if (threadIdx.x == 0) total[k] = sum;
    }
    if (threadIdx.x != 0) continue;
    const double* own = parameters + group * Family::parameters(n, m);
    if (p.tails) {
      const double tail[tail_sums] = {total[sums], total[sums + 1], total[sums + 2], total[sums + 3]};
      add_tail<Family>(own, p.low, tail[0], tail[1], total, n, m);
      add_tail<Family>(own, p.high, tail[2], tail[3], total, n, m);
    }
    Family::finish(total, own, gradient + group * Family::parameters(n, m), n, m);
  }
}

// A function of the shape only.
dim3 grid_of(const Problem& p) {
  const int64_t each = threads * width;
  int64_t columns = (p.outer * p.inner + each - 1) / each, rows = p.groups < 4096 ? p.groups : 4096;
  const int64_t most = most_blocks / rows > 1 ? most_blocks / rows : 1;
  if (columns > most) columns = most;
  return dim3(unsigned(columns < 1 ? 1 : columns), unsigned(rows));
}

template <class Family>
using Ends = std::conditional_t<std::is_same_v<Family, Hermite>, Polynomial, Family>;

struct Call {
  const void *gradient, *x;
  const double* parameters;
  void* result;
  double *partial, *parameter_gradient;
  cudaStream_t stream;
};

template <class Family, int D, int E>
int launch(const Problem& p, const Call& c) {
  using Inner = Ends<Family>;
  const dim3 grid = grid_of(p);
  if (!c.gradient) {
    forward_kernel<Inner, D, E><<<grid, threads, 0, c.stream>>>(p, c.x, c.parameters, c.result);
  } else {
    backward_kernel<Inner, D, E><<<grid, threads, 0, c.stream>>>(p, c.gradient, c.x, c.parameters, c.result, c.partial);
    const unsigned groups = unsigned(p.groups < 4096 ? p.groups : 4096);
    finish_kernel<Family><<<groups, threads, 0, c.stream>>>(p, c.parameters, c.partial, int(grid.x), c.parameter_gradient);
  }
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

// Unrolled for the degrees D…; another degree is read at run time, more slowly.
template <class Family, int... D>
int launch_degree(const Problem& p, const Call& c) {
  int status = -1;
  ((p.degree == D ? (void)(status = launch<Family, D, 0>(p, c)) : (void)0), ...);
  return status >= 0 ? status : launch<Family, 0, 0>(p, c);
}

int dispatch(const Problem& p, const Call& c) {
  if (p.data_type == type_float64) return 1;
  switch (p.family) {
    case family_polynomial: return launch_degree<Polynomial, 1, 2, 3, 4, 5, 6, 7, 8>(p, c);
    case family_hermite: return launch_degree<Hermite, 1, 2, 3, 4, 5, 6, 7, 8>(p, c);
    case family_chebyshev: return launch_degree<Chebyshev, 3, 5, 8>(p, c);
    case family_legendre: return launch_degree<Legendre, 3, 5, 8>(p, c);
    case family_fourier: return launch_degree<Fourier, 5, 6>(p, c);
    case family_harmonic: return launch_degree<Harmonic, 5, 6>(p, c);
    case family_tropical: return launch_degree<Tropical, 5, 6>(p, c);
    case family_tropical_rational: return launch_degree<TropicalRational, 6>(p, c);
    case family_polyrelu: return launch_degree<PolyReLU, 3>(p, c);
    case family_rational:
      if (p.degree == 5 && p.second_degree == 4) return launch<Rational, 5, 4>(p, c);
      return launch<Rational, 0, 0>(p, c);
    case family_piecewise_linear: return launch<PiecewiseLinear, 0, 0>(p, c);
    default: return 1;
  }
}

}  // namespace
}  // namespace polytrope

extern "C" {

// float64 numbers that backward needs for its partial sums; no family has more than `sums` sums per group.
int64_t polytrope_cuda_workspace(const polytrope::Problem* problem, int sums) {
  const dim3 grid = polytrope::grid_of(*problem);
  return int64_t(grid.x) * problem->groups * (sums + polytrope::tail_sums);
}

// All pointers are device pointers at multiples of 16 bytes. 0: enqueued on the stream; 1: no such kernel; 3: a launch failed.
int polytrope_cuda_forward(const polytrope::Problem* problem, const void* x, const double* parameters, void* y, void* stream) {
  return polytrope::dispatch(*problem, {nullptr, x, parameters, y, nullptr, nullptr, static_cast<cudaStream_t>(stream)});
}

int polytrope_cuda_backward(const polytrope::Problem* problem, const void* gradient, const void* x, const double* parameters,
                            void* x_gradient, double* workspace, double* parameter_gradient, void* stream) {
  return polytrope::dispatch(
      *problem, {gradient, x, parameters, x_gradient, workspace, parameter_gradient, static_cast<cudaStream_t>(stream)});
}

}  // extern "C"
