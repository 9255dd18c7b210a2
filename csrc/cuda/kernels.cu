// From the kind of a format to the file that holds its kernels.
#include "cuda/kernels.h"

#include "cuda/launch.cuh"
#include "cuda/topk.cuh"

namespace smallreduce::cuda {

void encode(const EncodeArgs& args, cudaStream_t stream) {
  if (is_sparse(args.format.kind)) return encode_topk(args, stream);
  if (is_cast(args.format.kind)) return encode_cast(args, stream);
  if (args.format.kind == Kind::kSign) return encode_sign(args, stream);
  encode_int(args, stream);
}

void decode(const DecodeArgs& args, cudaStream_t stream) {
  if (is_sparse(args.format.kind)) return decode_topk(args, stream);
  if (is_cast(args.format.kind)) return decode_cast(args, stream);
  decode_int(args, stream);
}

void clear(const ClearArgs& args, cudaStream_t stream) { clear_topk(args, stream); }

void reduce_encode(const ReduceEncodeArgs& args, cudaStream_t stream) {
  if (is_sparse(args.format.kind)) return reduce_encode_topk(args, stream);
  if (args.from_format.kind != args.format.kind || args.from_format.group != args.format.group) {
    return reduce_encode_mixed(args, stream);
  }
  if (is_cast(args.format.kind)) return reduce_encode_cast(args, stream);
  if (args.format.kind == Kind::kSign) return reduce_encode_sign(args, stream);
  reduce_encode_int(args, stream);
}

int64_t scratch_nbytes(const Layout& layout, int64_t ranks) {
  int64_t values = 0, candidates = 0, slabs = 0;
  for (int64_t p = 0; p < layout.packet_count; ++p) values += layout.packets[p].values;
  for (int64_t i = 0; i < layout.segment_count; ++i) {
    const Segment& segment = layout.segments[i];
    if (!is_sampled(segment.length, segment.kept)) continue;
    candidates += 2 * expected_candidates(segment.kept);
    slabs = max_ranges(layout.groups());
  }
  Scratch scratch = carve(nullptr, 0, {layout.groups(), layout.segment_count, layout.packet_count, values, ranks});
  int64_t pool = (candidates + slabs * kSlab) * int64_t(sizeof(Candidate));
  return int64_t(reinterpret_cast<uintptr_t>(scratch.pool)) + pool;
}

int runtime_version() {
  int version = 0;
  SR_CHECK(cudaRuntimeGetVersion(&version));
  return version;
}

}  // namespace smallreduce::cuda
