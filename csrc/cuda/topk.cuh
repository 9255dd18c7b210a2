// TopK (docs/wire-formats.md, section 11): how its work is divided among warps, and what lies in its scratch memory.
//
// A warp works on a range of tiles, neighbours in the order of the layout. What it must know of the ranges before its own (how
// many elements they selected, how many words they skipped) an earlier kernel left there for each range, to be added up.
#pragma once

#include "cuda/tile.cuh"

namespace smallreduce::SR_TARGET {

// A tile is the part of a segment that falls into 32 blocks of the layout whose numbers differ in the last five bits alone: at most
// 1024 elements. No tile lies in two ranges.
constexpr int kTileBlocks = kTile / int(kBlock);

constexpr int kMaxRanges = 3072;
constexpr int kMaxWordRanges = kMaxRanges / 4;
SR_FN int64_t max_ranges(int64_t blocks) {
  int64_t tasks = ceil_div(blocks, kTileBlocks);
  return tasks < kMaxRanges ? tasks : kMaxRanges;
}

struct SparseTile {
  int64_t number;  // ascending; that of a segment's last tile plus 1 is no tile's
  int64_t begin;   // of the segment's elements, the first
  int elements;
};

SR_FN int64_t tile_number(int64_t segment, int64_t block) { return block / kTileBlocks + 2 * segment; }
SR_FN int64_t tile_count(int64_t blocks, int64_t segments) { return blocks / kTileBlocks + 2 * segments + 1; }

// The ranges of a layout, at most `most`. A segment lies in several only as the last run of all of them but the last.
struct Ranges {
  Layout layout;
  int64_t tasks, count;

  SR_DEVICE_MEMBER Ranges(const Layout& layout, int64_t most)
      : layout(layout), tasks(ceil_div(layout.groups(), kTileBlocks)), count(smaller(most, tasks)) {}

  // The range in which a segment begins.
  SR_DEVICE_MEMBER int64_t of(const Segment& segment) const {
    return ((segment.first_group / kTileBlocks + 1) * count - 1) / tasks;
  }

  template <typename Visit>
  SR_DEVICE_MEMBER void for_each_run_of(int64_t range, Visit visit) const {
    constexpr int kAny = (1 << 26) - kTileBlocks;  // a range holds at most 2^25 blocks
    if (range < count) for_each_run(layout, Division{int(kBlock), kTileBlocks, kAny}, range, count, visit);
  }

  template <typename Visit>
  SR_DEVICE_MEMBER void for_each_tile_of(const Run& run, Visit visit) const {
    int64_t end = run.begin + run.elements;
    for (int64_t begin = run.begin; begin < end;) {
      int64_t block = run.segment->first_group + begin / kBlock;
      int64_t elements = smaller(kTile - block % kTileBlocks * kBlock, end - begin);
      visit(SparseTile{tile_number(run.segment - layout.segments, block), begin, int(elements)});
      begin += elements;
    }
  }
};

SR_DEVICE bool is_whole(const Run& run) { return run.elements == run.segment->length; }
SR_DEVICE bool is_last(const Run& run) { return run.begin + run.elements == run.segment->length; }

// Of `count` things that lie evenly in a segment, how many do so before one of its elements.
SR_DEVICE int64_t share(int64_t count, int64_t element, int64_t length) {
  return int64_t(uint64_t(count / length) * uint64_t(element) +
                 uint64_t(count % length) * uint64_t(element) / uint64_t(length));
}

// Selection is mostly one pass over the elements: a sample gives a threshold that some more than are wanted reach, and those, the
// candidates, are collected (Deep Gradient Compression, arXiv:1712.01887, section 5). Short segments, and those of which a
// large share is wanted, have no candidates.
constexpr int64_t kSampleRank = 256;  // the threshold is this one of the samples, in descending order
SR_FN int64_t expected_candidates(int64_t kept) { return 2 * kept + 8192; }
SR_FN bool is_sampled(int64_t length, int64_t kept) { return length >= 4 * expected_candidates(kept); }
SR_FN int64_t sample_count(int64_t length, int64_t kept) {
  return ceil_div(kSampleRank * length, expected_candidates(kept));
}

struct alignas(8) Candidate { uint32_t index, bits; };
constexpr int kSlab = 128;  // candidates for which a warp reserves room at once

// How far a search for the n-th largest has come: the digits that are known, and n among the elements that have them.
struct Choice { uint32_t prefix, wanted; };

// Of magnitudes, 31 bits: three digits of eight and one of seven.
constexpr int kDigits = 4, kSampleDigits = 2, kHistograms = kSampleDigits + kDigits, kBins = 256;

// What is known of a segment while its elements are selected.
struct Selection {
  uint32_t threshold;  // of its candidates
  uint32_t found;      // candidates
  uint32_t given_up;   // 1: they were too many
  Choice choice;       // the last selected magnitude, and how many of it are; only where one range holds the segment
};

// Elements of a larger magnitude than the last selected, and of the same.
struct alignas(8) TieCount { uint32_t above, equal; };
// The candidates of a tile.
struct alignas(8) List { uint32_t begin, count; };
// What words move a cursor on by.
struct WordSum { uint64_t elements, values; };

// The scratch memory. What belongs to a range is that of its last run.
struct Scratch {
  uint64_t* first_value;  // for each packet, the values in all before it; at the end their number
  uint32_t* refused;      // for each packet, or each rank's: not 0 if it is
  WordSum* word_sums;     // [ranks, kMaxWordRanges]
  uint32_t* starts;       // [ranks, tiles]: for each tile, the values of its segment whose elements come before
  Selection* selections;  // for each segment
  uint32_t* bins;         // [segments or, if they are fewer, ranges; kHistograms, kBins]
  TieCount* ties;         // for each range
  uint32_t* skips;        // for each range: words FFFF before its values
  List* lists;            // for each tile
  uint32_t* reserved;     // candidates, of the pool
  uint32_t* decoded;      // [ranks, values]: the elements that the packets given hold, as indices in their segments
  uint32_t* selected;     // the same of the packets that are made
  Candidate* pool;
  int64_t pool_capacity;
  int64_t tiles, values;
  bool bins_of_segments;
};

struct ScratchSizes { int64_t blocks, segments, packets, values, ranks; };

SR_FN Scratch carve(void* memory, int64_t nbytes, const ScratchSizes& sizes) {
  uintptr_t at = reinterpret_cast<uintptr_t>(memory), end = at + uintptr_t(nbytes);
  auto take = [&](int64_t bytes) {
    uintptr_t taken = at;
    at += uintptr_t(align16(bytes));
    return reinterpret_cast<void*>(taken);
  };
  Scratch s;
  int64_t ranges = max_ranges(sizes.blocks);
  s.tiles = tile_count(sizes.blocks, sizes.segments), s.values = sizes.values;
  s.bins_of_segments = sizes.segments <= ranges;
  int64_t bins = (s.bins_of_segments ? sizes.segments : ranges) * kHistograms * kBins;
  s.first_value = static_cast<uint64_t*>(take((sizes.packets + 1) * int64_t(sizeof *s.first_value)));
  s.refused = static_cast<uint32_t*>(take(sizes.packets * sizes.ranks * int64_t(sizeof *s.refused)));
  s.word_sums = static_cast<WordSum*>(take(sizes.ranks * kMaxWordRanges * int64_t(sizeof *s.word_sums)));
  s.starts = static_cast<uint32_t*>(take(sizes.ranks * s.tiles * int64_t(sizeof *s.starts)));
  s.selections = static_cast<Selection*>(take(sizes.segments * int64_t(sizeof *s.selections)));
  s.bins = static_cast<uint32_t*>(take(bins * int64_t(sizeof *s.bins)));
  s.ties = static_cast<TieCount*>(take(ranges * int64_t(sizeof *s.ties)));
  s.skips = static_cast<uint32_t*>(take(ranges * int64_t(sizeof *s.skips)));
  s.lists = static_cast<List*>(take(s.tiles * int64_t(sizeof *s.lists)));
  s.reserved = static_cast<uint32_t*>(take(sizeof *s.reserved));
  s.decoded = static_cast<uint32_t*>(take(sizes.ranks * sizes.values * int64_t(sizeof *s.decoded)));
  s.selected = static_cast<uint32_t*>(take(sizes.values * int64_t(sizeof *s.selected)));
  s.pool = static_cast<Candidate*>(take(0));
  int64_t room = at < end ? int64_t((end - at) / sizeof *s.pool) : 0, most = int64_t(1) << 31;
  s.pool_capacity = room < most ? room : most;
  return s;
}

// Before first_value is written.
SR_DEVICE Scratch scratch_without_values(void* memory, const Layout& layout, int64_t ranks) {
  return carve(memory, 0, {layout.groups(), layout.segment_count, layout.packet_count, 0, ranks});
}

SR_DEVICE Scratch scratch_of(void* memory, int64_t nbytes, const Layout& layout, int64_t ranks) {
  int64_t values = int64_t(static_cast<const uint64_t*>(memory)[layout.packet_count]);
  return carve(memory, nbytes, {layout.groups(), layout.segment_count, layout.packet_count, values, ranks});
}

// By one warp.
SR_DEVICE void write_first_values(const Layout& layout, uint64_t* first_value) {
  uint64_t before = 0;
  for (int64_t first = 0; first < layout.packet_count; first += kWarp) {
    int64_t packet = first + lane_index();
    uint64_t values = packet < layout.packet_count ? uint64_t(layout.packets[packet].values) : 0, sum = values;
    for (int distance = 1; distance < kWarp; distance *= 2) {
      int lane = lane_index();
      uint64_t other = from_lane(sum, lane < distance ? lane : lane - distance);
      if (lane >= distance) sum += other;
    }
    if (packet < layout.packet_count) first_value[packet] = before + sum - values;
    before += from_lane(sum, kWarp - 1);
  }
  if (lane_index() == 0) first_value[layout.packet_count] = before;
}

// Whether no packet of the ranks was refused. Of a layout's packets (ranks is 1): whether this one was not.
SR_DEVICE bool is_accepted(const Scratch& scratch, int64_t ranks, int64_t packet) {
  bool refused = false;
  for (int64_t rank = lane_index(); rank < ranks; rank += kWarp) refused |= scratch.refused[packet * ranks + rank] != 0;
  return !any_lane(refused);
}

// Each lane has a list, of positions from `begin` on. Calls `visit(present, list, position)` for all of them in order, 32 at a time:
// a lane gets the number of a list and a position in it.
template <typename Visit>
SR_DEVICE void for_each_listed(uint32_t begin, uint32_t count, Visit visit) {
  uint32_t end = running_sum(count), total = __shfl_sync(kAllLanes, end, kWarp - 1);
  for (uint32_t first = 0; first < total; first += kWarp) {
    uint32_t number = first + uint32_t(lane_index());
    int list = 0;  // the first that ends after `number`, or the last
    for (int step = kWarp / 2; step >= 1; step /= 2) {
      uint32_t theirs = __shfl_sync(kAllLanes, end, list + step - 1);
      if (theirs <= number) list += step;
    }
    uint32_t offset = __shfl_sync(kAllLanes, begin + count - end, list);
    visit(number < total, list, offset + number);
  }
}

}  // namespace smallreduce::SR_TARGET
