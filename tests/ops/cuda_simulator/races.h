// Which accesses to a block's shared memory nothing orders.
//
// An access happens before another one if a chain of these leads from the first to the second: the
// program order of a thread; __syncthreads for a block, __syncwarp for a warp; an arrival at a
// barrier in shared memory and a wait that saw its phase end. Shuffles, votes, ldmatrix and mma
// order nothing. Two accesses to one byte, one of them a write, without such a chain are a race in
// whatever order the simulation made them.
//
// An asynchronous copy is made by an agent of its own, one beside each thread: it begins after what
// its thread did before, and ends for those alone who waited for a barrier at which it has arrived.
// That arrival says nothing of what the thread itself wrote, nor do two copies of one thread wait
// for each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_nuwa::races {

// An access, or an arrival: whose, and in which stretch of its life. Stretches are numbered from 1;
// 0 is of an access that never was.
struct Moment {
  int agent = 0;
  int32_t stretch = 0;
};

// How much of each agent's life lies before.
class Clock {
 public:
  void forget(std::size_t agents) { stretches_.assign(agents, 0); }
  void add(const Moment& moment);
  void add(const Clock& other);
  bool has(const Moment& moment) const { return stretches_[moment.agent] >= moment.stretch; }

 private:
  std::vector<int32_t> stretches_;
};

// A block of so many threads begins; nothing has been read or written.
void begin(unsigned threads);

// The running thread reads or writes, by the instruction before `site`.
void read(uint32_t address, int bytes, const void* site);
void write(uint32_t address, int bytes, const void* site);
// It starts a copy, which writes at any time from now on.
void start_copy(uint32_t address, int bytes, const void* site);
// The copies that it has started so far; later ones belong to another stretch.
Moment end_copies();

// What lies before the running thread's next step lies before what will acquire `clock`.
void release(Clock& clock);
void acquire(const Clock& clock);
// A clock for so many agents as this block has, none of whose lives lies before.
void forget(Clock& clock);

}  // namespace megatron_nuwa::races
