// The 32-point Hadamard transform of a block that four lanes share (docs/wire-formats.md, section 8).
#pragma once

#include "cuda/tile.cuh"

namespace smallreduce::SR_TARGET {

template <int kDistance>
SR_DEVICE void butterfly_in_slot(Slot& v) {
#pragma unroll
  for (int i = 0; i < kSlot; ++i) {
    if (i & kDistance) continue;
    float a = v[i], b = v[i + kDistance];
    v[i] = a + b;
    v[i + kDistance] = a - b;
  }
}

template <int kLanes>
SR_DEVICE void butterfly_across_lanes(Slot& v) {
  uint32_t sign = lane_index() & kLanes ? kSignBit : 0;
#pragma unroll
  for (int i = 0; i < kSlot; ++i) {
    float other = __shfl_xor_sync(kAllLanes, v[i], kLanes);
    v[i] = other + float_of(bits_of(v[i]) ^ sign);
  }
}

// T, after a multiplication by 2^-5.
SR_DEVICE void hadamard(Tile& tile) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) tile[u][i] *= 0x1p-5f;
    butterfly_in_slot<1>(tile[u]);       // h = 1
    butterfly_in_slot<2>(tile[u]);       // h = 2
    butterfly_across_lanes<1>(tile[u]);  // h = 4
    butterfly_across_lanes<2>(tile[u]);  // h = 8
    butterfly_in_slot<4>(tile[u]);       // h = 16
  }
}

SR_DEVICE void inverse_hadamard(Tile& tile) {
  hadamard(tile);
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) tile[u][i] = limit_to_finite(tile[u][i] * 0x1p5f);
  }
}

}  // namespace smallreduce::SR_TARGET
