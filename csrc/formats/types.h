// The plain data that every target shares: what a format is, and the tables that say which elements go into which packet.
#pragma once

#include "formats/target.h"

namespace smallreduce {

enum class ElementType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr int64_t kBlock = 32;  // elements
constexpr int64_t kHeaderBytes = 16;
constexpr int64_t kMaxGroup = 32 * 65535;

enum class Kind : int {
  kCastFloat32 = 0,
  kCastBFloat16 = 1,
  kCastFloat16 = 2,
  kCastE4M3 = 3,
  kCastE5M2 = 4,
  kSign = 8,
  kInt2 = 18,
  kInt4 = 20,
  kInt8 = 24,
  kTopKFloat32 = 32,
  kTopKBFloat16 = 33,
  kTopKFloat16 = 34,
};

struct Format {
  Kind kind;
  int64_t group;  // elements; without scales: only the grain in which work and packets are cut
  bool hadamard;
  bool stochastic;
};

// The share of a segment's elements that TopK keeps, as a fraction; other kinds have none.
struct Ratio {
  int64_t numerator;
  int64_t denominator;
};
constexpr int64_t kMaxDenominator = 1000000000;

// One row of a layout's segment table, int64 each: a run of elements that falls into one packet.
struct Segment {
  int64_t first_group;  // number of its first group in the layout
  int64_t offset;       // of its first element in the buffer
  int64_t length;       // elements
  int64_t packet;       // number of its packet
  int64_t block;        // number of its first block in that packet
  int64_t group;        // number of its first group in that packet
  int64_t origin;       // number of its first block in the uncut list: selects random bits and the worker's residual
  int64_t kept;         // values that travel; this and the next two: 0 but for TopK
  int64_t value;        // number of its first value in that packet
  int64_t word;         // number of its first word in that packet
};

// One row of a layout's packet table, int64 each.
struct Packet {
  int64_t digest;
  int64_t groups;
  int64_t blocks;
  int64_t nbytes;
  int64_t values;  // of all its segments; 0 but for TopK
};

// A layout: which elements of a buffer go into which packets. segments[segment_count] is a sentinel whose first_group is the
// total number of groups.
struct Layout {
  const Segment* segments;
  int64_t segment_count;
  const Packet* packets;
  int64_t packet_count;
  SR_MEMBER int64_t groups() const { return segment_count == 0 ? 0 : segments[segment_count].first_group; }
};

}  // namespace smallreduce
