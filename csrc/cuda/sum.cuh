// The sum of the ranks' packets over a tile, in rank order (docs/wire-formats.md, section 9). Of one rank: decoding.
#pragma once

#include "cuda/codes.cuh"
#include "cuda/header.cuh"

namespace smallreduce::SR_TARGET {

SR_DEVICE float scale_value(uint16_t bits) { return bits > kMaxScale ? float_of(kNanBits) : float_from_bfloat16(bits); }

// Over one run. The first rank's packet lies at `from`, the others `stride` bytes apart.
template <Kind kKind>
struct RankSum {
  Sections<const uint8_t> from;
  int64_t ranks, stride;
  float factor;
  bool aligned;  // the packets, to 16 bytes

  // Adds one rank's values, or begins with them. `group` and `block`: numbers in the run of the tile's first.
  template <bool kFirst>
  SR_DEVICE_MEMBER void add(int64_t rank, const Tiling& tiling, int group, int block, const Place& place,
                            Tile& sum) const {
    const uint8_t* codes = from.codes + rank * stride + (block + place.block) * int(block_bytes(kKind));
    float scale = factor;  // of the group whose number in the tile is the lane's
    if constexpr (!is_cast(kKind)) {
      uint16_t bits = 0;
      const uint8_t* scales = from.scales + rank * stride;
      if (lane_index() < tiling.groups_in(place)) bits = load_u16(scales + 2 * (group + lane_index()), aligned);
      scale = scale_value(bits) * factor;
    }
    uint32_t words[kSteps][Codes<kKind>::kWords];
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
#pragma unroll
      for (int i = 0; i < Codes<kKind>::kWords; ++i) words[u][i] = Codes<kKind>::kZeros;  // past the end of a group
      const uint8_t* step = codes + u * kStepElements / int(kBlock) * int(block_bytes(kKind));
      if (place.exists(u)) Codes<kKind>::load(step, place.quarter, aligned, words[u]);
    }
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      float slot_scale = is_cast(kKind) ? factor : __shfl_sync(kAllLanes, scale, tiling.group_of(place, u));
      Slot values;
      Codes<kKind>::unpack(words[u], place.quarter, values);
#pragma unroll
      for (int i = 0; i < kSlot; ++i) {
        float value = values[i] * slot_scale;
        sum[u][i] = kFirst ? value : sum[u][i] + value;
      }
    }
  }

  SR_DEVICE_MEMBER void load(const Tiling& tiling, int group, int block, const Place& place, Tile& sum) const {
    add<true>(0, tiling, group, block, place, sum);
    for (int64_t rank = 1; rank < ranks; ++rank) add<false>(rank, tiling, group, block, place, sum);
  }
};

}  // namespace smallreduce::SR_TARGET
