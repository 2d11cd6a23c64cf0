// What the scheduler of the fibers (fibers.cpp) and the operations of a thread (operations.cpp)
// share.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "cuda_on_cpu.h"

#if defined(__SANITIZE_ADDRESS__)
#define QUIETSTAR_ASAN 1
#else
#define QUIETSTAR_ASAN 0
#endif

namespace quietstar::testing {

constexpr std::size_t kGuard = 128;      // bytes around shared memory that nobody may write
constexpr unsigned char kPoison = 0xFF;  // NaN in every floating-point type
constexpr unsigned char kCanary = 0xA5;

enum class State { ready, at_barrier, in_warp, left };

struct Copy {
  void* to;
  std::vector<unsigned char> bytes;
};

struct Jump {
  void* buffer[5];  // what __builtin_setjmp needs
};

struct Fiber {
  Self self{};
  State state = State::left;
  Place place{"", 0};
  int value = 0;      // of a barrier
  unsigned mask = 0;  // of a warp operation
  void* data = nullptr;
  std::vector<std::vector<Copy>> groups{1};  // the last one is not committed yet

  char* stack = nullptr;
  ucontext_t context{};
  Jump jump;
  bool started = false;
  void* fake_stack = nullptr;
};

// Memory of a known size between guards. With the address sanitizer its size is exact, too.
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(std::size_t bytes, std::size_t alignment = kGuard) : bytes_(bytes) {
    // The sanitizer guards an allocation by itself, from its very end on.
    const std::size_t guard = QUIETSTAR_ASAN ? 0 : kGuard;
    before_ = guard + alignment % kGuard;  // aligned to no more than was asked for
    void* memory = nullptr;
    if (posix_memalign(&memory, kGuard, std::max<std::size_t>(1, before_ + bytes + guard)) != 0) {
      throw std::bad_alloc();
    }
    memory_.reset(static_cast<unsigned char*>(memory));
    data_ = memory_.get() + before_;
    std::memset(memory_.get(), kCanary, before_);
    std::memset(data_ + bytes_, kCanary, guard);
  }
  unsigned char* data() const { return data_; }
  std::size_t size() const { return bytes_; }
  void poison() const { std::memset(data_, kPoison, bytes_); }
  bool intact() const {
    if (QUIETSTAR_ASAN || !memory_) return true;
    const auto untouched = [](const unsigned char* p, std::size_t bytes) {
      return std::all_of(p, p + bytes, [](unsigned char byte) { return byte == kCanary; });
    };
    return untouched(memory_.get(), before_) && untouched(data_ + bytes_, kGuard);
  }

 private:
  struct Free {
    void operator()(unsigned char* p) const { std::free(p); }
  };
  std::unique_ptr<unsigned char, Free> memory_;
  unsigned char* data_ = nullptr;
  std::size_t before_ = 0, bytes_ = 0;
};

struct World {
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  Block block{};
  const std::function<void()>* body = nullptr;
  std::string kernel, error;
  Guarded dynamic;
  std::map<const void*, Guarded> statics;
  std::size_t static_bytes = 0, allowed_bytes = 0;  // of shared memory; allowed: dynamic, too
  std::string order = "forward";
  std::mt19937_64 random;
  int warp = 0, stretch = 0;  // of order "uneven": who runs on, and how many times still

  Jump scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
};
extern World world;

std::string show(Place place);

// Leaves the running fiber; returns when it is its turn again.
void to_scheduler();
// Where a thread could be overtaken by others.
void may_be_overtaken();
// Ends the launch that the running fiber belongs to.
[[noreturn]] void end_launch(const std::string& why);

}  // namespace quietstar::testing
