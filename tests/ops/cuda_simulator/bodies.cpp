// Small kernels of three warps, right ones and wrong ones, that try what the simulated device says
// of each way to wait.
#define MEGATRON_NUWA_SIMULATED
#include "primitives.cuh"

#include <map>

namespace megatron_nuwa {
namespace {

int sink;  // what is read must be used
alignas(16) const int source[4] = {1, 2, 3, 4};

unsigned thread() { return threadIdx.x; }
unsigned warp() { return threadIdx.x / 32; }
int* words() { return reinterpret_cast<int*>(memory); }

// Barriers lie behind all else.
constexpr uint32_t kFirst = 4096, kSecond = kFirst + 8;
void start_both(int arrivals) {
  if (thread() == 0) {
    start_barrier(kFirst, arrivals);
    start_barrier(kSecond, arrivals);
  }
  __syncthreads();
}

// --- __syncthreads ------------------------------------------------------------------------------

// Of two slots, one may be filled while the other one is read.
template <int slots>
void ring() {
  for (int step = 0; step < 6; ++step) {
    int* const slot = words() + step % slots * blockDim.x;
    slot[thread()] = step;
    __syncthreads();
    sink += slot[(thread() + 33) % blockDim.x];
  }
}

void both_write() { words()[thread() % 32] = 7; }

void neighbours() {
  memory[thread()] = 1;
  __syncthreads();
  if (thread() % 4 == 0) words()[thread() / 4] = 1;
  if (thread() == 1) memory[blockDim.x] = 1;
}

void overlap() {
  if (thread() == 0) words()[0] = 1;
  if (thread() == 32) memory[3] = 1;
}

// Warps may come to the block's barrier in different places.
void warps_apart() {
  words()[thread()] = 1;
  if (warp() == 0) __syncthreads();
  else __syncthreads();
  sink += words()[(thread() + 33) % blockDim.x];
}

void lanes_apart() {
  if (thread() % 2) __syncthreads();
  else __syncthreads();
}

void some_lanes() {
  if (thread() % 32 < 16) __syncthreads();
}

void one_warp() {
  if (warp() == 0) __syncthreads();
}

void one_warp_waits_elsewhere() {
  start_both(1);
  if (warp() == 0) __syncthreads();
  else wait_for_phase(kFirst, 0);
}

// --- warps --------------------------------------------------------------------------------------

template <bool waits>
void lanes_exchange() {
  words()[thread()] = 1;
  if (waits) __syncwarp();
  sink += words()[thread() ^ 1];
}

void warps_exchange() {
  words()[thread()] = 1;
  __syncwarp();
  sink += words()[thread() ^ 32];
}

void shuffle_between() {
  words()[thread()] = 1;
  sink += __shfl_xor_sync(kAllLanes, 1, 1);
  sink += words()[thread() ^ 1];
}

void some_lanes_of_a_warp() {
  if (thread() % 32 < 16) __syncwarp();
  else sink += __shfl_xor_sync(kAllLanes, 1, 1);
}

void a_lane_leaves() {
  if (thread() == 5) return;
  __syncwarp();
}

template <bool waits_before, bool waits_after>
void matrices() {
  int4* const rows = reinterpret_cast<int4*>(memory);
  rows[thread()] = {1, 2, 3, 4};
  if (waits_before) __syncwarp();
  uint32_t loaded[4];
  load_matrices(loaded, 16 * thread());
  sink += loaded[0];
  if (waits_after) __syncwarp();
  rows[thread()] = {5, 6, 7, 8};
}

// Row 1 is lane 1's own, and goes to other lanes' registers.
template <bool waits>
void odd_row_transposed() {
  if (thread() == 1) reinterpret_cast<int4*>(memory)[1] = {1, 2, 3, 4};
  if (waits) __syncwarp();
  uint32_t loaded[4];
  load_matrices_transposed(loaded, 16 * thread());
  sink += loaded[0];
}

// --- copies and barriers in shared memory -------------------------------------------------------

template <bool waits>
void own_copy() {
  start_both(blockDim.x);
  copy_async_16(16 * thread(), source, true);
  arrive_with_copies(kFirst);
  if (waits) wait_for_phase(kFirst, 0);
  sink += words()[4 * thread()];
}

void copies_of_others() {
  start_both(blockDim.x);
  copy_async_16(16 * thread(), source, true);
  arrive_with_copies(kFirst);
  wait_for_phase(kFirst, 0);
  sink += words()[4 * (thread() ^ 33)];
}

// The block's barrier does not wait for copies.
void copies_and_the_blocks_barrier() {
  start_both(blockDim.x);
  copy_async_16(16 * thread(), source, true);
  arrive_with_copies(kFirst);
  __syncthreads();
  sink += words()[4 * (thread() ^ 33)];
}

template <bool waits>
void two_copies() {
  start_both(blockDim.x);
  copy_async_16(16 * thread(), source, true);
  arrive_with_copies(kFirst);
  if (waits) wait_for_phase(kFirst, 0);
  copy_async_8(16 * thread() + 8, source, true);
  arrive_with_copies(kSecond);
  wait_for_phase(kSecond, 0);
}

// A copy that began after those that are waited for.
void later_copy() {
  start_both(blockDim.x);
  copy_async_16(16 * thread(), source, true);
  arrive_with_copies(kFirst);
  copy_async_16(16 * (blockDim.x + thread()), source, true);
  arrive_with_copies(kSecond);
  wait_for_phase(kFirst, 0);
  sink += words()[4 * (blockDim.x + thread())];
}

// What a thread read lies before the copy that another one starts thereafter, and so before all who
// wait for that copy.
void read_before_a_copy() {
  start_both(32);
  if (warp() == 0) {
    sink += words()[4 * thread()];
    arrive(kFirst);
  } else if (warp() == 1) {
    wait_for_phase(kFirst, 0);
    copy_async_16(16 * (thread() % 32), source, true);
    arrive_with_copies(kSecond);
  } else {
    wait_for_phase(kSecond, 0);
    words()[4 * (thread() % 32)] = 1;
  }
}

void copy_without_a_barrier() { copy_async_16(16 * thread(), source, true); }

// Copies that have come say nothing of what their thread wrote itself.
template <bool arrives_itself>
void written_beside_copies() {
  start_both(blockDim.x);
  words()[512 + thread()] = 1;
  copy_async_16(16 * thread(), source, true);
  arrive_with_copies(kFirst);
  if (arrives_itself) arrive(kSecond);
  wait_for_phase(kFirst, 0);
  if (arrives_itself) wait_for_phase(kSecond, 0);
  sink += words()[512 + (thread() ^ 1)];
}

// Warp 0 tells warp 1, and that tells warp 2.
void passed_on() {
  start_both(32);
  if (warp() == 0) {
    words()[thread()] = 1;
    arrive(kFirst);
  } else if (warp() == 1) {
    wait_for_phase(kFirst, 0);
    arrive(kSecond);
  } else {
    wait_for_phase(kSecond, 0);
    sink += words()[thread() % 32];
  }
}

// Warp 0 writes between two phases of a barrier; warp 1 reads after the first or the second one.
template <bool waits_for_second>
void phases() {
  start_both(32);
  if (warp() == 0) {
    arrive(kFirst);
    wait_for_phase(kSecond, 0);
    words()[thread()] = 1;
    arrive(kFirst);
  } else if (warp() == 1) {
    wait_for_phase(kFirst, 0);
    arrive(kSecond);
    if (waits_for_second) wait_for_phase(kFirst, 1);
    sink += words()[thread() % 32];
  }
}

// Warp 1 means to wait for the third phase, and takes the end of the first one for it if it looks
// before the second one ends.
void mistaken_phase() {
  start_both(1);
  if (thread() == 0) {
    for (int phase = 0; phase < 3; ++phase) {
      words()[phase] = 1;
      arrive(kFirst);
    }
  } else if (thread() == 32) {
    wait_for_phase(kFirst, 0);
    sink += words()[2];
  }
}

void barrier_starts_late() {
  if (thread() == 0) start_barrier(kFirst, blockDim.x);
  arrive(kFirst);
}

void barrier_waits_for_nobody() {
  start_both(blockDim.x + 1);
  arrive(kFirst);
  wait_for_phase(kFirst, 0);
}

const std::map<std::string, void (*)()> bodies = {
    {"ring of one slot", ring<1>},
    {"ring of two slots", ring<2>},
    {"both write", both_write},
    {"neighbours", neighbours},
    {"overlap", overlap},
    {"warps apart", warps_apart},
    {"lanes apart", lanes_apart},
    {"some lanes", some_lanes},
    {"one warp", one_warp},
    {"one warp waits elsewhere", one_warp_waits_elsewhere},
    {"lanes exchange", lanes_exchange<true>},
    {"lanes exchange at once", lanes_exchange<false>},
    {"warps exchange", warps_exchange},
    {"shuffle between", shuffle_between},
    {"some lanes of a warp", some_lanes_of_a_warp},
    {"a lane leaves", a_lane_leaves},
    {"matrices", matrices<true, true>},
    {"matrices at once", matrices<false, true>},
    {"matrices overwritten", matrices<true, false>},
    {"odd row transposed", odd_row_transposed<true>},
    {"odd row transposed at once", odd_row_transposed<false>},
    {"own copy", own_copy<true>},
    {"own copy at once", own_copy<false>},
    {"copies of others", copies_of_others},
    {"copies and the block's barrier", copies_and_the_blocks_barrier},
    {"two copies", two_copies<true>},
    {"two copies at once", two_copies<false>},
    {"later copy", later_copy},
    {"read before a copy", read_before_a_copy},
    {"copy without a barrier", copy_without_a_barrier},
    {"written beside copies", written_beside_copies<true>},
    {"written beside copies that arrive", written_beside_copies<false>},
    {"passed on", passed_on},
    {"first phase", phases<false>},
    {"second phase", phases<true>},
    {"mistaken phase", mistaken_phase},
    {"barrier starts late", barrier_starts_late},
    {"barrier waits for nobody", barrier_waits_for_nobody},
};

void run(const void* name) {
  void (*const body)() = bodies.at(static_cast<const char*>(name));
  run_kernel({2}, 96, body);
}

}  // namespace
}  // namespace megatron_nuwa

extern "C" MEGATRON_NUWA_EXPORTED const char* run_body(const char* name, uint32_t pace) {
  megatron_nuwa::set_pace(pace);
  return megatron_nuwa::failure_of(megatron_nuwa::run, name);
}

extern "C" MEGATRON_NUWA_EXPORTED void to_fp16_and_back(float* numbers, int64_t count) {
  using namespace megatron_nuwa;
  for (int64_t i = 0; i < count; ++i) numbers[i] = widen(rounded<fp16>(numbers[i]));
}
