#include "cuda/topk_select.cuh"

namespace smallreduce::SR_TARGET {

void reduce_encode_topk(const cuda::ReduceEncodeArgs& args, cudaStream_t stream) {
  PacketFormat format{args.format.kind, packet_tag(args.format.kind, args.format.group, false, args.type)};
  SparseMemory memory{args.scratch, args.scratch_nbytes};
  SparsePackets packets{args.packets, args.ranks, args.stride, args.factor, args.format.kind};
  read_words(packets, format, args.layout, memory, args.error, stream);
  select<ServerSide>(args, stream);
  write_words(args.packet, 0, format, args.layout, memory, args.ranks, stream);
}

}  // namespace smallreduce::SR_TARGET
