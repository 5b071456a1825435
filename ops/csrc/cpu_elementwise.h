// The elementwise families on the CPU, for cpu_float32.cpp and cpu_float64.cpp: whole tensors in blocks that fit the
// first-level cache, converted to float and back where need be. Sums over elements are added in an order that depends on
// the shape only, never on the number of threads, so gradients are bitwise reproducible.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <type_traits>

#include "cpu_call.h"
#include "cpu_channels.h"
#include "cpu_elements.h"
#include "cpu_kernels.h"
#include "cpu_threads.h"
#include "problem.h"

namespace polytrope {
namespace {

struct Tasks {
  int64_t sequence, chunks, batch;  // elements of one group, tasks per group, tasks taken at once
  explicit Tasks(const Problem& problem)
      : sequence(problem.outer * problem.inner), chunks((sequence + chunk - 1) / chunk),
        batch(problem.groups == 1 ? 1 : std::max<int64_t>(1, std::min<int64_t>(64, chunk / std::max<int64_t>(1, sequence)))) {}
};

// ---- groups of many channels, each group for itself ----

// Elements first … first + count of a group's sequence, which is [outer, inner] out of [outer, groups, inner].
struct Layout {
  int64_t inner, row;  // row: elements from one outer index to the next

  template <class Visit>  // visit(position in the block, memory index, memory stride, count)
  void runs(int64_t start, int64_t first, int count, Visit visit) const {
    if (inner == 1) {
      visit(0, start + first * row, row, count);
      return;
    }
    int64_t outer_index = first / inner, inner_index = first % inner;
    for (int done = 0; done < count;) {
      const int run = int(std::min<int64_t>(inner - inner_index, count - done));
      visit(done, start + outer_index * row + inner_index, int64_t(1), run);
      done += run;
      inner_index = 0;
      ++outer_index;
    }
  }

  bool contiguous(int64_t first, int count) const { return inner > 1 && first % inner + count <= inner; }
  int64_t index(int64_t start, int64_t first) const { return start + first / inner * row + first % inner; }
};

template <class S>
void read_block(const Layout& layout, int type, const void* base, int64_t start, int64_t first, int count, S* target) {
  layout.runs(start, first, count, [&](int position, int64_t index, int64_t stride, int run) {
    read_elements(type, base, index, stride, target + position, run);
  });
}

template <class S>
void write_block(const Layout& layout, int type, void* base, int64_t start, int64_t first, int count, const S* source) {
  layout.runs(start, first, count, [&](int position, int64_t index, int64_t stride, int run) {
    write_elements(type, base, index, stride, source + position, run);
  });
}

// Whether the kernels take elements as they lie in memory: what they compute with, or bfloat16 that they convert.
template <class S>
bool is_direct(const Problem& problem) {
  if (problem.gated) return false;
  if constexpr (std::is_same_v<S, float>)
    return problem.data_type == type_float32 || (problem.data_type == type_bfloat16 && !problem.tails);
  else return problem.data_type == type_float64;
}

// The address of an element.
template <class S>
const void* address(const void* base, int64_t index, bool narrow) {
  return static_cast<const char*>(base) + index * int64_t(narrow ? sizeof(uint16_t) : sizeof(S));
}
template <class S>
void* address(void* base, int64_t index, bool narrow) {
  return static_cast<char*>(base) + index * int64_t(narrow ? sizeof(uint16_t) : sizeof(S));
}

// Of kernels that read and write `tensors` tensors.
inline Access find_access(const Call& call, int tensors) {
  const Problem& problem = call.problem;
  const int64_t bytes = problem.outer * problem.groups * problem.inner * element_size(problem.data_type);
  return {problem.data_type == type_bfloat16, tensors * bytes > call.cache_size};
}

template <class S>
void forward_groups(const Call& call, const Kernel<S>& kernel, const double* parameters, const void* x, void* y,
                    int threads) {
  const Problem& problem = call.problem;
  const Tasks tasks(problem);
  const int64_t half = problem.groups * problem.inner;
  const Layout in{problem.inner, problem.gated ? 2 * half : half}, out{problem.inner, half};
  const int type = problem.data_type;
  const Access access = find_access(call, 2);
  const bool direct = is_direct<S>(problem), narrow = access.narrow;
  const Pass<S> first_pass(problem, kernel, parameters);  // of the first group, often the only one
  run_tasks(tasks.chunks * problem.groups, tasks.batch, threads, call.parallel_region, [&](int64_t task) {
    const int64_t group = task % problem.groups, first = task / problem.groups * chunk;
    const int64_t last = std::min(first + chunk, tasks.sequence), start = group * problem.inner;
    alignas(64) S xs[block], ys[block], gates[block];
    std::optional<Pass<S>> own;
    const Pass<S>& pass = group == 0 ? first_pass : own.emplace(problem, kernel, parameters + group * kernel.parameters);
    for (int64_t at = first; at < last; at += block) {
      const int count = int(std::min<int64_t>(block, last - at)), width = padded(count, lanes<S>);
      if (direct && count % (narrow ? 2 * lanes<S> : lanes<S>) == 0 && in.contiguous(at, count)) {
        pass.value(address<S>(x, in.index(start, at), narrow), address<S>(y, out.index(start, at), narrow), count, access);
        continue;
      }
      read_block(in, type, x, start, at, count, xs);
      std::fill(xs + count, xs + width, S(0));
      pass.value(xs, ys, width);
      if (problem.gated) {
        read_block(in, type, x, start + half, at, count, gates);
        for (int i = 0; i < count; ++i) ys[i] *= gates[i];
      }
      write_block(out, type, y, start, at, count, ys);
    }
    if (access.past_cache) finish_stores();
  });
}

// Gives partial[chunk, group, sum], unless that is null.
template <class S>
void backward_groups(const Call& call, const Kernel<S>& kernel, const double* parameters, int sums, const void* g,
                     const void* x, void* dx, double* partial, int threads) {
  const Problem& problem = call.problem;
  const Tasks tasks(problem);
  const int type = problem.data_type;
  const int64_t half = problem.groups * problem.inner;
  const Layout in{problem.inner, problem.gated ? 2 * half : half}, out{problem.inner, half};
  const Access access = find_access(call, 3);
  const bool direct = is_direct<S>(problem), narrow = access.narrow;
  const Pass<S> first_pass(problem, kernel, parameters);  // of the first group, often the only one
  run_tasks(tasks.chunks * problem.groups, tasks.batch, threads, call.parallel_region, [&](int64_t task) {
    const int64_t group = task % problem.groups, first = task / problem.groups * chunk;
    const int64_t last = std::min(first + chunk, tasks.sequence), start = group * problem.inner;
    alignas(64) S xs[block], gs[block], dxs[block], gates[block], values[block];
    alignas(64) double total[(largest_sums + tail_sums) * lanes<S>];
    double* const wanted = partial ? total : nullptr;
    if (wanted) std::fill(total, total + sums * lanes<S>, 0.0);
    std::optional<Pass<S>> own;
    const Pass<S>& pass = group == 0 ? first_pass : own.emplace(problem, kernel, parameters + group * kernel.parameters);
    for (int64_t at = first; at < last; at += block) {
      const int count = int(std::min<int64_t>(block, last - at)), width = padded(count, lanes<S>);
      if (direct && count % (narrow ? 2 * lanes<S> : lanes<S>) == 0 && in.contiguous(at, count)) {
        const int64_t index = in.index(start, at);
        pass.gradient(address<S>(x, index, narrow), address<S>(g, index, narrow), address<S>(dx, index, narrow), count,
                      wanted, access);
        continue;
      }
      read_block(in, type, x, start, at, count, xs);
      read_block(out, type, g, start, at, count, gs);
      std::fill(xs + count, xs + width, S(0));
      std::fill(gs + count, gs + width, S(0));
      if (problem.gated) {
        read_block(in, type, x, start + half, at, count, gates);
        pass.value(xs, values, width);
        for (int i = 0; i < count; ++i) {
          values[i] *= gs[i];
          gs[i] *= gates[i];
        }
        write_block(in, type, dx, start + half, at, count, values);
      }
      pass.gradient(xs, gs, dxs, width, wanted);
      write_block(in, type, dx, start, at, count, dxs);
    }
    if (access.past_cache) finish_stores();
    for (int k = 0; wanted && k < sums; ++k)
      partial[task * sums + k] = std::accumulate(total + k * lanes<S>, total + (k + 1) * lanes<S>, 0.0);
  });
}

// ---- calls ----

template <class S>
int forward(const Call& call, const void* x, const void* const* parts, void* y, int threads) {
  const Problem& problem = call.problem;
  const Kernel<S> kernel = find_kernel<S>(problem);
  if (!kernel.forward || kernel.parameters != width_of(call.parts)) return 1;
  const std::unique_ptr<double[]> parameters = pack(call.parts, problem.groups, parts);
  if (!parameters) return 2;
  if (is_by_channel(problem)) return forward_channels(call, kernel, parameters.get(), x, y, threads);
  forward_groups(call, kernel, parameters.get(), x, y, threads);
  return 0;
}

// `part_gradients` null: nobody wants them.
template <class S>
int backward(const Call& call, const void* g, const void* x, const void* const* parts, void* dx, void* const* part_gradients,
             int threads) {
  const Problem& problem = call.problem;
  const Kernel<S> kernel = find_kernel<S>(problem);
  if (!kernel.backward || kernel.parameters != width_of(call.parts)) return 1;
  const bool by_channel = is_by_channel(problem);
  // Of partial[piece, group, channel of the group, sum]; where groups are not computed by channel, all channels are one.
  const int64_t pieces = by_channel ? strip_parts(problem) : Tasks(problem).chunks;
  const int64_t channels = by_channel ? problem.inner : 1;
  const int sums = kernel.sums + (problem.tails ? tail_sums : 0);
  const std::unique_ptr<double[]> parameters = pack(call.parts, problem.groups, parts);
  if (!part_gradients) {
    if (!parameters) return 2;
    if (by_channel) return backward_channels(call, kernel, parameters.get(), sums, g, x, dx, nullptr, threads);
    backward_groups(call, kernel, parameters.get(), sums, g, x, dx, nullptr, threads);
    return 0;
  }
  const std::unique_ptr<double[]> gradient(new (std::nothrow) double[size_t(problem.groups * kernel.parameters) + 1]);
  const std::unique_ptr<double[]> partial(new (std::nothrow) double[size_t(pieces * problem.groups * channels * sums) + 1]);
  if (!parameters || !gradient || !partial) return 2;
  if (!by_channel) {
    backward_groups(call, kernel, parameters.get(), sums, g, x, dx, partial.get(), threads);
  } else if (backward_channels(call, kernel, parameters.get(), sums, g, x, dx, partial.get(), threads) != 0) {
    return 2;
  }
  for (int64_t group = 0; group < problem.groups; ++group) {
    double total[largest_sums + tail_sums] = {};
    for (int64_t piece = 0; piece < pieces; ++piece) {
      const double* part = partial.get() + (piece * problem.groups + group) * channels * sums;
      for (int64_t channel = 0; channel < channels; ++channel, part += sums)
        for (int k = 0; k < sums; ++k) total[k] += part[k];
    }
    const double* own = parameters.get() + group * kernel.parameters;
    if (problem.tails) {
      const double* tail = total + kernel.sums;
      const double values[tail_sums] = {tail[0], tail[1], tail[2], tail[3]};
      kernel.add_tail(own, end_of(problem, problem.low), values[0], values[1], total, problem.degree, problem.second_degree);
      kernel.add_tail(own, end_of(problem, problem.high), values[2], values[3], total, problem.degree, problem.second_degree);
    }
    kernel.finish(total, own, gradient.get() + group * kernel.parameters, problem.degree, problem.second_degree,
                  {});
  }
  unpack(call.parts, problem.groups, gradient.get(), part_gradients);
  return 0;
}

}  // namespace
}  // namespace polytrope
