// Runs the project's CUDA sources on a CPU: every thread of a block is a fiber; blocks run one after the other.
//
// test_cuda.py writes kernel<<<grid, block, 0, stream>>>(…) as emulator::launch(grid, block, [&] { kernel(…); }) and includes
// this file first. A barrier or a shuffle that some thread never reaches ends the process.
#pragma once
#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __noinline__
#define __noinline__

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulator {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  long block_barriers, warp_barriers;  // how many of each it has reached
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<unsigned char> exchanged;  // 8 bytes of each thread, for shuffles
inline std::function<void()> body;
inline unsigned block_threads;
inline long progress;  // barriers passed and threads ended

inline void enter() {
  body();
  fibers[threadIdx.x].done = true;
  ++progress;
}

// Waits until the threads first … last have reached as many barriers of this kind.
inline void wait(long Fiber::*barriers, unsigned first, unsigned last) {
  const unsigned own = threadIdx.x;
  const long reached = ++(fibers[own].*barriers);
  for (unsigned k = first; k < last; ++k)
    while (fibers[k].*barriers < reached) swapcontext(&fibers[own].context, &scheduler);
  ++progress;
}

inline void run_block(unsigned threads) {
  block_threads = threads;
  for (unsigned k = 0; k < threads; ++k) {
    fibers[k].done = false;
    fibers[k].block_barriers = fibers[k].warp_barriers = 0;
    getcontext(&fibers[k].context);
    fibers[k].context.uc_stack.ss_sp = fibers[k].stack.data();
    fibers[k].context.uc_stack.ss_size = fibers[k].stack.size();
    fibers[k].context.uc_link = &scheduler;
    makecontext(&fibers[k].context, enter, 0);
  }
  for (unsigned done = 0; done < threads;) {
    const long before = progress;
    done = 0;
    for (unsigned k = 0; k < threads; ++k) {
      threadIdx.x = k;
      if (!fibers[k].done) swapcontext(&scheduler, &fibers[k].context);
      done += fibers[k].done;
    }
    if (progress == before) {
      std::fprintf(stderr, "emulator: %u of %u threads wait at a barrier for ever\n", threads - done, threads);
      std::abort();
    }
  }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = grid;
  while (fibers.size() < threads) fibers.push_back({{}, std::vector<char>(1 << 16), false, 0, 0});
  exchanged.resize(threads * 8);
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(threads);
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(&emulator::Fiber::block_barriers, 0, emulator::block_threads); }

template <class T>
T __shfl_down_sync(unsigned, T value, int offset) {
  const unsigned own = threadIdx.x, first = own / 32 * 32, from = own % 32 + offset < 32 ? own + offset : own;
  std::memcpy(&emulator::exchanged[own * 8], &value, sizeof(T));
  emulator::wait(&emulator::Fiber::warp_barriers, first, first + 32);
  std::memcpy(&value, &emulator::exchanged[from * 8], sizeof(T));
  emulator::wait(&emulator::Fiber::warp_barriers, first, first + 32);
  return value;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

template <class T>
T __ldcs(const T* pointer) {
  return *pointer;
}
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }

// A GPU of three multiprocessors that hold one block of each kernel.
extern "C" {
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, int) {
  return *blocks = 1, cudaSuccess;
}
