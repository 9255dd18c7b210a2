// The CPU kernels, compiled once per instruction set (SR_TARGET names it; CMakeLists.txt sets the flags).
#include "cpu/kernels.h"

#include "cpu/encode_group.h"

namespace smallreduce::SR_TARGET {
namespace {

using cpu::DecodeArgs;
using cpu::EncodeArgs;
using cpu::ReduceArgs;
using cpu::ReduceEncodeArgs;

constexpr int64_t kStreamFromBytes = 1 << 20;  // outputs that would not stay in a cache anyway

template <Kind kKind, typename Buffer>
void encode(const EncodeArgs& args, int64_t begin, int64_t end) {
  const auto* input = static_cast<const typename Buffer::Storage*>(args.input);
  RandomKey key = random_key(args.seed, args.step);
  int64_t group_size = args.format.group;
  for_each_group(args.layout, group_size, begin, end, [&](const Group& group) {
    int64_t packet = group.segment->packet;
    auto target = locate(args.packets + packet * args.stride, kKind, args.layout.packets[packet], group, group_size);
    float* residual = args.residual ? args.residual + group.origin() * kBlock : nullptr;
    WorkerSource<Buffer> source{input + group.segment->offset + group.first, residual, group.length,
                                args.format.hadamard};
    encode_group<kKind>(source, target, key, uint32_t(group.origin()), args.format.stochastic);
  });
}

template <Kind kKind>
SR_FN float decoding_scale(const uint8_t* scale, float factor) {
  return is_cast(kKind) ? factor : read_scale(scale) * factor;
}

// The sum of the ranks' packets over blocks [begin, begin + blocks) of a group, in the transformed domain.
template <Kind kKind>
struct Sum {
  const uint8_t* packets;
  int64_t ranks, stride;
  float factor;
  const Packet* row;
  Group group;
  int64_t group_size;

  SR_MEMBER void load(int64_t begin, int64_t blocks, float* __restrict tile) const {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      auto from = locate(packets + rank * stride, kKind, *row, group, group_size);
      float scale = decoding_scale<kKind>(from.scale, factor);
      const uint8_t* codes = from.codes + begin / kBlock * block_bytes(kKind);
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* block_codes = codes + b * block_bytes(kKind);
        float* target = tile + b * kBlock;
        if (rank == 0) {
          Codes<kKind>::decode(block_codes, scale, target);
        } else {
          float decoded[kBlock];
          Codes<kKind>::decode(block_codes, scale, decoded);
          for (int j = 0; j < kBlock; ++j) target[j] += decoded[j];
        }
      }
    }
  }
};

// The elements of one group of the reduced shard; its residual is a server's.
template <Kind kKind>
struct ServerSource {
  Sum<kKind> sum;
  float* residual;
  int64_t length;

  SR_MEMBER void load(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    int64_t blocks = blocks_of(count);
    sum.load(begin, blocks, tile);
    for (int64_t i = count; i < blocks * kBlock; ++i) tile[i] = 0.0f;
    if (!residual) return;
    const float* e = residual + begin;
    if (limit) {
      for (int64_t i = 0; i < count; ++i) tile[i] = compensate(tile[i], e[i], true);
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] += e[i];
    }
  }

  SR_MEMBER void keep_residual(int64_t begin, int64_t count, bool limit, float* __restrict decoded) const {
    float original[kTile];
    load(begin, count, limit, original);
    float* e = residual + begin;
    for (int64_t i = 0; i < count; ++i) e[i] = original[i] - decoded[i];
  }
};

template <Kind kKind>
void reduce_encode(const ReduceEncodeArgs& args, int64_t begin, int64_t end) {
  RandomKey key = random_key(args.seed, args.step);
  int64_t group_size = args.format.group;
  for_each_group(args.layout, group_size, begin, end, [&](const Group& group) {
    auto target = locate(args.packet, kKind, args.layout.packets[0], group, group_size);
    int64_t length = args.format.hadamard ? blocks_of(group.length) * kBlock : group.length;
    float* residual = args.residual ? args.residual + group.block() * kBlock : nullptr;
    Sum<kKind> sum{args.packets, args.ranks, args.stride, args.factor, args.layout.packets, group, group_size};
    ServerSource<kKind> source{sum, residual, length};
    encode_group<kKind>(source, target, key, uint32_t(group.origin()), args.format.stochastic);
  });
}

SR_FN void inverse_hadamard(float* tile, int64_t blocks) {
  for (int64_t b = 0; b < blocks; ++b) hadamard_block(tile + b * kBlock, 0x1p-5f);
  for (int64_t i = 0; i < blocks * kBlock; ++i) tile[i] = limit_to_finite(tile[i] * 0x1p5f);
}

template <typename Buffer>
SR_FN void store(const float* __restrict tile, int64_t count, bool stream, typename Buffer::Storage* __restrict output) {
  if constexpr (sizeof(typename Buffer::Storage) == sizeof(float)) {
    if (stream) {
      int64_t whole = count / kBlock;
      for (int64_t b = 0; b < whole; ++b) {
        float block[kBlock];
        for (int j = 0; j < kBlock; ++j) block[j] = Buffer::store(tile[b * kBlock + j]);
        stream_block(output + b * kBlock, block);
      }
      for (int64_t i = whole * kBlock; i < count; ++i) output[i] = Buffer::store(tile[i]);
      return;
    }
  }
  for (int64_t i = 0; i < count; ++i) output[i] = Buffer::store(tile[i]);
}

template <typename Buffer>
SR_FN bool may_stream(const Layout& layout, int64_t group_size, const typename Buffer::Storage* output) {
  return sizeof(typename Buffer::Storage) == sizeof(float) && reinterpret_cast<uintptr_t>(output) % 64 == 0 &&
         layout.groups() * group_size * int64_t(sizeof(float)) >= kStreamFromBytes;
}

template <Kind kKind, typename Buffer>
void decode(const DecodeArgs& args, int64_t begin, int64_t end) {
  int64_t group_size = args.format.group;
  bool streamed = false;
  for_each_group(args.layout, group_size, begin, end, [&](const Group& group) {
    int64_t packet = group.segment->packet;
    auto from = locate(args.packets + packet * args.stride, kKind, args.layout.packets[packet], group, group_size);
    auto* output = static_cast<typename Buffer::Storage*>(args.output) + group.segment->offset + group.first;
    float scale = decoding_scale<kKind>(from.scale, 1.0f);
    bool stream = may_stream<Buffer>(args.layout, group_size, output);
    streamed |= stream;
    float tile[kTile];
    for (int64_t first = 0; first < group.length; first += kTile) {
      int64_t count = group.length - first < kTile ? group.length - first : kTile;
      const uint8_t* codes = from.codes + first / kBlock * block_bytes(kKind);
      for (int64_t b = 0; b < blocks_of(count); ++b) {
        Codes<kKind>::decode(codes + b * block_bytes(kKind), scale, tile + b * kBlock);
      }
      if (args.format.hadamard) inverse_hadamard(tile, blocks_of(count));
      store<Buffer>(tile, count, stream, output + first);
    }
  });
  if (streamed) finish_streaming();
}

template <Kind kKind, typename Buffer>
void reduce(const ReduceArgs& args, int64_t begin, int64_t end) {
  int64_t group_size = args.format.group;
  bool streamed = false;
  for_each_group(args.layout, group_size, begin, end, [&](const Group& group) {
    Sum<kKind> sum{args.packets, args.ranks, args.stride, args.factor, args.layout.packets, group, group_size};
    auto* output = static_cast<typename Buffer::Storage*>(args.output) + group.segment->offset + group.first;
    bool stream = may_stream<Buffer>(args.layout, group_size, output);
    streamed |= stream;
    float tile[kTile];
    for (int64_t first = 0; first < group.length; first += kTile) {
      int64_t count = group.length - first < kTile ? group.length - first : kTile;
      sum.load(first, blocks_of(count), tile);
      if (args.format.hadamard) inverse_hadamard(tile, blocks_of(count));
      store<Buffer>(tile, count, stream, output + first);
    }
  });
  if (streamed) finish_streaming();
}

// Calls `Body<kKind>::run` for the kind at hand.
template <template <Kind> class Body, typename... Args>
void for_kind(Kind kind, Args&&... args) {
  switch (kind) {
    case Kind::kCastFloat32: return Body<Kind::kCastFloat32>::run(args...);
    case Kind::kCastBFloat16: return Body<Kind::kCastBFloat16>::run(args...);
    case Kind::kCastFloat16: return Body<Kind::kCastFloat16>::run(args...);
    case Kind::kCastE4M3: return Body<Kind::kCastE4M3>::run(args...);
    case Kind::kCastE5M2: return Body<Kind::kCastE5M2>::run(args...);
    case Kind::kSign: return Body<Kind::kSign>::run(args...);
    case Kind::kInt2: return Body<Kind::kInt2>::run(args...);
    case Kind::kInt4: return Body<Kind::kInt4>::run(args...);
    case Kind::kInt8: return Body<Kind::kInt8>::run(args...);
  }
}

#define SR_FOR_BUFFER(KERNEL)                                          \
  switch (args.type) {                                                 \
    case ElementType::kFloat32: return KERNEL<kKind, Float32Buffer>(args, begin, end);   \
    case ElementType::kBFloat16: return KERNEL<kKind, BFloat16Buffer>(args, begin, end); \
    case ElementType::kFloat16: return KERNEL<kKind, Float16Buffer>(args, begin, end);   \
  }

template <Kind kKind>
struct Encode {
  static void run(const EncodeArgs& args, int64_t begin, int64_t end) { SR_FOR_BUFFER(encode) }
};
template <Kind kKind>
struct Decode {
  static void run(const DecodeArgs& args, int64_t begin, int64_t end) { SR_FOR_BUFFER(decode) }
};
template <Kind kKind>
struct Reduce {
  static void run(const ReduceArgs& args, int64_t begin, int64_t end) { SR_FOR_BUFFER(reduce) }
};
template <Kind kKind>
struct ReduceEncode {
  static void run(const ReduceEncodeArgs& args, int64_t begin, int64_t end) { reduce_encode<kKind>(args, begin, end); }
};

template <template <Kind> class Body, typename Args>
void dispatch(const Args& args, int64_t begin, int64_t end) {
  for_kind<Body>(args.format.kind, args, begin, end);
}

}  // namespace

extern const cpu::Kernels kernels;
const cpu::Kernels kernels = {dispatch<Encode, EncodeArgs>, dispatch<Decode, DecodeArgs>, dispatch<Reduce, ReduceArgs>,
                              dispatch<ReduceEncode, ReduceEncodeArgs>};

}  // namespace smallreduce::SR_TARGET
