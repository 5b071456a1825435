// PolyNorm on the GPU: the formulas of cpu_polynorm.cpp, a block for each row at a time.
//
// A row is read twice, so its length is not limited by registers or shared memory.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

struct Rows {
  int type;
  int64_t rows, columns;
  int n;
  float epsilon;

  __device__ __forceinline__ void read_eight_of(const void* base, int64_t row, int64_t at, float* values) const {
    if (columns % width == 0) return read_eight(base, type, row * columns + at, values);
#pragma unroll
    for (int k = 0; k < width; ++k) values[k] = at + k < columns ? read(base, type, row * columns + at + k) : 0.0f;
  }
  __device__ __forceinline__ void write_eight_of(void* base, int64_t row, int64_t at, const float* values) const {
    if (columns % width == 0) return write_eight(base, type, row * columns + at, values);
#pragma unroll
    for (int k = 0; k < width; ++k)
      if (at + k < columns) write(base, type, row * columns + at + k, values[k]);
  }
};

constexpr int most = 2 * max_degree + 1;  // sums of x^2k (k = 1…n), then of g x^k (k = 0…n)

// The sums of one row, in shared `total`; g may be null. D: the degree, 0: read at run time.
template <int D>
__device__ __forceinline__ void add_moments(const Rows& r, const void* x, const void* g, int64_t row, double* shared,
                                            double* total) {
  const int n = D ? D : r.n;
  float sums[most] = {};
  for (int64_t at = threadIdx.x * width; at < r.columns; at += threads * width) {
    float xs[width], gs[width] = {};
    r.read_eight_of(x, row, at, xs);
    if (g) r.read_eight_of(g, row, at, gs);
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
  }
  block_sums(sums, 2 * n + 1, shared, [&](int k, double sum) { total[k] = sum; });
}

template <int D>
__global__ void __launch_bounds__(threads) forward_rows(Rows r, const void* x, const double* parameters, void* y) {
  __shared__ double shared[warps * most], total[most];
  __shared__ float t[max_degree + 1];
  const int n = D ? D : r.n;
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    add_moments<D>(r, x, nullptr, row, shared, total);
    for (int k = threadIdx.x; k <= n; k += threads)
      t[k] = float(k == 0 ? parameters[0] : parameters[k] / sqrt(total[k - 1] / double(r.columns) + r.epsilon));
    __syncthreads();
    for (int64_t at = threadIdx.x * width; at < r.columns; at += threads * width) {
      float xs[width];
      r.read_eight_of(x, row, at, xs);
#pragma unroll
      for (int k = 0; k < width; ++k) xs[k] = Polynomial::value(xs[k], static_cast<const float*>(t), n, 0);
      r.write_eight_of(y, row, at, xs);
    }
  }
}

template <int D>
__global__ void __launch_bounds__(threads)
    backward_rows(Rows r, const void* g, const void* x, const double* parameters, void* dx, double* partial) {
  __shared__ double shared[warps * most], total[most], own[max_degree + 1];
  __shared__ float direct[max_degree + 1], through[max_degree + 1];  // of x^(k-1), and of x^(2k-1)
  const int n = D ? D : r.n;
  for (int k = threadIdx.x; k <= n; k += threads) own[k] = 0;
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    add_moments<D>(r, x, g, row, shared, total);
    for (int k = threadIdx.x; k <= n; k += threads) {
      if (k == 0) {
        own[0] += total[n];
        continue;
      }
      const double scale = 1 / sqrt(total[k - 1] / double(r.columns) + r.epsilon), product = total[n + k];
      own[k] += scale * product;
      direct[k - 1] = float(k * parameters[k] * scale);
      through[k - 1] = float(-k / double(r.columns) * parameters[k] * scale * scale * scale * product);
    }
    __syncthreads();
    for (int64_t at = threadIdx.x * width; at < r.columns; at += threads * width) {
      float xs[width], gs[width];
      r.read_eight_of(x, row, at, xs);
      r.read_eight_of(g, row, at, gs);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float v = xs[k];
        xs[k] = gs[k] * Polynomial::value(v, static_cast<const float*>(direct), n - 1, 0) +
                v * Polynomial::value(v * v, static_cast<const float*>(through), n - 1, 0);
      }
      r.write_eight_of(dx, row, at, xs);
    }
  }
  for (int k = threadIdx.x; k <= n; k += threads) partial[int64_t(k) * gridDim.x + blockIdx.x] = own[k];
}

__global__ void __launch_bounds__(threads) finish_rows(const double* partial, int count, int blocks, double* gradient) {
  __shared__ double total[max_degree + 1];
  add_up_blocks(partial, count, blocks, total);
  for (int k = threadIdx.x; k < count; k += threads) gradient[k] = total[k];
}

unsigned blocks_of(int64_t rows) { return unsigned(rows < most_blocks() ? rows : most_blocks()); }

template <int D>
void launch_rows(const Rows& r, const Call& c) {
  const unsigned blocks = blocks_of(r.rows);
  if (!c.gradient) {
    forward_rows<D><<<blocks, threads, 0, c.stream>>>(r, c.x, c.parameters, c.result);
    return;
  }
  backward_rows<D><<<blocks, threads, 0, c.stream>>>(r, c.gradient, c.x, c.parameters, c.result, c.partial);
  finish_rows<<<1, threads, 0, c.stream>>>(c.partial, r.n + 1, int(blocks), c.parameter_gradient);
}

}  // namespace

int64_t polynorm_partial_bytes(const Problem& p) { return int64_t(blocks_of(p.outer)) * (p.degree + 1) * 8; }

int launch_polynorm(const Problem& p, const Call& c) {
  const Rows r{p.data_type, p.outer, p.inner, p.degree, float(p.epsilon)};
  const auto run = p.degree == 3 ? launch_rows<3> : launch_rows<0>;
  run(r, c);
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

}  // namespace polytrope
