// The CPU kernels, compiled once per instruction set (SR_TARGET names it; CMakeLists.txt sets the flags).
#include "cpu/kernels.h"

#include "cpu/encode_group.h"
#include "cpu/store.h"
#include "cpu/sum.h"

namespace smallreduce::SR_TARGET {
namespace {

using cpu::DecodeArgs;
using cpu::EncodeArgs;
using cpu::EncodeDifferenceArgs;
using cpu::ReduceArgs;
using cpu::ReduceEncodeArgs;

template <Kind kKind>
struct KindConstant {
  static constexpr Kind value = kKind;
};

// Calls `visit` with the kind as a constant.
template <typename Visit>
auto with_kind(Kind kind, Visit visit) {
  switch (kind) {
    case Kind::kCastFloat32: return visit(KindConstant<Kind::kCastFloat32>());
    case Kind::kCastBFloat16: return visit(KindConstant<Kind::kCastBFloat16>());
    case Kind::kCastFloat16: return visit(KindConstant<Kind::kCastFloat16>());
    case Kind::kCastE4M3: return visit(KindConstant<Kind::kCastE4M3>());
    case Kind::kCastE5M2: return visit(KindConstant<Kind::kCastE5M2>());
    case Kind::kSign: return visit(KindConstant<Kind::kSign>());
    case Kind::kInt2: return visit(KindConstant<Kind::kInt2>());
    case Kind::kInt4: return visit(KindConstant<Kind::kInt4>());
    case Kind::kInt8: return visit(KindConstant<Kind::kInt8>());
    case Kind::kTopKFloat32:
    case Kind::kTopKBFloat16:
    case Kind::kTopKFloat16: break;  // these have functions of their own: cpu/sparse.h
  }
  __builtin_trap();
}

// Calls `visit` with the type of buffer as an object.
template <typename Visit>
auto with_buffer(ElementType type, Visit visit) {
  switch (type) {
    case ElementType::kFloat32: return visit(Float32Buffer());
    case ElementType::kBFloat16: return visit(BFloat16Buffer());
    case ElementType::kFloat16: return visit(Float16Buffer());
  }
  __builtin_trap();
}

template <Kind kKind, typename Buffer>
void encode_elements(const EncodeArgs& args, int64_t begin, int64_t end) {
  const auto* input = static_cast<const typename Buffer::Storage*>(args.input);
  RandomKey key = random_key(args.seed, args.step);
  int64_t group_size = args.format.group;
  for_each_run(args.layout, group_size, begin, end, [&](const Run& run) {
    int64_t packet = run.segment->packet;
    auto target = locate(args.packets + packet * args.stride, kKind, args.layout.packets[packet], run, group_size);
    float* residual = args.residual ? args.residual + run.origin() * kBlock : nullptr;
    WorkerSource<Buffer> source{input + run.segment->offset + run.first, residual, run.length, args.format.hadamard};
    encode_run<kKind>(source, group_size, target, key, uint32_t(run.origin()), args.format.stochastic);
  });
}

void encode(const EncodeArgs& args, int64_t begin, int64_t end) {
  with_kind(args.format.kind, [&](auto kind) {
    with_buffer(args.type,
                [&](auto buffer) { encode_elements<decltype(kind)::value, decltype(buffer)>(args, begin, end); });
  });
}

// Encodes the run of a source that is in the domain of the codes, which with Hadamard has whole blocks.
void encode_loaded(LoadedSource source, const Format& format, const Run& run, uint8_t* packet, const Packet& row,
                   RandomKey key) {
  source.start = run.first;
  source.length = format.hadamard ? blocks_of(run.length) * kBlock : run.length;
  auto target = locate(packet, format.kind, row, run, format.group);
  with_kind(format.kind, [&](auto kind) {
    encode_run<decltype(kind)::value>(source, format.group, target, key, uint32_t(run.origin()), format.stochastic);
  });
}

void encode_rounded(const EncodeArgs& args, int64_t begin, int64_t end) {
  const auto* input = static_cast<const float*>(args.input);
  RandomKey key = random_key(args.seed, args.step);
  LoadTile load =
      args.type == ElementType::kBFloat16 ? load_rounded<RoundedToBFloat16> : load_rounded<RoundedToFloat16>;
  for_each_run(args.layout, args.format.group, begin, end, [&](const Run& run) {
    const Segment& segment = *run.segment;
    Rounded elements{input + segment.offset, segment.length, args.format.hadamard};
    encode_loaded({load, &elements, nullptr, 0, 0}, args.format, run, args.packets + segment.packet * args.stride,
                  args.layout.packets[segment.packet], key);
  });
}

void encode_difference(const EncodeDifferenceArgs& args, int64_t begin, int64_t end) {
  RandomKey key = random_key(args.seed, args.step);
  LoadTile load = with_buffer(args.type, [](auto buffer) -> LoadTile { return load_difference<decltype(buffer)>; });
  int64_t element_bytes = args.type == ElementType::kFloat32 ? 4 : 2;
  for_each_run(args.layout, args.format.group, begin, end, [&](const Run& run) {
    const Segment& segment = *run.segment;
    const auto* subtrahend = static_cast<const uint8_t*>(args.subtrahend) + segment.offset * element_bytes;
    Difference difference{args.minuend + segment.offset, subtrahend, segment.length, args.format.hadamard};
    encode_loaded({load, &difference, nullptr, 0, 0}, args.format, run, args.packets + segment.packet * args.stride,
                  args.layout.packets[segment.packet], key);
  });
}

LoadTile sum_loader(Kind kind) {
  return with_kind(kind, [](auto constant) -> LoadTile { return load_sum<decltype(constant)::value>; });
}

void reduce_encode(const ReduceEncodeArgs& args, int64_t begin, int64_t end) {
  RandomKey key = random_key(args.seed, args.step);
  LoadTile load = sum_loader(args.from_format.kind);
  for_each_run(args.layout, args.format.group, begin, end, [&](const Run& run) {
    const Segment& segment = args.from.segments[run.segment - args.layout.segments];
    auto from = locate(args.packets, args.from_format.kind, args.from.packets[0], segment);
    Sum sum{from.scale, from.codes, args.ranks, args.stride, args.factor, args.from_format.group};
    float* residual = args.residual ? args.residual + run.block() * kBlock : nullptr;
    encode_loaded({load, &sum, residual, 0, 0}, args.format, run, args.packet, args.layout.packets[0], key);
  });
}

// fl(value + decoded), limited to finite where both are.
SR_FN float add_decoded(float value, float decoded) {
  float sum = value + decoded, limited = limit_to_finite(sum);
  return is_finite(value) & is_finite(decoded) ? limited : sum;  // no branch, so that a loop over it vectorises
}

// Conversion and addition in loops of their own: as one the compiler does not vectorise them for fp16.
template <typename Buffer>
SR_FN void add_held(const typename Buffer::Storage* __restrict held, int64_t count, float* __restrict tile) {
  if constexpr (sizeof(*held) == sizeof(float)) {
    for (int64_t i = 0; i < count; ++i) tile[i] = add_decoded(held[i], tile[i]);
  } else {
    float values[kTile];
    for (int64_t i = 0; i < count; ++i) values[i] = Buffer::load(held[i]);
    for (int64_t i = 0; i < count; ++i) tile[i] = add_decoded(values[i], tile[i]);
  }
}

// Decodes the sum of packets into a run of a buffer, or adds it to what the buffer holds.
template <typename Buffer, typename Args>
void decode_run(const Args& args, LoadTile load, const Sum& sum, const Run& run, bool add) {
  auto* output = static_cast<typename Buffer::Storage*>(args.output) + run.segment->offset + run.first;
  bool stream = sizeof(*output) == sizeof(float) && reinterpret_cast<uintptr_t>(output) % 64 == 0 && !add &&
                args.layout.groups() * args.format.group * int64_t(sizeof(float)) >= kStreamFromBytes;
  float tile[kTile];
  for (int64_t first = 0; first < run.length; first += kTile) {
    int64_t count = run.length - first < kTile ? run.length - first : kTile;
    int64_t blocks = blocks_of(count);
    load(&sum, run.first + first, blocks * kBlock, tile);
    if (args.format.hadamard) inverse_hadamard(tile, blocks);
    if (add) add_held<Buffer>(output + first, count, tile);
    store<Buffer>(tile, count, stream, output + first);
  }
  if (stream) finish_streaming();
}

void decode(const DecodeArgs& args, int64_t begin, int64_t end) {
  LoadTile load = sum_loader(args.format.kind);
  with_buffer(args.type, [&](auto buffer) {
    for_each_run(args.layout, args.format.group, begin, end, [&](const Run& run) {
      int64_t packet = run.segment->packet;
      auto from =
          locate(args.packets + packet * args.stride, args.format.kind, args.layout.packets[packet], *run.segment);
      Sum sum{from.scale, from.codes, 1, 0, 1.0f, args.format.group};
      decode_run<decltype(buffer)>(args, load, sum, run, args.add);
    });
  });
}

void reduce(const ReduceArgs& args, int64_t begin, int64_t end) {
  LoadTile load = sum_loader(args.format.kind);
  with_buffer(args.type, [&](auto buffer) {
    for_each_run(args.layout, args.format.group, begin, end, [&](const Run& run) {
      auto from = locate(args.packets, args.format.kind, args.layout.packets[0], *run.segment);
      Sum sum{from.scale, from.codes, args.ranks, args.stride, args.factor, args.format.group};
      decode_run<decltype(buffer)>(args, load, sum, run, false);
    });
  });
}

}  // namespace

extern const cpu::Kernels kernels;
const cpu::Kernels kernels = {encode, encode_rounded, encode_difference, decode, reduce, reduce_encode};

}  // namespace smallreduce::SR_TARGET
