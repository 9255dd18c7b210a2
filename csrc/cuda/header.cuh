// Packets as a whole: their headers and padding, and which of them a decoder takes.
#pragma once

#include "cuda/memory.cuh"

namespace smallreduce::SR_TARGET {

// What a warp needs to know of a packet's format.
struct PacketFormat {
  Kind kind;
  uint64_t tag;
};

SR_DEVICE PacketFormat packet_format(Kind kind, const Format& format, ElementType type) {
  return {kind, packet_tag(kind, format.group, format.hadamard, type)};
}

// By one warp. `accepted` false: a header of zeros, which no decoder takes.
SR_DEVICE void write_header(uint8_t* packet, const PacketFormat& format, const Packet& row, bool accepted) {
  int lane = lane_index();
  if (lane < kHeaderBytes) {
    uint64_t word = lane < 8 ? uint64_t(row.digest) : format.tag;
    packet[lane] = accepted ? uint8_t(word >> (lane % 8 * 8)) : uint8_t(0);
  }
}

// By one warp: header and zero padding.
SR_DEVICE void write_frame(uint8_t* packet, const PacketFormat& format, const Packet& row, bool accepted) {
  int lane = lane_index();
  write_header(packet, format, row, accepted);
  int64_t codes = codes_offset(format.kind, row.groups);
  int64_t scales_end = is_cast(format.kind) ? codes : kHeaderBytes + 2 * row.groups;
  int64_t codes_end = codes + block_bytes(format.kind) * row.blocks;
  if (scales_end + lane < codes) packet[scales_end + lane] = 0;
  if (codes_end + lane < row.nbytes) packet[codes_end + lane] = 0;
}

SR_DEVICE bool is_expected(const uint8_t* packet, const PacketFormat& format, const Packet& row) {
  uint32_t header[4];
  load_words<4>(packet, is_aligned(packet, 16), header);
  uint64_t digest = header[0] | uint64_t(header[1]) << 32, tag = header[2] | uint64_t(header[3]) << 32;
  return tag == format.tag && digest == uint64_t(row.digest);
}

// Leaves 1 + the lowest number of a refused packet in `error`.
SR_DEVICE void refuse(int32_t* error, int64_t number) {
  if (!error) return;
  int32_t mine = int32_t(number) + 1;
  for (int32_t seen = 0; seen == 0 || seen > mine;) {
    int32_t before = atomicCAS(error, seen, mine);
    if (before == seen) return;
    seen = before;
  }
}

// The packets of `ranks` ranks for one row of the packet table: true if all are as expected, on every lane.
SR_DEVICE bool all_expected(const uint8_t* packets, int64_t ranks, int64_t stride, const PacketFormat& format,
                            const Packet& row) {
  bool expected = true;
  for (int64_t first = 0; first < ranks; first += kWarp) {
    int64_t rank = first + lane_index();
    if (rank < ranks) expected &= is_expected(packets + rank * stride, format, row);
  }
  return __ballot_sync(kAllLanes, expected) == kAllLanes;
}

// Each packet is looked at by one thread of the grid, which reports it.
SR_DEVICE void report_refused(const uint8_t* packets, int64_t ranks, int64_t stride, const PacketFormat& format,
                              const Layout& layout, int32_t* error) {
  int64_t first = warp_index() * kWarp + lane_index();
  for (int64_t number = first; number < layout.packet_count * ranks; number += warp_count() * kWarp) {
    const Packet& row = layout.packets[ranks == 1 ? number : 0];
    if (!is_expected(packets + number * stride, format, row)) refuse(error, number);
  }
}

// The scales and codes of a packet from a run's first group on.
template <typename Byte>
struct Sections {
  Byte* scales;
  Byte* codes;
};

template <typename Byte>
SR_DEVICE Sections<Byte> locate(Byte* packet, Kind kind, const Packet& row, const Run& run, int64_t group_size) {
  return {packet + kHeaderBytes + 2 * run.group(group_size),
          packet + codes_offset(kind, row.groups) + run.block() * block_bytes(kind)};
}

}  // namespace smallreduce::SR_TARGET
