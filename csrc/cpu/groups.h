// Walking over the groups of a layout, and where each group's scale and codes stand.
#pragma once

#include "formats/packet.h"

namespace smallreduce::SR_TARGET {

// One group: `length` elements from element `first` of a segment.
struct Group {
  const Segment* segment;
  int64_t first;
  int64_t length;
  SR_MEMBER int64_t block() const { return segment->block + first / kBlock; }
  SR_MEMBER int64_t origin() const { return segment->origin + first / kBlock; }
};

template <typename Visit>
static inline void for_each_group(const Layout& layout, int64_t group_size, int64_t begin, int64_t end, Visit visit) {
  const Segment* segment = layout.segments;
  for (int64_t low = 0, high = layout.segment_count; low < high;) {
    int64_t middle = (low + high) / 2;
    if (layout.segments[middle + 1].first_group > begin) {
      high = middle;
    } else {
      low = middle + 1;
    }
    segment = layout.segments + low;
  }
  for (int64_t number = begin; number < end; ++number) {
    while (segment[1].first_group <= number) ++segment;
    int64_t first = (number - segment->first_group) * group_size;
    int64_t rest = segment->length - first;
    visit(Group{segment, first, rest < group_size ? rest : group_size});
  }
}

// The bytes of one group in one packet.
template <typename Byte>
struct GroupCodes {
  Byte* scale;
  Byte* codes;
};

template <typename Byte>
SR_FN GroupCodes<Byte> locate(Byte* packet, Kind kind, const Packet& row, const Group& group, int64_t group_size) {
  int64_t number = group.segment->group + group.first / group_size;
  return {packet + kHeaderBytes + 2 * number,
          packet + codes_offset(kind, row.groups) + group.block() * block_bytes(kind)};
}

}  // namespace smallreduce::SR_TARGET
