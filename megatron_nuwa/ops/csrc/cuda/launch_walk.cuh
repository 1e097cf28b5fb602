// The body of launch(), for the files that instantiate it.
#pragma once

#include "launch.h"

namespace megatron_nuwa {

template <class Pass, bool is_large>
cudaError_t launch_on(const typename Pass::Arguments& arguments, const Tables& tables,
                      cudaStream_t stream) {
  using S = Shape<Pass, is_large>;
  constexpr int kBytes = Memory<Pass, is_large>::kBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(walk<Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  walk<Pass><<<tables.teams / S::kTeams, S::kThreads, kBytes, stream>>>(arguments, tables);
  return cudaGetLastError();
}

template <class Pass>
cudaError_t launch(const typename Pass::Arguments& arguments, const Tables& tables, bool is_large,
                   cudaStream_t stream) {
  return is_large ? launch_on<Pass, true>(arguments, tables, stream)
                  : launch_on<Pass, false>(arguments, tables, stream);
}

#define MEGATRON_NUWA_INSTANTIATE(...)                                                    \
  template cudaError_t launch<__VA_ARGS__>(const typename __VA_ARGS__::Arguments&,        \
                                           const Tables&, bool, cudaStream_t)

}  // namespace megatron_nuwa
