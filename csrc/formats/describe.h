// A packet's tag in words, for error messages. Host only.
#pragma once

#include <string>

#include "formats/types.h"

namespace smallreduce {

inline std::string describe_tag(uint64_t tag) {
  if ((tag & 0xffffffffu) != 0x31524d53u) return "no smallreduce packet of version 1";
  std::string text;
  switch (Kind(tag >> 32 & 0xff)) {
    case Kind::kCastFloat32: text = "fp32"; break;
    case Kind::kCastBFloat16: text = "bf16"; break;
    case Kind::kCastFloat16: text = "fp16"; break;
    case Kind::kCastE4M3: text = "fp8-e4m3"; break;
    case Kind::kCastE5M2: text = "fp8-e5m2"; break;
    case Kind::kSign: text = "sign"; break;
    case Kind::kInt2: text = "int2"; break;
    case Kind::kInt4: text = "int4"; break;
    case Kind::kInt8: text = "int8"; break;
    case Kind::kTopKFloat32: text = "topk of fp32 values"; break;
    case Kind::kTopKBFloat16: text = "topk of bf16 values"; break;
    case Kind::kTopKFloat16: text = "topk of fp16 values"; break;
    default: return "an unknown codec (kind " + std::to_string(tag >> 32 & 0xff) + ")";
  }
  if (tag >> 40 & 1) text += "-hadamard";
  if (uint64_t group = tag >> 48) text += ":group=" + std::to_string(32 * group);
  const char* types[] = {"float32", "bfloat16", "float16", "an unknown type"};
  return text + " of " + types[tag >> 41 & 3];
}

}  // namespace smallreduce
