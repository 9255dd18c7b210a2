#include "cuda/decode.cuh"
#include "cuda/launch.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <Kind kKind, typename Buffer>
void decode_buffer(const cuda::DecodeArgs& args, cudaStream_t stream) {
  Tiling tiling = tiling_of(args.format);
  if (args.ranks == 1) return launch<decode_kernel<kKind, Buffer, Decoding::kOneRank>>(stream, args, tiling);
  launch<decode_kernel<kKind, Buffer, Decoding::kSum>>(stream, args, tiling);
}

template <Kind kKind>
void decode_kind(const cuda::DecodeArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case ElementType::kFloat32: return decode_buffer<kKind, Float32Buffer>(args, stream);
    case ElementType::kBFloat16: return decode_buffer<kKind, BFloat16Buffer>(args, stream);
    case ElementType::kFloat16: return decode_buffer<kKind, Float16Buffer>(args, stream);
  }
}

}  // namespace

void decode_int(const cuda::DecodeArgs& args, cudaStream_t stream) {
  switch (args.format.kind) {
    case Kind::kSign: return decode_kind<Kind::kSign>(args, stream);
    case Kind::kInt2: return decode_kind<Kind::kInt2>(args, stream);
    case Kind::kInt4: return decode_kind<Kind::kInt4>(args, stream);
    default: return decode_kind<Kind::kInt8>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
