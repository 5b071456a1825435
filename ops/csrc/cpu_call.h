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

// A kernel's parameters are float64 [groups, count]. They come in parts, each [groups, a size of its own] of a data type of
// its own; side by side and times the factors (null: all 1) they are those of the kernel.
struct Parts {
  int32_t count, types[4];
  int64_t sizes[4];
  const double* factors;

  int64_t width() const {
    int64_t sum = 0;
    for (int part = 0; part < count; ++part) sum += sizes[part];
    return sum;
  }

  // Null where memory is lacking.
  std::unique_ptr<double[]> pack(int64_t groups, const void* const* parts) const {
    std::unique_ptr<double[]> packed(new (std::nothrow) double[size_t(groups * width()) + 1]);
    double* at = packed.get();
    for (int64_t group = 0; at && group < groups; ++group) {
      for (int part = 0; part < count; at += sizes[part++])
        read_elements<double>(types[part], parts[part], group * sizes[part], 1, at, int(sizes[part]));
      scale(at - width());
    }
    return packed;
  }

  // The other way round, for gradients.
  void unpack(int64_t groups, double* packed, void* const* parts) const {
    for (int64_t group = 0; group < groups; ++group) {
      scale(packed);
      for (int part = 0; part < count; packed += sizes[part++])
        write_elements<double>(types[part], parts[part], group * sizes[part], 1, packed, int(sizes[part]));
    }
  }

 private:
  void scale(double* row) const {
    for (int64_t k = 0; factors && k < width(); ++k) row[k] *= factors[k];
  }
};

struct Call {
  Problem problem;
  Parts parts;
  int64_t cache_size;              // bytes
  ParallelRegion parallel_region;  // GOMP_parallel or null
};

}  // namespace
}  // namespace polytrope
