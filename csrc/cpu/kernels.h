// The CPU kernels as the dispatcher sees them: one table of functions per instruction set, each working on a range of groups.
// Raw pointers and sizes; nothing here allocates, throws or checks: bindings/ has done so.
#pragma once

#include "formats/types.h"

namespace smallreduce::cpu {

struct EncodeArgs {
  const void* input;
  ElementType type;
  float* residual;  // in block order, indexed by origin; null: no feedback
  Layout layout;
  Format format;
  uint64_t seed, step;
  uint8_t* packets;  // layout.packet_count of them, `stride` bytes apart
  int64_t stride;
  void* scratch;  // of sparse_scratch_nbytes(), here and below
};

// Of an fp32 buffer less one of `type`, both laid out alike. No TopK.
struct EncodeDifferenceArgs {
  const float* minuend;
  const void* subtrahend;
  ElementType type;
  Layout layout;
  Format format;
  uint64_t seed, step;
  uint8_t* packets;
  int64_t stride;
};

struct DecodeArgs {
  const uint8_t* packets;
  int64_t stride;
  Layout layout;
  Format format;
  void* output;
  ElementType type;
  void* scratch;
  bool add = false;  // to what the output holds; no TopK
};

// The packets of `ranks` ranks, `stride` bytes apart, all of the one packet that `layout` describes.
struct ReduceArgs {
  const uint8_t* packets;
  int64_t ranks, stride;
  float factor;
  Layout layout;
  Format format;
  void* output;
  ElementType type;
  void* scratch;
};

// `layout` and `format` are of the packet written. Those of the packets read have the same segments and are alike in Hadamard.
struct ReduceEncodeArgs {
  const uint8_t* packets;
  int64_t ranks, stride;
  float factor;
  Layout from;
  Format from_format;
  Layout layout;
  Format format;
  float* residual;  // in block order, indexed by block in the packet; null: no feedback
  uint64_t seed, step;
  uint8_t* packet;
  int64_t nbytes;  // that `packet` has
  void* scratch;
};

// Each writes scales and codes, or elements, of groups [begin, end) of the layout. Headers and padding are the caller's.
struct Kernels {
  void (*encode)(const EncodeArgs&, int64_t begin, int64_t end);
  void (*encode_rounded)(const EncodeArgs&, int64_t begin, int64_t end);  // of an fp32 buffer; `type` is a narrower one
  void (*encode_difference)(const EncodeDifferenceArgs&, int64_t begin, int64_t end);
  void (*decode)(const DecodeArgs&, int64_t begin, int64_t end);
  void (*reduce)(const ReduceArgs&, int64_t begin, int64_t end);
  void (*reduce_encode)(const ReduceEncodeArgs&, int64_t begin, int64_t end);
};

}  // namespace smallreduce::cpu
