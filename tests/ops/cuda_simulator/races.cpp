#include "races.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <memory>
#include <string>

#include <dlfcn.h>

#include "simulated_device.h"

namespace megatron_nuwa::races {
namespace {

struct Access {
  Moment moment;
  const void* site = nullptr;
};

// What has been done to a byte, or to several always used together: the last write, and reads since
// that no later one lies after. Whoever is after those is after all.
struct History {
  Access written;
  std::vector<Access> reads;
};

// Most accesses are to 16 bytes in line; bytes have histories of their own where some are not.
constexpr int kGranule = 16;
struct Granule {
  History whole;
  std::unique_ptr<std::array<History, kGranule>> bytes;
};

std::array<Granule, kSharedBytesLimit / kGranule> granules;
std::vector<Clock> clocks;       // of the threads
std::vector<int32_t> stretches;  // of all agents

size_t agents() { return stretches.size(); }
int thread() { return static_cast<int>(threadIdx.x); }
int copier() { return thread() + static_cast<int>(clocks.size()); }

// "tile_walk.cuh:61, in backward.cuh:134", as addr2line reads it off the line tables.
std::string source_of(const void* site) {
  Dl_info library;
  if (!dladdr(site, &library)) return "an unknown place";
  const auto offset =
      static_cast<const char*>(site) - static_cast<const char*>(library.dli_fbase) - 1;
  char command[1024];
  std::snprintf(command, sizeof(command), "addr2line -i -e '%s' 0x%llx 2>/dev/null",
                library.dli_fname, static_cast<unsigned long long>(offset));
  std::string lines;
  FILE* const answer = popen(command, "r");
  char line[1024];
  while (answer && std::fgets(line, sizeof(line), answer)) {
    const std::string path(line, std::strcspn(line, " \n"));
    lines += (lines.empty() ? "" : ", in ") + path.substr(path.rfind('/') + 1);
  }
  if (answer) pclose(answer);
  return lines.empty() ? "offset " + std::to_string(offset) : lines;
}

std::string name_of(int agent) {
  const int threads = static_cast<int>(clocks.size());
  return agent < threads ? "thread " + std::to_string(agent)
                         : "a copy by thread " + std::to_string(agent - threads);
}

[[noreturn]] void report(const Access& first, bool first_writes, const Access& second,
                         bool second_writes, uint32_t address) {
  const auto part = [](const Access& access, bool writes) {
    return name_of(access.moment.agent) + (writes ? " writes (" : " reads (") +
           source_of(access.site) + ")";
  };
  fail("race at byte " + std::to_string(address) + " of shared memory: " +
       part(first, first_writes) + " and " + part(second, second_writes) +
       ", and nothing orders the two");
}

void add_read(History& history, const Access& access, const Clock& before, uint32_t address) {
  if (!before.has(history.written.moment)) report(history.written, true, access, false, address);
  std::erase_if(history.reads, [&](const Access& read) { return before.has(read.moment); });
  history.reads.push_back(access);
}

void add_write(History& history, const Access& access, const Clock& before, uint32_t address) {
  if (!before.has(history.written.moment)) report(history.written, true, access, true, address);
  for (const Access& read : history.reads)
    if (!before.has(read.moment)) report(read, false, access, true, address);
  history.reads.clear();
  history.written = access;
}

template <class Add>
void add_access(uint32_t address, uint32_t bytes, int agent, const void* site, bool writes,
                const Add& add) {
  const Access access{{agent, stretches[agent]}, site};
  const Clock& before = clocks[thread()];
  const uint32_t end = address + bytes;
  while (address < end) {
    Granule& granule = granules[address / kGranule];
    const uint32_t first = address % kGranule;
    const uint32_t last = std::min<uint32_t>(kGranule, first + end - address);
    const bool is_whole = last - first == kGranule;
    if (!is_whole && !granule.bytes) {
      granule.bytes = std::make_unique<std::array<History, kGranule>>();
      granule.bytes->fill(granule.whole);
    }
    if (granule.bytes) {
      for (uint32_t i = first; i < last; ++i)
        add((*granule.bytes)[i], access, before, address - first + i);
      // Whole again: all bytes have the same history.
      if (is_whole && writes) {
        granule.whole = (*granule.bytes)[0];
        granule.bytes.reset();
      }
    } else {
      add(granule.whole, access, before, address);
    }
    address += last - first;
  }
}

}  // namespace

void Clock::add(const Moment& moment) {
  stretches_[moment.agent] = std::max(stretches_[moment.agent], moment.stretch);
}

void Clock::add(const Clock& other) {
  const size_t agents = stretches_.size();
  int32_t* const ours = stretches_.data();
  const int32_t* const theirs = other.stretches_.data();
  for (size_t i = 0; i < agents; ++i) ours[i] = std::max(ours[i], theirs[i]);
}

void begin(unsigned threads) {
  for (Granule& granule : granules) {
    granule.whole.written = {};
    granule.whole.reads.clear();
    granule.bytes.reset();
  }
  stretches.assign(2 * threads, 1);
  clocks.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    forget(clocks[i]);
    clocks[i].add(Moment{static_cast<int>(i), stretches[i]});
  }
}

void read(uint32_t address, int bytes, const void* site) {
  add_access(address, bytes, thread(), site, false, add_read);
}

void write(uint32_t address, int bytes, const void* site) {
  add_access(address, bytes, thread(), site, true, add_write);
}

void start_copy(uint32_t address, int bytes, const void* site) {
  add_access(address, bytes, copier(), site, true, add_write);
}

Moment end_copies() { return {copier(), stretches[copier()]++}; }

void release(Clock& clock) {
  Clock& own = clocks[thread()];
  clock.add(own);
  own.add(Moment{thread(), ++stretches[thread()]});
}

void acquire(const Clock& clock) { clocks[thread()].add(clock); }

void forget(Clock& clock) { clock.forget(agents()); }

}  // namespace megatron_nuwa::races
