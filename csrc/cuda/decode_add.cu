#include "cuda/decode.cuh"
#include "cuda/launch.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <Kind kKind>
void add_kind(const cuda::DecodeArgs& args, cudaStream_t stream) {
  Tiling tiling = tiling_of(args.format);
  switch (args.type) {
    case ElementType::kFloat32:
      return launch<decode_kernel<kKind, Float32Buffer, Decoding::kAdd>>(stream, args, tiling);
    case ElementType::kBFloat16:
      return launch<decode_kernel<kKind, BFloat16Buffer, Decoding::kAdd>>(stream, args, tiling);
    case ElementType::kFloat16:
      return launch<decode_kernel<kKind, Float16Buffer, Decoding::kAdd>>(stream, args, tiling);
  }
}

}  // namespace

void decode_add(const cuda::DecodeArgs& args, cudaStream_t stream) {
  switch (args.format.kind) {
    case Kind::kCastFloat32: return add_kind<Kind::kCastFloat32>(args, stream);
    case Kind::kCastBFloat16: return add_kind<Kind::kCastBFloat16>(args, stream);
    case Kind::kCastFloat16: return add_kind<Kind::kCastFloat16>(args, stream);
    case Kind::kCastE4M3: return add_kind<Kind::kCastE4M3>(args, stream);
    case Kind::kCastE5M2: return add_kind<Kind::kCastE5M2>(args, stream);
    case Kind::kSign: return add_kind<Kind::kSign>(args, stream);
    case Kind::kInt2: return add_kind<Kind::kInt2>(args, stream);
    case Kind::kInt4: return add_kind<Kind::kInt4>(args, stream);
    default: return add_kind<Kind::kInt8>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
