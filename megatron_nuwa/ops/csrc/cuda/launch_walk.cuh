// The body of launch(), for the files that instantiate it.
#pragma once

#include <algorithm>

#include "launch.h"

namespace megatron_nuwa {

template <class Pass, bool is_large>
cudaError_t launch_on(const typename Pass::Arguments& arguments, const Tables& tables,
                      int64_t processors, cudaStream_t stream) {
  using S = Shape<Pass, is_large>;
  const Problem& problem = arguments.problem;
  const int64_t items = static_cast<int64_t>(tables.blocks) * problem.heads * problem.batch;
  // The number of an item after the last one must fit as well.
  if (items + processors * S::kBlocks * S::kTeams > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kBytes = Memory<Pass, is_large>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(walk<Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const int64_t blocks = std::min(items, processors * S::kBlocks);
  walk<Pass><<<blocks, S::kThreads, kBytes, stream>>>(arguments, tables);
  return cudaGetLastError();
}

template <class Pass>
cudaError_t launch(const typename Pass::Arguments& arguments, const Tables& tables,
                   cudaStream_t stream) {
  int device = 0, major = 0, processors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  return major < 9 ? launch_on<Pass, false>(arguments, tables, processors, stream)
                   : launch_on<Pass, true>(arguments, tables, processors, stream);
}

#define MEGATRON_NUWA_INSTANTIATE(...)                                                    \
  template cudaError_t launch<__VA_ARGS__>(const typename __VA_ARGS__::Arguments&,        \
                                           const Tables&, cudaStream_t)

}  // namespace megatron_nuwa
