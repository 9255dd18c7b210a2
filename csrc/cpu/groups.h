// Walking over the groups of a layout, and where each group's scale and codes stand.
#pragma once

#include "formats/packet.h"

namespace smallreduce::SR_TARGET {

// Groups in a row, within one segment: `length` elements from element `first` of the segment.
struct Run {
  const Segment* segment;
  int64_t first;
  int64_t length;
  SR_MEMBER int64_t block() const { return segment->block + first / kBlock; }
  SR_MEMBER int64_t origin() const { return segment->origin + first / kBlock; }
};

// Visits groups [begin, end) of the layout as one run a segment.
template <typename Visit>
static inline void for_each_run(const Layout& layout, int64_t group_size, int64_t begin, int64_t end, Visit visit) {
  int64_t low = 0;
  for (int64_t high = layout.segment_count; low < high;) {
    int64_t middle = (low + high) / 2;
    if (layout.segments[middle + 1].first_group > begin) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  for (const Segment* segment = layout.segments + low; begin < end; ++segment) {
    int64_t stop = segment[1].first_group < end ? segment[1].first_group : end;
    int64_t first = (begin - segment->first_group) * group_size;
    int64_t last = (stop - segment->first_group) * group_size;
    visit(Run{segment, first, (last < segment->length ? last : segment->length) - first});
    begin = stop;
  }
}

// The bytes of a run's first group in one packet.
template <typename Byte>
struct GroupCodes {
  Byte* scale;
  Byte* codes;
};

template <typename Byte>
SR_FN GroupCodes<Byte> locate(Byte* packet, Kind kind, const Packet& row, const Run& run, int64_t group_size) {
  int64_t number = run.segment->group + run.first / group_size;
  return {packet + kHeaderBytes + 2 * number,
          packet + codes_offset(kind, row.groups) + run.block() * block_bytes(kind)};
}

// As locate(), of the segment's first group.
template <typename Byte>
SR_FN GroupCodes<Byte> locate(Byte* packet, Kind kind, const Packet& row, const Segment& segment) {
  return {packet + kHeaderBytes + 2 * segment.group,
          packet + codes_offset(kind, row.groups) + segment.block * block_bytes(kind)};
}

}  // namespace smallreduce::SR_TARGET
