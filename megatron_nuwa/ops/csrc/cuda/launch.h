// How the library starts kernels; each is instantiated in a source file of its own kind, so that
// they compile side by side.
#pragma once

#include <cuda_runtime.h>

#include "backward.cuh"
#include "direct.cuh"
#include "forward.cuh"

namespace megatron_nuwa {

// Starts blocks of threads for all teams of the schedule, which are as many as the device holds at
// once. `is_large`: is its compute capability 9.0, for which the tables must have been made?
template <class Pass>
cudaError_t launch(const typename Pass::Arguments& arguments, const Tables& tables, bool is_large,
                   cudaStream_t stream);

template <int size>
cudaError_t launch_direct_forward(const DirectForward& arguments, const RowTables& tables,
                                  cudaStream_t stream);

template <int size, bool mirrored>
cudaError_t launch_direct_backward(const DirectBackward& arguments, const RowTables& tables,
                                   cudaStream_t stream);

template <int size>
cudaError_t launch_statistics(const Statistics& arguments, cudaStream_t stream);

}  // namespace megatron_nuwa
