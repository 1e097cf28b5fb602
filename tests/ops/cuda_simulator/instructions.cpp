// What primitives.cuh says in PTX: copies, barriers in shared memory, and matrices.
#include <map>

#include "block.h"

namespace megatron_nuwa {
namespace {

// Copies whose arrival at a barrier is still to come.
struct Batch {
  std::vector<Copy> copies;
  races::Moment end;
};

struct Barrier {
  int expected, arrived = 0, phase = 0;
  std::vector<Batch> awaited;
  races::Clock arrivals, last_phase;  // of the phase that runs; of the one that has ended
};

std::map<uint32_t, Barrier> barriers;

void copy_async(uint32_t target, const void* source, int bytes, bool is_real, const void* site) {
  require(target % bytes == 0 && target + bytes <= kSharedBytesLimit, "copy misses shared memory");
  require(!is_real || reinterpret_cast<uintptr_t>(source) % bytes == 0, "copy is misaligned");
  races::start_copy(target, bytes, site);
  std::memset(memory + target, 0xff, bytes);
  running().copies.push_back({target, static_cast<const char*>(source), bytes, is_real});
}

void finish(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    if (copy.is_real) std::memcpy(memory + copy.target, copy.source, copy.bytes);
    else std::memset(memory + copy.target, 0, copy.bytes);
  }
}

Barrier& barrier_at(uint32_t address, const void* site) {
  // Threads may use it at once, but not before or while one starts it.
  races::read(address, 8, site);
  require(barriers.count(address), "a barrier is used before it has started");
  return barriers[address];
}

void count_arrival(Barrier& barrier) {
  if (++barrier.arrived < barrier.expected) return;
  barrier.arrived = 0;
  ++barrier.phase;
  std::swap(barrier.last_phase, barrier.arrivals);
  races::forget(barrier.arrivals);
}

bool has_ended(Barrier& barrier, int parity) {
  for (const Batch& batch : barrier.awaited) {
    finish(batch.copies);
    barrier.arrivals.add(batch.end);
    count_arrival(barrier);
  }
  const bool has_moved = !barrier.awaited.empty();
  barrier.awaited.clear();
  if (has_moved) note_progress();
  return barrier.phase % 2 != parity;
}

uint32_t element_at(uint32_t row_address, int column) {
  uint16_t value;
  std::memcpy(&value, memory + row_address + 2 * column, 2);
  return value;
}

void load(uint32_t (&matrices)[4], uint32_t row_address, bool is_transposed, const Site& at,
          const void* site) {
  require(row_address % 16 == 0 && row_address + 16 <= kSharedBytesLimit,
          "matrix row misses shared memory");
  const char* const instruction = is_transposed ? "ldmatrix.trans" : "ldmatrix";
  // A row is read by the lane that names it, and by those whose registers it goes to.
  races::read(row_address, 16, site);
  const Shown warp = exchange(instruction, {{row_address}}, at);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int m = 0; m < 4; ++m) {
    const uint32_t low = warp[8 * m + (is_transposed ? 2 * t : g)].words[0];
    const uint32_t high = is_transposed ? warp[8 * m + 2 * t + 1].words[0] : low;
    races::read(low, 16, site);
    if (is_transposed) races::read(high, 16, site);
    const int column = is_transposed ? g : 2 * t;
    matrices[m] = element_at(low, column) |
                  element_at(high, is_transposed ? column : column + 1) << 16;
  }
}

// Element k of a row of A, or of a column of B, from the registers `low` (k < 8) and `high`.
template <class T>
float element(const Shown& warp, int index, int k, int low, int high) {
  const uint32_t word = warp[4 * index + k % 8 / 2].words[k < 8 ? low : high];
  return widen(T{static_cast<uint16_t>(k % 2 ? word >> 16 : word)});
}

}  // namespace

void copy_async_16(uint32_t target, const void* source, bool is_real) {
  copy_async(target, source, 16, is_real, __builtin_return_address(0));
}
void copy_async_4(uint32_t target, const void* source) {
  copy_async(target, source, 4, true, __builtin_return_address(0));
}
void copy_async_8(uint32_t target, const void* source, bool is_real) {
  copy_async(target, source, 8, is_real, __builtin_return_address(0));
}

void forget_barriers() { barriers.clear(); }

void start_barrier(uint32_t address, int expected) {
  require(address % 8 == 0 && address + 8 <= kSharedBytesLimit, "barrier misses shared memory");
  races::write(address, 8, __builtin_return_address(0));
  Barrier& barrier = barriers[address] = {expected, 0, 0, {}, {}, {}};
  races::forget(barrier.arrivals);
  races::forget(barrier.last_phase);
}

void arrive(uint32_t address) {
  Barrier& barrier = barrier_at(address, __builtin_return_address(0));
  races::release(barrier.arrivals);
  count_arrival(barrier);
  note_progress();
}

void arrive_with_copies(uint32_t address) {
  Barrier& barrier = barrier_at(address, __builtin_return_address(0));
  barrier.awaited.push_back({std::move(running().copies), races::end_copies()});
  running().copies.clear();
  note_progress();
}

void wait_for_phase(uint32_t address, int parity, Site at) {
  Barrier& barrier = barrier_at(address, __builtin_return_address(0));
  wait_until([&] { return has_ended(barrier, parity); }, "mbarrier wait", at);
  races::acquire(barrier.last_phase);
}

void load_matrices(uint32_t (&matrices)[4], uint32_t row_address, Site at) {
  load(matrices, row_address, false, at, __builtin_return_address(0));
}
void load_matrices_transposed(uint32_t (&matrices)[4], uint32_t row_address, Site at) {
  load(matrices, row_address, true, at, __builtin_return_address(0));
}

template <class T>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Site at) {
  const Shown warp = exchange("mma", {{a[0], a[1], a[2], a[3], b0, b1}}, at);
  const int g = lane_id() / 4, t = lane_id() % 4;
  for (int k = 0; k < 16; ++k)
    for (int i = 0; i < 4; ++i)
      sum[i] += element<T>(warp, g, k, i / 2, i / 2 + 2) * element<T>(warp, 2 * t + i % 2, k, 4, 5);
}

template void multiply_add<bf16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, Site);
template void multiply_add<fp16>(float (&)[4], const uint32_t (&)[4], uint32_t, uint32_t, Site);

}  // namespace megatron_nuwa
