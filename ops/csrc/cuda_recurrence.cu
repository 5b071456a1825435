// Chebyshev and Legendre series on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {

int launch_recurrence(const Problem& p, const Call& c) {
  if (p.family == family_legendre) return launch_degree<Legendre, Legendre, 2, 8>(p, c);
  return launch_degree<Chebyshev, Chebyshev, 2, 8>(p, c);
}

}  // namespace polytrope
