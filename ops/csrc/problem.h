// What one call computes: filled by Python (ops/native.py holds the same structures), read by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

namespace polytrope {

enum DataType { type_float32 = 0, type_float64 = 1, type_bfloat16 = 2, type_float16 = 3 };

// x is [outer, groups, inner], contiguous, or with `gated` [outer, 2, groups, inner], where F(x[:, 0]) x[:, 1] is meant.
// With `tails`, F is the family's function of (x - shift) inverse_scale, and outside [low, high], which may be infinite, goes
// on along its tangents. Of PolyNorm the rows are [outer, inner].
struct Problem {
  int32_t family, degree, second_degree, data_type, tails, gated;
  int64_t outer, groups, inner;
  double low, high, shift, inverse_scale, epsilon;
};

constexpr int most_parts = 4, most_factors = 64;

// A kernel's parameters are float64 [groups, count]. They come in parts, each [groups, a size of its own] of a data type of
// its own; side by side and, if `scaled`, times the factors they are those of the kernel.
struct Parts {
  int32_t count, types[most_parts];
  int64_t sizes[most_parts];
  int32_t scaled;
  double factors[most_factors];
};

// How many parameters a group has.
inline int64_t width_of(const Parts& parts) {
  int64_t sum = 0;
  for (int part = 0; part < parts.count; ++part) sum += parts.sizes[part];
  return sum;
}

struct Task {
  Problem problem;
  Parts parts;
};

}  // namespace polytrope
