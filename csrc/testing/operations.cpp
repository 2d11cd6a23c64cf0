// What a thread of a kernel can do, as fibers do it: barriers, warp operations, shared memory and
// asynchronous copies; see fibers.h.
#include "world.h"

namespace quietstar::testing {

const Self& self() {
  return world.current->self;
}
const Block& block() {
  return world.block;
}
unsigned char* dynamic_shared() {
  return world.dynamic.data();
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
