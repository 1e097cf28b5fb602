#include "launch_walk.cuh"

namespace megatron_nuwa {
MEGATRON_NUWA_INSTANTIATE(Forward<fp16, 32>);
MEGATRON_NUWA_INSTANTIATE(Forward<fp16, 64>);
MEGATRON_NUWA_INSTANTIATE(Forward<fp16, 128>);
}  // namespace megatron_nuwa
