// The C interface of the CUDA kernels: no torch headers, so one library serves many versions of torch.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

int dispatch(const Problem& p, const Call& c) {
  if (p.data_type == type_float64) return 1;
  switch (p.family) {
    case family_polynomial:
    case family_hermite: return launch_polynomial(p, c);
    case family_chebyshev:
    case family_legendre: return launch_recurrence(p, c);
    case family_fourier:
    case family_harmonic: return launch_waves(p, c);
    case family_tropical:
    case family_tropical_rational:
    case family_piecewise_linear: return launch_lines(p, c);
    case family_rational:
    case family_polyrelu: return launch_quotients(p, c);
    case family_polynorm: return launch_polynorm(p, c);
    default: return 1;
  }
}

// No family has a larger table, or more sums.
constexpr int64_t largest_function = function_size<PiecewiseLinear>;
constexpr int64_t most_sums = PiecewiseLinear::largest_sums + tail_sums;
static_assert(Fourier::largest_table <= PiecewiseLinear::largest_table && Fourier::largest_sums <= 2 * max_pieces);

int64_t function_bytes(const Problem& p) { return p.groups * largest_function * 4; }

int64_t partial_bytes(const Problem& p) {
  if (p.family == family_polynorm) return polynorm_partial_bytes(p);
  return p.groups * columns_of(p, most_blocks()) * most_sums * 8;
}

}  // namespace
}  // namespace polytrope

extern "C" {

// Bytes that a call needs beside its tensors: tables, and with `backward` partial sums.
int64_t polytrope_cuda_workspace(const polytrope::Problem* problem, int backward) {
  using namespace polytrope;
  return function_bytes(*problem) + (backward ? partial_bytes(*problem) : 0);
}

// `gradient` null: forward, and `result` is y; else it is the gradient of x. All pointers are device pointers at multiples
// of 16 bytes. 0: enqueued on the stream; 1: no such kernel; 3: a launch failed.
int polytrope_cuda_activation(const polytrope::Problem* problem, const void* gradient, const void* x,
                              const double* parameters, void* result, void* workspace, double* parameter_gradient,
                              void* stream) {
  using namespace polytrope;
  char* const bytes = static_cast<char*>(workspace);
  return dispatch(*problem, {gradient, x, parameters, result, reinterpret_cast<float*>(bytes),
                             reinterpret_cast<double*>(bytes + function_bytes(*problem)), parameter_gradient,
                             static_cast<cudaStream_t>(stream)});
}

}  // extern "C"
