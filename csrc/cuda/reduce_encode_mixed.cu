#include "cuda/launch.cuh"
#include "cuda/reduce_encode_mixed.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <Kind kKind>
void reduce_encode_kind(const cuda::ReduceEncodeArgs& args, cudaStream_t stream) {
  Tiling tiling = tiling_of(args.format);
  if constexpr (!is_cast(kKind)) {
    if (is_spread(args.format)) return launch<reduce_encode_mixed_kernel<kKind, true>>(stream, args, tiling);
  }
  launch<reduce_encode_mixed_kernel<kKind, false>>(stream, args, tiling);
}

}  // namespace

void reduce_encode_mixed(const cuda::ReduceEncodeArgs& args, cudaStream_t stream) {
  switch (args.format.kind) {
    case Kind::kCastFloat32: return reduce_encode_kind<Kind::kCastFloat32>(args, stream);
    case Kind::kCastBFloat16: return reduce_encode_kind<Kind::kCastBFloat16>(args, stream);
    case Kind::kCastFloat16: return reduce_encode_kind<Kind::kCastFloat16>(args, stream);
    case Kind::kCastE4M3: return reduce_encode_kind<Kind::kCastE4M3>(args, stream);
    case Kind::kCastE5M2: return reduce_encode_kind<Kind::kCastE5M2>(args, stream);
    case Kind::kSign: return reduce_encode_mixed_sign(args, stream);
    case Kind::kInt2: return reduce_encode_kind<Kind::kInt2>(args, stream);
    case Kind::kInt4: return reduce_encode_kind<Kind::kInt4>(args, stream);
    default: return reduce_encode_kind<Kind::kInt8>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
