#include "cuda/encode.cuh"
#include "cuda/launch.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <Kind kKind, typename Buffer>
void encode_buffer(const cuda::EncodeArgs& args, cudaStream_t stream) {
  Tiling tiling = tiling_of(args.format);
  if constexpr (!is_cast(kKind)) {
    if (is_spread(args.format)) return launch<encode_kernel<kKind, Buffer, false, true>>(stream, args, tiling);
  }
  launch<encode_kernel<kKind, Buffer, false, false>>(stream, args, tiling);
}

template <Kind kKind>
void encode_kind(const cuda::EncodeArgs& args, cudaStream_t stream) {
  if (args.type == ElementType::kBFloat16) return encode_buffer<kKind, RoundedToBFloat16>(args, stream);
  encode_buffer<kKind, RoundedToFloat16>(args, stream);
}

}  // namespace

void encode_rounded(const cuda::EncodeArgs& args, cudaStream_t stream) {
  if (args.type == ElementType::kFloat32) return encode(args, stream);
  switch (args.format.kind) {
    case Kind::kCastFloat32: return encode_kind<Kind::kCastFloat32>(args, stream);
    case Kind::kCastBFloat16: return encode_kind<Kind::kCastBFloat16>(args, stream);
    case Kind::kCastFloat16: return encode_kind<Kind::kCastFloat16>(args, stream);
    case Kind::kCastE4M3: return encode_kind<Kind::kCastE4M3>(args, stream);
    case Kind::kCastE5M2: return encode_kind<Kind::kCastE5M2>(args, stream);
    case Kind::kSign: return encode_rounded_sign(args, stream);
    case Kind::kInt2: return encode_kind<Kind::kInt2>(args, stream);
    case Kind::kInt4: return encode_kind<Kind::kInt4>(args, stream);
    default: return encode_kind<Kind::kInt8>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
