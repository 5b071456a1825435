// The C interface for tensors of float64. 0: done; 1: no such kernel; 2: out of memory.
#include "cpu_elementwise.h"

extern "C" {

// `parallel_region` is GOMP_parallel or null.
int polytrope_forward_float64(const polytrope::Problem* problem, const void* x, const double* parameters, void* y,
                              int threads, void* parallel_region) {
  const auto region = reinterpret_cast<polytrope::ParallelRegion>(parallel_region);
  return polytrope::forward<double>(*problem, x, parameters, y, threads, region);
}

int polytrope_backward_float64(const polytrope::Problem* problem, const void* gradient, const void* x,
                               const double* parameters, void* x_gradient, double* parameter_gradient, int threads,
                               void* parallel_region) {
  const auto region = reinterpret_cast<polytrope::ParallelRegion>(parallel_region);
  return polytrope::backward<double>(*problem, gradient, x, parameters, x_gradient, parameter_gradient, threads, region);
}

}  // extern "C"
