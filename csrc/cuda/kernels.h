// The CUDA kernels as their callers see them. Every pointer is to memory of the current device, the tables of a layout included;
// each call is one launch on `stream` (of TopK: several), allocates nothing, waits for nothing and can be captured in a CUDA graph.
// Throws std::runtime_error if a launch fails.
#pragma once

#include <cuda_runtime.h>

#include "formats/types.h"

namespace smallreduce::cuda {

struct EncodeArgs {
  const void* input;
  ElementType type;
  float* residual;  // in block order, indexed by origin; null: no feedback
  Layout layout;
  Format format;
  uint64_t seed;
  const int64_t* step;  // null: step 0
  uint8_t* packets;     // layout.packet_count of them, `stride` bytes apart
  int64_t stride;
  void* scratch;  // of TopK; here and below
  int64_t scratch_nbytes;
};

// Of an fp32 buffer less one of `type`, both laid out alike. No TopK.
struct EncodeDifferenceArgs {
  const float* minuend;
  const void* subtrahend;
  ElementType type;
  Layout layout;
  Format format;
  uint64_t seed;
  const int64_t* step;
  uint8_t* packets;
  int64_t stride;
};

// The packets of a layout (ranks is 1, factor 1), or those of `ranks` ranks for the one packet that the layout describes; either
// way `stride` bytes apart. A refused packet leaves 1 + its number in `error` (which may be null), the lowest if there are several:
// decoding then skips that packet, a reduction writes nothing.
struct DecodeArgs {
  const uint8_t* packets;
  int64_t ranks, stride;
  float factor;
  Layout layout;
  Format format;
  void* output;
  ElementType type;
  void* scratch;
  int64_t scratch_nbytes;
  int32_t* error;
};

// Sets to zero the elements that packets of TopK hold, of a buffer of any type.
struct ClearArgs {
  const uint8_t* packets;
  int64_t stride;
  Layout layout;
  Format format;
  ElementType packet_type;  // of the buffer that the packets are of
  void* output;
  ElementType type;
  void* scratch;
  int64_t scratch_nbytes;
  int32_t* error;
};

// `layout` and `format` are of the packet written. Those of the packets read have the same segments and are alike in Hadamard; TopK
// has but one format. If a packet is refused, the one written has a header of zeros, so that every receiver refuses it in turn.
struct ReduceEncodeArgs {
  const uint8_t* packets;
  int64_t ranks, stride;
  float factor;
  Layout from;
  Format from_format;
  Layout layout;
  Format format;
  float* residual;  // in block order, indexed by block in the packet; null: no feedback
  uint64_t seed;
  const int64_t* step;
  uint8_t* packet;
  ElementType type;  // of the buffer that the packets are of
  void* scratch;
  int64_t scratch_nbytes;
  int32_t* error;
};

void encode(const EncodeArgs& args, cudaStream_t stream);
void encode_rounded(const EncodeArgs& args, cudaStream_t stream);  // an fp32 buffer, to `type`; no residual, no TopK
void encode_difference(const EncodeDifferenceArgs& args, cudaStream_t stream);
void decode(const DecodeArgs& args, cudaStream_t stream);
void decode_add(const DecodeArgs& args, cudaStream_t stream);  // to what the output holds; of one rank, no TopK
void clear(const ClearArgs& args, cudaStream_t stream);
void reduce_encode(const ReduceEncodeArgs& args, cudaStream_t stream);

// Bytes of scratch memory, aligned to 16, that TopK needs for a layout whose tables are in host memory: reductions for the packets
// of `ranks` ranks.
int64_t scratch_nbytes(const Layout& layout, int64_t ranks);

int runtime_version();

}  // namespace smallreduce::cuda
