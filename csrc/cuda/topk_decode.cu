#include "cuda/topk_words.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <typename Buffer>
__global__ void __launch_bounds__(kWarp, 16) expand_kernel(cuda::DecodeArgs args) {
  Scratch scratch = scratch_of(args.scratch, args.scratch_nbytes, args.layout, args.ranks);
  SparsePackets packets{args.packets, args.ranks, args.stride, args.factor, args.format.kind};
  Ranges ranges(args.layout, warp_count());
  ranges.for_each_run_of(warp_index(), [&](const Run& run) {
    const Segment& segment = *run.segment;
    if (!is_accepted(scratch, args.ranks, segment.packet)) return;
    SparseSum sum(packets, scratch, segment);
    auto* output = static_cast<typename Buffer::Storage*>(args.output) + segment.offset;
    bool aligned = has_aligned_quads<Buffer>(output);
    const bool all[kSteps] = {true, true, true, true};
    ranges.for_each_tile_of(run, [&](const SparseTile& tile) {
      Tile values;
      sum.load(tile, values);
      store_tile<Buffer>(output + tile.begin, aligned, Place(tile.elements), values, all);
    });
  });
}

// Storage: of an element.
template <typename Storage>
__global__ void __launch_bounds__(kWarp, 16) clear_kernel(cuda::ClearArgs args) {
  Scratch scratch = scratch_of(args.scratch, args.scratch_nbytes, args.layout, 1);
  Ranges ranges(args.layout, warp_count());
  ranges.for_each_run_of(warp_index(), [&](const Run& run) {
    const Segment& segment = *run.segment;
    if (!is_accepted(scratch, 1, segment.packet)) return;
    const uint32_t* indices = scratch.decoded + scratch.first_value[segment.packet] + segment.value;
    Storage* output = static_cast<Storage*>(args.output) + segment.offset;
    int64_t end = share(segment.kept, run.begin + run.elements, segment.length);
    for (int64_t i = share(segment.kept, run.begin, segment.length) + lane_index(); i < end; i += kWarp) {
      output[indices[i]] = 0;
    }
  });
}

template <typename Buffer>
void expand(const cuda::DecodeArgs& args, cudaStream_t stream) {
  launch_warps<expand_kernel<Buffer>>(stream, sparse_warps(), kTileBytes, args);
}

PacketFormat format_of(const Format& format, ElementType type) {
  return {format.kind, packet_tag(format.kind, format.group, false, type)};
}

}  // namespace

void decode_topk(const cuda::DecodeArgs& args, cudaStream_t stream) {
  SparsePackets packets{args.packets, args.ranks, args.stride, args.factor, args.format.kind};
  SparseMemory memory{args.scratch, args.scratch_nbytes};
  read_words(packets, format_of(args.format, args.type), args.layout, memory, args.error, stream);
  switch (args.type) {
    case ElementType::kFloat32: return expand<Float32Buffer>(args, stream);
    case ElementType::kBFloat16: return expand<BFloat16Buffer>(args, stream);
    case ElementType::kFloat16: return expand<Float16Buffer>(args, stream);
  }
}

void clear_topk(const cuda::ClearArgs& args, cudaStream_t stream) {
  SparsePackets packets{args.packets, 1, args.stride, 1.0f, args.format.kind};
  SparseMemory memory{args.scratch, args.scratch_nbytes};
  read_words(packets, format_of(args.format, args.packet_type), args.layout, memory, args.error, stream);
  if (args.type == ElementType::kFloat32) return launch_warps<clear_kernel<float>>(stream, sparse_warps(), 0, args);
  launch_warps<clear_kernel<uint16_t>>(stream, sparse_warps(), 0, args);
}

}  // namespace smallreduce::SR_TARGET
