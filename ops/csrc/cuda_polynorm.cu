// PolyNorm on the GPU: the formulas of cpu_polynorm.cpp, a block for each row at a time; rows whose powers leave the range of
// float are gone over again, scaled as there.
//
// A thread keeps its elements of a row of up to 4096 in registers between the sums over the row and what follows from them;
// longer rows, and those whose length 8 does not divide, are read twice.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

constexpr int row_threads = threads / 2, row_warps = row_threads / 32;
constexpr int most_kept = 4;              // packets of a thread
enum Kept { nothing = 0, of_16_bits = 4, of_32_bits = 8 };  // words of a packet
constexpr int most = 2 * max_degree + 1;  // sums of x^2k (k = 1…n), then of g x^k (k = 0…n)

template <Kept kept>
struct KeptPacket {
  uint32_t words[kept == nothing ? 1 : kept];
};

struct Rows {
  int type;
  int64_t rows, columns;
  int n;
  float epsilon;

  // Packets of this thread in a row: visit(number, first column).
  template <Kept kept, class Visit>
  __device__ __forceinline__ void each_packet(const Visit& visit) const {
    if constexpr (kept != nothing) {
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
  template <Kept kept>
  __device__ __forceinline__ void keep(const void* base, int64_t row, KeptPacket<kept>* packets) const {
    if constexpr (kept != nothing)
      each_packet<kept>([&](int j, int64_t at) {
        constexpr int bytes = kept == of_16_bits ? 2 : 4;
        load_words<kept>(static_cast<const char*>(base) + (row * columns + at) * bytes, packets[j].words);
      });
  }
  template <Kept kept>
  __device__ __forceinline__ void values(const void* base, int64_t row, const KeptPacket<kept>& packet, int64_t at,
                                         float* to) const {
    if constexpr (kept == of_32_bits) {
      unpack_few<width>(packet.words, type_float32, to);
    } else if constexpr (kept == of_16_bits) {
      if (type == type_bfloat16) unpack_few<width>(packet.words, type_bfloat16, to);
      else unpack_few<width>(packet.words, type_float16, to);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k) to[k] = at + k < columns ? read(base, type, row * columns + at + k) : 0.0f;
    }
  }
  template <Kept kept>
  __device__ __forceinline__ void write_values(void* base, int64_t row, int64_t at, const float* from) const {
    if (kept != nothing) return write_eight(base, type, row * columns + at, from);
#pragma unroll
    for (int k = 0; k < width; ++k)
      if (at + k < columns) write(base, type, row * columns + at + k, from[k]);
  }
};

// mean(z^2k) + epsilon / s^2k of a row of z = x scale, and whether what is computed from it stays in the range of float.
__device__ __forceinline__ double mean_of(const Rows& r, double squares, float scale, int k) {
  double share = r.epsilon;
  if (scale != 1.0f)
    for (int i = 0; i < 2 * k; ++i) share *= double(scale);
  return squares / double(r.columns) + share;
}
__device__ __forceinline__ bool is_in_range(double mean) { return mean < 1e20 && mean > 1e-20; }

// A power of two that brings the largest element of a row of x near to 1; 1 for rows of zeros and those with ±inf or NaN.
// `shared` holds a number for each warp. All threads of a block call it together.
template <Kept kept>
__device__ __noinline__ float scale_of(const Rows& r, const void* x, int64_t row, float* shared) {
  float largest = 0;
  for (int64_t at = threadIdx.x; at < r.columns; at += row_threads) {
    const float size = absolute(read(x, r.type, row * r.columns + at));
    largest = size <= largest ? largest : size;
  }
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_down_sync(0xffffffffu, largest, offset);
    largest = other <= largest ? largest : other;
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = largest;
  __syncthreads();
  largest = 0;
  for (int warp = 0; warp < row_warps; ++warp) largest = shared[warp] <= largest ? largest : shared[warp];
  __syncthreads();
  if (!(largest > 0 && largest < INFINITY)) return 1;
  const int exponent = 1 - ilogbf(largest);
  return ldexpf(1.0f, exponent > 126 ? 126 : exponent < -126 ? -126 : exponent);
}

// D: the degree, 0: read at run time.
template <int D, Kept kept>
__global__ void __launch_bounds__(row_threads) forward_rows(Rows r, const void* x, Parameters parameters, void* y) {
  __shared__ double total[most], own[max_degree + 1];
  __shared__ float t[max_degree + 1], shared[row_warps * most];
  __shared__ bool leaves[max_degree + 1];
  const int n = D ? D : r.n;
  for (int k = threadIdx.x; k <= n; k += row_threads) own[k] = parameters.get(0, k);
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    KeptPacket<kept> packets[most_kept];
    r.keep<kept>(x, row, packets);
    float scale = 1;
    for (bool again = true; again;) {
      float sums[most] = {};
      r.each_packet<kept>([&](int j, int64_t at) {
        float xs[width];
        r.values<kept>(x, row, packets[j], at, xs);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const float v = xs[k] * scale, squared = v * v;
          float square = 1.0f;
#pragma unroll
          for (int power = 0; power < n; ++power) {
            square *= squared;
            sums[power] += square;
          }
        }
      });
      block_sums<row_threads>(sums, n, shared, [&](int k, double sum) { total[k] = sum; });
      for (int k = threadIdx.x; k <= n; k += row_threads) {
        const double mean = k == 0 ? 1 : mean_of(r, total[k - 1], scale, k);
        t[k] = float(k == 0 ? own[0] : own[k] / sqrt(mean));
        leaves[k] = !is_in_range(mean);
      }
      __syncthreads();
      again = false;
      for (int k = 1; k <= n; ++k) again |= leaves[k];
      if (!again || scale != 1.0f) break;
      scale = scale_of<kept>(r, x, row, shared);
      again = scale != 1.0f;
    }
    r.each_packet<kept>([&](int j, int64_t at) {
      float xs[width];
      r.values<kept>(x, row, packets[j], at, xs);
#pragma unroll
      for (int k = 0; k < width; ++k) xs[k] = Polynomial::value(xs[k] * scale, static_cast<const float*>(t), n, 0);
      r.write_values<kept>(y, row, at, xs);
    });
  }
}

template <int D, Kept kept>
__global__ void __launch_bounds__(row_threads)
    backward_rows(Rows r, const void* g, const void* x, Parameters parameters, void* dx, double* partial) {
  __shared__ double total[most], own[max_degree + 1], gradient[max_degree + 1];
  __shared__ float direct[max_degree + 1], through[max_degree + 1];  // of x^(k-1), and of x^(2k-1)
  __shared__ float shared[row_warps * most];
  __shared__ bool leaves[max_degree + 1];
  const int n = D ? D : r.n;
  for (int k = threadIdx.x; k <= n; k += row_threads) own[k] = parameters.get(0, k), gradient[k] = 0;
  for (int64_t row = blockIdx.x; row < r.rows; row += gridDim.x) {
    KeptPacket<kept> x_packets[most_kept], g_packets[most_kept];
    r.keep<kept>(x, row, x_packets);
    r.keep<kept>(g, row, g_packets);
    const auto each_pair = [&](const auto& visit) {  // visit(first column, elements of x, of g)
      r.each_packet<kept>([&](int j, int64_t at) {
        float xs[width], gs[width];
        r.values<kept>(x, row, x_packets[j], at, xs);
        r.values<kept>(g, row, g_packets[j], at, gs);
        visit(at, xs, gs);
      });
    };
    float scale = 1;
    for (bool again = true; again;) {
      float sums[most] = {};
      each_pair([&](int64_t, float* xs, const float* gs) {
#pragma unroll
        for (int k = 0; k < width; ++k) {
          const float v = xs[k] * scale, squared = v * v;
          float square = 1.0f, product = gs[k];
          sums[n] += product;
#pragma unroll
          for (int power = 0; power < n; ++power) {
            square *= squared;
            product *= v;
            sums[power] += square;
            sums[n + 1 + power] += product;
          }
        }
      });
      block_sums<row_threads>(sums, 2 * n + 1, shared, [&](int k, double sum) { total[k] = sum; });
      for (int k = threadIdx.x; k <= n; k += row_threads)
        leaves[k] = k > 0 && !is_in_range(mean_of(r, total[k - 1], scale, k));
      __syncthreads();
      again = false;
      for (int k = 1; k <= n; ++k) again |= leaves[k];
      if (!again || scale != 1.0f) break;
      scale = scale_of<kept>(r, x, row, shared);
      again = scale != 1.0f;
    }
    for (int k = threadIdx.x; k <= n; k += row_threads) {
      if (k == 0) {
        gradient[0] += total[n];
        continue;
      }
      const double inverse = 1 / sqrt(mean_of(r, total[k - 1], scale, k)), product = total[n + k];
      gradient[k] += inverse * product;
      direct[k - 1] = float(k * own[k] * inverse);
      through[k - 1] = float(-k / double(r.columns) * own[k] * inverse * inverse * inverse * product);
    }
    __syncthreads();
    each_pair([&](int64_t at, float* xs, const float* gs) {
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const float v = xs[k] * scale;
        xs[k] = scale * (gs[k] * Polynomial::value(v, static_cast<const float*>(direct), n - 1, 0) +
                         v * Polynomial::value(v * v, static_cast<const float*>(through), n - 1, 0));
      }
      r.write_values<kept>(dx, row, at, xs);
    });
  }
  if (!partial) return;
  for (int k = threadIdx.x; k <= n; k += row_threads) partial[int64_t(k) * gridDim.x + blockIdx.x] = gradient[k];
}

__global__ void __launch_bounds__(finish_threads)
    finish_rows(const double* partial, int count, int blocks, Parameters gradients) {
  __shared__ double total[max_degree + 1];
  add_up_blocks(partial, count, blocks, total);
  for (int k = threadIdx.x; k < count; k += finish_threads) gradients.set(0, k, total[k]);
}

template <int D, Kept kept>
void launch_rows(const Rows& r, const Call& c) {
  const auto blocks_of = [&](int64_t resident) { return unsigned(r.rows < resident ? r.rows : resident); };
  if (!c.gradient) {
    const unsigned blocks = blocks_of(resident_blocks<row_threads>(forward_rows<D, kept>));
    forward_rows<D, kept><<<blocks, row_threads, 0, c.stream>>>(r, c.x, c.parameters, c.result);
    return;
  }
  const unsigned blocks = blocks_of(resident_blocks<row_threads>(backward_rows<D, kept>));
  backward_rows<D, kept><<<blocks, row_threads, 0, c.stream>>>(r, c.gradient, c.x, c.parameters, c.result, c.partial);
  if (c.partial)
    finish_rows<<<1, finish_threads, 0, c.stream>>>(c.partial, r.n + 1, int(blocks), c.parameter_gradients);
}

}  // namespace

// No more blocks than these are resident.
int64_t polynorm_partial_bytes(const Problem& p) {
  const int64_t most = most_blocks() * (threads / row_threads);
  return (p.outer < most ? p.outer : most) * (p.degree + 1) * 8;
}

int launch_polynorm(const Problem& p, const Call& c) {
  const Rows r{p.data_type, p.outer, p.inner, p.degree, float(p.epsilon)};
  const bool kept = p.degree == 3 && p.inner % width == 0 && p.inner <= most_kept * row_threads * width;
  if (kept && p.data_type == type_float32) launch_rows<3, of_32_bits>(r, c);
  else if (kept) launch_rows<3, of_16_bits>(r, c);
  else if (p.degree == 3) launch_rows<3, nothing>(r, c);
  else launch_rows<0, nothing>(r, c);
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

}  // namespace polytrope
