#include "cuda/encode.cuh"
#include "cuda/launch.cuh"

namespace smallreduce::SR_TARGET {
namespace {

template <Kind kKind, typename Buffer>
void encode_buffer(const cuda::EncodeArgs& args, cudaStream_t stream) {
  Tiling tiling = tiling_of(args.format);
  if (is_spread(args.format)) {
    if (args.residual) return launch<encode_kernel<kKind, Buffer, true, true>>(stream, args, tiling);
    return launch<encode_kernel<kKind, Buffer, false, true>>(stream, args, tiling);
  }
  if (args.residual) return launch<encode_kernel<kKind, Buffer, true, false>>(stream, args, tiling);
  launch<encode_kernel<kKind, Buffer, false, false>>(stream, args, tiling);
}

template <Kind kKind>
void encode_kind(const cuda::EncodeArgs& args, cudaStream_t stream) {
  switch (args.type) {
    case ElementType::kFloat32: return encode_buffer<kKind, Float32Buffer>(args, stream);
    case ElementType::kBFloat16: return encode_buffer<kKind, BFloat16Buffer>(args, stream);
    case ElementType::kFloat16: return encode_buffer<kKind, Float16Buffer>(args, stream);
  }
}

}  // namespace

void encode_int(const cuda::EncodeArgs& args, cudaStream_t stream) {
  switch (args.format.kind) {
    case Kind::kInt2: return encode_kind<Kind::kInt2>(args, stream);
    case Kind::kInt4: return encode_kind<Kind::kInt4>(args, stream);
    default: return encode_kind<Kind::kInt8>(args, stream);
  }
}

}  // namespace smallreduce::SR_TARGET
