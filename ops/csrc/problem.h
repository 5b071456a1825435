// What one call computes: filled by Python (ops/native.py holds the same structure), read by the CPU and CUDA kernels.
#pragma once
#include <cstdint>

namespace polytrope {

enum DataType { type_float32 = 0, type_float64 = 1, type_bfloat16 = 2, type_float16 = 3 };

// x is [outer, groups, inner], contiguous, or with `gated` [outer, 2, groups, inner], where F(x[:, 0]) x[:, 1] is meant.
// With `tails`, outside [low, high] F goes on along its tangents. Of PolyNorm the rows are [outer, inner].
struct Problem {
  int32_t family, degree, second_degree, data_type, tails, gated;
  int64_t outer, groups, inner;
  double low, high, epsilon;
};

}  // namespace polytrope
