// From the kind of a format to the file that holds its kernels.
#include "cuda/kernels.h"

#include "cuda/launch.cuh"
#include "formats/packet.h"

namespace smallreduce::cuda {

void encode(const EncodeArgs& args, cudaStream_t stream) {
  if (is_cast(args.format.kind)) return encode_cast(args, stream);
  if (args.format.kind == Kind::kSign) return encode_sign(args, stream);
  encode_int(args, stream);
}

void decode(const DecodeArgs& args, cudaStream_t stream) {
  if (is_cast(args.format.kind)) return decode_cast(args, stream);
  decode_int(args, stream);
}

void reduce_encode(const ReduceEncodeArgs& args, cudaStream_t stream) {
  if (is_cast(args.format.kind)) return reduce_encode_cast(args, stream);
  if (args.format.kind == Kind::kSign) return reduce_encode_sign(args, stream);
  reduce_encode_int(args, stream);
}

int runtime_version() {
  int version = 0;
  SR_CHECK(cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace smallreduce::cuda
