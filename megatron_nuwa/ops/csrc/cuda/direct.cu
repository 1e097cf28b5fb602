#include "launch.h"

namespace megatron_nuwa {

namespace {

// Blocks of eight warps for so many warps; 0 where a grid cannot hold them.
unsigned blocks_for(int64_t warps) {
  const int64_t blocks = (warps + kDirectWarps - 1) / kDirectWarps;
  return blocks > INT32_MAX ? 0 : static_cast<unsigned>(blocks);
}

}  // namespace

template <int size>
cudaError_t launch_direct_forward(const DirectForward& arguments, const RowTables& tables,
                                  cudaStream_t stream) {
  const unsigned blocks = blocks_for(arguments.problem.rows);
  direct_forward<size><<<blocks, 32 * kDirectWarps, 0, stream>>>(arguments, tables);
  return cudaGetLastError();
}

template <int size, bool mirrored>
cudaError_t launch_direct_backward(const DirectBackward& arguments, const RowTables& tables,
                                   cudaStream_t stream) {
  const unsigned blocks = blocks_for(arguments.problem.rows);
  direct_backward<size, mirrored><<<blocks, 32 * kDirectWarps, 0, stream>>>(arguments, tables);
  return cudaGetLastError();
}

template <int size>
cudaError_t launch_statistics(const Statistics& arguments, cudaStream_t stream) {
  constexpr int kRowsAWarp = 32 / (size / 8);
  const unsigned blocks = blocks_for((arguments.rows + kRowsAWarp - 1) / kRowsAWarp);
  query_statistics<size><<<blocks, 32 * kDirectWarps, 0, stream>>>(arguments);
  return cudaGetLastError();
}

#define MEGATRON_NUWA_INSTANTIATE(size)                                                         \
  template cudaError_t launch_direct_forward<size>(const DirectForward&, const RowTables&,      \
                                                   cudaStream_t);                               \
  template cudaError_t launch_direct_backward<size, false>(const DirectBackward&,               \
                                                           const RowTables&, cudaStream_t);     \
  template cudaError_t launch_direct_backward<size, true>(const DirectBackward&,                \
                                                          const RowTables&, cudaStream_t);      \
  template cudaError_t launch_statistics<size>(const Statistics&, cudaStream_t)

MEGATRON_NUWA_INSTANTIATE(32);
MEGATRON_NUWA_INSTANTIATE(64);
MEGATRON_NUWA_INSTANTIATE(128);

}  // namespace megatron_nuwa
