// Scheduler of the fibers; see fibers.h. One fiber per thread of the block, reused from block to
// block and from launch to launch. Switching is the compiler's own setjmp and longjmp: other than
// swapcontext they need no system call, and other than the C library's the address sanitizer does
// not put a pass over the whole stack before them. It is told of every switch instead.
#include <sys/mman.h>
#include <unistd.h>

#include <utility>

#include "world.h"

#if QUIETSTAR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace quietstar::testing {

World world;

std::string show(Place place) {
  const std::string file = place.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
}

namespace {

constexpr std::size_t kStackBytes = QUIETSTAR_ASAN ? 512 * 1024 : 128 * 1024;

std::string show(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
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

}  // namespace

void to_scheduler() {
  Fiber& fiber = *world.current;
  leave_stack(&fiber.fake_stack, world.scheduler_stack, world.scheduler_stack_bytes);
  change(fiber.jump, world.scheduler, nullptr);
  enter_stack(fiber.fake_stack, nullptr, nullptr);
}

namespace {

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

[[noreturn]] void end_launch(const std::string& why) {
  world.error = why;
  for (;;) to_scheduler();  // the scheduler never comes back
}

void may_be_overtaken() {
  if (world.order == "uneven") to_scheduler();
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

}  // namespace quietstar::testing
