#include "cuda/topk_select.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <typename Buffer>
void encode_buffer(const cuda::EncodeArgs& args, cudaStream_t stream) {
  select<WorkerSide<Buffer>>(args, stream);
  PacketFormat format{args.format.kind, packet_tag(args.format.kind, args.format.group, false, args.type)};
  SparseMemory memory{args.scratch, args.scratch_nbytes};
  write_words(args.packets, args.stride, format, args.layout, memory, 0, stream);
}

}  // namespace

void encode_topk(const cuda::EncodeArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case ElementType::kFloat32: return encode_buffer<Float32Buffer>(args, stream);
    case ElementType::kBFloat16: return encode_buffer<BFloat16Buffer>(args, stream);
    case ElementType::kFloat16: return encode_buffer<Float16Buffer>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
