// Fourier series on the GPU.
#include "cuda_elementwise.cuh"

namespace polytrope {
namespace {

// The sine and cosine of x w - φ by the GPU's own, whose absolute errors on [-π, π] are at most 2^-21.4 and 2^-21.2 (CUDA C++
// Programming Guide), of an angle that is brought there with an error of |x w| 2^-23: up to |x w| = 2^11 less than half of
// what float16 rounds off, up to 2^14 of what bfloat16 does. NaN where x w overflows.
struct CoarseWaves {
  __device__ __forceinline__ static void set(double w, double phase, float& high, float& low, float& t) {
    high = float(w);
    low = 0;
    t = float(remainder(phase, 6.2831853071795865));
  }
  __device__ __forceinline__ static void set(double w, double phase, double& high, double& low, double& t) {
    ExactWaves::set(w, phase, high, low, t);
  }
  template <class T>
  __device__ __forceinline__ static void evaluate(float x, T high, T, T phase, float& sine, float& cosine) {
    float angle = x * high - phase;
    // Adding 1.5 * 2^23 leaves whole numbers only, of turns.
    const float turns = (angle * 0.15915494f + 12582912.0f) - 12582912.0f;
    angle -= turns * 6.2831853f;
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
