// The sum of the ranks' packets, encoded again in another format: of another kind, or with other groups. Tiles then begin anywhere in
// the groups of the packets read, and each slot looks up its scale. One kernel serves packets of every kind, which is the same in the
// whole grid, with and without feedback: as many kernels as there are pairs of kinds would take too long to compile.
#pragma once

#include "cuda/encode.cuh"

namespace smallreduce::SR_TARGET {

// Over one run of the packet written.
struct MixedSum {
  Kind kind;                     // of the packets read
  Sections<const uint8_t> from;  // of the segment's first group and block in rank 0's packet
  int64_t ranks, stride;
  float factor;
  int group_blocks;  // of the packets read
  int first_block;   // of the run, in the segment
  bool aligned;      // the packets, to 16 bytes

  template <Kind kKind, int kBegin, int kEnd>
  SR_DEVICE_MEMBER void add(int64_t rank, int tile_block, const int (&groups)[kSteps], const Place& place,
                            Tile& sum) const {
    const uint8_t* codes = from.codes + rank * stride + (tile_block + place.block) * block_bytes(kKind);
    const uint8_t* scales = from.scales + rank * stride;
    uint32_t words[kSteps][Codes<kKind>::kWords];
    float slot_scale[kSteps];
#pragma unroll
    for (int u = kBegin; u < kEnd; ++u) {
#pragma unroll
      for (int i = 0; i < Codes<kKind>::kWords; ++i) words[u][i] = 0;
      slot_scale[u] = 0.0f;  // and so are the values past the end
      if (!place.exists(u)) continue;
      Codes<kKind>::load(codes + u * kStepElements / kBlock * block_bytes(kKind), place.quarter, aligned, words[u]);
      slot_scale[u] = is_cast(kKind) ? factor : scale_value(load_u16(scales + 2 * groups[u], aligned)) * factor;
    }
#pragma unroll
    for (int u = kBegin; u < kEnd; ++u) {
      Slot values;
      Codes<kKind>::unpack(words[u], place.quarter, values);
#pragma unroll
      for (int i = 0; i < kSlot; ++i) {
        float value = values[i] * slot_scale[u];
        sum[u][i] = rank == 0 ? value : sum[u][i] + value;
      }
    }
  }

  template <Kind kKind, int kBegin, int kEnd>
  SR_DEVICE_MEMBER void load_kind(int tile_block, const Place& place, Tile& sum) const {
    int groups[kSteps];
#pragma unroll
    for (int u = kBegin; u < kEnd; ++u) groups[u] = (tile_block + place.block_of(u)) / group_blocks;
#pragma unroll 1
    for (int64_t rank = 0; rank < ranks; ++rank) add<kKind, kBegin, kEnd>(rank, tile_block, groups, place, sum);
  }

  // Steps kBegin to kEnd of a tile. `block`: number in the run of the tile's first.
  template <int kBegin = 0, int kEnd = kSteps>
  SR_DEVICE_MEMBER void load(int block, const Place& place, Tile& sum) const {
    int tile_block = first_block + block;
    switch (kind) {
      case Kind::kCastFloat32: load_kind<Kind::kCastFloat32, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kCastBFloat16: load_kind<Kind::kCastBFloat16, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kCastFloat16: load_kind<Kind::kCastFloat16, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kCastE4M3: load_kind<Kind::kCastE4M3, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kCastE5M2: load_kind<Kind::kCastE5M2, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kSign: load_kind<Kind::kSign, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kInt2: load_kind<Kind::kInt2, kBegin, kEnd>(tile_block, place, sum); break;
      case Kind::kInt4: load_kind<Kind::kInt4, kBegin, kEnd>(tile_block, place, sum); break;
      default: load_kind<Kind::kInt8, kBegin, kEnd>(tile_block, place, sum); break;
    }
  }
};

SR_DEVICE MixedSum mixed_sum_of(const cuda::ReduceEncodeArgs& args, const Run& run, bool aligned) {
  const Segment& segment = args.from.segments[run.segment - args.layout.segments];
  Kind kind = args.from_format.kind;
  const uint8_t* codes = args.packets + codes_offset(kind, args.from.packets[0].groups);
  return {kind,
          {args.packets + kHeaderBytes + 2 * segment.group, codes + segment.block * block_bytes(kind)},
          args.ranks,
          args.stride,
          args.factor,
          int(args.from_format.group / kBlock),
          int(run.begin / kBlock),
          aligned};
}

// As ServerSource.
struct MixedSource {
  static constexpr bool kHasResidual = true;
  MixedSum sum;
  float* residual;  // null: none after all
  bool aligned;     // the residual, to quads

  SR_DEVICE_MEMBER void load(const Tiling&, const TileAt& at, Tile& values) const {
    sum.load(at.begin / int(kBlock), at.place, values);
    if (!at.place.is_whole()) zero_missing(at.place, values);
    if (!residual) return;
    Tile owed;
    load_tile<ResidualBuffer>(residual + at.begin, aligned, at.place, owed);
    compensate(values, owed);
  }

  SR_DEVICE_MEMBER float remainder(float value, float decoded) const { return value - decoded; }

  SR_DEVICE_MEMBER void keep_residual(const TileAt& at, const Tile& remainders, const bool (&keep)[kSteps]) const {
    if (residual) store_tile<ResidualBuffer>(residual + at.begin, aligned, at.place, remainders, keep);
  }
};

template <Kind kKind, bool kSpread>
__global__ void __launch_bounds__(kWarp, kSpread ? 8 : 12)
    reduce_encode_mixed_kernel(cuda::ReduceEncodeArgs args, Tiling tiling) {
  PacketFormat format = packet_format(kKind, args.format, args.type);
  const Packet& row = args.layout.packets[0];
  bool accepted = accept_ranks(args);
  if (warp_index() == 0) write_frame(args.packet, format, row, accepted);
  if (!accepted) return;
  RandomKey key = read_key(args.seed, args.step);
  bool input_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    float* residual = args.residual ? args.residual + run.block() * kBlock : nullptr;
    MixedSource source{mixed_sum_of(args, run, input_aligned), residual, has_aligned_quads<ResidualBuffer>(residual)};
    int elements = args.format.hadamard ? int(ceil_div(run.elements, kBlock) * kBlock) : run.elements;
    Target target{locate(args.packet, kKind, row, run, tiling.division.group), is_aligned(args.packet, 16), key,
                  uint32_t(run.origin()), args.format.stochastic};
    encode_run<kKind, kSpread>(tiling, source, elements, target);
  });
}

}  // namespace smallreduce::SR_TARGET
