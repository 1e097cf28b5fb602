#include "block.h"

#include <random>
#include <stdexcept>

namespace megatron_nuwa {

alignas(1024) char memory[kSharedBytesLimit];
Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr size_t kStackBytes = 256 * 1024;

std::vector<Fiber> fibers;
std::vector<Peers> warps;
Peers block;
unsigned threads;
void (*body)(void*);
void* body_argument;

jmp_buf scheduler;
bool is_in_fiber, has_moved;
uint32_t pace_seed;
std::minstd_rand random_numbers;
std::string failure;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Unlike swapcontext, _setjmp and _longjmp make no system call.
__attribute__((noinline)) void switch_to_scheduler() {
  if (!_setjmp(running().here)) _longjmp(scheduler, 1);
}

void live() {
  for (;;) {
    body(body_argument);
    require(running().copies.empty(), "a thread ends with copies that no barrier awaits");
    running().is_done = has_moved = true;
    block.left = warp_of(threadIdx.x).left = threadIdx.x;
    switch_to_scheduler();
  }
}

__attribute__((noinline)) void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.has_started) _longjmp(fiber.here, 1);
  fiber.has_started = true;
  if (!fiber.stack) fiber.stack.reset(new char[kStackBytes]);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, live, 0);
  setcontext(&fiber.start);
}

void begin(Peers& peers, unsigned first, unsigned size) {
  peers.first = first, peers.size = size, peers.left = -1;
  for (Meeting& meeting : peers.meetings) meeting.turn = 0;
}

std::string said_of(unsigned thread) {
  const Fiber& fiber = fibers[thread];
  const std::string path = fiber.site.file_name();
  return "thread " + std::to_string(thread) + " waits at " + fiber.instruction + " (" +
         path.substr(path.rfind('/') + 1) + ":" + std::to_string(fiber.site.line()) + ")";
}

// No thread can move: name one, and one that waits elsewhere if there is one.
[[noreturn]] void fail_in_deadlock() {
  unsigned first = 0;
  while (fibers[first].is_done) ++first;
  std::string others;
  for (unsigned i = first + 1; i < threads && others.empty(); ++i)
    if (!fibers[i].is_done && (fibers[i].instruction != fibers[first].instruction ||
                               fibers[i].site.line() != fibers[first].site.line()))
      others = ", " + said_of(i);
  throw Failure("nobody can go on: " + said_of(first) + others + " (block " +
                std::to_string(blockIdx.x) + ")");
}

void begin_block() {
  std::memset(memory, 0xff, sizeof(memory));
  races::begin(threads);
  forget_barriers();
  begin(block, 0, threads);
  for (unsigned i = 0; i < warps.size(); ++i) begin(warps[i], 32 * i, 32);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].is_done = false;
    fibers[i].warp_turns = fibers[i].block_turns = 0;
  }
}

void run_block() {
  begin_block();
  // Slow warps seldom have a turn unless all others wait.
  std::vector<bool> is_slow(warps.size());
  if (pace_seed)
    for (unsigned i = 0; i < warps.size(); ++i) is_slow[i] = random_numbers() & 64;
  for (bool is_running = true, is_stuck = false; is_running;) {
    is_running = has_moved = false;
    for (unsigned i = 0; i < threads; ++i) {
      if (fibers[i].is_done) continue;
      is_running = true;
      if (!is_stuck && is_slow[i / 32] && random_numbers() % 32) continue;
      is_in_fiber = true;
      threadIdx.x = i;
      resume(fibers[i]);
      is_in_fiber = false;
      if (!failure.empty()) throw Failure(failure);
    }
    if (is_running && is_stuck && !has_moved) fail_in_deadlock();
    is_stuck = !has_moved;
  }
}

void meet(Peers& peers, int turn, const char* instruction, const Site& site, bool orders) {
  Meeting& meeting = peers.meetings[turn % 2];
  if (meeting.turn != turn) {
    meeting.turn = turn, meeting.arrived = 0, meeting.first = threadIdx.x;
    if (orders) races::forget(meeting.before);
  }
  if (orders) races::release(meeting.before);
  ++meeting.arrived;
  wait_until([&] { return meeting.arrived == peers.size; }, instruction, site, &peers);
  if (orders) races::acquire(meeting.before);
}

bool is_same(const char* instruction, const Site& site, const Fiber& other) {
  const auto are_equal = [](const char* a, const char* b) {
    return a == b || std::strcmp(a, b) == 0;
  };
  return site.line() == other.site.line() && site.column() == other.site.column() &&
         are_equal(instruction, other.instruction) &&
         are_equal(site.file_name(), other.site.file_name());
}

}  // namespace

Fiber& running() { return fibers[threadIdx.x]; }
Peers& warp_of(unsigned thread) { return warps[thread / 32]; }

void note_progress() {
  has_moved = true;
  if (pace_seed && random_numbers() & 64) switch_to_scheduler();
}

void set_pace(uint32_t seed) {
  pace_seed = seed;
  random_numbers.seed(seed);
}

void fail(const std::string& what) {
  failure = what + " (block " + std::to_string(blockIdx.x) + ", thread " +
            std::to_string(threadIdx.x) + ")";
  if (!is_in_fiber) throw Failure(failure);
  for (;;) switch_to_scheduler();
}

void begin_to_wait(const char* instruction, const Site& site) {
  running().instruction = instruction, running().site = site;
}

void let_others_run(const Peers* peers) {
  if (peers && peers->left >= 0)
    fail("thread " + std::to_string(peers->left) + " has ended, and " + said_of(threadIdx.x));
  switch_to_scheduler();
}

void end_waiting() { has_moved = true; }

Shown exchange(const char* instruction, const Operands& operands, const Site& site, bool orders) {
  Fiber& fiber = running();
  Peers& warp = warp_of(threadIdx.x);
  const int turn = ++fiber.warp_turns, parity = turn % 2;
  fiber.shown[parity] = operands;
  begin_to_wait(instruction, site);
  const Meeting& meeting = warp.meetings[parity];
  if (meeting.turn == turn && !is_same(instruction, site, fibers[meeting.first]))
    fail("lanes of a warp meet at different instructions: " + said_of(meeting.first) + ", " +
         said_of(threadIdx.x));
  meet(warp, turn, instruction, site, orders);
  return {&fibers[warp.first], parity};
}

void __syncthreads(Site site) {
  // One instruction of each warp, all of whose lanes execute it together.
  exchange("__syncthreads", {}, site);
  meet(block, ++running().block_turns, "__syncthreads", site, true);
}

void __syncwarp(Site site) { exchange("__syncwarp", {}, site, true); }

uint32_t shuffle(const char* instruction, unsigned mask, uint32_t value, int source, Site site) {
  require(mask == 0xffffffff, "a shuffle leaves lanes out");
  return exchange(instruction, {{value}}, site)[source].words[0];
}

uint32_t __ballot_sync(unsigned mask, bool vote, Site site) {
  require(mask == 0xffffffff, "a vote leaves lanes out");
  const Shown warp = exchange("ballot", {{vote}}, site);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= warp[lane].words[0] << lane;
  return votes;
}

void run_blocks(Blocks blocks, unsigned count, void (*kernel)(void*), void* argument) {
  require(count % 32 == 0, "a block ends with part of a warp");
  threads = blockDim.x = count;
  body = kernel, body_argument = argument;
  if (fibers.size() < count) fibers.resize(count);
  warps.resize(count / 32);
  gridDim = {static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y),
             static_cast<unsigned>(blocks.z)};
  const int64_t all = static_cast<int64_t>(blocks.x) * blocks.y * blocks.z;
  for (int64_t number = 0; number < all; ++number) {
    blockIdx.x = number % blocks.x;
    blockIdx.y = number / blocks.x % blocks.y;
    blockIdx.z = number / blocks.x / blocks.y;
    run_block();
  }
}

const char* failure_of(void (*body)(const void*), const void* argument) {
  failure.clear();
  try {
    body(argument);
    return nullptr;
  } catch (const Failure& thrown) {
    failure = thrown.what();
    fibers.clear();  // which stand in the middle of a kernel
    return failure.c_str();
  }
}

}  // namespace megatron_nuwa
