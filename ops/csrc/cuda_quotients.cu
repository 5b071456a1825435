// Rational functions and splines, and PolyReLU, on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {

int launch_quotients(const Problem& p, const Call& c) {
  if (p.family == family_polyrelu) return launch_degree<PolyReLU, PolyReLU, 3, 4>(p, c);
  if (p.family == family_rational_spline) return launch<RationalSpline, RationalSpline, 0, 0>(p, c);
  if (p.degree == 5 && p.second_degree == 4) return launch<Rational, Rational, 5, 4>(p, c);
  return launch<Rational, Rational, 0, 0>(p, c);
}

}  // namespace polytrope
