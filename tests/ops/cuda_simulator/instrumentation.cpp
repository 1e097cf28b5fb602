// What GCC's and Clang's -fsanitize=thread makes of the kernels' own loads and stores: calls of the
// functions below, which the sanitizer's library would hold, and which hold them here against the
// rules of a CUDA block. The library is not linked.
#include "races.h"
#include "simulated_device.h"

using megatron_nuwa::kSharedBytesLimit;
using megatron_nuwa::memory;
namespace races = megatron_nuwa::races;

namespace {

bool is_shared(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(memory) <
         kSharedBytesLimit;
}

}  // namespace

#define MEGATRON_NUWA_CALLBACK extern "C" void

#define MEGATRON_NUWA_ACCESS(name, act, bytes)                                    \
  MEGATRON_NUWA_CALLBACK __tsan_##name##bytes(void* address) {                    \
    if (is_shared(address))                                                       \
      act(megatron_nuwa::shared_address(address), bytes, __builtin_return_address(0)); \
  }

#define MEGATRON_NUWA_ACCESSES(bytes)                          \
  MEGATRON_NUWA_ACCESS(read, races::read, bytes)               \
  MEGATRON_NUWA_ACCESS(write, races::write, bytes)             \
  MEGATRON_NUWA_ACCESS(unaligned_read, races::read, bytes)     \
  MEGATRON_NUWA_ACCESS(unaligned_write, races::write, bytes)

MEGATRON_NUWA_ACCESSES(1)
MEGATRON_NUWA_ACCESSES(2)
MEGATRON_NUWA_ACCESSES(4)
MEGATRON_NUWA_ACCESSES(8)
MEGATRON_NUWA_ACCESSES(16)

MEGATRON_NUWA_CALLBACK __tsan_read_range(void* address, size_t bytes) {
  if (is_shared(address))
    races::read(megatron_nuwa::shared_address(address), bytes, __builtin_return_address(0));
}
MEGATRON_NUWA_CALLBACK __tsan_write_range(void* address, size_t bytes) {
  if (is_shared(address))
    races::write(megatron_nuwa::shared_address(address), bytes, __builtin_return_address(0));
}

// Nothing that kernels have in shared memory.
MEGATRON_NUWA_CALLBACK __tsan_vptr_read(void*) {}
MEGATRON_NUWA_CALLBACK __tsan_vptr_update(void*, void*) {}
MEGATRON_NUWA_CALLBACK __tsan_func_entry(void*) {}
MEGATRON_NUWA_CALLBACK __tsan_func_exit() {}
MEGATRON_NUWA_CALLBACK __tsan_init() {}
