#include "cuda/sign.cuh"

#include "cuda/launch.cuh"

namespace smallreduce::SR_TARGET {

void encode_sign(const cuda::EncodeArgs& args, cudaStream_t stream) {
  SignTiling tiling = sign_tiling_of(args.format);
  switch (args.type) {
    case ElementType::kFloat32: return launch<encode_sign_kernel<Float32Buffer>>(stream, args, tiling);
    case ElementType::kBFloat16: return launch<encode_sign_kernel<BFloat16Buffer>>(stream, args, tiling);
    case ElementType::kFloat16: return launch<encode_sign_kernel<Float16Buffer>>(stream, args, tiling);
  }
}

void encode_rounded_sign(const cuda::EncodeArgs& args, cudaStream_t stream) {
  SignTiling tiling = sign_tiling_of(args.format);
  if (args.type == ElementType::kBFloat16) return launch<encode_sign_kernel<RoundedToBFloat16>>(stream, args, tiling);
  launch<encode_sign_kernel<RoundedToFloat16>>(stream, args, tiling);
}

void encode_difference_sign(const cuda::EncodeDifferenceArgs& args, cudaStream_t stream) {
  launch<encode_sign_difference_kernel>(stream, args, sign_tiling_of(args.format));
}

void reduce_encode_mixed_sign(const cuda::ReduceEncodeArgs& args, cudaStream_t stream) {
  launch<reduce_encode_sign_kernel<true>>(stream, args, sign_tiling_of(args.format));
}

void reduce_encode_sign(const cuda::ReduceEncodeArgs& args, cudaStream_t stream) {
  launch<reduce_encode_sign_kernel<false>>(stream, args, sign_tiling_of(args.format));
}

}  // namespace smallreduce::SR_TARGET
