// One group from values to scale, codes and residual. The values come in tiles from a source: a worker's own elements, or the
// sum of the ranks' packets.
#pragma once

#include "cpu/codes.h"
#include "cpu/groups.h"

namespace smallreduce::SR_TARGET {

constexpr int64_t kTile = 1024;  // elements that stay in the first-level cache between the passes over a group

SR_FN int64_t blocks_of(int64_t elements) { return ceil_div(elements, kBlock); }

// fl(value + residual), limited to finite where the value is.
SR_FN float compensate(float value, float residual, bool limit) {
  float sum = value + residual;
  return limit && is_finite(value) ? limit_to_finite(sum) : sum;
}

// The elements of one group of a buffer.
template <typename Buffer>
struct WorkerSource {
  const typename Buffer::Storage* input;
  float* residual;  // null: no feedback
  int64_t length;
  bool hadamard;

  // The compensated values, before any transform, of elements [begin, begin + count), zeros up to a whole block.
  SR_MEMBER void load_original(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    const auto* x = input + begin;
    if (residual) {
      const float* e = residual + begin;
      if (limit) {
        for (int64_t i = 0; i < count; ++i) tile[i] = compensate(Buffer::load(x[i]), e[i], true);
      } else {
        for (int64_t i = 0; i < count; ++i) tile[i] = Buffer::load(x[i]) + e[i];
      }
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] = Buffer::load(x[i]);
    }
    for (int64_t i = count; i < blocks_of(count) * kBlock; ++i) tile[i] = 0.0f;
  }

  SR_MEMBER void load(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    load_original(begin, count, limit, tile);
    if (!hadamard) return;
    for (int64_t b = 0; b < blocks_of(count); ++b) hadamard_block(tile + b * kBlock, 0x1p-5f);
  }

  // `decoded`: what a decoder sees before the inverse transform; overwritten.
  SR_MEMBER void keep_residual(int64_t begin, int64_t count, bool limit, float* __restrict decoded) const {
    if (hadamard) {
      for (int64_t b = 0; b < blocks_of(count); ++b) hadamard_block(decoded + b * kBlock, 0x1p-5f);
      for (int64_t i = 0; i < blocks_of(count) * kBlock; ++i) decoded[i] = limit_to_finite(decoded[i] * 0x1p5f);
    }
    float original[kTile];
    load_original(begin, count, limit, original);
    float* e = residual + begin;
    for (int64_t i = 0; i < count; ++i) e[i] = original[i] - decoded[i];
  }
};

template <typename Source>
SR_FN uint32_t absmax_bits(const Source& source, bool limit, float* __restrict tile) {
  uint32_t largest = 0;
  for (int64_t begin = 0; begin < source.length; begin += kTile) {
    int64_t count = source.length - begin < kTile ? source.length - begin : kTile;
    source.load(begin, count, limit, tile);
    int64_t padded = blocks_of(count) * kBlock;
    for (int64_t i = 0; i < padded; ++i) {
      uint32_t magnitude = magnitude_bits(tile[i]);
      largest = magnitude > largest ? magnitude : largest;
    }
  }
  return largest;
}

// The sum of section 5's Sign: 32 accumulators, then a tree.
template <typename Source>
SR_FN float magnitude_sum(const Source& source, bool limit, float* __restrict tile) {
  FloatVector sums[kVectors] = {};
  for (int64_t begin = 0; begin < source.length; begin += kTile) {
    int64_t count = source.length - begin < kTile ? source.length - begin : kTile;
    source.load(begin, count, limit, tile);
    for (int64_t b = 0; b < blocks_of(count); ++b) {
      for (int i = 0; i < kVectors; ++i) {
        IntVector bits = IntVector(*(const UnalignedFloatVector*)(tile + b * kBlock + i * kLanes));
        sums[i] += FloatVector(bits & int32_t(~kSignBit));
      }
    }
  }
  float lanes[kBlock];
  for (int i = 0; i < kVectors; ++i) *(UnalignedFloatVector*)(lanes + i * kLanes) = sums[i];
  for (int h = 16; h >= 1; h /= 2) {
    for (int j = 0; j < h; ++j) lanes[j] += lanes[j + h];
  }
  return lanes[0];
}

struct GroupScale {
  uint16_t bits;
  bool limit;  // the values had to be limited to stay finite
};

// `tile` holds the last tile of the group on return.
template <Kind kKind, typename Source>
SR_FN GroupScale measure(const Source& source, float* __restrict tile) {
  if constexpr (kKind == Kind::kSign) {
    bool limit = false;
    float sum = magnitude_sum(source, false, tile);
    if (!is_finite(sum)) {
      limit = true;
      if (absmax_bits(source, true, tile) >= kInfBits) return {kNanScale, true};
      sum = magnitude_sum(source, true, tile);
    }
    uint16_t mean = bfloat16_from_float(sum / float(source.length));
    return {mean > kMaxScale ? kMaxScale : mean, limit};
  } else {
    bool limit = false;
    uint32_t largest = absmax_bits(source, false, tile);
    if (largest >= kInfBits) {
      limit = true;
      largest = absmax_bits(source, true, tile);
      if (largest >= kInfBits) return {kNanScale, true};
    }
    return {int_scale<code_bits(kKind)>(largest), limit};
  }
}

template <Kind kKind, typename Source>
SR_FN void encode_scaled_group(const Source& source, const GroupCodes<uint8_t>& target, RandomKey key, uint32_t origin,
                               bool stochastic) {
  float tile[kTile];
  GroupScale scale = measure<kKind>(source, tile);
  *(UnalignedU16*)target.scale = scale.bits;
  bool finite = scale.bits != kNanScale;
  float inverse = finite && kKind != Kind::kSign ? inverse_scale(scale.bits) : 0.0f;
  float value = float_from_bfloat16(scale.bits);
  for (int64_t begin = 0; begin < source.length; begin += kTile) {
    int64_t count = source.length - begin < kTile ? source.length - begin : kTile;
    if (source.length > kTile) source.load(begin, count, scale.limit, tile);
    uint8_t* codes = target.codes + begin / kBlock * block_bytes(kKind);
    int64_t blocks = blocks_of(count);
    if constexpr (kKind == Kind::kSign) {
      for (int64_t b = 0; b < blocks; ++b) ((UnalignedU32*)codes)[b] = nonnegative_bits(tile + b * kBlock);
    } else {
      if (!finite) memset(tile, 0, size_t(blocks * kBlock) * sizeof(float));
      uint32_t block_origin = origin + uint32_t(begin / kBlock);
      if (stochastic) {
        for (int64_t b = 0; b < blocks; ++b) {
          Codes<kKind>::template encode<true>(tile + b * kBlock, inverse, key, block_origin + uint32_t(b),
                                              codes + b * block_bytes(kKind));
        }
      } else {
        for (int64_t b = 0; b < blocks; ++b) {
          Codes<kKind>::template encode<false>(tile + b * kBlock, inverse, key, 0, codes + b * block_bytes(kKind));
        }
      }
    }
    if (!source.residual || !finite) continue;
    for (int64_t b = 0; b < blocks; ++b) Codes<kKind>::decode(codes + b * block_bytes(kKind), value, tile + b * kBlock);
    source.keep_residual(begin, count, scale.limit, tile);
  }
}

// A cast has no scale: element by element.
template <Kind kKind, typename Source>
SR_FN void encode_cast_group(const Source& source, uint8_t* codes) {
  float tile[kTile];
  for (int64_t begin = 0; begin < source.length; begin += kTile) {
    int64_t count = source.length - begin < kTile ? source.length - begin : kTile;
    source.load(begin, count, source.residual != nullptr, tile);
    uint8_t* target = codes + begin / kBlock * block_bytes(kKind);
    for (int64_t b = 0; b < blocks_of(count); ++b) {
      Codes<kKind>::encode(tile + b * kBlock, target + b * block_bytes(kKind));
    }
    if (!source.residual) continue;
    float* e = source.residual + begin;
    float decoded[kBlock];
    for (int64_t b = 0; b < blocks_of(count); ++b) {
      Codes<kKind>::decode(target + b * block_bytes(kKind), 1.0f, decoded);
      for (int64_t i = b * kBlock; i < count && i < (b + 1) * kBlock; ++i) {
        e[i] = is_finite(tile[i]) ? tile[i] - decoded[i - b * kBlock] : e[i];
      }
    }
  }
}

template <Kind kKind, typename Source>
SR_FN void encode_group(const Source& source, const GroupCodes<uint8_t>& target, RandomKey key, uint32_t origin,
                        bool stochastic) {
  if constexpr (is_cast(kKind)) {
    encode_cast_group<kKind>(source, target.codes);
  } else {
    encode_scaled_group<kKind>(source, target, key, origin, stochastic);
  }
}

}  // namespace smallreduce::SR_TARGET
