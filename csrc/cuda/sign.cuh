// Values to packets of Sign. A lane is one of the 32 accumulators of the scale (docs/wire-formats.md, section 5), so here lane j
// holds element j of each block of a tile, and the codes of a block are a ballot.
#pragma once

#include "cuda/reduce_encode_mixed.cuh"

namespace smallreduce::SR_TARGET {

constexpr int kSignBlocks = kTile / int(kBlock);
using Column = float[kSignBlocks];  // one element of each block of a tile

// The groups that share a tile, or one group of several tiles.
struct SignTiling {
  int group_blocks;
  int unit;  // elements
  Division division;
};

inline SignTiling sign_tiling_of(const Format& format) {
  int group = int(format.group), shared = group < kTile ? kTile / group : 1;
  return {group / int(kBlock), shared * group, division_of(format, shared)};
}

SR_DEVICE void compensate(const float* residual, int count, Column& values) {
  int lane = lane_index();
#pragma unroll
  for (int b = 0; b < kSignBlocks; ++b) {
    int element = b * kWarp + lane;
    if (element < count) values[b] = compensate(values[b], residual[element]);
  }
}

template <typename Buffer>
struct SignWorkerSource {
  const typename Buffer::Storage* input;
  float* residual;  // null: no feedback

  SR_DEVICE_MEMBER float remainder(float value, float decoded) const { return limit_to_finite(value - decoded); }

  SR_DEVICE_MEMBER void load(const SignTiling&, const TileAt& at, Column& values) const {
    int lane = lane_index();
#pragma unroll
    for (int b = 0; b < kSignBlocks; ++b) {
      int element = b * kWarp + lane;
      values[b] = element < at.place.count ? Buffer::load(input[at.begin + element]) : 0.0f;
    }
    if (residual) compensate(residual + at.begin, at.place.count, values);
  }
};

struct SignDifferenceSource {
  const float* minuend;
  const void* subtrahend;
  ElementType type;
  float* residual = nullptr;

  SR_DEVICE_MEMBER float remainder(float value, float) const { return value; }

  SR_DEVICE_MEMBER void load(const SignTiling&, const TileAt& at, Column& values) const {
    int lane = lane_index();
#pragma unroll
    for (int b = 0; b < kSignBlocks; ++b) {
      int element = b * kWarp + lane;
      bool present = element < at.place.count;
      values[b] = present ? minuend[at.begin + element] - old(at.begin + element) : 0.0f;
    }
  }

  SR_DEVICE_MEMBER float old(int element) const {
    if (type == ElementType::kFloat32) return static_cast<const float*>(subtrahend)[element];
    uint16_t half = static_cast<const uint16_t*>(subtrahend)[element];
    return type == ElementType::kBFloat16 ? BFloat16Buffer::load(half) : Float16Buffer::load(half);
  }
};

// The sum of packets of any kind, element for element in its lane's column.
struct SignMixedSource {
  MixedSum sum;
  float* residual;  // null: no feedback

  SR_DEVICE_MEMBER float remainder(float value, float decoded) const { return value - decoded; }

  SR_DEVICE_MEMBER void load(const SignTiling&, const TileAt& at, Column& values) const {
    load_step<0>(at, values);
    load_step<1>(at, values);
    load_step<2>(at, values);
    load_step<3>(at, values);
    if (residual) compensate(residual + at.begin, at.place.count, values);
  }

  template <int kStep>
  SR_DEVICE_MEMBER void load_step(const TileAt& at, Column& values) const {
    Tile tile;  // of which one step is used
    sum.load<kStep, kStep + 1>(at.begin / int(kBlock), at.place, tile);
    int lane = lane_index(), mine = lane % 4 + lane / 16 * 4;  // the place in its slot of this lane's element
#pragma unroll
    for (int row = 0; row < kStepElements / int(kBlock); ++row) {
      int b = kStep * (kStepElements / int(kBlock)) + row;
#pragma unroll
      for (int i = 0; i < kSlot; ++i) {
        float value = __shfl_sync(kAllLanes, tile[kStep][i], 4 * row + lane % 16 / 4);
        values[b] = i == 0 || i == mine ? value : values[b];
      }
      if (b * kWarp + lane >= at.place.count) values[b] = 0.0f;
    }
  }
};

struct SignServerSource {
  Sections<const uint8_t> from;
  int64_t ranks, stride;
  float factor;
  bool packets_aligned;
  float* residual;  // null: no feedback

  SR_DEVICE_MEMBER float remainder(float value, float decoded) const { return value - decoded; }

  SR_DEVICE_MEMBER void load(const SignTiling& tiling, const TileAt& at, Column& values) const {
    int lane = lane_index();
    for (int64_t rank = 0; rank < ranks; ++rank) {
      uint32_t word = 0;
      float scale = 0.0f;
      if (lane * kWarp < at.place.count) {
        load_words<1>(from.codes + rank * stride + 4 * (at.begin / int(kBlock) + lane), packets_aligned, &word);
        int group = at.group + (tiling.group_blocks < kSignBlocks ? lane / tiling.group_blocks : 0);
        scale = scale_value(load_u16(from.scales + rank * stride + 2 * group, packets_aligned)) * factor;
      }
#pragma unroll
      for (int b = 0; b < kSignBlocks; ++b) {
        uint32_t negative = ~__shfl_sync(kAllLanes, word, b) >> lane << 31;
        float value = float_of(bits_of(__shfl_sync(kAllLanes, scale, b)) ^ negative);
        values[b] = rank == 0 ? value : values[b] + value;
      }
    }
#pragma unroll
    for (int b = 0; b < kSignBlocks; ++b) {
      if (b * kWarp + lane >= at.place.count) values[b] = 0.0f;
    }
    if (residual) compensate(residual + at.begin, at.place.count, values);
  }
};

SR_DEVICE uint16_t sign_scale(float sum, uint32_t largest, int elements) {
  uint16_t mean = bfloat16_from_float(sum / float(elements));
  mean = mean > kMaxScale ? kMaxScale : mean;
  return largest < kInfBits ? mean : kNanScale;
}

template <typename Source>
SR_DEVICE void encode_sign_run(const SignTiling& tiling, int group_size, const Source& source, int elements,
                               const Target& target) {
  int lane = lane_index();
  for (int unit = 0, group = 0; unit < elements; unit += tiling.unit) {
    int end = smaller(unit + tiling.unit, elements);
    bool spread = end - unit > kTile;
    Column values;
    float sum = 0.0f, group_sum = 0.0f;  // of the group at hand; of the group whose number is the lane's
    uint32_t largest = 0, group_largest = 0;
    for (int begin = unit; begin < end; begin += kTile) {
      TileAt at{begin, group, Place(smaller(kTile, end - begin))};
      source.load(tiling, at, values);
      int blocks = int(ceil_div(at.place.count, kBlock));
      int finished = 0, group_end = tiling.group_blocks - (begin - unit) / int(kBlock);
      uint32_t codes = 0;
#pragma unroll
      for (int b = 0; b < kSignBlocks; ++b) {
        if (b >= blocks) continue;
        uint32_t magnitude = magnitude_bits(values[b]);
        sum += float_of(magnitude);
        largest = magnitude > largest ? magnitude : largest;
        uint32_t word = __ballot_sync(kAllLanes, !(values[b] < 0.0f));
        codes = lane == b ? word : codes;
        if (b + 1 == group_end || (b + 1 == blocks && begin + at.place.count == end)) {
          float whole = sum_over_lanes(sum);
          uint32_t whole_largest = max_over_lanes(largest, kWarp);
          group_sum = lane == finished ? whole : group_sum;
          group_largest = lane == finished ? whole_largest : group_largest;
          ++finished;
          group_end += tiling.group_blocks;
          sum = 0.0f;
          largest = 0;
        }
      }
      if (lane < blocks) store_words<1>(target.to.codes + 4 * (begin / int(kBlock) + lane), target.aligned, &codes);
    }
    int before = lane * group_size;
    uint16_t scale_bits = 0;
    if (unit + before < end) {
      scale_bits = sign_scale(group_sum, group_largest, smaller(group_size, end - unit - before));
      store_u16(target.to.scales + 2 * (group + lane), target.aligned, scale_bits);
    }
    group += int(ceil_div(end - unit, group_size));
    if (!source.residual) continue;
    float group_scale = float_from_bfloat16(scale_bits);
    for (int begin = unit; begin < end; begin += kTile) {
      TileAt at{begin, group - 1, Place(smaller(kTile, end - begin))};
      if (spread) source.load(tiling, at, values);
      int number = 0, group_end = spread ? kSignBlocks : tiling.group_blocks;
#pragma unroll
      for (int b = 0; b < kSignBlocks; ++b) {
        float scale = __shfl_sync(kAllLanes, group_scale, number);
        int element = b * kWarp + lane;
        if (element < at.place.count && is_finite(scale)) {
          source.residual[begin + element] = source.remainder(values[b], values[b] < 0.0f ? -scale : scale);
        }
        if (b + 1 == group_end) {
          ++number;
          group_end += tiling.group_blocks;
        }
      }
    }
  }
}

template <typename Buffer>
__global__ void __launch_bounds__(kWarp, 12) encode_sign_kernel(cuda::EncodeArgs args, SignTiling tiling) {
  PacketFormat format = packet_format(Kind::kSign, args.format, args.type);
  for (int64_t p = warp_index(); p < args.layout.packet_count; p += warp_count()) {
    write_frame(args.packets + p * args.stride, format, args.layout.packets[p], true);
  }
  bool packets_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int group_size = tiling.division.group;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    int64_t packet = run.segment->packet;
    const auto* input = static_cast<const typename Buffer::Storage*>(args.input) + run.segment->offset + run.begin;
    SignWorkerSource<Buffer> source{input, args.residual ? args.residual + run.origin() * kBlock : nullptr};
    Target target{
        locate(args.packets + packet * args.stride, Kind::kSign, args.layout.packets[packet], run, group_size),
        packets_aligned,
        {},
        0,
        false};
    encode_sign_run(tiling, group_size, source, run.elements, target);
  });
}

static __global__ void __launch_bounds__(kWarp, 12)
    encode_sign_difference_kernel(cuda::EncodeDifferenceArgs args, SignTiling tiling) {
  PacketFormat format = packet_format(Kind::kSign, args.format, args.type);
  for (int64_t p = warp_index(); p < args.layout.packet_count; p += warp_count()) {
    write_frame(args.packets + p * args.stride, format, args.layout.packets[p], true);
  }
  bool packets_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int element_bytes = args.type == ElementType::kFloat32 ? 4 : 2;
  int group_size = tiling.division.group;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    int64_t packet = run.segment->packet, first = run.segment->offset + run.begin;
    const auto* subtrahend = static_cast<const uint8_t*>(args.subtrahend) + first * element_bytes;
    SignDifferenceSource source{args.minuend + first, subtrahend, args.type};
    Target target{
        locate(args.packets + packet * args.stride, Kind::kSign, args.layout.packets[packet], run, group_size),
        packets_aligned,
        {},
        0,
        false};
    encode_sign_run(tiling, group_size, source, run.elements, target);
  });
}

SR_DEVICE SignServerSource sign_sum_of(const cuda::ReduceEncodeArgs& args, const Run& run, bool aligned,
                                       float* residual) {
  return {locate(args.packets, Kind::kSign, args.layout.packets[0], run, args.format.group),
          args.ranks,
          args.stride,
          args.factor,
          aligned,
          residual};
}

// kMixed: from packets of another format than the one written.
template <bool kMixed>
__global__ void __launch_bounds__(kWarp, kMixed ? 8 : 12)
    reduce_encode_sign_kernel(cuda::ReduceEncodeArgs args, SignTiling tiling) {
  PacketFormat format = packet_format(Kind::kSign, args.format, args.type);
  const Packet& row = args.layout.packets[0];
  bool accepted = accept_ranks(args);
  if (warp_index() == 0) write_frame(args.packet, format, row, accepted);
  if (!accepted) return;
  bool input_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int group_size = tiling.division.group;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    float* residual = args.residual ? args.residual + run.block() * kBlock : nullptr;
    auto source = [&] {
      if constexpr (kMixed) {
        return SignMixedSource{mixed_sum_of(args, run, input_aligned), residual};
      } else {
        return sign_sum_of(args, run, input_aligned, residual);
      }
    }();
    Target target{locate(args.packet, Kind::kSign, row, run, group_size), is_aligned(args.packet, 16), {}, 0, false};
    encode_sign_run(tiling, group_size, source, run.elements, target);
  });
}

}  // namespace smallreduce::SR_TARGET
