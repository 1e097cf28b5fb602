// The CPU operators as PyTorch sees them, on its stable ABI. They check all that keeps the kernels
// within bounds; the friendly messages about arguments are the Python side's.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <optional>

#include "kernels.h"

namespace megatron_nuwa {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlocksAnItem = 16;  // enough to hide the cost of taking an item

void check(bool fits, const char* what) { STD_TORCH_CHECK(fits, "nearby attention: ", what); }

void check_tensor(const Tensor& tensor, ScalarType type, int64_t numel) {
  check(tensor.is_cpu(), "a tensor is not on the CPU");
  check(tensor.scalar_type() == type, "a tensor has the wrong dtype");
  check(tensor.is_contiguous(), "a tensor is not contiguous");
  check(tensor.numel() == numel, "a tensor has the wrong shape");
}

// A table as one int32 tensor: the number of blocks, rows, starts, counts, entries.
BlockTable checked_table(const Tensor& packed, int64_t rows, int64_t neighbours) {
  const int64_t numel = packed.numel();
  check_tensor(packed, ScalarType::Int, numel);
  check(numel > 0, "a table is empty");
  const int32_t* data = packed.const_data_ptr<int32_t>();
  const int64_t blocks = data[0];
  const int64_t entries = numel - (blocks * (kBlockRows + 2) + 2);
  check(blocks >= 0 && entries >= 0, "a table is too short");
  BlockTable result{blocks, 0, data + 1, nullptr, nullptr, nullptr};
  result.starts = result.rows + blocks * kBlockRows;
  result.counts = result.starts + blocks + 1;
  result.entries = result.counts + blocks;
  for (int64_t i = 0; i < blocks * kBlockRows; ++i)
    check(result.rows[i] >= -1 && result.rows[i] < rows, "a table row is out of bounds");
  check(result.starts[0] >= 0 && result.starts[blocks] <= entries,
        "a table list is out of bounds");
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t padded = int64_t{result.starts[b + 1]} - result.starts[b];
    check(padded >= 0 && padded % kListPadding == 0 && result.counts[b] >= 0 &&
              result.counts[b] <= padded,
          "a table list is malformed");
    result.longest = padded > result.longest ? padded : result.longest;
  }
  int32_t lowest = 0, highest = 0;
  for (int64_t i = result.starts[0]; i < result.starts[blocks]; ++i) {
    lowest = result.entries[i] < lowest ? result.entries[i] : lowest;
    highest = result.entries[i] > highest ? result.entries[i] : highest;
  }
  check(lowest >= 0 && (highest >> kEntryBits) < neighbours, "a table entry is out of bounds");
  return result;
}

// Runs a kernel for every block of every head, on PyTorch's own threads. Threads take items as
// they come free; what an item computes does not depend on who takes it.
void run(BlockKernel kernel, const Call& call, const BlockTable& table) {
  const int64_t chunks = (table.blocks + kBlocksAnItem - 1) / kBlocksAnItem;
  const int64_t items = call.batch * chunks * call.heads;
  const int64_t bytes = scratch_bytes(table.longest, call.head_dim);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes),
                                                             &std::free);
    check(scratch != nullptr, "out of memory");
    for (int64_t item = next++; item < items; item = next++) {
      const int64_t head = item % call.heads;
      const int64_t first = item / call.heads % chunks * kBlocksAnItem;
      const int64_t batch = item / call.heads / chunks;
      const int64_t last =
          first + kBlocksAnItem < table.blocks ? first + kBlocksAnItem : table.blocks;
      for (int64_t block = first; block < last; ++block)
        kernel(call, table, batch, head, block, scratch.get());
    }
  };
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads < items ? threads : items, 1, work);
}

ElementType element_type(const Tensor& tensor) {
  const bool is_float = tensor.scalar_type() == ScalarType::Float;
  const bool is_known = is_float || tensor.scalar_type() == ScalarType::BFloat16;
  check(is_known, "dtype is not float32 or bfloat16");
  return is_float ? ElementType::float32 : ElementType::bfloat16;
}

Kernels chosen_kernels(int64_t instruction_set, const Tensor& query) {
  check(instruction_set >= 0 && instruction_set <= static_cast<int64_t>(best_instruction_set()),
        "this CPU has not the instruction set");
  return kernels(static_cast<InstructionSet>(instruction_set), element_type(query));
}

Call checked_call(const Tensor& query, const Tensor& key, const Tensor& value,
                  const std::optional<Tensor>& mask, const Tensor& log_sum, double scale) {
  check(query.dim() == 4 && key.dim() == 4, "tensors must have 4 dimensions");
  Call call{};
  call.batch = query.size(0);
  call.tokens = query.size(1);
  call.heads = query.size(2);
  call.head_dim = query.size(3);
  call.context_tokens = key.size(1);
  call.scale = static_cast<float>(scale);
  check(call.head_dim % 16 == 0, "head_dim must be a multiple of 16");
  const ScalarType type = query.scalar_type();
  const int64_t row = call.batch * call.heads * call.head_dim;
  check_tensor(query, type, row * call.tokens);
  check_tensor(key, type, row * call.context_tokens);
  check_tensor(value, type, row * call.context_tokens);
  check_tensor(log_sum, ScalarType::Float, call.batch * call.heads * call.tokens);
  if (mask) check_tensor(*mask, ScalarType::Bool, call.batch * call.context_tokens);
  call.query = query.const_data_ptr();
  call.key = key.const_data_ptr();
  call.value = value.const_data_ptr();
  call.context_mask = mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr;
  call.log_sum = static_cast<float*>(log_sum.mutable_data_ptr());
  return call;
}

void cpu_forward(const Tensor& query, const Tensor& key, const Tensor& value,
                 std::optional<Tensor> mask, Tensor output, Tensor log_sum, const Tensor& keys_of,
                 double scale, int64_t instruction_set) {
  Call call = checked_call(query, key, value, mask, log_sum, scale);
  check_tensor(output, query.scalar_type(), query.numel());
  call.output = output.mutable_data_ptr();
  const BlockTable table = checked_table(keys_of, call.tokens, call.context_tokens);
  run(chosen_kernels(instruction_set, query).forward, call, table);
}

void cpu_backward(const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value,
                  std::optional<Tensor> mask, const Tensor& log_sum, Tensor grad_query,
                  Tensor grad_key, Tensor grad_value, Tensor row_product,
                  const Tensor& keys_of, const Tensor& queries_of, double scale,
                  int64_t instruction_set) {
  Call call = checked_call(query, key, value, mask, log_sum, scale);
  check_tensor(grad, query.scalar_type(), query.numel());
  check_tensor(grad_query, query.scalar_type(), query.numel());
  check_tensor(grad_key, query.scalar_type(), key.numel());
  check_tensor(grad_value, query.scalar_type(), key.numel());
  check_tensor(row_product, ScalarType::Float, log_sum.numel());
  call.grad = grad.const_data_ptr();
  call.row_product = static_cast<float*>(row_product.mutable_data_ptr());
  call.grad_query = grad_query.mutable_data_ptr();
  call.grad_key = grad_key.mutable_data_ptr();
  call.grad_value = grad_value.mutable_data_ptr();
  const Kernels chosen = chosen_kernels(instruction_set, query);
  const BlockTable keys = checked_table(keys_of, call.tokens, call.context_tokens);
  const BlockTable queries = checked_table(queries_of, call.context_tokens, call.tokens);
  run(chosen.backward_query, call, keys);
  run(chosen.backward_key_value, call, queries);
}

int64_t cpu_best_instruction_set() { return static_cast<int64_t>(best_instruction_set()); }

STABLE_TORCH_LIBRARY_FRAGMENT(megatron_nuwa_native, m) {
  m.def(
      "cpu_forward(Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor(a!) output, "
      "Tensor(b!) log_sum, Tensor keys_of, float scale, int instruction_set) -> ()");
  m.def(
      "cpu_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? mask, "
      "Tensor log_sum, Tensor(a!) grad_query, Tensor(b!) grad_key, "
      "Tensor(c!) grad_value, Tensor(d!) row_product, Tensor keys_of, Tensor queries_of, "
      "float scale, int instruction_set) -> ()");
  m.def("cpu_best_instruction_set() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nuwa_native, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}

STABLE_TORCH_LIBRARY_IMPL(megatron_nuwa_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_best_instruction_set", TORCH_BOX(&cpu_best_instruction_set));
}

}  // namespace
}  // namespace megatron_nuwa
