// The body of launch(), for the files that instantiate it.
#pragma once

#include "launch.h"

namespace megatron_nuwa {

template <class Pass>
cudaError_t launch(const typename Pass::Arguments& arguments, const Tables& tables, int64_t images,
                   cudaStream_t stream) {
  const int64_t blocks = images * tables.blocks;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kBytes = Memory<Pass>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(walk<Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  walk<Pass><<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(arguments, tables);
  return cudaGetLastError();
}

#define MEGATRON_NUWA_INSTANTIATE(...)                                                    \
  template cudaError_t launch<__VA_ARGS__>(const typename __VA_ARGS__::Arguments&,        \
                                           const Tables&, int64_t, cudaStream_t)

}  // namespace megatron_nuwa
