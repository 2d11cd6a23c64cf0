// The threads of a block as fibers: who runs, who waits for whom, and shared memory.
// What it checks is listed in cuda_on_cpu.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

namespace quietstar::testing {

// Line of a source file at which threads meet.
struct Place {
  const char* file;
  int line;
};

// What a thread sees of itself.
struct Self {
  uint3 thread;
  unsigned lane;
};
struct Block {
  uint3 index;
  dim3 block_size, grid_size;
  int threads;
};
const Self& self();
const Block& block();

// Runs body once for every thread of a grid that a device would take. Throws std::runtime_error
// with what a check found; shared memory, static and dynamic, may come to allowed_bytes.
void run_grid(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
              std::size_t allowed_bytes, const std::function<void()>& body);

// For tests. Order of threads and blocks: "forward", "reverse" or "shuffled" by the seed, where all
// threads go on from one barrier or warp operation to the next by turns; or "uneven", where a warp
// goes on alone, by the seed for one turn or for thousands, and the others stand.
void set_order(const std::string& order, std::uint64_t seed);

// Stops the launch with an error about the calling thread.
[[noreturn]] void fail(Place place, const std::string& what);

// Waits for all threads of the block; returns the sum of their values.
int sync_block(Place place, int value);

// ---- operations of a warp. The last lane of the mask to arrive does the work for all.
using WarpWork = void (*)(Place place, unsigned mask, void* const* lanes);
void warp_operation(Place place, unsigned mask, void* data, WarpWork work);

struct SyncWarp {
  Place place;
  void operator()(unsigned mask = ~0u) const {
    warp_operation(place, mask, nullptr, [](Place, unsigned, void* const*) {});
  }
};

// Calls body(lane, data) for the lanes of a mask.
template <class T, class Body>
void for_lanes(unsigned mask, void* const* lanes, Body body) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) body(lane, *static_cast<T*>(lanes[lane]));
  }
}

enum class Shuffle { index, exclusive, down, up };

// The lane from which `lane` reads, as the PTX manual defines shfl.
unsigned source_lane(Place place, Shuffle kind, unsigned lane, int operand, int width);

template <class T>
T shuffle(Place place, unsigned mask, T value, Shuffle kind, int operand, int width = 32) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles move 4 or 8 bytes");
  struct Exchange {
    T value, result;
    unsigned source;
  };
  Exchange exchange{value, value, source_lane(place, kind, self().lane, operand, width)};
  warp_operation(place, mask, &exchange, [](Place at, unsigned all, void* const* lanes) {
    for_lanes<Exchange>(all, lanes, [&](unsigned lane, Exchange& mine) {
      if (!(all >> mine.source & 1)) {
        fail(at, "lane " + std::to_string(lane) + " reads from lane " +
                     std::to_string(mine.source) + ", which is not in the mask");
      }
      mine.result = static_cast<Exchange*>(lanes[mine.source])->value;
    });
  });
  return exchange.result;
}

inline unsigned ballot(Place place, unsigned mask, unsigned predicate) {
  unsigned vote = predicate;
  warp_operation(place, mask, &vote, [](Place, unsigned all, void* const* lanes) {
    unsigned votes = 0;
    for_lanes<unsigned>(all, lanes, [&](unsigned lane, unsigned v) { votes |= v << lane; });
    for_lanes<unsigned>(all, lanes, [&](unsigned, unsigned& v) { v = votes; });
  });
  return vote;
}

struct Sum {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Larger {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Smaller {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};

template <class T, class Combine>
T reduce(Place place, unsigned mask, T value, Combine) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4, "warp reductions take 32-bit integers");
  warp_operation(place, mask, &value, [](Place, unsigned all, void* const* lanes) {
    bool first = true;
    T sum{};
    for_lanes<T>(all, lanes, [&](unsigned, T v) {
      sum = first ? v : Combine{}(sum, v);
      first = false;
    });
    for_lanes<T>(all, lanes, [&](unsigned, T& v) { v = sum; });
  });
  return value;
}

// ---- shared memory
unsigned char* dynamic_shared();
// One array per block and key; NaN in every block.
void* static_shared(const void* key, std::size_t bytes, std::size_t alignment);

// ---- asynchronous copies: they happen when they are waited for, and the destination is NaN until
// then. bytes beyond valid_bytes become zero.
void start_copy(Place place, void* to, const void* from, int bytes, int valid_bytes);
void close_copies();
void finish_copies(int pending_groups);

}  // namespace quietstar::testing
