// The CPU kernels, compiled once per instruction set (SR_TARGET names it; CMakeLists.txt sets the flags).
#include "cpu/kernels.h"

#include "cpu/encode_group.h"
#include "cpu/store.h"

namespace smallreduce::SR_TARGET {
namespace {

using cpu::DecodeArgs;
using cpu::EncodeArgs;
using cpu::ReduceArgs;
using cpu::ReduceEncodeArgs;

template <Kind kKind, typename Buffer>
void encode(const EncodeArgs& args, int64_t begin, int64_t end) {
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

template <Kind kKind>
SR_FN float decoding_scale(const uint8_t* scale, float factor) {
  return is_cast(kKind) ? factor : read_scale(scale) * factor;
}

// The sum of the ranks' packets over a run, in the transformed domain.
template <Kind kKind>
struct Sum {
  const uint8_t* scales;  // of the run's first group in rank 0's packet
  const uint8_t* codes;
  int64_t ranks, stride;
  float factor;
  int64_t group_size;

  // From element `begin` of the run, which starts a block.
  SR_MEMBER void load(int64_t begin, int64_t blocks, float* __restrict tile) const {
    for (int64_t rank = 0; rank < ranks; ++rank) {
      const uint8_t* block_codes = codes + rank * stride + begin / kBlock * block_bytes(kKind);
      for (int64_t done = 0; done < blocks;) {
        int64_t element = begin + done * kBlock, number = element / group_size;
        int64_t group_end = ((number + 1) * group_size - begin) / kBlock;
        int64_t stop = group_end < blocks ? group_end : blocks;
        float scale = decoding_scale<kKind>(scales + rank * stride + 2 * number, factor);
        for (; done < stop; ++done, block_codes += block_bytes(kKind)) {
          float* target = tile + done * kBlock;
          if (rank == 0) {
            Codes<kKind>::decode(block_codes, scale, target);
          } else {
            float decoded[kBlock];
            Codes<kKind>::decode(block_codes, scale, decoded);
            for (int j = 0; j < kBlock; j += kLanes) {
              store_lanes(target + j, load_lanes(target + j) + load_lanes(decoded + j));
            }
          }
        }
      }
    }
  }
};

template <Kind kKind, typename Args>
SR_FN Sum<kKind> sum_of(const Args& args, const Run& run) {
  auto from = locate(args.packets, kKind, args.layout.packets[0], run, args.format.group);
  return {from.scale, from.codes, args.ranks, args.stride, args.factor, args.format.group};
}

// Elements of the reduced shard, `start` into the run that is summed; their residual is a server's.
template <Kind kKind>
struct ServerSource {
  Sum<kKind> sum;
  float* residual;
  int64_t length;
  int64_t start;

  SR_MEMBER ServerSource part(int64_t first, int64_t count) const {
    return {sum, residual ? residual + first : nullptr, count, start + first};
  }

  SR_MEMBER const float* view(int64_t begin, int64_t count, float* __restrict tile) const {
    load(begin, count, false, tile);
    return tile;
  }

  SR_MEMBER void load(int64_t begin, int64_t count, bool limit, float* __restrict tile) const {
    int64_t blocks = blocks_of(count);
    sum.load(start + begin, blocks, tile);
    for (int64_t i = count; i < blocks * kBlock; ++i) tile[i] = 0.0f;
    if (!residual) return;
    const float* e = residual + begin;
    if (limit) {
      for (int64_t i = 0; i < count; ++i) tile[i] = compensate(tile[i], e[i], true);
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] += e[i];
    }
  }

  SR_MEMBER void keep_residual(int64_t begin, int64_t count, bool, float* __restrict loaded,
                               float* __restrict decoded) const {
    subtract(loaded, decoded, count, residual + begin);
  }
};

template <Kind kKind>
void reduce_encode(const ReduceEncodeArgs& args, int64_t begin, int64_t end) {
  RandomKey key = random_key(args.seed, args.step);
  int64_t group_size = args.format.group;
  for_each_run(args.layout, group_size, begin, end, [&](const Run& run) {
    auto target = locate(args.packet, kKind, args.layout.packets[0], run, group_size);
    int64_t length = args.format.hadamard ? blocks_of(run.length) * kBlock : run.length;
    float* residual = args.residual ? args.residual + run.block() * kBlock : nullptr;
    ServerSource<kKind> source{sum_of<kKind>(args, run), residual, length, 0};
    encode_run<kKind>(source, group_size, target, key, uint32_t(run.origin()), args.format.stochastic);
  });
}

// Decodes the sum of `ranks` packets into a buffer.
template <Kind kKind, typename Buffer, typename Args>
SR_FN void decode_run(const Args& args, const Sum<kKind>& sum, const Run& run) {
  auto* output = static_cast<typename Buffer::Storage*>(args.output) + run.segment->offset + run.first;
  bool stream = sizeof(*output) == sizeof(float) && reinterpret_cast<uintptr_t>(output) % 64 == 0 &&
                args.layout.groups() * args.format.group * int64_t(sizeof(float)) >= kStreamFromBytes;
  float tile[kTile];
  for (int64_t first = 0; first < run.length; first += kTile) {
    int64_t count = run.length - first < kTile ? run.length - first : kTile;
    sum.load(first, blocks_of(count), tile);
    if (args.format.hadamard) inverse_hadamard(tile, blocks_of(count));
    store<Buffer>(tile, count, stream, output + first);
  }
  if (stream) finish_streaming();
}

template <Kind kKind, typename Buffer>
void decode(const DecodeArgs& args, int64_t begin, int64_t end) {
  for_each_run(args.layout, args.format.group, begin, end, [&](const Run& run) {
    int64_t packet = run.segment->packet;
    auto from = locate(args.packets + packet * args.stride, kKind, args.layout.packets[packet], run, args.format.group);
    decode_run<kKind, Buffer>(args, Sum<kKind>{from.scale, from.codes, 1, 0, 1.0f, args.format.group}, run);
  });
}

template <Kind kKind, typename Buffer>
void reduce(const ReduceArgs& args, int64_t begin, int64_t end) {
  for_each_run(args.layout, args.format.group, begin, end,
               [&](const Run& run) { decode_run<kKind, Buffer>(args, sum_of<kKind>(args, run), run); });
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
    case Kind::kTopKFloat32:
    case Kind::kTopKBFloat16:
    case Kind::kTopKFloat16: __builtin_trap();  // these have functions of their own: cpu/sparse.h
  }
}

#define SR_FOR_BUFFER(KERNEL)                                                            \
  switch (args.type) {                                                                   \
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
