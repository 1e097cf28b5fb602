// The operators of _native_cuda.so, on PyTorch's stable ABI: check, allocate, launch.
//
// Inputs are contiguous (batch, tokens, heads, size). Fake tensors, gradients and the choice of
// tables are Python's part.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "launch.h"

// PyTorch without CUDA lacks this; weak, so that the library can be loaded and looked at there.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(
    int32_t device_index, void** stream);

namespace megatron_nuwa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this PyTorch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
}

template <class T>
const T* read(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* written(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

void check_like(const char* name, const Tensor& tensor, const Tensor& like, int64_t tokens) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.is_contiguous(), name,
                  " must be contiguous (batch, tokens, heads, size)");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, " must have the query's dtype");
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), name,
                  " must be on the query's device");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, name,
                  " must be aligned to 16 bytes");
  for (int axis : {0, 2, 3})
    STD_TORCH_CHECK(tensor.size(axis) == like.size(axis), name,
                    " must have the query's batch, heads and size");
  STD_TORCH_CHECK(tensor.size(1) == tokens && tokens < INT32_MAX, name, " must have ", tokens,
                  " tokens");
}

// The tensors of one call, and what is the same for all its kernels.
struct Call {
  const Tensor &query, &key, &value;
  const bool* context_mask = nullptr;
  int64_t batch, queries, keys, heads;
  double scale;
  cudaStream_t stream;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& mask,
       double scale)
      : query(query), key(key), value(value), batch(query.size(0)), queries(query.size(1)),
        keys(key.size(1)), heads(query.size(2)), scale(scale), stream(current_stream(query)) {
    check_like("query", query, query, queries);
    STD_TORCH_CHECK(heads * query.size(3) < INT32_MAX / 4, "query has too many heads");
    // Kernels count 16 bytes of one batch item at a time, in 32 bits.
    STD_TORCH_CHECK(
        batch < INT32_MAX && std::max(queries, keys) * heads * query.size(3) < int64_t{1} << 34,
        "query, key and value are too large");
    check_like("key", key, query, keys);
    check_like("value", value, query, keys);
    if (!mask) return;
    STD_TORCH_CHECK(mask->is_cuda() && mask->scalar_type() == ScalarType::Bool &&
                        mask->is_contiguous() && mask->numel() == batch * keys,
                    "context_mask must be contiguous bool (batch, context tokens) on the device");
    context_mask = read<bool>(*mask);
  }

  Problem problem(bool mirrored) const {
    return {static_cast<int32_t>(batch), static_cast<int32_t>(heads),
            static_cast<int32_t>(mirrored ? keys : queries),
            static_cast<int32_t>(mirrored ? queries : keys), static_cast<float>(scale),
            context_mask};
  }

  DirectProblem direct_problem(bool mirrored) const {
    const Problem same = problem(mirrored);
    return {same.heads, same.row_tokens, same.column_tokens, batch * heads * same.row_tokens,
            same.scale, context_mask};
  }
};

void check_tables(const std::vector<Tensor>& tables, size_t count) {
  STD_TORCH_CHECK(tables.size() == count, "expected ", count, " tables, not ", tables.size());
  for (const Tensor& table : tables)
    STD_TORCH_CHECK(table.is_cuda() && table.is_contiguous(), "tables must be on the device");
}

bool has_large_memory() {
  int device = 0, major = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

template <class S>
Tables tables_of(const std::vector<Tensor>& tables, const Problem& problem) {
  constexpr int64_t warps = S::kWarps, chunk = S::kChunk;
  check_tables(tables, 7);
  const int64_t blocks = tables[0].numel() - 1, chunks = tables[4].numel() / warps;
  for (const Tensor& table : tables)
    STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int, "a table is not int32");
  STD_TORCH_CHECK(tables[1].numel() == chunks * chunk &&
                      tables[2].numel() == blocks * warps * kTileRows &&
                      tables[3].numel() == blocks * warps &&
                      tables[4].numel() == chunks * warps &&
                      tables[5].numel() % kGroup == 0,
                  "tables do not fit each other or the head size");
  const Tensor& schedule = tables[6];
  STD_TORCH_CHECK(schedule.dim() == 2 && schedule.numel() < INT32_MAX &&
                      schedule.numel() >= blocks * problem.heads * problem.batch &&
                      schedule.size(1) > 0 && schedule.size(1) % S::kTeams == 0,
                  "the schedule does not fit the tables, the heads or the batch");
  return {read<int32_t>(tables[0]), read<int32_t>(tables[1]), read<int32_t>(tables[2]),
          read<int32_t>(tables[3]), read<int32_t>(tables[4]), read<uint32_t>(tables[5]),
          read<uint32_t>(schedule), static_cast<int32_t>(blocks),
          static_cast<int32_t>(schedule.size(1))};
}

RowTables row_tables_of(const std::vector<Tensor>& tables, int64_t rows) {
  check_tables(tables, 2);
  STD_TORCH_CHECK(tables[0].scalar_type() == ScalarType::Long && tables[0].numel() == rows + 1 &&
                      tables[1].scalar_type() == ScalarType::Int,
                  "tables do not fit the tokens");
  return {read<int64_t>(tables[0]), read<int32_t>(tables[1])};
}

template <class Pass>
void walk_with(const Call& call, const std::vector<Tensor>& tables,
               const typename Pass::Arguments& arguments) {
  // This runs on the CPU, where the kernels' own idea of the device's size is of no use.
  const bool is_large = has_large_memory();
  const Tables walked = is_large ? tables_of<Shape<Pass, true>>(tables, arguments.problem)
                                 : tables_of<Shape<Pass, false>>(tables, arguments.problem);
  check(launch<Pass>(arguments, walked, is_large, call.stream));
}

template <class T, int size>
struct Kernels {
  static void forward(const Call& call, const std::vector<Tensor>& tables, const Tensor& output,
                      const Tensor& log_sum) {
    walk_with<Forward<T, size>>(
        call, tables,
        {call.problem(false), {read<T>(call.query)}, {read<T>(call.key), read<T>(call.value)},
         written<T>(output), written<float>(log_sum)});
  }

  static void backward(const Call& call, const std::vector<Tensor>& tables,
                       const std::vector<Tensor>& mirrored, const Tensor& grad,
                       const Tensor& output, const Tensor& log_sum, const Tensor& statistics,
                       const Tensor (&grads)[3]) {
    const T *query = read<T>(call.query), *key = read<T>(call.key), *value = read<T>(call.value);
    float2* of_query = written<float2>(statistics);
    walk_with<Backward<T, size, false>>(
        call, tables,
        {call.problem(false), {query, read<T>(grad), read<T>(output)}, {key, value}, of_query,
         {written<T>(grads[0])}, read<float>(log_sum)});
    walk_with<Backward<T, size, true>>(
        call, mirrored,
        {call.problem(true), {key, value}, {query, read<T>(grad)}, of_query,
         {written<T>(grads[1]), written<T>(grads[2])}, nullptr});
  }
};

template <int size>
struct Kernels<float, size> {
  static void forward(const Call& call, const std::vector<Tensor>& tables, const Tensor& output,
                      const Tensor& log_sum) {
    check(launch_direct_forward<size>(
        {call.direct_problem(false), read<float>(call.query), read<float>(call.key),
         read<float>(call.value), written<float>(output), written<float>(log_sum)},
        row_tables_of(tables, call.queries), call.stream));
  }

  static void backward(const Call& call, const std::vector<Tensor>& tables,
                       const std::vector<Tensor>& mirrored, const Tensor& grad,
                       const Tensor& output, const Tensor& log_sum, const Tensor& statistics,
                       const Tensor (&grads)[3]) {
    const float *query = read<float>(call.query), *key = read<float>(call.key);
    const float *value = read<float>(call.value), *change = read<float>(grad);
    float2* of_query = written<float2>(statistics);
    check(launch_statistics<size>(
        {change, read<float>(output), read<float>(log_sum), of_query,
         call.batch * call.queries * call.heads, static_cast<int32_t>(call.queries),
         static_cast<int32_t>(call.heads)},
        call.stream));
    check(launch_direct_backward<size, false>(
        {call.direct_problem(false), {query, change}, {key, value}, of_query,
         {written<float>(grads[0]), nullptr}},
        row_tables_of(tables, call.queries), call.stream));
    check(launch_direct_backward<size, true>(
        {call.direct_problem(true), {key, value}, {query, change}, of_query,
         {written<float>(grads[1]), written<float>(grads[2])}},
        row_tables_of(mirrored, call.keys), call.stream));
  }
};

// Call `run` with the type and head size of a tensor as template arguments.
template <class Run>
void dispatch(const Tensor& tensor, const Run& run) {
  const auto with_size = [&]<class T>() {
    switch (tensor.size(3)) {
      case 32: return run.template operator()<T, 32>();
      case 64: return run.template operator()<T, 64>();
      case 128: return run.template operator()<T, 128>();
      default: STD_TORCH_CHECK(false, "head size must be 32, 64 or 128, not ", tensor.size(3));
    }
  };
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return with_size.template operator()<float>();
    case ScalarType::BFloat16: return with_size.template operator()<bf16>();
    case ScalarType::Half: return with_size.template operator()<fp16>();
    default: STD_TORCH_CHECK(false, "dtype must be float32, bfloat16 or float16");
  }
}

std::tuple<Tensor, Tensor> forward(Tensor query, Tensor key, Tensor value, OptionalTensor mask,
                                   std::vector<Tensor> tables, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Call call(query, key, value, mask, scale);
  Tensor output = torch::stable::empty_like(query);
  Tensor log_sum = torch::stable::new_empty(query, {call.batch, call.heads, call.queries},
                                            ScalarType::Float);
  if (query.numel() > 0)
    dispatch(query, [&]<class T, int size>() {
      Kernels<T, size>::forward(call, tables, output, log_sum);
    });
  return {output, log_sum};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor query, Tensor key, Tensor value,
                                            OptionalTensor mask, Tensor output, Tensor log_sum,
                                            std::vector<Tensor> tables,
                                            std::vector<Tensor> mirrored, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(query.get_device_index());
  const Call call(query, key, value, mask, scale);
  check_like("grad", grad, query, call.queries);
  check_like("output", output, query, call.queries);
  STD_TORCH_CHECK(log_sum.is_cuda() && log_sum.is_contiguous() &&
                      log_sum.scalar_type() == ScalarType::Float &&
                      log_sum.numel() == call.batch * call.heads * call.queries,
                  "log_sum must be contiguous float32 (batch, heads, tokens) on the device");
  const Tensor grads[3] = {torch::stable::empty_like(query), torch::stable::empty_like(key),
                           torch::stable::empty_like(value)};
  if (query.numel() > 0)
    dispatch(query, [&]<class T, int size>() {
      const Tensor statistics = torch::stable::new_empty(
          log_sum, {call.batch, call.heads, call.queries, 2}, ScalarType::Float);
      Kernels<T, size>::backward(call, tables, mirrored, grad, output, log_sum, statistics, grads);
    });
  return {grads[0], grads[1], grads[2]};
}

}  // namespace
}  // namespace megatron_nuwa

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nuwa_native, library) {
  library.def(
      "cuda_forward(Tensor query, Tensor key, Tensor value, Tensor? context_mask, Tensor[] tables, "
      "float scale) -> (Tensor, Tensor)");
  library.def(
      "cuda_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? context_mask, "
      "Tensor output, Tensor log_sum, Tensor[] tables, Tensor[] mirrored_tables, float scale) -> "
      "(Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nuwa_native, CUDA, library) {
  library.impl("cuda_forward", TORCH_BOX(&megatron_nuwa::forward));
  library.impl("cuda_backward", TORCH_BOX(&megatron_nuwa::backward));
}
