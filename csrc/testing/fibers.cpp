// Scheduler of the fibers; see fibers.h. One fiber per thread of the block, reused from block to
// block and from launch to launch. Switching is the compiler's own setjmp and longjmp: other than
// swapcontext they need no system call, and other than the C library's the address sanitizer does
// not put a pass over the whole stack before them. It is told of every switch instead.
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define QUIETSTAR_ASAN 1
#else
#define QUIETSTAR_ASAN 0
#endif

namespace quietstar::testing {
namespace {

constexpr std::size_t kStackBytes = QUIETSTAR_ASAN ? 512 * 1024 : 128 * 1024;
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
World world;

std::string show(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}
std::string show(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

// ---- switching
#define QUIETSTAR_PLAIN __attribute__((noinline, no_sanitize("address", "undefined")))

[[noreturn]] QUIETSTAR_PLAIN void jump(Jump& there) {
  __builtin_longjmp(there.buffer, 1);
}
// Leaves for `there`, or for a fiber's beginning, and returns when something jumps to `here`.
QUIETSTAR_PLAIN void change(Jump& here, Jump& there, const ucontext_t* beginning) {
  if (__builtin_setjmp(here.buffer) != 0) return;
  if (beginning) setcontext(beginning);
  jump(there);
}

// Tells the sanitizer of the switch to another stack, and that it happened.
void leave_stack(void** fake_stack, const void* next, std::size_t bytes) {
#if QUIETSTAR_ASAN
  __sanitizer_start_switch_fiber(fake_stack, next, bytes);
#else
  (void)fake_stack, (void)next, (void)bytes;
#endif
}
void enter_stack(void* fake_stack, const void** previous, std::size_t* bytes) {
#if QUIETSTAR_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, previous, bytes);
#else
  (void)fake_stack, (void)previous, (void)bytes;
#endif
}

void to_scheduler() {
  Fiber& fiber = *world.current;
  leave_stack(&fiber.fake_stack, world.scheduler_stack, world.scheduler_stack_bytes);
  change(fiber.jump, world.scheduler, nullptr);
  enter_stack(fiber.fake_stack, nullptr, nullptr);
}

void fiber_main() {
  enter_stack(nullptr, &world.scheduler_stack, &world.scheduler_stack_bytes);
  for (;;) {
    (*world.body)();
    world.current->state = State::left;
    to_scheduler();
  }
}

void run(Fiber& fiber) {
  world.current = &fiber;
  const ucontext_t* beginning = fiber.started ? nullptr : &fiber.context;
  fiber.started = true;
  void* fake_stack = nullptr;
  leave_stack(&fake_stack, fiber.stack, kStackBytes);
  change(world.scheduler, fiber.jump, beginning);
  enter_stack(fake_stack, nullptr, nullptr);
  world.current = nullptr;
}

void prepare(Fiber& fiber) {
  if (!fiber.stack) {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // an overflow of the stack stops here
    fiber.stack = static_cast<char*>(memory) + page;
  }
#if QUIETSTAR_ASAN
  // Functions that a failed launch left in the middle will not clear their marks themselves.
  ASAN_UNPOISON_MEMORY_REGION(fiber.stack, kStackBytes);
#endif
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
  fiber.started = false;
  fiber.fake_stack = nullptr;
}

[[noreturn]] void stop(const std::string& what) {
  // The fibers of this launch are in the middle of something: they start anew the next time.
  for (auto& fiber : world.fibers) {
    if (fiber->started) prepare(*fiber);
    fiber->state = State::left;
  }
  throw std::runtime_error("kernel " + world.kernel + ", block " + show(world.block.index) + ": " +
                           what);
}

[[noreturn]] void end_launch(const std::string& why) {
  world.error = why;
  for (;;) to_scheduler();  // the scheduler never comes back
}

std::vector<int> order_of(int count) {
  std::vector<int> order(count);
  for (int i = 0; i < count; ++i) order[i] = world.order == "reverse" ? count - 1 - i : i;
  if (world.order == "shuffled" || world.order == "uneven") {
    std::shuffle(order.begin(), order.end(), world.random);
  }
  return order;
}

int below(int count) {
  return static_cast<int>(world.random() % static_cast<unsigned>(count));
}

// Order "uneven": one of the ready lanes of a warp, for a stretch of any length or until none is
// left; then of another warp. Null where no thread is ready.
Fiber* next_uneven(int threads) {
  const auto ready = [&](int warp) {
    std::vector<Fiber*> lanes;
    for (int i = warp * 32; i < std::min(warp * 32 + 32, threads); ++i) {
      if (world.fibers[i]->state == State::ready) lanes.push_back(world.fibers[i].get());
    }
    return lanes;
  };
  std::vector<Fiber*> lanes;
  if (world.stretch > 0) lanes = ready(world.warp);
  if (lanes.empty()) {
    std::vector<int> warps;
    for (int warp = 0; warp < (threads + 31) / 32; ++warp) {
      if (!ready(warp).empty()) warps.push_back(warp);
    }
    if (warps.empty()) return nullptr;
    world.warp = warps[below(static_cast<int>(warps.size()))];
    world.stretch = 1 + below(1 << below(12));
    lanes = ready(world.warp);
  }
  world.stretch -= 1;
  return lanes[below(static_cast<int>(lanes.size()))];
}

// Where a thread could be overtaken by others.
void may_be_overtaken() {
  if (world.order == "uneven") to_scheduler();
}

// ---- one block
void explain_deadlock(int threads) {
  std::string what = "threads wait for each other for ever:";
  std::map<std::string, std::vector<int>> groups;
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = *world.fibers[i];
    std::string where = "left the kernel";
    if (f.state == State::at_barrier) where = "at the barrier in " + show(f.place);
    if (f.state == State::in_warp) {
      char mask[16];
      std::snprintf(mask, sizeof mask, "0x%08x", f.mask);
      where = "in a warp operation with mask " + std::string(mask) + " in " + show(f.place);
    }
    groups[where].push_back(i);
  }
  for (const auto& [where, who] : groups) {
    what += " " + std::to_string(who.size()) + " " + where + " (the first is thread " +
            std::to_string(who[0]) + ");";
  }
  what.back() = '.';
  stop(what);
}

// Opens the barrier if every thread of the block is there.
bool open_barrier(int threads) {
  int sum = 0;
  const Fiber& first = *world.fibers[0];
  for (int i = 0; i < threads; ++i) {
    const Fiber& f = *world.fibers[i];
    if (f.state != State::at_barrier) return false;
    if (f.place.line != first.place.line || std::strcmp(f.place.file, first.place.file) != 0) {
      stop("divergent barrier: thread 0 is at " + show(first.place) + ", thread " +
           std::to_string(i) + " at " + show(f.place));
    }
    sum += f.value;
  }
  for (int i = 0; i < threads; ++i) {
    world.fibers[i]->value = sum;
    world.fibers[i]->state = State::ready;
  }
  return true;
}

void run_block(int threads) {
  world.dynamic.poison();
  for (auto& [key, memory] : world.statics) memory.poison();
  for (int i = 0; i < threads; ++i) {
    Fiber& f = *world.fibers[i];
    const dim3 size = world.block.block_size;
    const unsigned n = static_cast<unsigned>(i);
    f.self = {{n % size.x, n / size.x % size.y, n / (size.x * size.y)}, n % 32};
    f.state = State::ready;
    f.groups.assign(1, {});
  }
  int left = 0;
  world.stretch = 0;
  while (left < threads) {
    bool progress = false;
    const auto go_on = [&](Fiber& f) {
      run(f);
      progress = true;
      if (!world.error.empty()) stop(std::exchange(world.error, ""));
      left += f.state == State::left;
    };
    if (world.order == "uneven") {
      while (Fiber* f = next_uneven(threads)) go_on(*f);
    } else {
      for (int i : order_of(threads)) {
        if (world.fibers[i]->state == State::ready) go_on(*world.fibers[i]);
      }
    }
    if (open_barrier(threads)) progress = true;
    if (!progress && left < threads) explain_deadlock(threads);
  }
  if (!world.dynamic.intact()) stop("something was stored outside of dynamic shared memory");
  for (auto& [key, memory] : world.statics) {
    if (!memory.intact()) stop("something was stored outside of a shared array");
  }
  for (int i = 0; i < threads; ++i) {
    for (const auto& group : world.fibers[i]->groups) {
      if (!group.empty()) stop("thread " + std::to_string(i) + " left with copies not waited for");
    }
  }
}

}  // namespace

const Self& self() {
  return world.current->self;
}
const Block& block() {
  return world.block;
}
unsigned char* dynamic_shared() {
  return world.dynamic.data();
}

void set_order(const std::string& order, std::uint64_t seed) {
  if (order != "forward" && order != "reverse" && order != "shuffled" && order != "uneven") {
    throw std::invalid_argument("order is '" + order +
                                "'; expected forward, reverse, shuffled or uneven");
  }
  world.order = order;
  world.random.seed(seed);
}

void fail(Place place, const std::string& what) {
  end_launch("thread " + show(world.current->self.thread) + " at " + show(place) + ": " + what);
}

void run_grid(const char* kernel, dim3 grid, dim3 block, std::size_t shared_bytes,
              std::size_t allowed_bytes, const std::function<void()>& body) {
  if (world.current) throw std::runtime_error("a kernel is launched inside a kernel");
  const std::int64_t blocks = std::int64_t{grid.x} * grid.y * grid.z;
  if (blocks > 0x7fffffff) throw std::runtime_error("more blocks than a test can run");
  world.kernel = kernel;
  world.block = {{0, 0, 0}, block, grid, static_cast<int>(block.x * block.y * block.z)};
  world.body = &body;
  world.dynamic = Guarded(shared_bytes);
  world.statics.clear();
  world.static_bytes = 0;
  world.allowed_bytes = allowed_bytes;
  while (world.fibers.size() < static_cast<std::size_t>(world.block.threads)) {
    world.fibers.push_back(std::make_unique<Fiber>());
    prepare(*world.fibers.back());
  }
  for (int b : order_of(static_cast<int>(blocks))) {
    const auto n = static_cast<unsigned>(b);
    world.block.index = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
    run_block(world.block.threads);
  }
}

int sync_block(Place place, int value) {
  Fiber& fiber = *world.current;
  fiber.place = place;
  fiber.value = value;
  fiber.state = State::at_barrier;
  to_scheduler();
  return fiber.value;
}

void warp_operation(Place place, unsigned mask, void* data, WarpWork work) {
  Fiber& fiber = *world.current;
  const unsigned lane = fiber.self.lane;
  if (!(mask >> lane & 1)) fail(place, "the mask of a warp operation leaves the calling lane out");
  fiber.place = place;
  fiber.mask = mask;
  fiber.data = data;
  fiber.state = State::in_warp;
  const auto index_of = [&](unsigned other) {
    const Self& s = fiber.self;
    const dim3 size = world.block.block_size;
    const unsigned mine = s.thread.x + size.x * (s.thread.y + size.y * s.thread.z);
    return static_cast<int>(mine - lane + other);
  };
  void* lanes[32] = {};
  bool complete = true;
  for (unsigned other = 0; other < 32; ++other) {
    if (!(mask >> other & 1)) continue;
    const int index = index_of(other);
    if (index >= world.block.threads) {
      fail(place,
           "the mask names lane " + std::to_string(other) + ", which the block does not have");
    }
    const Fiber& f = *world.fibers[index];
    if (f.state == State::left) {
      fail(place, "the mask names lane " + std::to_string(other) + ", which has left the kernel");
    }
    if (f.state != State::in_warp) {
      complete = false;
      continue;
    }
    if (f.mask != mask || f.place.line != place.line ||
        std::strcmp(f.place.file, place.file) != 0) {
      // A lane that waits in another operation cannot come to this one before that is over, and
      // that cannot be over without this lane if it names it.
      if (f.mask >> lane & 1) {
        fail(place, "lane " + std::to_string(other) + " is in another warp operation, at " +
                        show(f.place) + (f.mask != mask ? ", with another mask" : ""));
      }
      complete = false;
      continue;
    }
    lanes[other] = f.data;
  }
  if (!complete) {
    to_scheduler();
    return;
  }
  work(place, mask, lanes);
  for (unsigned other = 0; other < 32; ++other) {
    if (mask >> other & 1) world.fibers[index_of(other)]->state = State::ready;
  }
  may_be_overtaken();
}

unsigned source_lane(Place place, Shuffle kind, unsigned lane, int operand, int width) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail(place, "a shuffle has width " + std::to_string(width));
  }
  const int first = static_cast<int>(lane) / width * width, mine = static_cast<int>(lane);
  int source = mine;
  switch (kind) {
    case Shuffle::index:
      return static_cast<unsigned>(first + (operand & (width - 1)));
    case Shuffle::exclusive:
      source = mine ^ operand;
      // The lanes of an earlier group can be read, those of a later one not.
      return static_cast<unsigned>(source < first + width ? source : mine);
    case Shuffle::down:
      source = mine + operand;
      return static_cast<unsigned>(source < first + width ? source : mine);
    case Shuffle::up:
      source = mine - operand;
      return static_cast<unsigned>(source >= first ? source : mine);
  }
  return lane;
}

void* static_shared(const void* key, std::size_t bytes, std::size_t alignment) {
  if (alignment > kGuard) throw std::logic_error("a shared array wants too much alignment");
  auto found = world.statics.find(key);
  if (found == world.statics.end()) {
    world.static_bytes += (bytes + alignment - 1) / alignment * alignment;
    // The dynamic memory lies behind it, aligned as QUIETSTAR_DYNAMIC_SHARED says.
    const std::size_t before = (world.static_bytes + kGuard - 1) / kGuard * kGuard;
    if (before + world.dynamic.size() > world.allowed_bytes) {
      // A device would not begin.
      end_launch("invalid launch: " + std::to_string(before + world.dynamic.size()) +
                 " bytes of static and dynamic shared memory, and " +
                 std::to_string(world.allowed_bytes) + " allowed");
    }
    found = world.statics.emplace(key, Guarded(bytes, alignment)).first;
    found->second.poison();
  }
  return found->second.data();
}

void start_copy(Place place, void* to, const void* from, int bytes, int valid_bytes) {
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % bytes;
  };
  if (misaligned(to) || misaligned(from)) fail(place, "an asynchronous copy is not aligned");
  Copy copy{to, std::vector<unsigned char>(static_cast<std::size_t>(bytes), 0)};
  std::memcpy(copy.bytes.data(), from, static_cast<std::size_t>(valid_bytes));
  std::memset(to, kPoison, static_cast<std::size_t>(bytes));
  world.current->groups.back().push_back(std::move(copy));
}

void close_copies() {
  world.current->groups.emplace_back();
}

void finish_copies(int pending_groups) {
  may_be_overtaken();  // the copies arrive as late as they may
  auto& groups = world.current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending_groups) {
    for (const Copy& copy : groups.front()) {
      std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    }
    groups.erase(groups.begin());
  }
}

}  // namespace quietstar::testing
