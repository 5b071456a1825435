// Maxima of lines on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {

int launch_lines(const Problem& p, const Call& c) {
  if (p.family == family_tropical) return launch_degree<Tropical, Tropical, 3, 8>(p, c);
  if (p.family == family_tropical_rational) return launch_degree<TropicalRational, TropicalRational, 5, 6>(p, c);
  return launch_degree<PiecewiseLinear, PiecewiseLinear, 8, 8>(p, c);
}

}  // namespace polytrope
