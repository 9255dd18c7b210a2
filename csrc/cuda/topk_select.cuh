// Which elements of a segment TopK sends (docs/wire-formats.md, section 11): the kernels, in the order in which they run.
#pragma once

#include "cuda/topk_radix.cuh"
#include "cuda/topk_words.cuh"

namespace smallreduce::SR_TARGET {

// Clears what the others add to.
template <typename Side>
__global__ void __launch_bounds__(kWarp, 16) prepare_kernel(typename Side::Args args) {
  Scratch scratch = scratch_without_values(args.scratch, args.layout, Side::ranks(args));
  if (!Side::kReads && warp_index() == 0) write_first_values(args.layout, scratch.first_value);
  if (warp_index() == 0 && lane_index() == 0) *scratch.reserved = 0;
  for (int64_t i = warp_index() * kWarp + lane_index(); i < args.layout.segment_count; i += warp_count() * kWarp) {
    scratch.selections[i] = {};
  }
  Ranges ranges(args.layout, warp_count());
  ranges.for_each_run_of(warp_index(), [&](const Run& run) {
    if (run.begin != 0 || is_last(run)) return;
    uint32_t* bins = bins_of(scratch, ranges, *run.segment);
    for (int i = lane_index(); i < kHistograms * kBins; i += kWarp) bins[i] = 0;
  });
}

// Bit 8·u + i of the result is that of element i of step u.
template <typename Test>
SR_DEVICE uint32_t test_elements(const Tile& values, Test test) {
  uint32_t passed = 0;
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) passed |= uint32_t(test(values[u][i])) << (kSlot * u + i);
  }
  return passed;
}

// From bits of a lane's elements to those of a block: lane b gets the block whose number in the tile is b, in the order of its
// elements, and without what lies past the end of the tile.
SR_DEVICE uint32_t by_block(const Place& place, uint32_t passed) {
  uint32_t own = 0;
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    uint32_t low = passed >> (kSlot * u) & 0xfu, high = passed >> (kSlot * u + 4) & 0xfu;
    uint32_t block = low << (4 * place.quarter) | high << (4 * place.quarter + 16);
    block |= __shfl_xor_sync(kAllLanes, block, 1);
    block |= __shfl_xor_sync(kAllLanes, block, 2);
    uint32_t theirs = __shfl_sync(kAllLanes, block, lane_index() % 8 * 4);
    own = lane_index() / 8 == u ? theirs : own;
  }
  int rest = place.count - lane_index() * int(kBlock);
  return rest >= int(kBlock) ? own : rest > 0 ? own & ((1u << rest) - 1) : 0;
}

// Collects the candidates, and replaces the residual by the values.
template <typename Side>
__global__ void __launch_bounds__(kWarp, 16) collect_kernel(typename Side::Args args) {
  Scratch scratch = scratch_of<Side>(args);
  Ranges ranges(args.layout, warp_count());
  uint32_t room = 0, room_end = 0;  // in the pool, reserved for this warp
  for_each_work<Side>(args, scratch, ranges, [&](const Work<Side>& work) {
    bool collects = work.sampled();
    if (!collects && !work.residual) return;
    float threshold = 0.0f;
    if (collects) {
      uint32_t bits = work.selection.threshold;
      __syncwarp();
      if (!is_whole(work.run)) bits = find_digits({0, uint32_t(kSampleRank)}, kSampleDigits, work.bins()).prefix;
      bits = bits < 1 ? 1 : bits > kInfBits ? kInfBits : bits;
      if (work.run.begin == 0 && lane_index() == 0) work.selection.threshold = bits;
      threshold = float_of(bits);
    }
    uint32_t found = 0;
    ranges.for_each_tile_of(work.run, [&](const SparseTile& tile) {
      Place place(tile.elements);
      Tile values;
      work.load_first(tile, values);
      if (!collects) return;
      uint32_t passed = test_elements(values, [&](float value) { return !(fabsf(value) < threshold); });
      uint32_t count = 0;
      if (any_lane(passed != 0)) {
        passed = by_block(place, passed);
        uint32_t end = running_sum(uint32_t(__popc(passed)));
        count = __shfl_sync(kAllLanes, end, kWarp - 1);
        if (count > room_end - room) {
          uint32_t wanted = count > kSlab ? count : kSlab, at = 0;
          if (lane_index() == 0) at = atomicAdd(scratch.reserved, wanted);
          at = __shfl_sync(kAllLanes, at, 0);
          collects = uint64_t(at) + wanted <= uint64_t(scratch.pool_capacity);
          if (!collects) return;
          room = at, room_end = at + wanted;
        }
        store_shared(place, values, shared_tile());
        __syncwarp();
        Candidate* to = scratch.pool + room + end - __popc(passed);
        for (; passed != 0; passed &= passed - 1) {
          int at = lane_index() * int(kBlock) + __ffs(int(passed)) - 1;
          *to++ = {uint32_t(tile.begin + at), bits_of(shared_tile()[at])};
        }
        __syncwarp();
      }
      if (lane_index() == 0) scratch.lists[tile.number] = {room, count};
      room += count, found += count;
    });
    if (!work.sampled() || lane_index() != 0) return;
    if (collects) {
      atomicAdd(&work.selection.found, found);
    } else {
      work.selection.given_up = 1;
    }
  });
}

// For each range, what its last run adds to the ranges behind it.
template <typename Side>
__global__ void __launch_bounds__(kWarp, 16) count_kernel(typename Side::Args args) {
  Scratch scratch = scratch_of<Side>(args);
  Ranges ranges(args.layout, warp_count());
  for_each_work<Side>(args, scratch, ranges, [&](const Work<Side>& work) {
    if (is_last(work.run)) return;
    Way way = way_of(work.selection, work.segment);
    uint32_t last = final_choice(work, way).prefix;
    TieCount ties = {0, 0};
    work.for_each_key(way, [&](uint32_t key) {
      ties.above += key > last;
      ties.equal += key == last;
    });
    ties = {__reduce_add_sync(kAllLanes, ties.above), __reduce_add_sync(kAllLanes, ties.equal)};
    if (lane_index() == 0) scratch.ties[warp_index()] = ties;
  });
}

template <typename Side>
SR_DEVICE TieCount ties_before(const Work<Side>& work) {
  TieCount ties = {0, 0};
  if (work.run.begin == 0) return ties;
  for (int64_t range = work.ranges.of(work.segment) + lane_index(); range < warp_index(); range += kWarp) {
    TieCount theirs = work.scratch.ties[range];
    ties.above += theirs.above, ties.equal += theirs.equal;
  }
  return {__reduce_add_sync(kAllLanes, ties.above), __reduce_add_sync(kAllLanes, ties.equal)};
}

// Where the values of a segment go.
struct Selected {
  Choice choice;
  Kind kind;
  uint8_t* values;
  bool aligned;
  uint32_t* indices;
  float* residual;

  // An element that so many others come before: larger ones, and equal ones of lower indices.
  SR_DEVICE_MEMBER void add(const TieCount& before, bool is_equal, uint32_t index, float value) const {
    bool left_over = before.equal >= choice.wanted;
    if (is_equal && left_over) return;
    uint32_t number = before.above + (left_over ? choice.wanted : before.equal);
    float decoded = store_value(kind, values, number, aligned, value);
    indices[number] = index;
    if (residual && is_finite(value)) residual[index] = limit_to_finite(value - decoded);
  }
};

template <typename Side>
SR_DEVICE void emit_candidates(const Work<Side>& work, const Selected& selected, TieCount before) {
  work.for_each_candidate([&](bool present, const Candidate& candidate) {
    uint32_t key = magnitude_key(float_of(candidate.bits)), last = selected.choice.prefix;
    unsigned above = __ballot_sync(kAllLanes, present && key > last);
    unsigned equal = __ballot_sync(kAllLanes, present && key == last);
    if (present && key >= last) {
      TieCount mine = {before.above + lanes_before(above), before.equal + lanes_before(equal)};
      selected.add(mine, key == last, candidate.index, float_of(candidate.bits));
    }
    before.above += uint32_t(__popc(above)), before.equal += uint32_t(__popc(equal));
  });
}

template <typename Side>
SR_DEVICE void emit_elements(const Work<Side>& work, const Selected& selected, TieCount before) {
  work.ranges.for_each_tile_of(work.run, [&](const SparseTile& tile) {
    Place place(tile.elements);
    Tile values;
    work.load_again(tile, values);
    uint32_t last = selected.choice.prefix;
    uint32_t above = test_elements(values, [&](float value) { return magnitude_key(value) > last; });
    uint32_t equal = test_elements(values, [&](float value) { return magnitude_key(value) == last; });
    if (before.equal >= selected.choice.wanted) equal = 0;
    if (!any_lane((above | equal) != 0)) return;
    above = by_block(place, above), equal = by_block(place, equal);
    uint32_t above_end = running_sum(uint32_t(__popc(above))), equal_end = running_sum(uint32_t(__popc(equal)));
    store_shared(place, values, shared_tile());
    __syncwarp();
    for (uint32_t rest = above | equal; rest != 0; rest &= rest - 1) {
      uint32_t bit = rest & (0u - rest);
      TieCount mine = {before.above + above_end - uint32_t(__popc(above & ~(bit - 1))),
                       before.equal + equal_end - uint32_t(__popc(equal & ~(bit - 1)))};
      int at = lane_index() * int(kBlock) + __ffs(int(bit)) - 1;
      selected.add(mine, (equal & bit) != 0, uint32_t(tile.begin + at), shared_tile()[at]);
    }
    __syncwarp();
    before.above += __shfl_sync(kAllLanes, above_end, kWarp - 1);
    before.equal += __shfl_sync(kAllLanes, equal_end, kWarp - 1);
  });
}

// Writes the values, their indices into the scratch memory, and what the residual keeps of them.
template <typename Side>
__global__ void __launch_bounds__(kWarp, 16) emit_kernel(typename Side::Args args) {
  Scratch scratch = scratch_of<Side>(args);
  Ranges ranges(args.layout, warp_count());
  for_each_work<Side>(args, scratch, ranges, [&](const Work<Side>& work) {
    const Segment& segment = work.segment;
    Kind kind = args.format.kind;
    Way way = way_of(work.selection, segment);
    uint8_t* values = Side::packet(args, segment) + kHeaderBytes + value_bytes(kind) * segment.value;
    uint32_t* indices = scratch.selected + scratch.first_value[segment.packet] + segment.value;
    Selected selected{
        final_choice(work, way), kind, values, is_aligned(values, size_t(value_bytes(kind))), indices, work.residual};
    TieCount before = ties_before(work);
    if (way == Way::kCandidates) {
      emit_candidates(work, selected, before);
    } else {
      emit_elements(work, selected, before);
    }
  });
}

template <typename Side>
void select(const typename Side::Args& args, cudaStream_t stream) {
  int warps = sparse_warps();
  launch_warps<prepare_kernel<Side>>(stream, warps, 0, args);
  for (int digit = 0; digit < kSampleDigits; ++digit) {
    launch_warps<histogram_kernel<Side, true>>(stream, warps, kSharedBytes, args, digit);
  }
  launch_warps<collect_kernel<Side>>(stream, warps, kSharedBytes, args);
  for (int digit = 0; digit < kDigits; ++digit) {
    launch_warps<histogram_kernel<Side, false>>(stream, warps, kSharedBytes, args, digit);
  }
  launch_warps<count_kernel<Side>>(stream, warps, kSharedBytes, args);
  launch_warps<emit_kernel<Side>>(stream, warps, kSharedBytes, args);
}

}  // namespace smallreduce::SR_TARGET
