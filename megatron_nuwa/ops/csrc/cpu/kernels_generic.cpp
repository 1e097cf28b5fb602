#include "block_kernels.h"

namespace megatron_nuwa {

Kernels generic_kernels(ElementType type) { return kernels_of(type); }

}  // namespace megatron_nuwa
