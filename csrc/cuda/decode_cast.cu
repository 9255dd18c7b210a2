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

void decode_cast(const cuda::DecodeArgs& args, cudaStream_t stream) {
  switch (args.format.kind) {
    case Kind::kCastFloat32: return decode_kind<Kind::kCastFloat32>(args, stream);
    case Kind::kCastBFloat16: return decode_kind<Kind::kCastBFloat16>(args, stream);
    case Kind::kCastFloat16: return decode_kind<Kind::kCastFloat16>(args, stream);
    case Kind::kCastE4M3: return decode_kind<Kind::kCastE4M3>(args, stream);
    default: return decode_kind<Kind::kCastE5M2>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
