// Sums of powers of x, which Hermite series are too on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {

int launch_polynomial(const Problem& p, const Call& c) {
  // Hermite differs from Polynomial in its table (prepare_table) and in what stands after its kernels.
  if (p.family == family_hermite) return launch_degree<Hermite, Polynomial, 1, 8>(p, c);
  return launch_degree<Polynomial, Polynomial, 1, 8>(p, c);
}

}  // namespace polytrope
