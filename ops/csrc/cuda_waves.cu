// Fourier series on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {

int launch_waves(const Problem& p, const Call& c) {
  if (p.family == family_harmonic) return launch_degree<Harmonic, Harmonic, 4, 6>(p, c);
  return launch_degree<Fourier, Fourier, 4, 6>(p, c);
}

}  // namespace polytrope
