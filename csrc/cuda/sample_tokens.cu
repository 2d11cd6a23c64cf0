// One token per row of logits; what is computed stands in quietstar/sample_tokens.h.
//
// Many rows: a block per row, one launch. A warp takes a chunk of the row (1024 16-bit logits or
// 512 of fp32, four 16-byte loads per lane), finds its maximum, adds up its powers of two, and
// leaves maximum and sum in shared memory. Then the first warp takes one uniform number from
// Philox, picks a chunk by the running sum of the sums, and reads that chunk alone again to find
// the token. No noise per element, no sort, nothing per element in memory.
//
// Few rows: the first pass is a launch of its own with several blocks per row, which leaves the
// same maxima and sums in the workspace; the second launch finishes, a block per row.
//
// Two pairs of kernels: the fast ones (sample_tokens_fast.cuh) for 16-bit logits in the usual call,
// the others for the rest. What counts for the fast ones is that the memory always has something to
// do: 64 registers a thread hold the chunk that is worked on and the next one, which is under way
// meanwhile, in all of 32 warps to a multiprocessor. A block has 16 warps and as many rows as give
// each warp some eight chunks, four rows at most: while a row's token is drawn its warps load
// nothing, and a row that has to be added up again has the whole block for it, or its call would
// wait for one row. Few rows of up to 64 chunks take one launch, with a block of 32 warps per row.
//
// Bytes: vocab elements per row, once, and one chunk of 2 KB again.
//
// Operations per element, in issue slots (a multiprocessor has four warps' a cycle: at 4.2 TB/s and
// 1.8 GHz an H200 has 14 per 16-bit element and 29 per fp32 element):
// - fast: 1 conversion, 1/4 maximum, 2 multiply-adds, 1 exp2, 1 addition, 1/2 to move the next
//   chunk, and 2 for what a chunk costs, counted in the machine code for sm_90
//   (scripts/compile_check.py has the limits): 7 3/4;
// - exact: 1 maximum, 1 lower limit, 4 for the argument, 6 for the polynomial, 1 for the exponent,
//   2 for a sum in double, and 4 for the chunk: 19.
//
// Where the edges between tokens lie must not depend on how they were computed: with V tokens of
// equal size, errors that move an edge by x of the total change V x of the draws, so 1 in 100,000
// at 128,000 tokens leaves 10^-10 for x. Sums in fp32 do not have that, nor has the exp2 unit,
// whose relative error is 2^-22. So fp32 logits are added up exactly from the start, as csrc/cpu
// does. 16-bit logits are added up fast, and again exactly in the rows (about one in a hundred
// where all tokens are equally likely, else fewer) whose number falls too close to an edge: the
// token is that of the exact sums in either case (see find_fast()).
#include <algorithm>
#include <cmath>
#include <string>

#include "launch.cuh"
#include "quietstar/checks.h"
#include "sample_tokens_fast.cuh"
#include "sample_tokens_truncate.cuh"

namespace quietstar::cuda {
namespace {

using namespace sampling;

// Blocks per multiprocessor that there are registers for; each of their threads has 64 to 128 bytes
// of loads under way.
template <class T>
constexpr int kBlocks = sizeof(T) == 2 ? 4 : 3;
// The fast kernels have 64 registers a thread, 32 warps to a multiprocessor: two blocks, or the one
// of a row that is added up in one go.
constexpr int kFastThreads = 1024, kFastWarps = 16;
// Blocks per multiprocessor to plan the first of two launches for.
constexpr int kResident = 4;
// Up to so many chunks a row is not worth two launches to the fast kernels.
constexpr int kOneLaunch = 2 * kFastThreads / 32;

// Row n, after the banned ids have been brought to shared memory. Every thread of the block calls
// it.
template <class T>
__device__ __forceinline__ Row<T> begin_row(const Options& o, std::int64_t n, int* banned) {
  load_banned(o, banned);
  return row_of<T>(o, n, banned);
}

template <class T>
__global__ __launch_bounds__(kThreads,
                             kBlocks<T>) void scan_rows(const __grid_constant__ Options o) {
  QUIETSTAR_SHARED(int, banned, [kFewBanned]);
  const std::int64_t n = blockIdx.y;
  const Row<T> row = begin_row<T>(o, n, banned);
  const int first = static_cast<int>(blockIdx.x) * o.per_block;
  scan<T>(row, o, first, min(first + o.per_block, row.entries), o.sums + n * o.max_entries,
          o.maxima + n * o.max_entries);
}

// What the block of a row keeps in shared memory.
struct RowState {
  double sums[kMaxEntries];
  float maxima[kMaxEntries];
  int banned[kFewBanned];
  float scratch[kThreads / 32];
};

// From the maxima and sums of a row to its token.
template <class T>
QUIETSTAR_NOINLINE __device__ void finish(RowState& state, Bins& bins, const Options& o) {
  const std::int64_t n = blockIdx.x;
  Row<T> row = row_of<T>(o, n, state.banned);
  const int thread = static_cast<int>(threadIdx.x);
  double* const sums = state.sums;
  float* const maxima = state.maxima;
  float row_max = -kInf;
  for (int i = thread; i < row.entries; i += kThreads) row_max = max_nan(row_max, maxima[i]);
  row_max = block_reduce<kThreads>(row_max, state.scratch, LargestNan{});

  if (!(fabsf(row_max) < kInf)) {  // NaN, +inf, or nothing is left
    if (thread == 0) write_row(o, n, -1, kNaN);
    return;
  }
  if (o.greedy) {
    if (thread < 32) take_largest(row, o, n, maxima, row_max);
    return;
  }
  if (fabsf(row_max) * o.factor > kShiftedFrom) {
    row.origin = row_max;
    row_max = 0;
    rescan(row, o, kLowest, true, sums, maxima);
    __syncthreads();
  }
  weigh(o, row.entries, maxima, row_max, sums);
  float floor = kLowest;
  if (o.truncated) {
    floor = smallest_kept(bins, row, o, sums, maxima, row_max);
    __syncthreads();
    rescan(row, o, floor, false, sums, maxima);
    __syncthreads();
    weigh(o, row.entries, maxima, row_max, sums);
  }
  if (thread < 32) draw(row, o, n, sums, maxima, row_max, floor);
}

template <class T>
__global__ __launch_bounds__(kThreads,
                             kBlocks<T>) void sample_rows(const __grid_constant__ Options o) {
  QUIETSTAR_SHARED(RowState, state, [1]);
  QUIETSTAR_DYNAMIC_SHARED(memory);
  const std::int64_t n = blockIdx.x;
  const Row<T> row = begin_row<T>(o, n, state->banned);
  if (o.sums) {
    for (int i = static_cast<int>(threadIdx.x); i < row.entries; i += kThreads) {
      state->sums[i] = o.sums[n * o.max_entries + i];
      state->maxima[i] = o.maxima[n * o.max_entries + i];
    }
  } else {
    scan<T>(row, o, 0, row.entries, state->sums, state->maxima);
  }
  __syncthreads();
  finish<T>(*state, *reinterpret_cast<Bins*>(memory), o);
}

template <class T>
__global__ __launch_bounds__(kFastThreads) void scan_rows_fast(const __grid_constant__ Options o) {
  QUIETSTAR_SHARED(int, banned, [kFewBanned]);
  const std::int64_t n = blockIdx.y;
  const Row<T> row = begin_row<T>(o, n, banned);
  const int first = static_cast<int>(blockIdx.x) * o.per_block;
  const int warps = static_cast<int>(blockDim.x / 32), warp = static_cast<int>(threadIdx.x / 32);
  scan_chunks(row, o, first, min(first + o.per_block, row.chunks), warp, warps,
              o.fast_sums + n * o.max_entries, o.maxima + n * o.max_entries, [] {});
}

// Which row of the call a thread's warp works on, as one of which warps.
struct Share {
  int in_block, n, warp, warps;

  __device__ __forceinline__ Share(const Options& o, int thread)
      : in_block(thread / 32 >> o.row_shift), warps(1 << o.row_shift) {
    n = first_row(o) + in_block;
    warp = thread / 32 - (in_block << o.row_shift);
  }
  static __device__ __forceinline__ int block_rows(const Options& o) {
    return static_cast<int>(blockDim.x) / 32 >> o.row_shift;
  }
  static __device__ __forceinline__ int first_row(const Options& o) {
    return static_cast<int>(blockIdx.x) * block_rows(o);
  }
};

// A block has one row or several, each with 2^o.row_shift warps.
template <class T>
__global__ __launch_bounds__(kFastThreads) void sample_rows_fast(
    const __grid_constant__ Options o) {
  QUIETSTAR_SHARED(FastState, state, [1]);
  int thread = static_cast<int>(threadIdx.x);
  load_banned(o, state->banned);
  {
    const Share share(o, thread);
    FastState::OfRow& mine = state->rows[share.in_block];
    // While the first loads are under way, or the end would wait for the seed.
    const auto meanwhile = [&] {
      if (share.warp != 0 || lane_id() != 0) return;
      mine.uniform = philox_uniform(static_cast<std::uint64_t>(*o.seed),
                                    o.offset + static_cast<std::uint64_t>(share.n));
    };
    if (share.n >= o.rows) {
    } else if (o.fast_sums) {
      const std::int64_t at = static_cast<std::int64_t>(share.n) * o.max_entries;
      const Row<T> row = row_of<T>(o, share.n, state->banned);
      for (int i = thread; i < row.chunks; i += static_cast<int>(blockDim.x)) {
        mine.sums[i] = o.fast_sums[at + i];
        mine.maxima[i] = o.maxima[at + i];
      }
      meanwhile();
    } else {
      const Row<T> row = row_of<T>(o, share.n, state->banned);
      scan_chunks(row, o, 0, row.chunks, share.warp, share.warps, mine.sums, mine.maxima,
                  meanwhile);
    }
  }
  __syncthreads();
  keep(thread);  // all of it is computed anew: registers are short
  const Share share(o, thread);
  if (share.warp == 0 && share.n < o.rows) {
    draw_fast(row_of<T>(o, share.n, state->banned), o, share.n, state->rows[share.in_block]);
  }
  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < Share::block_rows(o); ++i) {
    const int n = Share::first_row(o) + i;
    if (n < o.rows && state->rows[i].verdict != kDecided) draw_exactly<T>(*state, i, o, n);
  }
}

__global__ void clear_bits(unsigned* bits, std::int64_t words) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < words) bits[i] = 0;
}

void check_on_device(const SampleTokens& call) {
  check(call);
  QUIETSTAR_ARGUMENT(call.rows >= 0 && call.rows < (std::int64_t{1} << 31),
                     "logits has " + std::to_string(call.rows) + " rows; expected 0 to 2^31 - 1");
  QUIETSTAR_ARGUMENT(call.softcap >= 0,
                     "softcap is " + std::to_string(call.softcap) + "; expected 0 or more");
}

// How a call is cut up.
struct Plan {
  int per_entry, max_entries;
  int parts;           // blocks per row in the first of two launches; 1: there is only one launch
  int per_block;       // entries of such a block
  int fast_warps;      // of a fast block
  int row_shift;       // 2^row_shift of them work on one row
  bool fast_at_once;   // fast kernels take one launch all the same
  std::int64_t words;  // of the bitmap of banned ids; 0: none
};

Plan plan(DType dtype, std::int64_t rows, std::int64_t vocab, std::int64_t banned_count,
          const Device& device) {
  const int pack = 16 / bytes_of(dtype);
  const std::int64_t chunks = ceil_div(vocab + pack - 1, 32 * kPacks * pack);
  Plan plan{};
  plan.per_entry = static_cast<int>(ceil_div(chunks, kMaxEntries));
  plan.max_entries = static_cast<int>(ceil_div(chunks, plan.per_entry));
  plan.words = banned_count > kFewBanned ? ceil_div(vocab, 32) : 0;
  plan.parts = 1;
  const std::int64_t multiprocessors = cuda::multiprocessors(device);
  // Eight chunks to a warp, or fewer where the rows are resident all at once even so. The smaller a
  // row's share of its block, the fewer warps wait while one draws.
  const std::int64_t fair = rows <= 2 * multiprocessors ? 16 : rows <= 4 * multiprocessors ? 8 : 4;
  plan.fast_warps = kFastWarps;
  int row_warps = kFastWarps / kMaxBlockRows;
  while (row_warps < kFastWarps && (row_warps < fair || row_warps * 8 < plan.max_entries)) {
    row_warps *= 2;
  }
  if (rows > 0 && rows < multiprocessors) {
    // Blocks of eight warps, all resident at once, and as many chunks for each warp.
    const std::int64_t warps = kThreads / 32 * kResident * multiprocessors;
    const std::int64_t per_block = kThreads / 32 * ceil_div(rows * plan.max_entries, warps);
    plan.per_block = static_cast<int>(std::min<std::int64_t>(per_block, plan.max_entries));
    plan.parts = static_cast<int>(ceil_div(plan.max_entries, plan.per_block));
    plan.fast_at_once = plan.max_entries <= kOneLaunch;
    if (plan.fast_at_once && plan.max_entries > kFastWarps) plan.fast_warps = kFastThreads / 32;
    row_warps = plan.fast_warps;
  }
  while (1 << plan.row_shift < row_warps) ++plan.row_shift;
  return plan;
}

// Where the arrays of the workspace begin, in bytes.
struct Offsets {
  std::int64_t maxima, bits, end;
};
Offsets offsets(const Plan& plan, std::int64_t rows) {
  const std::int64_t entries = plan.parts > 1 ? rows * plan.max_entries : 0;
  Offsets at{};
  at.maxima = entries * static_cast<std::int64_t>(sizeof(double));
  at.bits = at.maxima + entries * static_cast<std::int64_t>(sizeof(float));
  at.end = at.bits + plan.words * static_cast<std::int64_t>(sizeof(unsigned));
  return at;
}

Options options_of(const SampleTokens& call, const Plan& plan) {
  Options o{};
  o.logits = call.logits;
  o.vocab = call.vocab;
  o.row_stride = call.row_stride;
  const double temperature = call.temperature == 0 ? 1 : call.temperature;
  constexpr double kLog2E = 1.4426950408889634;
  o.factor = kLog2E / temperature;
  o.reach = kOctaves / o.factor;
  o.hi = static_cast<float>(o.factor);
  o.lo = static_cast<float>(o.factor - static_cast<double>(o.hi));
  o.below_hi = static_cast<double>(o.hi) < o.factor ? o.hi : std::nextafterf(o.hi, 0.0f);
  o.above_0 = static_cast<float>(o.factor - static_cast<double>(o.below_hi));
  o.gain = static_cast<float>(call.softcap > 0 ? 2 * kLog2E * call.logit_scale / call.softcap
                                               : call.logit_scale);
  o.cap = static_cast<float>(call.softcap);
  o.transformed = call.softcap > 0 || call.logit_scale != 1;
  o.greedy = call.temperature == 0;
  o.top_k = call.top_k < call.vocab ? call.top_k : 0;
  o.top_p = call.top_p;
  o.min_p_shift = call.min_p > 0 ? temperature * std::log(call.min_p) : -HUGE_VAL;
  o.truncated = !o.greedy && (o.top_k > 0 || o.top_p < 1 || call.min_p > 0);
  o.first_sums = !o.greedy && (!o.truncated || (o.top_p < 1 && o.top_k == 0));
  // Very high and low temperatures may leave the range of fp32 on the way.
  const bool usual = o.factor > 1e-4 && o.factor < 1e4;
  o.fast = usual && call.dtype != DType::f32 && !o.transformed && o.first_sums && !o.truncated &&
           plan.per_entry == 1;
  int vocab_bits = 1;
  while (call.vocab >> vocab_bits) ++vocab_bits;
  o.unit = std::ldexp(1.0, 61 - vocab_bits);
  o.banned = call.banned;
  o.banned_count = plan.words ? 0 : static_cast<int>(call.banned_count);
  o.seed = call.seed;
  o.offset = call.offset;
  o.tokens = call.tokens;
  o.logprobs = call.logprobs;
  o.per_entry = plan.per_entry;
  o.max_entries = plan.max_entries;
  char* workspace = static_cast<char*>(call.workspace);
  const Offsets at = offsets(plan, call.rows);
  o.rows = static_cast<int>(call.rows);
  o.row_shift = plan.row_shift;
  if (plan.parts > 1 && !(o.fast && plan.fast_at_once)) {
    o.per_block = plan.per_block;
    if (o.fast) {
      o.fast_sums = reinterpret_cast<float*>(workspace);
    } else {
      o.sums = reinterpret_cast<double*>(workspace);
    }
    o.maxima = reinterpret_cast<float*>(workspace + at.maxima);
  }
  if (plan.words) o.banned_bits = reinterpret_cast<unsigned*>(workspace + at.bits);
  return o;
}

// One launch and two add up in the same way, so that a row's result does not depend, to the last
// bit, on how many others there are.
template <class T, bool kFast>
void launch_rows(const Options& o, std::int64_t rows, const Plan& plan, const Device& device) {
  const char *const first_name = "sample_tokens, first pass", *const name = "sample_tokens";
  const dim3 parts(static_cast<unsigned>(plan.parts), static_cast<unsigned>(rows));
  if constexpr (kFast) {
    if (o.fast_sums) launch(first_name, device, scan_rows_fast<T>, parts, dim3(kThreads), 0, o);
    launch(name, device, sample_rows_fast<T>, blocks(rows, plan.fast_warps >> plan.row_shift),
           blocks(plan.fast_warps * 32), 0, o);
  } else {
    if (plan.parts > 1) launch(first_name, device, scan_rows<T>, parts, dim3(kThreads), 0, o);
    const std::size_t shared = o.truncated ? sizeof(Bins) : 0;
    launch(name, device, sample_rows<T>, blocks(rows), dim3(kThreads), shared, o);
  }
}

}  // namespace

std::int64_t sample_tokens_workspace(DType dtype, std::int64_t rows, std::int64_t vocab,
                                     std::int64_t banned_count, const Device& device) {
  const auto bytes = [&](std::int64_t count) {
    return offsets(plan(dtype, count, vocab, banned_count, device), count).end;
  };
  // A call with fewer rows needs more where it takes two launches.
  const std::int64_t max_split = multiprocessors(device) - 1;
  return rows > max_split ? std::max(bytes(rows), bytes(max_split)) : bytes(rows);
}

void sample_tokens(const SampleTokens& call, const Device& device) {
  check_on_device(call);
  if (call.rows == 0) return;
  const Plan cut = plan(call.dtype, call.rows, call.vocab, call.banned_count, device);
  const Options o = options_of(call, cut);
  if (cut.words) {
    auto* bits = const_cast<unsigned*>(o.banned_bits);
    launch("sample_tokens, clearing the bitmap", device, clear_bits, blocks(cut.words, kThreads),
           dim3(kThreads), 0, bits, cut.words);
    banned_tokens(call.banned, call.banned_count, call.vocab, bits, device);
  }
  with_type(call.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (o.fast) return launch_rows<T, true>(o, call.rows, cut, device);
    }
    launch_rows<T, false>(o, call.rows, cut, device);
  });
}

}  // namespace quietstar::cuda
