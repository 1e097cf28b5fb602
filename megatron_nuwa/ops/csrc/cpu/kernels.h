// What a caller of the CPU kernels has to know; free of PyTorch, so that a plain C++ program can
// run them under a sanitizer.
#pragma once

#include <cstdint>

namespace megatron_nuwa {

constexpr int kBlockRows = 4;   // rows of a block: queries (or keys) that share one neighbour list
constexpr int kListPadding = 16;  // the length of every neighbour list is a multiple of this
constexpr int kEntryBits = 4;   // low bits of an entry: which rows of the block see the neighbour

// The sparsity of the operator. A block is up to four rows and one list of entries; an entry is
// neighbour << kEntryBits | visibility. Lists are padded with entries that no row sees.
struct BlockTable {
  int64_t blocks;
  int64_t longest;         // entries of the longest list, padding included
  const int32_t* rows;     // (blocks, kBlockRows), -1 where a block has fewer rows
  const int32_t* starts;   // (blocks + 1,) multiples of kListPadding
  const int32_t* counts;   // (blocks,) entries without padding
  const int32_t* entries;  // (starts[blocks],)
};

// All tensors are contiguous, (batch, tokens, heads, head_dim) in the kernel's element type;
// log_sum and row_product are float (batch, heads, tokens). head_dim is a multiple of 16.
struct Call {
  const void* query;
  const void* key;
  const void* value;
  const bool* context_mask;  // (batch, context_tokens), or null
  void* output;
  float* log_sum;

  // For the backward kernels only. `row_product` is a query's sum of weight * (grad . value), which
  // equals grad . output but has not the output's rounding; the first pass writes it.
  const void* grad;  // of the output
  float* row_product;
  void* grad_query;
  void* grad_key;
  void* grad_value;

  int64_t batch, tokens, context_tokens, heads, head_dim;
  float scale;
};

// One block of one head of one batch row. `scratch` is aligned to 64 bytes and belongs to the
// calling thread: scratch_bytes(...) of it.
using BlockKernel = void (*)(const Call&, const BlockTable&, int64_t batch, int64_t head,
                             int64_t block, void* scratch);

struct Kernels {
  BlockKernel forward;             // walks the keys of each query
  BlockKernel backward_query;      // the same walk: row_product and grad_query
  BlockKernel backward_key_value;  // walks the queries of each key: grad_key and grad_value
};

enum class InstructionSet : int64_t { generic = 0, avx2 = 1, avx512 = 2 };
enum class ElementType : int64_t { float32 = 0, bfloat16 = 1 };

// Kernels of an instruction set that `best_instruction_set` is at least equal to.
Kernels kernels(InstructionSet, ElementType);
InstructionSet best_instruction_set();
int64_t scratch_bytes(int64_t longest, int64_t head_dim);

// One translation unit each, with its own compiler flags.
Kernels generic_kernels(ElementType);
Kernels avx2_kernels(ElementType);
Kernels avx512_kernels(ElementType);

}  // namespace megatron_nuwa
