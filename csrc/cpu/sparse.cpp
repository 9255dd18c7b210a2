#include "cpu/sparse.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/pool.h"

namespace smallreduce::cpu {
namespace {

using namespace smallreduce::SR_TARGET;

constexpr int64_t kPartElements = 1 << 17;    // a part is worth a thread from here on
constexpr int64_t kExpandElements = 1 << 16;  // of an output, at a time

int64_t part_count(int64_t length, int threads) {
  return std::clamp<int64_t>(length / kPartElements, 1, std::max(threads, 1));
}

// Candidates that each of `count` parts of a segment has room for.
int64_t part_capacity(const Segment& segment, int64_t count) {
  return std::min(sampling_of(segment.length, segment.kept).capacity, segment.length / count + kBlock);
}

int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

void* element(void* buffer, ElementType type, int64_t offset) {
  return static_cast<uint8_t*>(buffer) + offset * element_bytes(type);
}

const void* element(const void* buffer, ElementType type, int64_t offset) {
  return static_cast<const uint8_t*>(buffer) + offset * element_bytes(type);
}

int64_t total_values(const Layout& layout) {
  int64_t total = 0;
  for (int64_t p = 0; p < layout.packet_count; ++p) total += layout.packets[p].values;
  return total;
}

// Reads the indices of a run out of its words; false if they are not those of exactly `kept` elements below `length`.
bool read_indices(const uint8_t* words, int64_t kept, int64_t length, uint32_t* indices) {
  int64_t count = word_count(length, kept), cursor = 0, found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint16_t word;
    memcpy(&word, words + 2 * i, sizeof word);
    if (word == kSkip) {
      cursor += kSkipElements;
      continue;
    }
    cursor += word;
    if (cursor >= length || found == kept) return false;
    indices[found++] = uint32_t(cursor++);
  }
  return found == kept;
}

// The values and words of one run in a packet.
SparseTarget target_of(uint8_t* packet, Kind kind, const Packet& row, const Segment& segment) {
  return {packet + kHeaderBytes + value_bytes(kind) * segment.value,
          packet + words_offset(kind, row.values) + 2 * segment.word, segment.kept};
}

// Indices of all runs of the packets of `ranks` ranks, or (ranks = 0) of each packet of a layout, rank after rank. Throws
// std::invalid_argument before anything is written if the words of one do not fit. Returns the number of each packet's first
// value, of a layout whose packets lie one behind the other.
std::vector<int64_t> read_packets(const uint8_t* packets, int64_t stride, int64_t ranks, const Layout& layout,
                                  Kind kind, uint32_t* indices, int threads) {
  int64_t copies = std::max<int64_t>(ranks, 1);
  std::vector<int64_t> first(size_t(layout.packet_count) + 1, 0);
  for (int64_t p = 0; p < layout.packet_count; ++p) first[size_t(p) + 1] = first[size_t(p)] + layout.packets[p].values;
  std::atomic<int64_t> refused{-1};
  parallel_for(copies * layout.segment_count, 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      int64_t copy = i / layout.segment_count;
      const Segment& segment = layout.segments[i % layout.segment_count];
      int64_t packet = ranks == 0 ? segment.packet : copy;
      auto from =
          target_of(const_cast<uint8_t*>(packets) + packet * stride, kind, layout.packets[segment.packet], segment);
      uint32_t* to = indices + copy * first.back() + first[size_t(segment.packet)] + segment.value;
      if (!read_indices(from.words, segment.kept, segment.length, to)) refused = packet;
    }
  });
  if (refused >= 0) {
    throw std::invalid_argument("packet " + std::to_string(refused.load()) +
                                " names other elements than its segments have, or is corrupt");
  }
  return first;
}

// Selects in every run of a layout. source_of(segment) gives what from, target_of(segment) where to.
template <typename SourceOf, typename TargetOf>
void select_all(const SparseKernels& kernels, const Layout& layout, Kind kind, void* scratch, int threads,
                SourceOf source_of, TargetOf target_of) {
  struct Task {
    SparseSource source;
    SparseTarget target;
    uint32_t threshold;
    int64_t part, parts;
  };
  std::vector<Task> tasks;
  std::vector<SparsePart> parts;
  std::vector<int64_t> task_of;
  auto* candidates = static_cast<Candidate*>(scratch);
  for (int64_t s = 0; s < layout.segment_count; ++s) {
    const Segment& segment = layout.segments[s];
    if (segment.length == 0) continue;
    int64_t count = part_count(segment.length, threads), capacity = part_capacity(segment, count);
    tasks.push_back({source_of(segment), target_of(segment), 0, int64_t(parts.size()), count});
    for (int64_t p = 0; p < count; ++p, candidates += capacity) {
      // Between blocks, so that whole blocks can be read.
      auto bound = [&](int64_t i) {
        return i == count ? segment.length : segment.length * i / count / kBlock * kBlock;
      };
      parts.push_back({bound(p), bound(p + 1), candidates, capacity, 0});
      task_of.push_back(int64_t(tasks.size()) - 1);
    }
  }
  auto each = [&](int64_t count, auto visit) {
    parallel_for(count, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) visit(size_t(i));
    });
  };
  each(int64_t(tasks.size()),
       [&](size_t i) { tasks[i].threshold = kernels.estimate(tasks[i].source, kind, tasks[i].target.kept); });
  each(int64_t(parts.size()), [&](size_t i) {
    const Task& task = tasks[size_t(task_of[i])];
    kernels.collect(task.source, kind, task.threshold, parts[i]);
  });
  each(int64_t(tasks.size()), [&](size_t i) {
    const Task& task = tasks[i];
    kernels.select(task.source, kind, task.threshold, parts.data() + task.part, task.parts, task.target);
  });
}

// Writes the sum of `ranks` packets, or each packet of a layout (ranks = 0), into a buffer.
void expand_all(const SparseKernels& kernels, const uint8_t* packets, int64_t stride, int64_t ranks, float factor,
                const Layout& layout, Kind kind, void* output, ElementType type, void* scratch, int threads) {
  auto* indices = static_cast<uint32_t*>(scratch);
  std::vector<int64_t> first = read_packets(packets, stride, ranks, layout, kind, indices, threads);
  struct Task {
    SparseSource source;
    int64_t begin, end;
    void* output;
  };
  std::vector<Task> tasks;
  int64_t elements = 0;
  for (int64_t s = 0; s < layout.segment_count; ++s) {
    const Segment& segment = layout.segments[s];
    elements += segment.length;
    const uint8_t* packet = packets + (ranks == 0 ? segment.packet * stride : 0);
    auto from = target_of(const_cast<uint8_t*>(packet), kind, layout.packets[segment.packet], segment);
    SparseSource source{segment.length, nullptr,
                        nullptr,        type,
                        from.values,    indices + first[size_t(segment.packet)] + segment.value,
                        segment.kept,   std::max<int64_t>(ranks, 1),
                        stride,         first.back(),
                        factor};
    for (int64_t begin = 0; begin < segment.length; begin += kExpandElements) {
      tasks.push_back(
          {source, begin, std::min(begin + kExpandElements, segment.length), element(output, type, segment.offset)});
    }
  }
  bool large = type == ElementType::kFloat32 && elements * int64_t(sizeof(float)) >= int64_t(1) << 20;
  parallel_for(int64_t(tasks.size()), 1, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Task& task = tasks[size_t(i)];
      bool stream = large && reinterpret_cast<uintptr_t>(task.output) % 64 == 0;
      kernels.expand(task.source, kind, task.begin, task.end, stream, type, task.output);
    }
  });
}

int64_t indices_nbytes(const Layout& layout, int64_t ranks) { return align16(4 * ranks * total_values(layout)); }

}  // namespace

Sampling sampling_of(int64_t length, int64_t kept) {
  constexpr int64_t kSmallest = 1 << 9, kLine = 16;
  if (length < kSmallest || 2 * kept >= length) return {0, 0, 0};
  int64_t samples = std::clamp<int64_t>(length / 64, 1 << 7, kMostSamples) / kLine * kLine;
  // Of the samples about `expected` are among the largest, give or take its root. Four roots more are rarely too few.
  double expected = double(samples) * double(kept) / double(length);
  double rank = std::ceil(expected + 4 * std::sqrt(expected) + 2);
  if (2 * rank >= double(samples)) return {0, 0, 0};
  double most = (rank + 4 * std::sqrt(rank) + 4) * double(length) / double(samples);
  return {samples, int64_t(rank), std::min(length, int64_t(std::ceil(most)))};
}

int64_t sparse_scratch_nbytes(const Layout& layout, int64_t ranks, int threads) {
  int64_t candidates = 0;
  for (int64_t s = 0; s < layout.segment_count; ++s) {
    const Segment& segment = layout.segments[s];
    int64_t count = part_count(segment.length, threads);
    candidates += count * part_capacity(segment, count);
  }
  return indices_nbytes(layout, ranks) + align16(candidates * int64_t(sizeof(Candidate)));
}

void sparse_encode(const SparseKernels& kernels, const EncodeArgs& args, int threads) {
  Kind kind = args.format.kind;
  auto source_of = [&](const Segment& segment) {
    float* residual = args.residual ? args.residual + segment.origin * kBlock : nullptr;
    return SparseSource{segment.length,
                        residual,
                        element(args.input, args.type, segment.offset),
                        args.type,
                        nullptr,
                        nullptr,
                        0,
                        0,
                        0,
                        0,
                        1.0f};
  };
  select_all(kernels, args.layout, kind, args.scratch, threads, source_of, [&](const Segment& segment) {
    return target_of(args.packets + segment.packet * args.stride, kind, args.layout.packets[segment.packet], segment);
  });
}

void sparse_decode(const SparseKernels& kernels, const DecodeArgs& args, int threads) {
  expand_all(kernels, args.packets, args.stride, 0, 1.0f, args.layout, args.format.kind, args.output, args.type,
             args.scratch, threads);
}

void sparse_reduce(const SparseKernels& kernels, const ReduceArgs& args, int threads) {
  expand_all(kernels, args.packets, args.stride, args.ranks, args.factor, args.layout, args.format.kind, args.output,
             args.type, args.scratch, threads);
}

void sparse_reduce_encode(const SparseKernels& kernels, const ReduceEncodeArgs& args, int threads) {
  Kind kind = args.format.kind;
  const Packet& row = args.layout.packets[0];
  auto* indices = static_cast<uint32_t*>(args.scratch);
  read_packets(args.packets, args.stride, args.ranks, args.layout, kind, indices, threads);
  auto source_of = [&](const Segment& segment) {
    float* residual = args.residual ? args.residual + segment.block * kBlock : nullptr;
    auto from = target_of(const_cast<uint8_t*>(args.packets), kind, row, segment);
    return SparseSource{segment.length, residual,
                        nullptr,        ElementType::kFloat32,
                        from.values,    indices + segment.value,
                        segment.kept,   args.ranks,
                        args.stride,    row.values,
                        args.factor};
  };
  auto* candidates = static_cast<uint8_t*>(args.scratch) + indices_nbytes(args.layout, args.ranks);
  select_all(kernels, args.layout, kind, candidates, threads, source_of,
             [&](const Segment& segment) { return target_of(args.packet, kind, row, segment); });
}

void sparse_clear(const DecodeArgs& args, int threads) {
  const Layout& layout = args.layout;
  auto* indices = static_cast<uint32_t*>(args.scratch);
  std::vector<int64_t> first = read_packets(args.packets, args.stride, 0, layout, args.format.kind, indices, threads);
  for (int64_t s = 0; s < layout.segment_count; ++s) {
    const Segment& segment = layout.segments[s];
    const uint32_t* own = indices + first[size_t(segment.packet)] + segment.value;
    for (int64_t i = 0; i < segment.kept; ++i) {
      memset(element(args.output, args.type, segment.offset + own[i]), 0, size_t(element_bytes(args.type)));
    }
  }
}

}  // namespace smallreduce::cpu
