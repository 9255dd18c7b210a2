// The position of a thread, and what the lanes of a warp compute together. Every lane of a warp takes part in every operation.
#pragma once

#include <cuda_runtime.h>

#include "formats/elements.h"

#define SR_DEVICE static __device__ __forceinline__
#define SR_DEVICE_MEMBER __device__ __forceinline__

namespace smallreduce::SR_TARGET {

// A block is one warp: whatever is not a matter of lanes is then the same in the whole block, which the compiler sees, keeps in
// uniform registers and branches on without provision for divergence.
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

SR_DEVICE int lane_index() { return int(threadIdx.x); }
SR_DEVICE int64_t warp_index() { return blockIdx.x; }
SR_DEVICE int64_t warp_count() { return gridDim.x; }

// The largest value among `lanes` neighbours, a power of two.
SR_DEVICE uint32_t max_over_lanes(uint32_t value, int lanes) {
  if (lanes == kWarp) return __reduce_max_sync(kAllLanes, value);
  for (int distance = 1; distance < lanes; distance *= 2) {
    uint32_t other = __shfl_xor_sync(kAllLanes, value, distance);
    value = other > value ? other : value;
  }
  return value;
}

// The tree of section 5's Sign: a[j] + a[j + h] for h = 16, 8, 4, 2, 1. Every lane gets the sum, since a + b is b + a.
SR_DEVICE float sum_over_lanes(float value) {
  for (int h = 16; h >= 1; h /= 2) value += __shfl_xor_sync(kAllLanes, value, h);
  return value;
}

// Lane j gets the sum of the values of lanes 0 … j.
SR_DEVICE uint32_t running_sum(uint32_t value) {
  for (int distance = 1; distance < kWarp; distance *= 2) {
    int lane = lane_index();
    uint32_t other = __shfl_sync(kAllLanes, value, lane < distance ? lane : lane - distance);
    if (lane >= distance) value += other;
  }
  return value;
}

SR_DEVICE uint64_t from_lane(uint64_t value, int lane) {
  uint32_t low = __shfl_sync(kAllLanes, uint32_t(value), lane);
  uint32_t high = __shfl_sync(kAllLanes, uint32_t(value >> 32), lane);
  return low | uint64_t(high) << 32;
}

SR_DEVICE uint64_t sum_over_lanes(uint64_t value) {
  for (int distance = 1; distance < kWarp; distance *= 2) value += from_lane(value, lane_index() ^ distance);
  return value;
}

SR_DEVICE bool any_lane(bool predicate) { return __ballot_sync(kAllLanes, predicate) != 0; }

// Of the lanes below this one, how many of `lanes` are among them.
SR_DEVICE uint32_t lanes_before(unsigned lanes) { return uint32_t(__popc(lanes & ((1u << lane_index()) - 1))); }

}  // namespace smallreduce::SR_TARGET
