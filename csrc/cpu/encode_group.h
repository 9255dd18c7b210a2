// Groups from values to scales, codes and residual. The values come in tiles from a source (cpu/sources.h).
#pragma once

#include "cpu/codes.h"
#include "cpu/groups.h"
#include "cpu/sources.h"

namespace smallreduce::SR_TARGET {

SR_FN IntVector absmax_lanes(const float* values, int64_t blocks) {
  IntVector largest = {};
  for (int64_t i = 0; i < blocks * kBlock; i += kLanes) {
    IntVector magnitude = IntVector(load_lanes(values + i)) & int32_t(~kSignBit);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

template <typename Source>
SR_FN uint32_t absmax_bits(const Source& source, bool limit, float* __restrict tile) {
  IntVector largest = {};
  for (int64_t begin = 0; begin < source.length; begin += kTile) {
    int64_t count = source.length - begin < kTile ? source.length - begin : kTile;
    source.load(begin, count, limit, tile);
    IntVector lanes = absmax_lanes(tile, blocks_of(count));
    largest = lanes > largest ? lanes : largest;
  }
  return uint32_t(largest_lane(largest));
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
        sums[i] += FloatVector(IntVector(load_lanes(tile + b * kBlock + i * kLanes)) & int32_t(~kSignBit));
      }
    }
  }
  float lanes[kBlock];
  for (int i = 0; i < kVectors; ++i) store_lanes(lanes + i * kLanes, sums[i]);
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

template <Kind kKind>
SR_FN void encode_int_blocks(const float* values, int64_t blocks, float inverse, RandomKey key, uint32_t origin,
                             bool stochastic, uint8_t* codes) {
  if (stochastic) {
    for (int64_t b = 0; b < blocks; ++b) {
      Codes<kKind>::template encode<true>(values + b * kBlock, inverse, key, origin + uint32_t(b),
                                          codes + b * block_bytes(kKind));
    }
  } else {
    for (int64_t b = 0; b < blocks; ++b) {
      Codes<kKind>::template encode<false>(values + b * kBlock, inverse, key, 0, codes + b * block_bytes(kKind));
    }
  }
}

// Any one group, at its own pace: larger than a tile, or not finite.
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
      encode_int_blocks<kKind>(tile, blocks, inverse, key, origin + uint32_t(begin / kBlock), stochastic, codes);
    }
    if (!source.residual || !finite) continue;
    float decoded[kTile];
    for (int64_t b = 0; b < blocks; ++b)
      Codes<kKind>::decode(codes + b * block_bytes(kKind), value, decoded + b * kBlock);
    source.keep_residual(begin, count, scale.limit, tile, decoded);
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
    float decoded[kTile];
    for (int64_t b = 0; b < blocks_of(count); ++b) {
      Codes<kKind>::decode(target + b * block_bytes(kKind), 1.0f, decoded + b * kBlock);
    }
    float* e = source.residual + begin;
    for (int64_t i = 0; i < count; ++i) e[i] = is_finite(tile[i]) ? tile[i] - decoded[i] : e[i];
  }
}

// As many integer groups as fit into a tile, pass by pass over all of them: the chain from absmax to scale to codes of one group
// would leave the processor waiting. False if one of them is not finite; then nothing but scratch has been written.
template <Kind kKind, typename Source>
SR_FN bool encode_batch(const Source& source, int64_t begin, int64_t count, int64_t group_size,
                        const GroupCodes<uint8_t>& target, RandomKey key, uint32_t origin, bool stochastic) {
  constexpr int64_t kMaxGroups = kTile / kBlock;
  float tile[kTile];
  const float* values = source.view(begin, count, tile);
  int64_t groups = ceil_div(count, group_size), group_blocks = group_size / kBlock, blocks = blocks_of(count);
  auto blocks_in = [&](int64_t g) {
    int64_t rest = blocks - g * group_blocks;
    return rest < group_blocks ? rest : group_blocks;
  };
  uint32_t absmax[kMaxGroups], largest = 0;
  for (int64_t g = 0; g < groups; ++g) {
    absmax[g] = uint32_t(largest_lane(absmax_lanes(values + g * group_size, blocks_in(g))));
    largest = absmax[g] > largest ? absmax[g] : largest;
  }
  if (largest >= kInfBits) return false;
  uint16_t scales[kMaxGroups];
  float inverses[kMaxGroups];
  for (int64_t g = 0; g < groups; ++g) {
    scales[g] = int_scale<code_bits(kKind)>(absmax[g]);
    inverses[g] = inverse_scale(scales[g]);
  }
  memcpy(target.scale, scales, size_t(groups) * sizeof(uint16_t));
  for (int64_t g = 0; g < groups; ++g) {
    encode_int_blocks<kKind>(values + g * group_size, blocks_in(g), inverses[g], key,
                             origin + uint32_t(g * group_blocks), stochastic,
                             target.codes + g * group_blocks * block_bytes(kKind));
  }
  if (!source.residual) return true;
  float decoded[kTile];
  for (int64_t g = 0; g < groups; ++g) {
    float scale = float_from_bfloat16(scales[g]);
    const uint8_t* codes = target.codes + g * group_blocks * block_bytes(kKind);
    for (int64_t b = 0; b < blocks_in(g); ++b) {
      Codes<kKind>::decode(codes + b * block_bytes(kKind), scale, decoded + g * group_size + b * kBlock);
    }
  }
  source.keep_residual(begin, count, false, tile, decoded);
  return true;
}

// A run of groups of one segment in one packet. `source` covers its elements, `target` and `origin` are its first group's.
template <Kind kKind, typename Source>
SR_FN void encode_run(const Source& source, int64_t group_size, const GroupCodes<uint8_t>& target, RandomKey key,
                      uint32_t origin, bool stochastic) {
  constexpr bool is_int = !is_cast(kKind) && kKind != Kind::kSign;
  int64_t batch = is_int && group_size < kTile ? kTile / group_size * group_size : group_size;
  for (int64_t begin = 0; begin < source.length; begin += batch) {
    int64_t count = source.length - begin < batch ? source.length - begin : batch;
    auto at = [&](int64_t element) {
      return GroupCodes<uint8_t>{target.scale + 2 * (element / group_size),
                                 target.codes + element / kBlock * block_bytes(kKind)};
    };
    if constexpr (is_int) {
      if (batch <= kTile && encode_batch<kKind>(source, begin, count, group_size, at(begin), key,
                                                origin + uint32_t(begin / kBlock), stochastic)) {
        continue;
      }
    }
    for (int64_t first = begin; first < begin + count; first += group_size) {
      int64_t length = begin + count - first < group_size ? begin + count - first : group_size;
      if constexpr (is_cast(kKind)) {
        encode_cast_group<kKind>(source.part(first, length), at(first).codes);
      } else {
        encode_scaled_group<kKind>(source.part(first, length), at(first), key, origin + uint32_t(first / kBlock),
                                   stochastic);
      }
    }
  }
}

}  // namespace smallreduce::SR_TARGET
