// Builds the two tables of a layout from segments. Host only.
#pragma once

#include <optional>
#include <vector>

#include "formats/types.h"

namespace smallreduce {

struct LayoutTables {
  std::vector<Segment> segments;  // with the sentinel
  std::vector<Packet> packets;
};

// Cuts the segments into `packet_count` packets: evenly between groups, or, with packet_of, each segment whole into the packet
// named for it (ascending). `ratio` is TopK's. Throws std::invalid_argument on sizes that no buffer has.
LayoutTables build_layout(const std::vector<int64_t>& offsets, const std::vector<int64_t>& lengths,
                          const std::optional<std::vector<int64_t>>& packet_of, int64_t packet_count,
                          const Format& format, Ratio ratio, ElementType type);

}  // namespace smallreduce
