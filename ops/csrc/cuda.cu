// The C interface of the CUDA kernels: no torch headers, so one library serves many versions of torch.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

int dispatch(const Problem& p, const Call& c) {
  if (p.data_type == type_float64) return 1;
  if (p.degree < 1 || p.degree > largest_degree(p.family)) return 1;
  if (p.second_degree < 0 || p.second_degree > max_degree) return 1;
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
    case family_rational_spline:
    case family_polyrelu: return launch_quotients(p, c);
    case family_polynorm: return launch_polynorm(p, c);
    default: return 1;
  }
}

// No family has more parameters.
static_assert(RationalSpline::parameters(max_pieces, 0) <= most_parameters);

Parameters with_pointers(const Parts& parts, const void* const* pointers) {
  Parameters parameters{parts, {}};
  for (int part = 0; pointers && part < parts.count; ++part) parameters.pointers[part] = const_cast<void*>(pointers[part]);
  return parameters;
}

}  // namespace
}  // namespace polytrope

extern "C" {

// Bytes that backward needs beside its tensors, for the sums of each block: only splines have more sums than parameters.
int64_t polytrope_cuda_workspace(const polytrope::Task* task) {
  using namespace polytrope;
  const Problem& p = task->problem;
  if (p.family == family_polynorm) return polynorm_partial_bytes(p);
  const int64_t own = p.family == family_rational_spline ? RationalSpline::sums(p.degree, 0) : width_of(task->parts);
  const int64_t sums = own + tail_sums;
  if (is_by_column(p)) return columns_partial_bytes(p, sums);
  return p.groups * columns_of(p, most_blocks()) * sums * 8;
}

// `gradient` null: forward, `result` is y, and there is neither workspace nor part gradients; else `result` is the gradient
// of x; without workspace and part gradients nobody wants these. x, gradient and result are device pointers at multiples of 16 bytes, those of the parts at any place.
// 0: enqueued on the stream; 1: no such kernel; 3: a launch failed.
int polytrope_cuda_activation(const polytrope::Task* task, const void* gradient, const void* x, const void* const* parts,
                              void* result, void* workspace, void* const* part_gradients, void* stream) {
  using namespace polytrope;
  return dispatch(task->problem, {gradient, x, with_pointers(task->parts, parts), result, static_cast<double*>(workspace),
                                  with_pointers(task->parts, part_gradients), static_cast<cudaStream_t>(stream)});
}

}  // extern "C"
