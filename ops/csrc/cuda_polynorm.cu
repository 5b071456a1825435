// PolyNorm on the GPU: the formulas of cpu_polynorm.cpp, a block for each row at a time.
//
// A thread keeps its elements of a row of up to 4096 in registers between the sums over the row and what follows from them;
// longer rows, and those whose length 8 does not divide, are read twice.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

constexpr int row_threads = threads / 2, row_warps = row_threads / 32;
constexpr int most_kept = 4;              // packets of a thread
constexpr int most = 2 * max_degree + 1;  // sums of x^2k (k = 1…n), then of g x^k (k = 0…n)

struct Rows {
  int type;
  int64_t rows, columns;
  int n;
  float epsilon;

  // Packets of this thread in a row: visit(number, first column).
  template <bool Kept, class Visit>
  __device__ __forceinline__ void each_packet(const Visit& visit) const {
    if constexpr (Kept) {
#pragma unroll
      for (int j = 0; j < most_kept; ++j) {
        const int at = (j * row_threads + int(threadIdx.x)) * width;
        if (at < columns) visit(j, int64_t(at));
      }
    } else {
      for (int64_t at = threadIdx.x * width; at < columns; at += row_threads * width) visit(0, at);
    }
  }
  // All packets of a row at once, if they are to be kept.
  template <bool Kept>
  __device__ __forceinline__ void keep(const void* base, int64_t row, Packet* packets) const {
    if (Kept) each_packet<Kept>([&](int j, int64_t at) { packets[j] = fetch(base, type, row * columns + at); });
  }
  template <bool Kept>
  __device__ __forceinline__ void values(const void* base, int64_t row, const Packet& kept, int64_t at, float* to) const {
    if (Kept) return unpack(kept, type, to);
#pragma unroll
    for (int k = 0; k < width; ++k) to[k] = at + k < columns ? read(base, type, row * columns + at + k) : 0.0f;
  }
  template <bool Kept>
  __device__ __forceinline__ void write_values(void* base, int64_t row, int64_t at, const float* from) const {
    if (Kept) return write_eight(base, type, row * columns + at, from);
#pragma unroll
    for (int k = 0; k < width; ++k)
      if (at + k < columns) write(base, type, row * columns + at + k, from[k]);
  }
};

// D: the degree, 0: read at run time.
template <int D, bool Kept>
__global__ void __launch_bounds__(row_threads) forward_rows(Rows r, const void* x, Parameters parameters, void* y) {
  __shared__ double total[most], own[max_degree + 1];
  __shared__ float t[max_degree + 1], shared[row_warps * most];
  const int n = D ? D : r.n;
  for (int k = threadIdx.x; k <= n; k += row_threads) own[k] = parameters.get(0, k);
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    Packet packets[most_kept];
    r.keep<Kept>(x, row, packets);
    float sums[most] = {};
    r.each_packet<Kept>([&](int j, int64_t at) {
      float xs[width];
      r.values<Kept>(x, row, packets[j], at, xs);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float squared = xs[k] * xs[k];
        float square = 1.0f;
#pragma unroll
        for (int power = 0; power < n; ++power) {
          square *= squared;
          sums[power] += square;
        }
      }
    });
    block_sums<row_threads>(sums, n, shared, [&](int k, double sum) { total[k] = sum; });
    for (int k = threadIdx.x; k <= n; k += row_threads)
      t[k] = float(k == 0 ? own[0] : own[k] / sqrt(total[k - 1] / double(r.columns) + r.epsilon));
    __syncthreads();
    r.each_packet<Kept>([&](int j, int64_t at) {
      float xs[width];
      r.values<Kept>(x, row, packets[j], at, xs);
#pragma unroll
      for (int k = 0; k < width; ++k) xs[k] = Polynomial::value(xs[k], static_cast<const float*>(t), n, 0);
      r.write_values<Kept>(y, row, at, xs);
    });
  }
}

template <int D, bool Kept>
__global__ void __launch_bounds__(row_threads)
    backward_rows(Rows r, const void* g, const void* x, Parameters parameters, void* dx, double* partial) {
  __shared__ double total[most], own[max_degree + 1], gradient[max_degree + 1];
  __shared__ float direct[max_degree + 1], through[max_degree + 1];  // of x^(k-1), and of x^(2k-1)
  __shared__ float shared[row_warps * most];
  const int n = D ? D : r.n;
  for (int k = threadIdx.x; k <= n; k += row_threads) own[k] = parameters.get(0, k), gradient[k] = 0;
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    Packet x_packets[most_kept], g_packets[most_kept];
    r.keep<Kept>(x, row, x_packets);
    r.keep<Kept>(g, row, g_packets);
    const auto each_pair = [&](const auto& visit) {  // visit(first column, elements of x, of g)
      r.each_packet<Kept>([&](int j, int64_t at) {
        float xs[width], gs[width];
        r.values<Kept>(x, row, x_packets[j], at, xs);
        r.values<Kept>(g, row, g_packets[j], at, gs);
        visit(at, xs, gs);
      });
    };
    float sums[most] = {};
    each_pair([&](int64_t, float* xs, const float* gs) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float squared = xs[k] * xs[k];
        float square = 1.0f, product = gs[k];
        sums[n] += product;
#pragma unroll
        for (int power = 0; power < n; ++power) {
          square *= squared;
          product *= xs[k];
          sums[power] += square;
          sums[n + 1 + power] += product;
        }
      }
    });
    block_sums<row_threads>(sums, 2 * n + 1, shared, [&](int k, double sum) { total[k] = sum; });
    for (int k = threadIdx.x; k <= n; k += row_threads) {
      if (k == 0) {
        gradient[0] += total[n];
        continue;
      }
      const double scale = 1 / sqrt(total[k - 1] / double(r.columns) + r.epsilon), product = total[n + k];
      gradient[k] += scale * product;
      direct[k - 1] = float(k * own[k] * scale);
      through[k - 1] = float(-k / double(r.columns) * own[k] * scale * scale * scale * product);
    }
    __syncthreads();
    each_pair([&](int64_t at, float* xs, const float* gs) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float v = xs[k];
        xs[k] = gs[k] * Polynomial::value(v, static_cast<const float*>(direct), n - 1, 0) +
                v * Polynomial::value(v * v, static_cast<const float*>(through), n - 1, 0);
      }
      r.write_values<Kept>(dx, row, at, xs);
    });
  }
  for (int k = threadIdx.x; k <= n; k += row_threads) partial[int64_t(k) * gridDim.x + blockIdx.x] = gradient[k];
}

__global__ void __launch_bounds__(finish_threads)
    finish_rows(const double* partial, int count, int blocks, Parameters gradients) {
  __shared__ double total[max_degree + 1];
  add_up_blocks(partial, count, blocks, total);
  for (int k = threadIdx.x; k < count; k += finish_threads) gradients.set(0, k, total[k]);
}

int64_t blocks_of(int64_t rows) {
  const int64_t all = 2 * most_blocks();
  return rows < all ? rows : all;
}

template <int D, bool Kept>
void launch_rows(const Rows& r, const Call& c) {
  const unsigned blocks = unsigned(blocks_of(r.rows));
  if (!c.gradient) {
    forward_rows<D, Kept><<<blocks, row_threads, 0, c.stream>>>(r, c.x, c.parameters, c.result);
    return;
  }
  backward_rows<D, Kept><<<blocks, row_threads, 0, c.stream>>>(r, c.gradient, c.x, c.parameters, c.result, c.partial);
  finish_rows<<<1, finish_threads, 0, c.stream>>>(c.partial, r.n + 1, int(blocks), c.parameter_gradients);
}

}  // namespace

int64_t polynorm_partial_bytes(const Problem& p) { return blocks_of(p.outer) * (p.degree + 1) * 8; }

int launch_polynorm(const Problem& p, const Call& c) {
  const Rows r{p.data_type, p.outer, p.inner, p.degree, float(p.epsilon)};
  const bool kept = p.degree == 3 && p.inner % width == 0 && p.inner <= most_kept * row_threads * width;
  const auto run = kept ? launch_rows<3, true> : (p.degree == 3 ? launch_rows<3, false> : launch_rows<0, false>);
  run(r, c);
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

}  // namespace polytrope
