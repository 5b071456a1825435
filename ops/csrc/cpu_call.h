// What Python (ops/native.py holds the same structures) says once for all calls with tensors of the same shapes.
#pragma once
#include <cstdint>
#include <memory>
#include <new>

#include "cpu_elements.h"
#include "cpu_threads.h"
#include "problem.h"

namespace polytrope {
namespace {

inline void scale(const Parts& parts, double* row) {
  const int64_t width = parts.scaled ? width_of(parts) : 0;
  for (int64_t k = 0; k < width; ++k) row[k] *= parts.factors[k];
}

// Null where memory is lacking.
inline std::unique_ptr<double[]> pack(const Parts& parts, int64_t groups, const void* const* from) {
  const int64_t width = width_of(parts);
  std::unique_ptr<double[]> packed(new (std::nothrow) double[size_t(groups * width) + 1]);
  double* at = packed.get();
  for (int64_t group = 0; at && group < groups; ++group) {
    for (int part = 0; part < parts.count; at += parts.sizes[part++])
      read_elements<double>(parts.types[part], from[part], group * parts.sizes[part], 1, at, int(parts.sizes[part]));
    scale(parts, at - width);
  }
  return packed;
}

// The other way round, for gradients.
inline void unpack(const Parts& parts, int64_t groups, double* packed, void* const* to) {
  for (int64_t group = 0; group < groups; ++group) {
    scale(parts, packed);
    for (int part = 0; part < parts.count; packed += parts.sizes[part++])
      write_elements<double>(parts.types[part], to[part], group * parts.sizes[part], 1, packed, int(parts.sizes[part]));
  }
}

struct Call : Task {
  int64_t cache_size;              // bytes
  ParallelRegion parallel_region;  // GOMP_parallel or null
};

}  // namespace
}  // namespace polytrope
