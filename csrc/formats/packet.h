// Sizes, positions, tag and digest of a packet (docs/wire-formats.md, sections 1 to 3).
#pragma once

#include "formats/types.h"

namespace smallreduce::SR_TARGET {

// Bits of one element's code; of one value of TopK.
SR_FN constexpr int code_bits(Kind kind) {
  switch (kind) {
    case Kind::kCastFloat32: return 32;
    case Kind::kCastBFloat16:
    case Kind::kCastFloat16: return 16;
    case Kind::kCastE4M3:
    case Kind::kCastE5M2:
    case Kind::kInt8: return 8;
    case Kind::kInt4: return 4;
    case Kind::kInt2: return 2;
    case Kind::kSign: return 1;
    case Kind::kTopKFloat32: return 32;
    case Kind::kTopKBFloat16:
    case Kind::kTopKFloat16: return 16;
  }
  return 0;
}

SR_FN constexpr bool is_cast(Kind kind) { return int(kind) < int(Kind::kSign); }
SR_FN constexpr bool is_sparse(Kind kind) { return int(kind) >= int(Kind::kTopKFloat32); }

SR_FN constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SR_FN constexpr int64_t align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

SR_FN constexpr int64_t block_bytes(Kind kind) { return 4 * code_bits(kind); }
SR_FN constexpr int64_t scale_bytes(Kind kind, int64_t groups) { return is_cast(kind) ? 0 : align16(2 * groups); }
SR_FN constexpr int64_t codes_offset(Kind kind, int64_t groups) { return kHeaderBytes + scale_bytes(kind, groups); }
SR_FN constexpr int64_t packet_nbytes(Kind kind, int64_t groups, int64_t blocks) {
  return codes_offset(kind, groups) + align16(block_bytes(kind) * blocks);
}

// TopK (docs/wire-formats.md, section 11).
constexpr uint16_t kSkip = 0xffff;  // a word that moves on by kSkipElements without a value
constexpr int64_t kSkipElements = 65535;
constexpr int64_t kMaxSparseSegment = 0xffffffff;
SR_FN constexpr int64_t word_count(int64_t length, int64_t kept) { return kept + ceil_div(length, kSkipElements); }
SR_FN constexpr int64_t value_bytes(Kind kind) { return code_bits(kind) / 8; }
SR_FN constexpr int64_t words_offset(Kind kind, int64_t values) {
  return kHeaderBytes + align16(value_bytes(kind) * values);
}
SR_FN constexpr int64_t sparse_packet_nbytes(Kind kind, int64_t values, int64_t words) {
  return words_offset(kind, values) + align16(2 * words);
}

SR_FN constexpr uint64_t mix64(uint64_t z) {
  z ^= z >> 30;
  z *= 0xbf58476d1ce4e5b9ull;
  z ^= z >> 27;
  z *= 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

SR_FN constexpr uint64_t packet_tag(Kind kind, int64_t group, bool hadamard, ElementType type) {
  uint64_t flags = uint64_t(hadamard) | uint64_t(type) << 1;
  uint64_t group32 = is_cast(kind) || is_sparse(kind) ? 0 : uint64_t(group / kBlock);
  return 0x31524d53ull | uint64_t(kind) << 32 | flags << 40 | group32 << 48;
}

}  // namespace smallreduce::SR_TARGET
