#include "launch_walk.cuh"

namespace megatron_nuwa {
MEGATRON_NUWA_INSTANTIATE(Backward<bf16, 32, false>);
MEGATRON_NUWA_INSTANTIATE(Backward<bf16, 64, false>);
MEGATRON_NUWA_INSTANTIATE(Backward<bf16, 128, false>);
MEGATRON_NUWA_INSTANTIATE(Backward<bf16, 32, true>);
MEGATRON_NUWA_INSTANTIATE(Backward<bf16, 64, true>);
MEGATRON_NUWA_INSTANTIATE(Backward<bf16, 128, true>);
}  // namespace megatron_nuwa
