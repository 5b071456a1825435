// The elementwise families where each channel, or few neighbouring ones, has a function of its own: x is [outer, channels].
//
// A thread owns up to 8 neighbouring channels, their tables and sums in registers, and goes down their rows, of which the
// next are on their way while it computes. The threads of a block lie side by side over up to 32 such owners, and the rest of
// them under each other. Sums are added up within the block and then, by a second launch, over the blocks of a channel and
// the channels of a group: in a fixed order, without atomics.
#pragma once
#include "cuda_function.cuh"

namespace polytrope {

constexpr int most_across = 32;  // owners side by side in a block
constexpr int few_channels = 32;  // in a group, from which on each group is a sequence for itself

// The tables of a spline leave no room for those of other channels.
template <class Family>
constexpr bool never_by_column = std::is_same_v<Family, RationalSpline>;

inline bool is_by_column(const Problem& p) {
  return p.groups > 1 && p.inner < few_channels && p.family != family_rational_spline;
}

// How many channels a thread owns: what it keeps of them must leave registers for 8 elements and the next 8. 1: only in
// kernels where degree, tails and gates are read at run time.
template <class Family, int D, int E>
constexpr int owned_channels(bool tails) {
  if (D == 0 || has_far<Family>) return 1;
  const int kept = Family::sums(D, E) + (tails || never_has_tails<Family> ? 2 : 0);  // maxima need two more besides
  return kept <= 4 ? 8 : kept <= 9 ? 4 : kept <= 11 ? 2 : 1;
}

// How the threads lie over the tensor.
struct Columns {
  int64_t channels;
  int across, down;  // owners side by side in a block, and under each other
  int64_t strips, parts;  // blocks side by side, and under each other
};

template <int own>
Columns columns_for(const Problem& p, int64_t resident) {
  Columns c;
  c.channels = p.groups * p.inner;
  const int64_t owners = c.channels / own, rows = width / own;
  c.strips = (owners + most_across - 1) / most_across;
  c.across = int((owners + c.strips - 1) / c.strips);
  c.down = threads / c.across;
  const int64_t most = (p.outer + c.down * rows - 1) / (c.down * rows), wanted = resident / c.strips;
  c.parts = wanted < 1 ? 1 : wanted < most ? wanted : most;
  if (c.parts > 65535) c.parts = 65535;
  return c;
}

// Room for the sums of any kernel's blocks: strips are never wider than here, and parts never more.
inline int64_t columns_partial_bytes(const Problem& p, int64_t sums) {
  const int64_t channels = p.groups * p.inner, strips = (channels + most_across * width - 1) / (most_across * width);
  const int64_t wanted = most_blocks() / strips;
  const int64_t parts = wanted < 1 ? 1 : wanted < p.outer ? wanted : p.outer;
  return parts * channels * sums * int64_t(sizeof(float));
}

// The functions of a block's channels, in shared memory.
template <class Family, int D, int E, int own>
struct ChannelFunctions {
  static constexpr int channels = most_across * own;
  // Where the degree is known, threads copy their tables into registers; else they read them where they are, and an odd
  // distance keeps the channels of a warp in different banks.
  static constexpr int entries = D ? Family::table(D, E) : Family::largest_table | 1;
  alignas(16) float table[entries * channels];
  float slopes[2 * channels];  // at the low and at the high end

  // Of `count` channels. All threads of a block call it together.
  __device__ __forceinline__ void load(const Problem& p, const Parameters& parameters, int64_t first, int count, int n, int m,
                                       bool tails) {
    constexpr int most_raw = D ? Family::parameters(D, E) : most_parameters;
    for (int channel = threadIdx.x; channel < count; channel += threads) {
      double raw[most_raw];
      load_parameters<Family>(parameters, (first + channel) / p.inner, raw, n, m, {});
      if constexpr (D > 0) {
        float own_table[entries];
        prepare_table<Family>(p, raw, own_table, n, m, {});
#pragma unroll
        for (int k = 0; k < entries; ++k) table[k * channels + channel] = own_table[k];
      } else {
        prepare_table<Family>(p, raw, table + channel * entries, n, m, {});
      }
      if (!tails) continue;
      double wide[entries];
      prepare_table<Family>(p, raw, wide, n, m, {});
      for (int end = 0; end < 2; ++end) slopes[2 * channel + end] = end_slope<Family>(p, wide, end == 1, n, m);
    }
    __syncthreads();
  }
};

// A thread's own functions.
template <class Family, int D, int E, int own>
struct OwnedFunctions {
  using Shared = ChannelFunctions<Family, D, E, own>;
  static constexpr int entries = D ? Shared::entries : 1;
  float copy[own * entries], slopes[2 * own];
  const float* in_place;

  __device__ __forceinline__ OwnedFunctions(const Shared& shared, int lane) : in_place(shared.table + lane * Shared::entries) {
#pragma unroll
    for (int k = 0; k < 2 * own; ++k) slopes[k] = shared.slopes[2 * own * lane + k];
    if constexpr (D > 0) {
#pragma unroll
      for (int k = 0; k < entries; ++k) {
#pragma unroll
        for (int j = 0; j < own; ++j) copy[j * entries + k] = shared.table[k * Shared::channels + lane * own + j];
      }
    }
  }
  __device__ __forceinline__ const float* table() const { return D ? copy : in_place; }
};

// A thread's place: its channels, and the rows that it takes at the same time, `apart` from each other.
template <int own>
struct Place {
  static constexpr int rows = width / own;
  int lane, walker;
  int64_t channel, row, step, end;  // the first channel and row, to the first row of the next time, the end of all rows
  int apart;

  __device__ __forceinline__ Place(const Columns& c, const Problem& p)
      : lane(int(threadIdx.x) % c.across), walker(int(threadIdx.x) / c.across),
        channel((int64_t(blockIdx.x) * c.across + lane) * own), row(int64_t(blockIdx.y) * c.down * rows + walker),
        step(int64_t(gridDim.y) * c.down * rows), end(walker < c.down && channel < c.channels ? p.outer : 0), apart(c.down) {}

  // Of all rows that there are; of the others, 0. `row` is not beyond the last.
  __device__ __forceinline__ Packet fetch(const void* base, int type, int64_t row, int64_t length) const {
    Packet packet;
    fetch_few<own>(base, type, row * length + channel, packet.words);
#pragma unroll
    for (int r = 1; r < rows; ++r) {
#pragma unroll
      for (int k = 0; k < own; ++k) packet.words[r * own + k] = 0;
      if (row + r * apart < end) fetch_few<own>(base, type, (row + r * apart) * length + channel, packet.words + r * own);
    }
    return packet;
  }
  __device__ __forceinline__ static void unpack(const Packet& packet, int type, float* values) {
#pragma unroll
    for (int r = 0; r < rows; ++r) unpack_few<own>(packet.words + r * own, type, values + r * own);
  }
  __device__ __forceinline__ void write(void* base, int type, int64_t row, int64_t length, const float* values) const {
#pragma unroll
    for (int r = 0; r < rows; ++r)
      if (row + r * apart < end) write_few<own>(base, type, (row + r * apart) * length + channel, values + r * own);
  }
};

// Channels of this block.
template <int own>
__device__ __forceinline__ int block_channels(const Columns& c) {
  const int64_t left = c.channels - int64_t(blockIdx.x) * c.across * own;
  return int(left < c.across * own ? left : c.across * own);
}

// Elements far from 0, where there are any among these, one by one; with gradients if there are sums.
template <class F>
__device__ __noinline__ void compute_far_channel(const F& f, const float* xs, const float* gs, float* results, float* sums) {
  for (int k = 0; k < width; ++k) {
    float c;
    f.template enter<1>(xs + k, &c);
    if (!f.template any_far<1>(&c)) continue;
    const FarRational far = far_rational(c, f.table, f.n, f.m);
    const float beyond = f.tails ? xs[k] - f.limited(xs[k]) : 0.0f;
    const bool outside = absolute(beyond) > 0;
    const float end = outside ? f.slope_of(0, beyond) : 0.0f;
    if (!sums) {
      results[k] = float(far.value) + (outside ? end * beyond : 0.0f);
      continue;
    }
    results[k] = gs[k] * (outside ? end : float(far.slope));
    for (int j = 0; j <= f.n + f.m; ++j) sums[j] += float(gs[k] * far.sums[j]);
  }
}

template <class Family, int D, int E, int own, bool with_tails>
__global__ void __launch_bounds__(threads, 3)
    forward_columns(Problem p, Columns c, const void* x, Parameters parameters, void* y) {
  __shared__ ChannelFunctions<Family, D, E, own> functions;
  const bool gated = D == 0 && p.gated, tails = D ? with_tails : p.tails && !never_has_tails<Family>;
  const int n = D ? D : p.degree, m = D ? E : p.second_degree, type = p.data_type;
  const int64_t length = gated ? 2 * c.channels : c.channels;
  const Place<own> at(c, p);
  int64_t row = at.row;
  Packet next;
  if (row < at.end) next = at.fetch(x, type, row, length);
  functions.load(p, parameters, int64_t(blockIdx.x) * c.across * own, block_channels<own>(c), n, m, tails);
  const OwnedFunctions<Family, D, E, own> owned(functions, at.lane);
  const Evaluation<Family, own, owned.entries> f(owned.table(), owned.slopes, p, n, m, tails);
  while (row < at.end) {
    const int64_t now = row;
    float xs[width], ys[width];
    at.unpack(next, type, xs);
    row += at.step;
    if (row < at.end) next = at.fetch(x, type, row, length);
    bool far = false;
    f.template values<width>(xs, ys, far);
    if constexpr (has_far<Family>)
      if (far) compute_far_channel(f, xs, nullptr, ys, nullptr);
    if (gated) {
      Place<own> gate = at;
      gate.channel += c.channels;
      float gates[width];
      gate.unpack(gate.fetch(x, type, now, length), type, gates);
#pragma unroll
      for (int k = 0; k < width; ++k) ys[k] *= gates[k];
    }
    at.write(y, type, now, c.channels, ys);
  }
}

// Adds up `value` of the threads under each other; `buffer` has room for a number of each channel of each thread, and is not
// read any more after the barrier of the call after the next. All threads of a block call it together.
template <int own>
__device__ __forceinline__ void add_up_walkers(const Columns& c, const Place<own>& at, const float* values, float* buffer,
                                               float* partial) {
  const int across = c.across * own;
  if (at.walker < c.down) {
#pragma unroll
    for (int j = 0; j < own; ++j) buffer[at.walker * across + at.lane * own + j] = values[j];
  }
  __syncthreads();
  for (int channel = threadIdx.x; channel < block_channels<own>(c); channel += threads) {
    double total = 0;
    for (int walker = 0; walker < c.down; ++walker) total += buffer[walker * across + channel];
    partial[channel] = float(total);
  }
}

// Gives partial[part][sum, then those of the tails][channel], unless that is null.
template <class Family, int D, int E, int own, bool with_tails>
__global__ void __launch_bounds__(threads, 2)
    backward_columns(Problem p, Columns c, const void* g, const void* x, Parameters parameters, void* dx, float* partial) {
  __shared__ ChannelFunctions<Family, D, E, own> functions;
  __shared__ float buffers[2][threads * own];
  constexpr int most = D ? Family::sums(D, E) : Family::largest_sums;
  const bool gated = D == 0 && p.gated, tails = D ? with_tails : p.tails && !never_has_tails<Family>;
  const int n = D ? D : p.degree, m = D ? E : p.second_degree, type = p.data_type;
  const int64_t length = gated ? 2 * c.channels : c.channels, first = int64_t(blockIdx.x) * c.across * own;
  const Place<own> at(c, p);
  int64_t row = at.row;
  Packet next_x, next_g;
  if (row < at.end) {
    next_x = at.fetch(x, type, row, length);
    next_g = at.fetch(g, type, row, c.channels);
  }
  functions.load(p, parameters, first, block_channels<own>(c), n, m, tails);
  const OwnedFunctions<Family, D, E, own> owned(functions, at.lane);
  const Evaluation<Family, own, owned.entries, most> f(owned.table(), owned.slopes, p, n, m, tails);
  float sums[own * most] = {}, tail[own * tail_sums] = {};
  while (row < at.end) {
    const int64_t now = row;
    float xs[width], gs[width], results[width];
    at.unpack(next_x, type, xs);
    at.unpack(next_g, type, gs);
    row += at.step;
    if (row < at.end) {
      next_x = at.fetch(x, type, row, length);
      next_g = at.fetch(g, type, row, c.channels);
    }
    bool far = false;
    if (gated) {
      Place<own> gate = at;
      gate.channel += c.channels;
      float gates[width];
      gate.unpack(gate.fetch(x, type, now, length), type, gates);
      f.template values<width>(xs, results, far);
      if constexpr (has_far<Family>)
        if (far) compute_far_channel(f, xs, nullptr, results, nullptr);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        results[k] *= gs[k];
        gs[k] *= gates[k];
      }
      gate.write(dx, type, now, length, results);
    }
    f.template gradients<width>(xs, gs, results, sums, tail, far);
    if constexpr (has_far<Family>)
      if (far) compute_far_channel(f, xs, gs, results, sums);
    at.write(dx, type, now, length, results);
  }
  if (!partial) return;
#pragma unroll
  for (int j = 0; j < own; ++j) settle<Family>(sums + j * most, n);
  const int count = Family::sums(n, m);
  partial += int64_t(blockIdx.y) * (count + tail_sums) * c.channels + first;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    float values[own];
#pragma unroll
    for (int j = 0; j < own; ++j) values[j] = sums[j * most + k];
    add_up_walkers<own>(c, at, values, buffers[k % 2], partial + k * c.channels);
  }
  if (!tails) return;
#pragma unroll
  for (int end = 0; end < tail_sums; ++end) {
    float values[own];
#pragma unroll
    for (int j = 0; j < own; ++j) values[j] = tail[j * tail_sums + end];
    add_up_walkers<own>(c, at, values, buffers[(count + end) % 2], partial + (count + end) * c.channels);
  }
}

// Adds up the parts and the channels of each group: a block for as many whole groups as a warp has lanes for channels. Each
// sum of a channel is added up by `shares` warps, so that few of what they wait for wait for each other.
template <class Family>
__global__ void __launch_bounds__(finish_threads)
    finish_columns(Problem p, Parameters parameters, const float* partial, int64_t parts, Parameters gradients) {
  constexpr int shares = Family::largest_sums <= 2 * max_degree + 2 ? 4 : 1;
  __shared__ double totals[(Family::largest_sums + tail_sums) * shares][32];
  const int n = p.degree, m = p.second_degree, count = Family::sums(n, m), all = count + tail_sums, inner = int(p.inner);
  const int groups = 32 / inner, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first = int64_t(blockIdx.x) * groups, channels = p.groups * inner, channel = first * inner + lane;
  if (lane < groups * inner && channel < channels)
    for (int unit = warp; unit < (p.tails ? all : count) * shares; unit += finish_threads / 32) {
      double total = 0;
#pragma unroll 4
      for (int64_t part = unit % shares; part < parts; part += shares)
        total += partial[(part * all + unit / shares) * channels + channel];
      totals[unit][lane] = total;
    }
  __syncthreads();
  const int64_t group = first + threadIdx.x;
  if (threadIdx.x >= groups || group >= p.groups) return;
  double raw[most_parameters], gradient[most_parameters], total[Family::largest_sums + tail_sums];
  for (int k = 0; k < (p.tails ? all : count); ++k) {
    total[k] = 0;
    for (int share = 0; share < shares; ++share)
      for (int j = 0; j < inner; ++j) total[k] += totals[k * shares + share][int(threadIdx.x) * inner + j];
  }
  load_parameters<Family>(parameters, group, raw, n, m, {});
  if (p.tails) {
    double wide[Family::largest_table];
    prepare_table<Family>(p, raw, wide, n, m, {});
    for (int end = 0; end < tail_sums; ++end)
      add_tail_of_table<Family>(wide, end_of(p, end ? p.high : p.low), 0, total[count + end], total, n, m);
  }
  Family::finish(total, raw, gradient, n, m);
  for (int k = 0; k < Family::parameters(n, m); ++k) gradients.set(group, k, gradient[k]);
}

// Family: what stands after; Inner: the same function from its table.
template <class Family, class Inner, int D, int E, int own, bool with_tails>
int launch_owners(const Problem& p, const Call& call) {
  if (!call.gradient) {
    const Columns c = columns_for<own>(p, resident_blocks(forward_columns<Inner, D, E, own, with_tails>));
    const dim3 grid(unsigned(c.strips), unsigned(c.parts));
    forward_columns<Inner, D, E, own, with_tails><<<grid, threads, 0, call.stream>>>(p, c, call.x, call.parameters, call.result);
  } else {
    const Columns c = columns_for<own>(p, resident_blocks(backward_columns<Inner, D, E, own, with_tails>));
    const dim3 grid(unsigned(c.strips), unsigned(c.parts));
    float* const partial = reinterpret_cast<float*>(call.partial);
    backward_columns<Inner, D, E, own, with_tails><<<grid, threads, 0, call.stream>>>(p, c, call.gradient, call.x, call.parameters,
                                                                               call.result, partial);
    const int64_t each = 32 / p.inner;
    const unsigned blocks = unsigned((p.groups + each - 1) / each);
    if (partial)
      finish_columns<Family><<<blocks, finish_threads, 0, call.stream>>>(p, call.parameters, partial, c.parts,
                                                                     call.parameter_gradients);
  }
  return cudaGetLastError() == cudaSuccess ? 0 : 3;
}

template <class Family, class Inner, int D, int E>
int launch_columns(const Problem& p, const Call& call) {
  const int64_t channels = p.groups * p.inner;
  if constexpr (owned_channels<Inner, D, E>(false) > 1) {
    constexpr int own = owned_channels<Inner, D, E>(false);
    if (!p.tails && !p.gated && channels % own == 0) return launch_owners<Family, Inner, D, E, own, false>(p, call);
  }
  if constexpr (owned_channels<Inner, D, E>(true) > 1 && !never_has_tails<Inner>) {
    constexpr int own = owned_channels<Inner, D, E>(true);
    if (p.tails && !p.gated && channels % own == 0) return launch_owners<Family, Inner, D, E, own, true>(p, call);
  }
  return launch_owners<Family, Inner, 0, 0, 1, false>(p, call);
}

}  // namespace polytrope
