// The body of launch(), for the files that instantiate it.
#pragma once

#include "launch.h"

namespace megatron_nuwa {

template <class Pass>
cudaError_t launch(const typename Pass::Arguments& arguments, const Tables& tables, int64_t blocks,
                   int64_t batch, cudaStream_t stream) {
  const int64_t heads = arguments.problem.heads;
  if (blocks > INT32_MAX || heads > UINT16_MAX || batch > UINT16_MAX)
    return cudaErrorInvalidConfiguration;
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  const int bytes = major < 9 ? Memory<Pass, false>::kBytes : Memory<Pass, true>::kBytes;
  if (error == cudaSuccess)
    error = cudaFuncSetAttribute(walk<Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  constexpr int kThreads = Shape<Pass>::kThreads;
  const dim3 grid(blocks, heads, batch);
  walk<Pass><<<grid, kThreads, bytes, stream>>>(arguments, tables);
  return cudaGetLastError();
}

#define MEGATRON_NUWA_INSTANTIATE(...)                                                    \
  template cudaError_t launch<__VA_ARGS__>(const typename __VA_ARGS__::Arguments&,        \
                                           const Tables&, int64_t, int64_t, cudaStream_t)

}  // namespace megatron_nuwa
