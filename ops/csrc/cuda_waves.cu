// Fourier series on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

// As sine_cosine of a float by the GPU's own sine and cosine, whose absolute errors on [-π, π] are at most 2^-21.4 and
// 2^-21.2 (CUDA C++ Programming Guide): a small part of what bfloat16 and float16 round off. NaN where x w overflows.
struct CoarseWaves {
  template <class T>
  __device__ __forceinline__ static void evaluate(float x, T high, T low, T phase, float& sine, float& cosine) {
    // Adding 1.5 * 2^24 leaves even numbers only: whole turns, so the fraction is in [-1, 1] half turns.
    const float turns = ((x * high - phase) + 25165824.0f) - 25165824.0f;
    const float angle = 3.14159265f * (x * low + (fraction(x, high, turns) - phase));
    sine = __sinf(angle);
    cosine = __cosf(angle);
  }
  __device__ __forceinline__ static void evaluate(Dual x, double high, double low, double phase, Dual& sine, Dual& cosine) {
    sine_cosine(x, high, low, phase, sine, cosine);
  }
};

}  // namespace

int launch_waves(const Problem& p, const Call& c) {
  using CoarseHarmonic = HarmonicSeries<CoarseWaves>;
  using CoarseFourier = FourierSeries<CoarseWaves>;
  constexpr int first = first_degree(4, 6), last = 6;
  const bool exact = p.data_type == type_float32 || p.degree < first || p.degree > last;
  if (p.family == family_harmonic)
    return exact ? launch_degree<Harmonic, Harmonic, 6, 6>(p, c) : launch_degree<Harmonic, CoarseHarmonic, first, last, false>(p, c);
  return exact ? launch_degree<Fourier, Fourier, 6, 6>(p, c) : launch_degree<Fourier, CoarseFourier, first, last, false>(p, c);
}

}  // namespace polytrope
