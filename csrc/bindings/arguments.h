// From Python integers to the types of the kernels, checked as far as a number can be.
#pragma once

#include <stdexcept>
#include <string>

#include "formats/types.h"

namespace smallreduce {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline ElementType type(int number) {
  if (number < 0 || number > 2) {
    throw std::invalid_argument("element type is " + std::to_string(number) + ", expected 0 to 2");
  }
  return ElementType(number);
}

inline Format format(int kind, int64_t group, bool hadamard, bool stochastic) {
  switch (Kind(kind)) {
    case Kind::kInt2:
    case Kind::kInt4:
    case Kind::kInt8: break;
    case Kind::kCastFloat32:
    case Kind::kCastBFloat16:
    case Kind::kCastFloat16:
    case Kind::kCastE4M3:
    case Kind::kCastE5M2:
    case Kind::kSign:
    case Kind::kTopKFloat32:
    case Kind::kTopKBFloat16:
    case Kind::kTopKFloat16:
      if (hadamard) throw std::invalid_argument("only the integer kinds have a Hadamard form");
      break;
    default: throw std::invalid_argument("kind is " + std::to_string(kind) + ", which no codec has");
  }
  if (group < kBlock || group % kBlock != 0 || group > kMaxGroup) {
    throw std::invalid_argument("group is " + std::to_string(group) + ", expected a multiple of 32 from 32 to " +
                                std::to_string(kMaxGroup));
  }
  return {Kind(kind), group, hadamard, stochastic};
}

// Of the packets that a reduction reads and of the one that it writes.
inline void check_formats(const Format& from, const Format& into) {
  bool sparse = int(from.kind) >= int(Kind::kTopKFloat32) || int(into.kind) >= int(Kind::kTopKFloat32);
  if (sparse && from.kind != into.kind) {
    throw std::invalid_argument("packets of top-k are summed into a packet of their own format only");
  }
  if (from.hadamard != into.hadamard) {
    throw std::invalid_argument("the packets read and the packet written must both have a Hadamard transform, or none");
  }
}

inline Layout layout(uintptr_t segments, int64_t segment_count, uintptr_t packets, int64_t packet_count) {
  return {pointer<const Segment>(segments), segment_count, pointer<const Packet>(packets), packet_count};
}

inline int64_t rank_count(int64_t ranks) {
  if (ranks < 1) throw std::invalid_argument("ranks is " + std::to_string(ranks) + ", expected at least 1");
  return ranks;
}

inline Layout single_packet_layout(uintptr_t segments, int64_t segment_count, uintptr_t packets, int64_t packet_count) {
  if (packet_count != 1) {
    throw std::invalid_argument("a reduction's layout describes one packet, given " + std::to_string(packet_count));
  }
  return layout(segments, segment_count, packets, packet_count);
}

}  // namespace smallreduce
