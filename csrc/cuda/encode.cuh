// Values to packets of IntQuant and Cast. The values come from a source: a worker's own elements, which their buffer may round, the
// difference of two buffers, or the sum of the ranks' packets.
#pragma once

#include "cuda/hadamard.cuh"
#include "cuda/kernels.h"
#include "cuda/sum.cuh"

namespace smallreduce::SR_TARGET {

// fl(value + residual), limited to finite where the value is.
SR_DEVICE float compensate(float value, float residual) {
  float sum = value + residual;
  return is_finite(value) ? limit_to_finite(sum) : sum;
}

SR_DEVICE void compensate(Tile& values, const Tile& residual) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) values[u][i] = compensate(values[u][i], residual[u][i]);
  }
}

// A tile of a run: `begin` and `group` count elements and groups from the run's first.
struct TileAt {
  int begin, group;
  Place place;
};

// The elements of a buffer, over one run.
template <typename Buffer, bool kFeedback>
struct WorkerSource {
  static constexpr bool kHasResidual = kFeedback;
  const typename Buffer::Storage* input;
  float* residual;
  bool hadamard;
  bool aligned;  // input and residual, to quads

  SR_DEVICE_MEMBER void load(const Tiling&, const TileAt& at, Tile& values) const {
    load_tile<Buffer>(input + at.begin, aligned, at.place, values);
    if constexpr (kFeedback) {
      Tile owed;
      load_tile<ResidualBuffer>(residual + at.begin, aligned, at.place, owed);
      compensate(values, owed);
    }
    if (hadamard) smallreduce::SR_TARGET::hadamard(values);
  }

  // What is kept of a value until keep_residual(): with Hadamard what a decoder makes of it before the inverse transform, since
  // the residual is a difference on the other side of it.
  SR_DEVICE_MEMBER float remainder(float value, float decoded) const {
    return hadamard ? decoded : limit_to_finite(value - decoded);
  }

  SR_DEVICE_MEMBER void keep_residual(const TileAt& at, Tile& remainders, const bool (&keep)[kSteps]) const {
    if (hadamard) {
      inverse_hadamard(remainders);
      // Read again, step by step: cheaper than registers for both forms.
      bool whole = aligned && at.place.is_whole();
#pragma unroll
      for (int u = 0; u < kSteps; ++u) {
        Slot original, owed;
        load_slot<Buffer>(input + at.begin, at.place, u, whole, original);
        load_slot<ResidualBuffer>(residual + at.begin, at.place, u, whole, owed);
#pragma unroll
        for (int i = 0; i < kSlot; ++i) {
          remainders[u][i] = limit_to_finite(compensate(original[i], owed[i]) - remainders[u][i]);
        }
      }
    }
    store_tile<ResidualBuffer>(residual + at.begin, aligned, at.place, remainders, keep);
  }
};

// What an fp32 buffer has more than another, over one run. The type of the other is the same in the whole grid.
struct DifferenceSource {
  static constexpr bool kHasResidual = false;
  const float* minuend;
  const void* subtrahend;
  ElementType type;
  bool hadamard;
  bool aligned;  // both, to quads

  SR_DEVICE_MEMBER void load(const Tiling&, const TileAt& at, Tile& values) const {
    load_tile<Float32Buffer>(minuend + at.begin, aligned, at.place, values);
    switch (type) {
      case ElementType::kFloat32: subtract<Float32Buffer>(at, values); break;
      case ElementType::kBFloat16: subtract<BFloat16Buffer>(at, values); break;
      case ElementType::kFloat16: subtract<Float16Buffer>(at, values); break;
    }
    if (hadamard) smallreduce::SR_TARGET::hadamard(values);
  }

  template <typename Buffer>
  SR_DEVICE_MEMBER void subtract(const TileAt& at, Tile& values) const {
    const auto* from = static_cast<const typename Buffer::Storage*>(subtrahend) + at.begin;
    bool whole = aligned && at.place.is_whole();
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      Slot old;
      load_slot<Buffer>(from, at.place, u, whole, old);
#pragma unroll
      for (int i = 0; i < kSlot; ++i) values[u][i] = values[u][i] - old[i];
    }
  }
};

SR_DEVICE void zero_missing(Place place, Tile& values) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) values[u][i] = slot_offset(i) < place.rest(u) ? values[u][i] : 0.0f;
  }
}

// The sum of the ranks' packets, over one run; its residual is a server's. With Hadamard the elements of a run are those of whole
// blocks, all of them data.
template <Kind kKind, bool kFeedback>
struct ServerSource {
  static constexpr bool kHasResidual = kFeedback;
  RankSum<kKind> sum;
  float* residual;
  bool aligned;  // the residual, to quads

  SR_DEVICE_MEMBER void load(const Tiling& tiling, const TileAt& at, Tile& values) const {
    sum.load(tiling, at.group, at.begin / int(kBlock), at.place, values);
    if (!at.place.is_whole()) zero_missing(at.place, values);
    if constexpr (kFeedback) {
      Tile owed;
      load_tile<ResidualBuffer>(residual + at.begin, aligned, at.place, owed);
      compensate(values, owed);
    }
  }

  SR_DEVICE_MEMBER float remainder(float value, float decoded) const { return value - decoded; }

  SR_DEVICE_MEMBER void keep_residual(const TileAt& at, const Tile& remainders, const bool (&keep)[kSteps]) const {
    store_tile<ResidualBuffer>(residual + at.begin, aligned, at.place, remainders, keep);
  }
};

// Where a run's codes go and what rounds them.
struct Target {
  Sections<uint8_t> to;
  bool aligned;  // the packet, to 16 bytes
  RandomKey key;
  uint32_t origin;  // of the run's first block
  bool stochastic;
};

SR_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// For each step the largest magnitude, as bits, in the lane's slot.
SR_DEVICE void max_over_slots(const Tile& values, uint32_t (&largest)[kSteps]) {
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
#pragma unroll
    for (int i = 0; i < kSlot; ++i) largest[u] = larger(largest[u], magnitude_bits(values[u][i]));
  }
}

// From the largest of each slot to the largest of the group to which the slot belongs.
SR_DEVICE void max_over_groups(int span, uint32_t (&largest)[kSteps]) {
#pragma unroll
  for (int distance = 1; distance < kSteps; distance *= 2) {
    if (distance * kWarp >= span) break;
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      if (u & distance) continue;
      largest[u] = largest[u + distance] = larger(largest[u], largest[u + distance]);
    }
  }
  if (span >= kWarp) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) largest[u] = __reduce_max_sync(kAllLanes, largest[u]);
    return;
  }
  for (int distance = 1; distance < span; distance *= 2) {
#pragma unroll
    for (int u = 0; u < kSteps; ++u) largest[u] = larger(largest[u], __shfl_xor_sync(kAllLanes, largest[u], distance));
  }
}

template <int kBits>
SR_DEVICE void rounding_offsets(const Target& target, uint32_t origin, int quarter, Slot& offsets) {
  constexpr float nearest = float(IntLevels<kBits>::kZero) + 0.5f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t random = target.stochastic ? random_pair(target.key, origin, uint32_t(4 * quarter + i)) : 0;
    offsets[i] = target.stochastic ? rounding_offset<kBits>(random & 0xffffu) : nearest;
    offsets[i + 4] = target.stochastic ? rounding_offset<kBits>(random >> 16) : nearest;
  }
}

// Of the group whose number in the tile is the lane's.
struct GroupScale { float scale, inverse; };

// From the largest magnitude of each slot's group. The scales are written.
template <int kBits>
SR_DEVICE GroupScale scale_groups(const Tiling& tiling, const TileAt& at, const uint32_t (&largest)[kSteps],
                                  const Target& target) {
  int lane = lane_index(), slot = lane * tiling.span;
  uint32_t mine = 0;
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    uint32_t theirs = __shfl_sync(kAllLanes, largest[u], slot % kWarp);
    mine = slot / kWarp == u ? theirs : mine;
  }
  uint16_t scale = mine < kInfBits ? int_scale<kBits>(mine) : kNanScale;
  if (lane < tiling.groups_in(at.place)) store_u16(target.to.scales + 2 * (at.group + lane), target.aligned, scale);
  return {float_from_bfloat16(scale), inverse_scale(scale)};
}

// Writes the codes of a tile. With feedback `values` become the source's remainders; `finite`: those of finite groups.
template <Kind kKind, typename Source>
SR_DEVICE void quantize_tile(const Tiling& tiling, const TileAt& at, const GroupScale& groups, const Target& target,
                             const Source& source, Tile& values, bool (&finite)[kSteps]) {
  constexpr int kBits = code_bits(kKind);
  int block = at.begin / int(kBlock) + at.place.block;
  uint8_t* to = target.to.codes + block * int(block_bytes(kKind));
#pragma unroll
  for (int u = 0; u < kSteps; ++u) {
    constexpr int kBlocks = kStepElements / int(kBlock);
    int group = tiling.group_of(at.place, u);
    float scale = __shfl_sync(kAllLanes, groups.scale, group), inverse = __shfl_sync(kAllLanes, groups.inverse, group);
    finite[u] = is_finite(scale);
    Slot offsets;
    rounding_offsets<kBits>(target, target.origin + uint32_t(block + u * kBlocks), at.place.quarter, offsets);
    uint32_t codes[kSlot], words[Codes<kKind>::kWords];
#pragma unroll
    for (int i = 0; i < kSlot; ++i) {
      codes[i] = biased_int_code<kBits>(values[u][i], inverse, offsets[i]);
      if constexpr (Source::kHasResidual) {
        values[u][i] = source.remainder(values[u][i], biased_code_value<kBits>(codes[i]) * scale);
      }
    }
    Codes<kKind>::pack(codes, at.place.quarter, words);
#pragma unroll
    for (int i = 0; i < Codes<kKind>::kWords; ++i) words[i] = finite[u] ? words[i] : Codes<kKind>::kZeros;
    if (at.place.exists(u)) {
      Codes<kKind>::store(to + u * kBlocks * int(block_bytes(kKind)), at.place.quarter, target.aligned, words);
    }
  }
}

// kSpread: a group has several tiles and is read twice, first for its scale alone.
template <Kind kKind, bool kSpread, typename Source>
SR_DEVICE void encode_int_run(const Tiling& tiling, const Source& source, int elements, const Target& target) {
  for (int unit = 0, group = 0; unit < elements; unit += tiling.unit, group += tiling.groups) {
    int end = smaller(unit + tiling.unit, elements);
    uint32_t largest[kSteps] = {};
    GroupScale groups = {};
    for (int begin = kSpread ? unit : end; begin < end; begin += kTile) {
      TileAt at{begin, group, Place(smaller(kTile, end - begin))};
      Tile values;
      source.load(tiling, at, values);
      max_over_slots(values, largest);
    }
    for (int begin = unit; begin < end; begin += kTile) {
      TileAt at{begin, group, Place(smaller(kTile, end - begin))};
      Tile values;
      bool finite[kSteps];
      source.load(tiling, at, values);
      if (!kSpread) max_over_slots(values, largest);
      if (begin == unit) {
        max_over_groups(tiling.span, largest);
        groups = scale_groups<code_bits(kKind)>(tiling, at, largest, target);
      }
      quantize_tile<kKind>(tiling, at, groups, target, source, values, finite);
      if constexpr (Source::kHasResidual) source.keep_residual(at, values, finite);
      if (!kSpread) break;  // a unit is one tile
    }
  }
}

template <Kind kKind, typename Source>
SR_DEVICE void encode_cast_run(const Tiling& tiling, const Source& source, int elements, const Target& target) {
  for (int begin = 0; begin < elements; begin += kTile) {
    TileAt at{begin, 0, Place(smaller(kTile, elements - begin))};
    Tile values;
    source.load(tiling, at, values);
    uint8_t* to = target.to.codes + (begin / int(kBlock) + at.place.block) * int(block_bytes(kKind));
#pragma unroll
    for (int u = 0; u < kSteps; ++u) {
      uint32_t words[Codes<kKind>::kWords];
      Codes<kKind>::cast(values[u], words);
      if (at.place.exists(u)) {
        Codes<kKind>::store(to + u * kStepElements / int(kBlock) * int(block_bytes(kKind)), at.place.quarter,
                            target.aligned, words);
      }
      if constexpr (Source::kHasResidual) {
        if (!source.residual) continue;
        Slot decoded;
        Codes<kKind>::unpack(words, at.place.quarter, decoded);
        float* residual = source.residual + begin + at.place.first_element(u);
#pragma unroll
        for (int i = 0; i < kSlot; ++i) {
          bool present = slot_offset(i) < at.place.rest(u) && is_finite(values[u][i]);
          if (present) residual[slot_offset(i)] = values[u][i] - decoded[i];
        }
      }
    }
  }
}

template <Kind kKind, bool kSpread, typename Source>
SR_DEVICE void encode_run(const Tiling& tiling, const Source& source, int elements, const Target& target) {
  if constexpr (is_cast(kKind)) {
    encode_cast_run<kKind>(tiling, source, elements, target);
  } else {
    encode_int_run<kKind, kSpread>(tiling, source, elements, target);
  }
}

SR_DEVICE RandomKey read_key(uint64_t seed, const int64_t* step) {
  return random_key(seed, step ? uint64_t(*step) : 0);
}

// Whether the packets of all ranks are as expected; those that are not are reported.
SR_DEVICE bool accept_ranks(const cuda::ReduceEncodeArgs& args) {
  PacketFormat format = packet_format(args.from_format.kind, args.from_format, args.type);
  report_refused(args.packets, args.ranks, args.stride, format, args.from, args.error);
  return all_expected(args.packets, args.ranks, args.stride, format, args.from.packets[0]);
}

template <Kind kKind, typename Buffer, bool kFeedback, bool kSpread>
__global__ void __launch_bounds__(kWarp, kFeedback || kSpread ? 16 : 20)
    encode_kernel(cuda::EncodeArgs args, Tiling tiling) {
  PacketFormat format = packet_format(kKind, args.format, args.type);
  for (int64_t p = warp_index(); p < args.layout.packet_count; p += warp_count()) {
    write_frame(args.packets + p * args.stride, format, args.layout.packets[p], true);
  }
  RandomKey key = read_key(args.seed, args.step);
  bool packets_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int group_size = tiling.division.group;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    int64_t packet = run.segment->packet;
    const auto* input = static_cast<const typename Buffer::Storage*>(args.input) + run.segment->offset + run.begin;
    float* residual = kFeedback ? args.residual + run.origin() * kBlock : nullptr;
    bool aligned = has_aligned_quads<Buffer>(input) && has_aligned_quads<ResidualBuffer>(residual);
    WorkerSource<Buffer, kFeedback> source{input, residual, args.format.hadamard, aligned};
    Target target{locate(args.packets + packet * args.stride, kKind, args.layout.packets[packet], run, group_size),
                  packets_aligned, key, uint32_t(run.origin()), args.format.stochastic};
    encode_run<kKind, kSpread>(tiling, source, run.elements, target);
  });
}

// An fp32 buffer less another.
template <Kind kKind, bool kSpread>
__global__ void __launch_bounds__(kWarp, 16) encode_difference_kernel(cuda::EncodeDifferenceArgs args, Tiling tiling) {
  PacketFormat format = packet_format(kKind, args.format, args.type);
  for (int64_t p = warp_index(); p < args.layout.packet_count; p += warp_count()) {
    write_frame(args.packets + p * args.stride, format, args.layout.packets[p], true);
  }
  RandomKey key = read_key(args.seed, args.step);
  bool packets_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int element_bytes = args.type == ElementType::kFloat32 ? 4 : 2;
  int group_size = tiling.division.group;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    int64_t packet = run.segment->packet, first = run.segment->offset + run.begin;
    const float* minuend = args.minuend + first;
    const auto* subtrahend = static_cast<const uint8_t*>(args.subtrahend) + first * element_bytes;
    bool aligned = has_aligned_quads<Float32Buffer>(minuend) && is_aligned(subtrahend, size_t(4 * element_bytes));
    DifferenceSource source{minuend, subtrahend, args.type, args.format.hadamard, aligned};
    Target target{locate(args.packets + packet * args.stride, kKind, args.layout.packets[packet], run, group_size),
                  packets_aligned, key, uint32_t(run.origin()), args.format.stochastic};
    encode_run<kKind, kSpread>(tiling, source, run.elements, target);
  });
}

// From packets of the same format as the one written.
template <Kind kKind, bool kFeedback, bool kSpread>
__global__ void __launch_bounds__(kWarp, 16) reduce_encode_kernel(cuda::ReduceEncodeArgs args, Tiling tiling) {
  PacketFormat format = packet_format(kKind, args.format, args.type);
  const Packet& row = args.layout.packets[0];
  bool accepted = accept_ranks(args);
  if (warp_index() == 0) write_frame(args.packet, format, row, accepted);
  if (!accepted) return;
  RandomKey key = read_key(args.seed, args.step);
  bool input_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int group_size = tiling.division.group;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    RankSum<kKind> sum{locate(args.packets, kKind, row, run, group_size), args.ranks, args.stride, args.factor,
                       input_aligned};
    float* residual = kFeedback ? args.residual + run.block() * kBlock : nullptr;
    ServerSource<kKind, kFeedback> source{sum, residual, has_aligned_quads<ResidualBuffer>(residual)};
    int elements = args.format.hadamard ? int(ceil_div(run.elements, kBlock) * kBlock) : run.elements;
    Target target{locate(args.packet, kKind, row, run, group_size), is_aligned(args.packet, 16), key,
                  uint32_t(run.origin()), args.format.stochastic};
    encode_run<kKind, kSpread>(tiling, source, elements, target);
  });
}

}  // namespace smallreduce::SR_TARGET
