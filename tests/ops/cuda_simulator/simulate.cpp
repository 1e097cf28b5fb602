// The kernels of csrc/cuda as plain functions, run on a simulated device.
//
// Every tensor is copied to pages that end, or begin, at one that may not be touched: a read or
// write past it ends the process.
#define MEGATRON_NUWA_SIMULATED
#include "backward.cuh"
#include "direct.cuh"
#include "forward.cuh"

#include <vector>

#include <sys/mman.h>
#include <unistd.h>

namespace megatron_nuwa {
namespace {

class Guarded {
 public:
  Guarded(void* data, int64_t bytes, bool is_output, bool at_end)
      : data_(data), bytes_(bytes), is_output_(is_output) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    const int64_t inner = (bytes + page - 1) / page * page;
    length_ = inner + 2 * page;
    pages_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(pages_ != MAP_FAILED, "no memory");
    // 16-byte reads need their alignment, which every tensor's end has.
    copy_ = pages_ + page + (at_end ? inner - bytes : 0);
    if (is_output) std::memset(copy_, 0xff, bytes);
    else if (bytes) std::memcpy(copy_, data, bytes);
    mprotect(pages_, page, PROT_NONE);
    mprotect(pages_ + page + inner, page, PROT_NONE);
  }
  ~Guarded() {
    if (is_output_) std::memcpy(data_, copy_, bytes_);
    munmap(pages_, length_);
  }
  template <class T>
  T* as() const {
    return data_ ? reinterpret_cast<T*>(copy_) : nullptr;
  }

 private:
  void* data_;
  int64_t bytes_, length_;
  bool is_output_;
  char *pages_, *copy_;
};

struct Array {
  void* data;
  int64_t bytes;
};

// What a call passes: sizes, and arrays by their places below.
struct Call {
  int32_t batch, heads, queries, keys, blocks[3], teams[3];
  float scale;
  int32_t at_end;
  uint32_t pace;
  Array query, key, value, mask, grad, output, log_sum, statistics;
  Array grad_query, grad_key, grad_value;
  Array tables[3][7];  // of outputs, gradients of queries, and those of keys and values
};

struct WalkTables {
  explicit WalkTables(const Array (&arrays)[7], bool at_end) {
    for (const Array& array : arrays)
      copies.push_back(new Guarded(array.data, array.bytes, false, at_end));
  }
  ~WalkTables() {
    for (Guarded* copy : copies) delete copy;
  }
  Tables walk(int blocks, int teams) const {
    return {copies[0]->as<int32_t>(),  copies[1]->as<int32_t>(), copies[2]->as<int32_t>(),
            copies[3]->as<int32_t>(),  copies[4]->as<int32_t>(), copies[5]->as<uint32_t>(),
            copies[6]->as<uint32_t>(), blocks,                   teams};
  }
  RowTables direct() const { return {copies[0]->as<int64_t>(), copies[1]->as<int32_t>()}; }
  std::vector<Guarded*> copies;
};

template <class Pass>
void run(const typename Pass::Arguments& arguments, const WalkTables& tables, const Call& call,
         int pass) {
  static_assert(Memory<Pass>::kBytes <= (kIsLarge ? 227 : 163) * 1024);
  const Tables walked = tables.walk(call.blocks[pass], call.teams[pass]);
  run_kernel({walked.teams / Shape<Pass>::kTeams}, Shape<Pass>::kThreads,
             [&] { walk<Pass>(arguments, walked); });
}

int direct_blocks(int64_t warps) { return (warps + kDirectWarps - 1) / kDirectWarps; }

template <class T, int size>
void simulate(const Call& call) {
  set_pace(call.pace);
  const bool at_end = call.at_end;
  const auto in = [&](const Array& a) { return Guarded(a.data, a.bytes, false, at_end); };
  const auto out = [&](const Array& a) { return Guarded(a.data, a.bytes, true, at_end); };
  const int images = call.batch * call.heads;
  const Guarded query = in(call.query), key = in(call.key), value = in(call.value);
  const Guarded mask = in(call.mask), grad = in(call.grad);
  const Guarded output = out(call.output), log_sum = out(call.log_sum);
  const Guarded statistics = out(call.statistics);
  const Guarded grad_query = out(call.grad_query), grad_key = out(call.grad_key);
  const Guarded grad_value = out(call.grad_value);
  const WalkTables of_outputs(call.tables[0], at_end), tables(call.tables[1], at_end);
  const WalkTables mirrored(call.tables[2], at_end);
  const Problem problem{call.batch, call.heads, call.queries, call.keys, call.scale, mask.as<bool>()};
  const Problem mirror{call.batch, call.heads, call.keys, call.queries, call.scale, mask.as<bool>()};
  const T *q = query.as<T>(), *k = key.as<T>(), *v = value.as<T>(), *g = grad.as<T>();
  const auto direct = [&](const Problem& p) {
    return DirectProblem{p.heads, p.row_tokens, p.column_tokens,
                         static_cast<int64_t>(images) * p.row_tokens, p.scale, p.context_mask};
  };
  const int64_t rows = static_cast<int64_t>(images) * call.queries;

  float2* of_query = statistics.as<float2>();
  if constexpr (std::is_same_v<T, float>) {
    const DirectForward arguments{direct(problem), q, k, v, output.as<T>(), log_sum.as<float>()};
    run_kernel({direct_blocks(rows)}, 32 * kDirectWarps,
               [&] { direct_forward<size>(arguments, tables.direct()); });
    const Statistics sums{g, output.as<T>(), log_sum.as<float>(), of_query, rows, call.queries,
                          call.heads};
    run_kernel({direct_blocks((rows * (size / 8) + 31) / 32)}, 32 * kDirectWarps,
               [&] { query_statistics<size>(sums); });
    const DirectBackward backward{
        direct(problem), {q, g}, {k, v}, of_query, {grad_query.as<T>(), nullptr}};
    run_kernel({direct_blocks(rows)}, 32 * kDirectWarps,
               [&] { direct_backward<size, false>(backward, tables.direct()); });
    const DirectBackward mirrored_backward{
        direct(mirror), {k, v}, {q, g}, of_query, {grad_key.as<T>(), grad_value.as<T>()}};
    run_kernel({direct_blocks(static_cast<int64_t>(images) * call.keys)}, 32 * kDirectWarps,
               [&] { direct_backward<size, true>(mirrored_backward, mirrored.direct()); });
  } else {
    run<Forward<T, size>>({problem, {q}, {k, v}, output.as<T>(), log_sum.as<float>()}, of_outputs,
                          call, 0);
    run<Backward<T, size, false>>({problem, {q, g, output.as<T>()}, {k, v}, of_query,
                                   {grad_query.as<T>()}, log_sum.as<float>()},
                                  tables, call, 1);
    run<Backward<T, size, true>>(
        {mirror, {k, v}, {q, g}, of_query, {grad_key.as<T>(), grad_value.as<T>()}, nullptr},
        mirrored, call, 2);
  }
}

}  // namespace
}  // namespace megatron_nuwa

// Null, or what went wrong.
#define MEGATRON_NUWA_EXPORT(T, size)                                                        \
  extern "C" MEGATRON_NUWA_EXPORTED const char* simulate_##T##_##size(const void* call) {    \
    using namespace megatron_nuwa;                                                           \
    return failure_of(                                                                       \
        [](const void* call) { simulate<T, size>(*static_cast<const Call*>(call)); }, call); \
  }

MEGATRON_NUWA_EXPORT(bf16, 64)
#ifndef MEGATRON_NUWA_ONLY_BF16_64
MEGATRON_NUWA_EXPORT(bf16, 32)
MEGATRON_NUWA_EXPORT(bf16, 128)
MEGATRON_NUWA_EXPORT(fp16, 32)
MEGATRON_NUWA_EXPORT(fp16, 64)
MEGATRON_NUWA_EXPORT(fp16, 128)
MEGATRON_NUWA_EXPORT(float, 32)
MEGATRON_NUWA_EXPORT(float, 64)
MEGATRON_NUWA_EXPORT(float, 128)
#endif
