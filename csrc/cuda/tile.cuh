// How the groups of a layout are divided: a contiguous range of groups for each warp, in it one run for each segment, in a run
// tiles of 1024 elements, in a tile slots of 8 elements that a lane keeps in registers.
//
// A slot holds elements j … j+3 and j+16 … j+19 of a block, j = 4·quarter, so that four lanes share a block. The elements whose
// codes share a byte of IntQuant(4), and those that share a random word, are then in one lane; loads and stores are of four
// elements; and only two of the five stages of a Hadamard transform cross lanes.
#pragma once

#include "cuda/warp.cuh"
#include "formats/packet.h"

namespace smallreduce::SR_TARGET {

constexpr int kSteps = 4;                     // slots of a lane
constexpr int kSlot = 8;                      // elements of a slot
constexpr int kStepElements = kWarp * kSlot;  // a step of the warp: 8 blocks
constexpr int kTile = kSteps * kStepElements;

using Slot = float[kSlot];
using Tile = Slot[kSteps];

// The elements of a slot, counted from its first.
SR_DEVICE constexpr int slot_offset(int i) { return i < 4 ? i : i + 12; }

// Where this lane's slots lie in a tile that holds `count` elements.
struct Place {
  int quarter;
  int block;  // number in the step of the block that the lane shares
  int count;
  explicit SR_DEVICE_MEMBER Place(int count) : quarter(lane_index() % 4), block(lane_index() / 4), count(count) {}
  SR_DEVICE_MEMBER int block_of(int step) const { return step * (kStepElements / int(kBlock)) + block; }
  SR_DEVICE_MEMBER bool exists(int step) const { return block_of(step) * int(kBlock) < count; }
  SR_DEVICE_MEMBER int first_element(int step) const { return block_of(step) * int(kBlock) + 4 * quarter; }
  // Whether all its blocks are whole.
  SR_DEVICE_MEMBER bool is_whole() const { return count % int(kBlock) == 0; }
  // Of the elements from the slot's first on, how many the tile holds; none or fewer if the slot does not exist.
  SR_DEVICE_MEMBER int rest(int step) const { return count - first_element(step); }
};

// How a layout is divided among warps, in groups.
struct Division {
  int group;  // elements
  int task;   // what the ranges of warps are multiples of
  int run;    // at most in one run
};

constexpr int kRunElements = 1 << 24;
static_assert(kRunElements >= kMaxGroup, "a run holds a group");

inline Division division_of(const Format& format, int task) {
  int group = int(format.group);
  return {group, task, kRunElements / (task * group) * task};
}

// Groups of a power of two of elements share a tile; any other has tiles of its own.
struct Tiling {
  int span;        // slots of a tile that belong to one group
  int group_log2;  // of the elements of a group that shares a tile; otherwise more than a tile's
  int unit;        // elements: a tile, or one group
  int groups;      // of a unit
  Division division;

  // The number in the tile of the group that a slot belongs to.
  SR_DEVICE_MEMBER int group_of(const Place& place, int step) const {
    return place.block_of(step) * int(kBlock) >> group_log2;
  }
  SR_DEVICE_MEMBER int groups_in(const Place& place) const { return ((place.count - 1) >> group_log2) + 1; }
};

// A group of several tiles is read twice.
inline bool is_spread(const Format& format) { return !is_cast(format.kind) && format.group > kTile; }

// A cast has no groups: its tiles are cut from the run as a whole.
inline Tiling tiling_of(const Format& format) {
  constexpr int kWhole = kTile / kSlot, kNever = 31;
  int group = int(format.group);
  if (is_cast(format.kind)) {
    int task = group < kTile ? kTile / group : 1;
    return {kWhole, kNever, kTile, 0, division_of(format, task)};
  }
  if (group >= kTile || (group & (group - 1)) != 0) return {kWhole, kNever, group, 1, division_of(format, 1)};
  int group_log2 = 5;
  while (1 << group_log2 < group) ++group_log2;
  return {group / kSlot, group_log2, kTile, kTile / group, division_of(format, kTile / group)};
}

SR_DEVICE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
SR_DEVICE int smaller(int a, int b) { return a < b ? a : b; }

// Some elements of one segment, from the beginning of a group on; so few that an int counts their bytes.
struct Run {
  const Segment* segment;
  int64_t begin;
  int elements;
  SR_DEVICE_MEMBER int64_t block() const { return segment->block + begin / kBlock; }
  SR_DEVICE_MEMBER int64_t origin() const { return segment->origin + begin / kBlock; }
  SR_DEVICE_MEMBER int64_t group(int64_t group_size) const { return segment->group + begin / group_size; }
};

// Calls `visit` with each run of range `range` of `ranges` into which the groups of a layout, at most 2^28, are divided.
template <typename Visit>
SR_DEVICE void for_each_run(const Layout& layout, const Division& division, int64_t range, int64_t ranges,
                            Visit visit) {
  int64_t groups = layout.groups(), tasks = ceil_div(groups, division.task);
  int group = int(tasks * range / ranges * division.task);
  int last = int(smaller(tasks * (range + 1) / ranges * division.task, groups));
  if (group >= last) return;
  int64_t low = 0;
  for (int64_t high = layout.segment_count - 1; low < high;) {
    int64_t middle = (low + high) / 2;
    if (layout.segments[middle + 1].first_group > group) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  for (const Segment* segment = layout.segments + low; group < last;) {
    int stop = smaller(smaller(int(segment[1].first_group), last), group + division.run);
    if (stop <= group) {  // past the end of the segment
      ++segment;
      continue;
    }
    int64_t begin = (group - segment->first_group) * division.group;
    int64_t end = smaller((stop - segment->first_group) * division.group, segment->length);
    visit(Run{segment, begin, int(end - begin)});
    group = stop;
  }
}

// Those of this warp.
template <typename Visit>
SR_DEVICE void for_each_run(const Layout& layout, const Division& division, Visit visit) {
  for_each_run(layout, division, warp_index(), warp_count(), visit);
}

}  // namespace smallreduce::SR_TARGET
