// Packets to elements: of one rank, the sum of several ranks', or added to what the buffer holds.
#pragma once

#include "cuda/hadamard.cuh"
#include "cuda/kernels.h"
#include "cuda/sum.cuh"

namespace smallreduce::SR_TARGET {

enum class Decoding { kOneRank, kSum, kAdd };

// fl(value + decoded), limited to finite where both are.
SR_DEVICE float add_decoded(float value, float decoded) {
  float sum = value + decoded;
  return is_finite(value) && is_finite(decoded) ? limit_to_finite(sum) : sum;
}

template <Kind kKind, typename Buffer, Decoding kDecoding>
__global__ void __launch_bounds__(kWarp, 16) decode_kernel(cuda::DecodeArgs args, Tiling tiling) {
  PacketFormat format = packet_format(kKind, args.format, args.type);
  report_refused(args.packets, args.ranks, args.stride, format, args.layout, args.error);
  bool packets_aligned = is_aligned(args.packets, 16) && args.stride % 16 == 0;
  int checked = -1;
  bool accepted = false;
  for_each_run(args.layout, tiling.division, [&](const Run& run) {
    int packet = int(run.segment->packet);
    const Packet& row = args.layout.packets[packet];
    const uint8_t* packets = args.packets + packet * args.stride;
    if (packet != checked) {
      accepted = all_expected(packets, args.ranks, args.stride, format, row);
      checked = packet;
    }
    if (!accepted) return;
    RankSum<kKind> sum{locate(packets, kKind, row, run, tiling.division.group), args.ranks, args.stride, args.factor,
                       packets_aligned};
    auto* output = static_cast<typename Buffer::Storage*>(args.output) + run.segment->offset + run.begin;
    bool aligned = has_aligned_quads<Buffer>(output);
    const bool all[kSteps] = {true, true, true, true};
    for (int unit = 0, group = 0; unit < run.elements; unit += tiling.unit, group += tiling.groups) {
      int end = smaller(unit + tiling.unit, run.elements);
      for (int begin = unit; begin < end; begin += kTile) {
        Place place(smaller(kTile, end - begin));
        Tile tile;
        if constexpr (kDecoding == Decoding::kSum) {
          sum.load(tiling, group, begin / int(kBlock), place, tile);
        } else {
          sum.template add<true>(0, tiling, group, begin / int(kBlock), place, tile);
        }
        if (args.format.hadamard) inverse_hadamard(tile);
        if constexpr (kDecoding == Decoding::kAdd) {
          bool whole = aligned && place.is_whole();
#pragma unroll
          for (int u = 0; u < kSteps; ++u) {
            Slot held;
            load_slot<Buffer>(output + begin, place, u, whole, held);
#pragma unroll
            for (int i = 0; i < kSlot; ++i) tile[u][i] = add_decoded(held[i], tile[u][i]);
          }
        }
        store_tile<Buffer>(output + begin, aligned, place, tile, all);
      }
    }
  });
}

}  // namespace smallreduce::SR_TARGET
