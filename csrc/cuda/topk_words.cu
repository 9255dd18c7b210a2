// From words to indices before packets are decoded or added, from indices to words once elements are selected.
#include "cuda/topk_words.cuh"

namespace smallreduce::SR_TARGET {
namespace {

struct ReadArgs {
  SparsePackets packets;
  PacketFormat format;
  Layout layout;
  SparseMemory memory;
  int32_t* error;
  int word_ranges;  // of each rank
};

// The words of one run: a part of its segment's, as large as the run's part of the elements.
struct WordRun {
  const uint8_t* words;  // of the segment
  int64_t begin, end;
  bool aligned;

  SR_DEVICE_MEMBER WordRun(const ReadArgs& args, int64_t rank, const Run& run)
      : aligned(is_aligned(args.packets.packets, 2) && args.packets.stride % 2 == 0) {
    const Segment& segment = *run.segment;
    const uint8_t* packet = args.packets.packets + (segment.packet + rank) * args.packets.stride;
    words = packet + words_offset(args.packets.kind, args.layout.packets[segment.packet].values) + 2 * segment.word;
    int64_t count = word_count(segment.length, segment.kept);
    begin = share(count, run.begin, segment.length);
    end = share(count, run.begin + run.elements, segment.length);
  }

  SR_DEVICE_MEMBER uint16_t at(int64_t word) const { return load_u16(words + 2 * word, aligned); }
};

SR_DEVICE uint32_t elements_of(uint16_t word) { return word == kSkip ? uint32_t(kSkipElements) : word + 1u; }

// Headers; and for each range what its words move a cursor on by.
__global__ void __launch_bounds__(kWarp, 16) sum_words_kernel(ReadArgs args) {
  int64_t ranks = args.packets.ranks;
  Scratch scratch = scratch_without_values(args.memory.scratch, args.layout, ranks);
  if (warp_index() == 0) write_first_values(args.layout, scratch.first_value);
  for (int64_t i = warp_index() * kWarp + lane_index(); i < args.layout.packet_count * ranks;
       i += warp_count() * kWarp) {
    bool expected =
        is_expected(args.packets.packets + i * args.packets.stride, args.format, args.layout.packets[i / ranks]);
    scratch.refused[i] = !expected;
    if (!expected) refuse(args.error, i);
  }
  Ranges ranges(args.layout, args.word_ranges);
  for (int64_t i = warp_index(); i < ranks * ranges.count; i += warp_count()) {
    int64_t rank = i / ranges.count, range = i % ranges.count;
    WordSum sum = {0, 0};
    ranges.for_each_run_of(range, [&](const Run& run) {
      sum = {0, 0};
      if (is_last(run)) return;
      WordRun words(args, rank, run);
      for (int64_t word = words.begin + lane_index(); word < words.end; word += kWarp) {
        uint16_t bits = words.at(word);
        sum.elements += elements_of(bits);
        sum.values += bits != kSkip;
      }
    });
    sum = {sum_over_lanes(sum.elements), sum_over_lanes(sum.values)};
    if (lane_index() == 0) scratch.word_sums[rank * kMaxWordRanges + range] = sum;
  }
}

// The sum of the segment's words in the ranges before this one.
SR_DEVICE WordSum words_before(const Scratch& scratch, const Ranges& ranges, int64_t rank, int64_t range,
                               const Run& run) {
  WordSum sum = {0, 0};
  if (run.begin == 0) return sum;
  for (int64_t before = ranges.of(*run.segment) + lane_index(); before < range; before += kWarp) {
    WordSum theirs = scratch.word_sums[rank * kMaxWordRanges + before];
    sum.elements += theirs.elements, sum.values += theirs.values;
  }
  return {sum_over_lanes(sum.elements), sum_over_lanes(sum.values)};
}

// The tiles of a segment as what a cursor meets.
struct TileStarts {
  uint32_t* starts;
  int64_t segment, first_element, length;  // the first as if all blocks before it were whole

  // The cursor moves from `begin` to `end`, with `values` behind it.
  SR_DEVICE_MEMBER void pass(uint64_t begin, uint64_t end, uint32_t values) const {
    int64_t last = int64_t(end < uint64_t(length) ? end : uint64_t(length));
    int64_t at = int64_t(begin);
    while (at < last) {
      int64_t past = (first_element + at) % kTile;
      if (at == 0 || past == 0) starts[tile_number(segment, (first_element + at) / kBlock)] = values;
      at += kTile - past;
    }
    // Behind the last tile.
    if (begin <= uint64_t(length) && uint64_t(length) < end) {
      starts[tile_number(segment, (first_element + length - 1) / kBlock) + 1] = values;
    }
  }
};

__global__ void __launch_bounds__(kWarp, 16) read_words_kernel(ReadArgs args) {
  int64_t ranks = args.packets.ranks;
  Scratch scratch = scratch_of(args.memory.scratch, args.memory.nbytes, args.layout, ranks);
  Ranges ranges(args.layout, args.word_ranges);
  for (int64_t i = warp_index(); i < ranks * ranges.count; i += warp_count()) {
    int64_t rank = i / ranges.count, range = i % ranges.count;
    ranges.for_each_run_of(range, [&](const Run& run) {
      const Segment& segment = *run.segment;
      WordRun words(args, rank, run);
      WordSum before = words_before(scratch, ranges, rank, range, run);
      uint32_t* indices = scratch.decoded + rank * scratch.values + scratch.first_value[segment.packet] + segment.value;
      TileStarts tiles{scratch.starts + rank * scratch.tiles, run.segment - args.layout.segments,
                       segment.first_group * kBlock, segment.length};
      bool wrong = false;
      for (int64_t first = words.begin; first < words.end; first += kWarp) {
        int64_t word = first + lane_index();
        bool present = word < words.end;
        uint16_t bits = present ? words.at(word) : kSkip;
        uint32_t moved = present ? elements_of(bits) : 0, passed = running_sum(moved);
        bool is_value = bits != kSkip;
        unsigned values = __ballot_sync(kAllLanes, is_value);
        uint64_t end = before.elements + passed, number = before.values + lanes_before(values);
        if (is_value) {
          bool right = number < uint64_t(segment.kept) && end <= uint64_t(segment.length);
          if (right) indices[number] = uint32_t(end - 1);
          wrong |= !right;
        }
        if (present) tiles.pass(end - moved, end, uint32_t(number));
        before.elements += __shfl_sync(kAllLanes, passed, kWarp - 1);
        before.values += uint32_t(__popc(values));
      }
      wrong |= is_last(run) && before.values != uint64_t(segment.kept);
      if (any_lane(wrong) && lane_index() == 0) {
        int64_t number = segment.packet * ranks + rank;
        scratch.refused[number] = 1;
        refuse(args.error, number);
      }
    });
  }
}

struct WriteArgs {
  uint8_t* packets;
  int64_t stride;
  PacketFormat format;
  Layout layout;
  SparseMemory memory;
  int64_t ranks;
};

// The values of one run: a part of its segment's.
struct ValueRun {
  const uint32_t* indices;  // of the segment
  int64_t begin, end;

  SR_DEVICE_MEMBER ValueRun(const Scratch& scratch, const Run& run) {
    const Segment& segment = *run.segment;
    indices = scratch.selected + scratch.first_value[segment.packet] + segment.value;
    begin = share(segment.kept, run.begin, segment.length);
    end = share(segment.kept, run.begin + run.elements, segment.length);
  }

  // The elements between a value and the one before it.
  SR_DEVICE_MEMBER uint32_t gap(int64_t value) const {
    return indices[value] - (value == 0 ? 0 : indices[value - 1] + 1);
  }
};

// Where the packets that were read are refused, whoever had this from them would have nothing to write.
SR_DEVICE bool has_selected(const WriteArgs& args, const Scratch& scratch) {
  return args.ranks == 0 || is_accepted(scratch, args.ranks, 0);
}

SR_DEVICE Scratch scratch_behind(const WriteArgs& args) {
  return scratch_of(args.memory.scratch, args.memory.nbytes, args.layout, args.ranks == 0 ? 1 : args.ranks);
}

__global__ void __launch_bounds__(kWarp, 16) count_skips_kernel(WriteArgs args) {
  Scratch scratch = scratch_behind(args);
  if (!has_selected(args, scratch)) return;
  Ranges ranges(args.layout, warp_count());
  uint32_t skips = 0;
  ranges.for_each_run_of(warp_index(), [&](const Run& run) {
    skips = 0;
    if (is_last(run)) return;
    ValueRun values(scratch, run);
    for (int64_t value = values.begin + lane_index(); value < values.end; value += kWarp) {
      skips += values.gap(value) / uint32_t(kSkipElements);
    }
  });
  skips = __reduce_add_sync(kAllLanes, skips);
  if (warp_index() < ranges.count && lane_index() == 0) scratch.skips[warp_index()] = skips;
}

SR_DEVICE uint32_t skips_before(const Scratch& scratch, const Ranges& ranges, const Run& run) {
  if (run.begin == 0) return 0;
  uint32_t skips = 0;
  for (int64_t range = ranges.of(*run.segment) + lane_index(); range < warp_index(); range += kWarp) {
    skips += scratch.skips[range];
  }
  return __reduce_add_sync(kAllLanes, skips);
}

// The header, and zeros behind the values.
SR_DEVICE void write_sparse_frame(uint8_t* packet, const PacketFormat& format, const Packet& row, bool accepted) {
  int lane = lane_index();
  write_header(packet, format, row, accepted);
  int64_t values_end = kHeaderBytes + value_bytes(format.kind) * row.values;
  if (values_end + lane < words_offset(format.kind, row.values)) packet[values_end + lane] = 0;
}

__global__ void __launch_bounds__(kWarp, 16) write_words_kernel(WriteArgs args) {
  Scratch scratch = scratch_behind(args);
  bool accepted = has_selected(args, scratch);
  for (int64_t p = warp_index(); p < args.layout.packet_count; p += warp_count()) {
    write_sparse_frame(args.packets + p * args.stride, args.format, args.layout.packets[p], accepted);
  }
  if (!accepted) return;
  bool aligned = is_aligned(args.packets, 2) && args.stride % 2 == 0;
  Ranges ranges(args.layout, warp_count());
  ranges.for_each_run_of(warp_index(), [&](const Run& run) {
    const Segment& segment = *run.segment;
    const Packet& row = args.layout.packets[segment.packet];
    uint8_t* packet = args.packets + segment.packet * args.stride;
    uint8_t* words = packet + words_offset(args.format.kind, row.values) + 2 * segment.word;
    ValueRun values(scratch, run);
    uint32_t skipped = skips_before(scratch, ranges, run);
    for (int64_t first = values.begin; first < values.end; first += kWarp) {
      int64_t value = first + lane_index();
      bool present = value < values.end;
      uint32_t gap = present ? values.gap(value) : 0, skips = gap / uint32_t(kSkipElements), sum = running_sum(skips);
      if (present) {
        int64_t word = value + skipped + sum;
        for (int64_t skip = word - skips; skip < word; ++skip) store_u16(words + 2 * skip, aligned, kSkip);
        store_u16(words + 2 * word, aligned, uint16_t(gap - skips * uint32_t(kSkipElements)));
      }
      skipped += __shfl_sync(kAllLanes, sum, kWarp - 1);
    }
    if (!is_last(run)) return;
    int64_t end = word_count(segment.length, segment.kept);
    for (int64_t word = segment.kept + skipped + lane_index(); word < end; word += kWarp) {
      store_u16(words + 2 * word, aligned, kSkip);
    }
    bool is_last_of_packet =
        run.segment + 1 == args.layout.segments + args.layout.segment_count || run.segment[1].packet != segment.packet;
    uint8_t* padding = words + 2 * end + lane_index();
    if (is_last_of_packet && padding < packet + row.nbytes) *padding = 0;
  });
}

}  // namespace

void read_words(const SparsePackets& packets, const PacketFormat& format, const Layout& layout,
                const SparseMemory& memory, int32_t* error, cudaStream_t stream) {
  int blocks = sparse_warps(), word_ranges = blocks / 4;
  ReadArgs args{packets, format, layout, memory, error, word_ranges};
  launch_warps<sum_words_kernel>(stream, blocks, 0, args);
  launch_warps<read_words_kernel>(stream, blocks, 0, args);
}

void write_words(uint8_t* packets, int64_t stride, const PacketFormat& format, const Layout& layout,
                 const SparseMemory& memory, int64_t ranks, cudaStream_t stream) {
  WriteArgs args{packets, stride, format, layout, memory, ranks};
  launch_warps<count_skips_kernel>(stream, sparse_warps(), 0, args);
  launch_warps<write_words_kernel>(stream, sparse_warps(), 0, args);
}

}  // namespace smallreduce::SR_TARGET
