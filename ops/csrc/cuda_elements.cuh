// What all CUDA kernels share: elements in and out, sums in a fixed order, the size of a grid.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "families.h"
#include "problem.h"

namespace polytrope {

#ifdef POLYTROPE_CUDA_THREADS
constexpr int threads = POLYTROPE_CUDA_THREADS;
#else
constexpr int threads = 256;
#endif
constexpr int warps = threads / 32;
constexpr int width = 8;      // elements that a thread takes at a time
constexpr int tail_sums = 2;  // sums of g (x - end), on the left and on the right

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

// Eight elements as they lie in memory: 16-bit types two in a word. Loads are kept apart from conversions, so that all that
// a thread wants is on its way before it waits for any of it.
struct Packet {
  uint32_t words[width];
};

template <int count>
__device__ __forceinline__ void load_words(const void* source, uint32_t* words) {
  if constexpr (count >= 4) {
#pragma unroll
    for (int k = 0; k < count; k += 4) {
      const uint4 four = __ldcs(static_cast<const uint4*>(source) + k / 4);
      words[k] = four.x;
      words[k + 1] = four.y;
      words[k + 2] = four.z;
      words[k + 3] = four.w;
    }
  } else if constexpr (count == 2) {
    const uint2 two = __ldcs(static_cast<const uint2*>(source));
    words[0] = two.x;
    words[1] = two.y;
  } else {
    words[0] = __ldcs(static_cast<const uint32_t*>(source));
  }
}

template <int count>
__device__ __forceinline__ void store_words(void* target, const uint32_t* words) {
  if constexpr (count >= 4) {
#pragma unroll
    for (int k = 0; k < count; k += 4)
      static_cast<uint4*>(target)[k / 4] = make_uint4(words[k], words[k + 1], words[k + 2], words[k + 3]);
  } else if constexpr (count == 2) {
    *static_cast<uint2*>(target) = make_uint2(words[0], words[1]);
  } else {
    *static_cast<uint32_t*>(target) = words[0];
  }
}

// `count` (1, 2, 4 or 8) neighbours from `index` on, which is a multiple of count; the tensors begin at multiples of 16
// bytes. A single element of 16 bits has a word for itself.
template <int count>
__device__ __forceinline__ void fetch_few(const void* base, int type, int64_t index, uint32_t* words) {
  if (type == type_float32) load_words<count>(static_cast<const float*>(base) + index, words);
  else if constexpr (count == 1) words[0] = static_cast<const uint16_t*>(base)[index];
  else load_words<count / 2>(static_cast<const uint16_t*>(base) + index, words);
}

template <int count>
__device__ __forceinline__ void unpack_few(const uint32_t* words, int type, float* values) {
  if (type == type_bfloat16) {
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] = __uint_as_float(k % 2 ? words[k / 2] & 0xffff0000u : words[k / 2] << 16);
  } else if (type == type_float32) {
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] = __uint_as_float(words[k]);
  } else {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[k / 2]));
      values[k] = pair.x;
      if (k + 1 < count) values[k + 1] = pair.y;
    }
  }
}

template <int count>
__device__ __forceinline__ void write_few(void* base, int type, int64_t index, const float* values) {
  uint32_t words[count];
  if constexpr (count == 1) return write(base, type, index, values[0]);
  if (type == type_float32) {
#pragma unroll
    for (int k = 0; k < count; ++k) words[k] = __float_as_uint(values[k]);
    return store_words<count>(static_cast<float*>(base) + index, words);
  }
  if (type == type_bfloat16) {
#pragma unroll
    for (int k = 0; k < count / 2; ++k) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * k], values[2 * k + 1]);
      words[k] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  } else {
#pragma unroll
    for (int k = 0; k < count / 2; ++k) {
      const __half2 pair = __floats2half2_rn(values[2 * k], values[2 * k + 1]);
      words[k] = *reinterpret_cast<const uint32_t*>(&pair);
    }
  }
  if constexpr (count > 1) store_words<count / 2>(static_cast<uint16_t*>(base) + index, words);
}

__device__ __forceinline__ Packet fetch(const void* base, int type, int64_t index) {
  Packet packet;
  fetch_few<width>(base, type, index, packet.words);
  return packet;
}
__device__ __forceinline__ void unpack(const Packet& packet, int type, float* values) {
  unpack_few<width>(packet.words, type, values);
}
__device__ __forceinline__ void write_eight(void* base, int type, int64_t index, const float* values) {
  write_few<width>(base, type, index, values);
}

// The parameters of all groups, or the gradients of these.
struct Parameters {
  Parts parts;
  void* pointers[most_parts];

  struct Place {
    int part;
    int64_t index;
  };
  __device__ __forceinline__ Place find(int64_t group, int k) const {
    int part = 0;
    while (k >= parts.sizes[part]) k -= int(parts.sizes[part++]);
    return {part, group * parts.sizes[part] + k};
  }
  __device__ __forceinline__ double factor(int k) const { return parts.scaled ? parts.factors[k] : 1.0; }

  // Packed parameter k of a group.
  __device__ __forceinline__ double get(int64_t group, int k) const {
    const Place place = find(group, k);
    const int type = parts.types[place.part];
    const void* pointer = pointers[place.part];
    const double value =
        type == type_float64 ? static_cast<const double*>(pointer)[place.index] : double(read(pointer, type, place.index));
    return value * factor(k);
  }
  __device__ __forceinline__ void set(int64_t group, int k, double value) const {
    const Place place = find(group, k);
    const int type = parts.types[place.part];
    value *= factor(k);
    if (type == type_float64) static_cast<double*>(pointers[place.part])[place.index] = value;
    else write(pointers[place.part], type, place.index, float(value));
  }
};

// The sum over a warp, the same order every time; valid in its first lane.
template <class S>
__device__ __forceinline__ S warp_sum(S value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  return value;
}

// Adds up, over a block of so many threads, `values`[0 … count) of all threads, within a warp in S; thread k then gives its
// sum to keep(k, sum). `shared` holds count numbers for each warp. All threads of a block call it together.
template <int block_threads = threads, class S, class Keep>
__device__ __forceinline__ void block_sums(const float* values, int count, S* shared, Keep keep) {
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const S sum = warp_sum(S(values[k]));
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32 * count + k] = sum;
  }
  __syncthreads();
  for (int k = threadIdx.x; k < count; k += block_threads) {
    double total = 0;
    for (int warp = 0; warp < block_threads / 32; ++warp) total += shared[warp * count + k];
    keep(k, total);
  }
  __syncthreads();
}

// Threads of the block that adds up those of a launch, for each group: a warp for each of the sums of most families.
constexpr int finish_threads = 2 * threads;

// total[k] = sum of rows[k * blocks …][0 … blocks), a warp for each k; `total` is shared.
__device__ __forceinline__ void add_up_blocks(const double* rows, int count, int blocks, double* total) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int k = warp; k < count; k += finish_threads / 32) {
    const double* row = rows + int64_t(k) * blocks;
    double part = 0;
#pragma unroll 4
    for (int block = lane; block < blocks; block += 32) part += row[block];
    part = warp_sum(part);
    if (lane == 0) total[k] = part;
  }
  __syncthreads();
}

// Blocks that the whole GPU can hold of a kernel with 2048 / threads of them on a multiprocessor: the most there are.
inline int64_t most_blocks() {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  return int64_t(processors) * (2048 / threads);
}

// Blocks of `kernel` that are resident at the same time on the current GPU: one wave, so that none is left to run alone at
// the end.
template <int block_threads = threads, class Kernel>
int64_t resident_blocks(Kernel kernel) {
  int each = 0;
  if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, block_threads, 0) != cudaSuccess || each < 1) each = 1;
  return most_blocks() / (2048 / threads) * each;
}

}  // namespace polytrope
