#include "block_kernels.h"

namespace megatron_nuwa {

Kernels avx512_kernels(ElementType type) { return kernels_of(type); }

}  // namespace megatron_nuwa
