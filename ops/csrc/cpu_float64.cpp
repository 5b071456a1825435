// The C interface for tensors of float64. 0: done; 1: no such kernel; 2: out of memory.
#include "cpu_elementwise.h"

extern "C" {

// `parts`: addresses of the parts of the parameters; `part_gradients` likewise, or null where nobody wants them.
int polytrope_forward_float64(const polytrope::Call* call, const void* x, const void* const* parts, void* y, int threads) {
  return polytrope::forward<double>(*call, x, parts, y, threads);
}

int polytrope_backward_float64(const polytrope::Call* call, const void* gradient, const void* x, const void* const* parts,
                               void* x_gradient, void* const* part_gradients, int threads) {
  return polytrope::backward<double>(*call, gradient, x, parts, x_gradient, part_gradients, threads);
}

}  // extern "C"
