// The threads of a block as fibers, and where they meet.
#pragma once

#include <csetjmp>
#include <memory>
#include <vector>

#include <ucontext.h>

#include "races.h"
#include "simulated_device.h"

namespace megatron_nuwa {

struct Copy {
  uint32_t target;
  const char* source;
  int bytes;
  bool is_real;
};

// What a lane shows its warp.
struct Operands {
  uint32_t words[6];
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf here;
  bool has_started = false, is_done;
  int warp_turns, block_turns;  // meetings so far
  const char* instruction;      // at which it waits
  Site site;
  std::vector<Copy> copies;  // that no barrier awaits yet
  Operands shown[2];         // of its last two meetings
};

// A meeting that all threads of a warp, or of a block, must come to. Its successor may have begun
// while some have yet to leave it, so there are two.
struct Meeting {
  int turn;
  unsigned arrived, first;  // how many, and who was first
  races::Clock before;
};

// The threads of a warp, or of a block.
struct Peers {
  unsigned first, size;
  int left;  // one that has ended, or -1
  Meeting meetings[2];
};

Fiber& running();
Peers& warp_of(unsigned thread);

// The running thread waits at an instruction; others run, unless one of `peers`, all of whom it
// waits for, has ended; it waits no more.
void begin_to_wait(const char* instruction, const Site& site);
void let_others_run(const Peers* peers);
void end_waiting();

template <class Condition>
void wait_until(const Condition& has_come, const char* instruction, const Site& site,
                const Peers* peers = nullptr) {
  begin_to_wait(instruction, site);
  while (!has_come()) let_others_run(peers);
  end_waiting();
}

// It has done what others may wait for, and may be interrupted.
void note_progress();

// A block begins, whose shared memory holds no barrier.
void forget_barriers();

// Show this lane's operands to its warp, once all lanes are at this instruction; where it `orders`,
// what lanes did before lies before what they do after.
struct Shown {
  const Fiber* lanes;
  int parity;
  const Operands& operator[](int lane) const { return lanes[lane].shown[parity]; }
};
Shown exchange(const char* instruction, const Operands& operands, const Site& site,
               bool orders = false);

}  // namespace megatron_nuwa
