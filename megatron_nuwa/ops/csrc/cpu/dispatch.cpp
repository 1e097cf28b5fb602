#include "kernels.h"

namespace megatron_nuwa {

InstructionSet best_instruction_set() {
#if defined(MEGATRON_NUWA_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? InstructionSet::avx512 : InstructionSet::avx2;
  }
#endif
  return InstructionSet::generic;
}

Kernels kernels(InstructionSet set, ElementType type) {
#if defined(MEGATRON_NUWA_X86)
  if (set == InstructionSet::avx512) return avx512_kernels(type);
  if (set == InstructionSet::avx2) return avx2_kernels(type);
#endif
  return generic_kernels(type);
}

int64_t scratch_bytes(int64_t longest, int64_t head_dim) {
  // The most that one kernel takes: two sets of four rows, a list, two sets of four scores and two
  // numbers a neighbour.
  const int64_t floats = 2 * kBlockRows * head_dim + longest * (1 + 2 * kBlockRows + 2);
  return (floats * 4 + 63) / 64 * 64;
}

}  // namespace megatron_nuwa
