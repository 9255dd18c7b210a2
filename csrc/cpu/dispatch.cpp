#include "cpu/dispatch.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/pool.h"
#include "cpu/sparse.h"
#include "formats/describe.h"
#include "formats/packet.h"

namespace smallreduce {

namespace baseline {
extern const cpu::Kernels kernels;
extern const cpu::SparseKernels sparse_kernels;
}  // namespace baseline
#if defined(SMALLREDUCE_X86)
namespace avx2 {
extern const cpu::Kernels kernels;
extern const cpu::SparseKernels sparse_kernels;
}  // namespace avx2
namespace avx512 {
extern const cpu::Kernels kernels;
extern const cpu::SparseKernels sparse_kernels;
}  // namespace avx512
#endif

namespace cpu {
namespace {

using namespace smallreduce::SR_TARGET;

constexpr int64_t kGrainElements = 1 << 15;  // are worth a thread

struct Isa {
  const char* name;
  const Kernels* kernels;
  const SparseKernels* sparse_kernels;
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> isas{{"baseline", &baseline::kernels, &baseline::sparse_kernels}};
#if defined(SMALLREDUCE_X86)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2")) isas.push_back({"avx2", &avx2::kernels, &avx2::sparse_kernels});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back({"avx512", &avx512::kernels, &avx512::sparse_kernels});
    }
#endif
    return isas;
  }();
  return found;
}

const Isa& find_isa(const std::string& name) {
  std::string names;
  for (const Isa& isa : isas()) {
    if (name == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is unknown or not supported here; accepted: " + names);
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa = [] {
    const char* forced = std::getenv("SMALLREDUCE_CPU");
    return forced && *forced ? &find_isa(forced) : &isas().back();
  }();
  return isa;
}

const Kernels& kernels() { return *chosen().load()->kernels; }
const SparseKernels& sparse_kernels() { return *chosen().load()->sparse_kernels; }

void check_stride(int64_t stride, const Layout& layout) {
  for (int64_t p = 0; p < layout.packet_count; ++p) {
    if (layout.packets[p].nbytes > stride) {
      throw std::invalid_argument("packets are " + std::to_string(stride) + " bytes apart, but packet " +
                                  std::to_string(p) + " takes " + std::to_string(layout.packets[p].nbytes));
    }
  }
}

// Words of TopK in packet `number`.
int64_t words_of(const Layout& layout, int64_t number) {
  for (const Segment* s = layout.segments + layout.segment_count; s-- != layout.segments;) {
    if (s->packet == number) return s->word + word_count(s->length, s->kept);
  }
  return 0;
}

// The header, and zeros in the gaps behind the sections.
void write_header(uint8_t* packet, const Format& format, const Layout& layout, int64_t number, ElementType type) {
  const Packet& row = layout.packets[number];
  uint64_t header[2] = {uint64_t(row.digest), packet_tag(format.kind, format.group, format.hadamard, type)};
  memcpy(packet, header, sizeof header);
  if (is_sparse(format.kind)) {
    int64_t values_end = kHeaderBytes + value_bytes(format.kind) * row.values;
    int64_t words = words_offset(format.kind, row.values), words_end = words + 2 * words_of(layout, number);
    memset(packet + values_end, 0, size_t(words - values_end));
    memset(packet + words_end, 0, size_t(row.nbytes - words_end));
    return;
  }
  int64_t codes = codes_offset(format.kind, row.groups);
  if (!is_cast(format.kind)) {
    int64_t end = kHeaderBytes + 2 * row.groups;
    memset(packet + end, 0, size_t(codes - end));
  }
  int64_t end = codes + block_bytes(format.kind) * row.blocks;
  memset(packet + end, 0, size_t(row.nbytes - end));
}

template <typename Args>
void write_headers(const Args& args) {
  check_stride(args.stride, args.layout);
  for (int64_t p = 0; p < args.layout.packet_count; ++p) {
    write_header(args.packets + p * args.stride, args.format, args.layout, p, args.type);
  }
}

void check_header(const uint8_t* packet, const Format& format, const Packet& row, ElementType type, int64_t number) {
  uint64_t header[2];
  memcpy(header, packet, sizeof header);
  uint64_t tag = packet_tag(format.kind, format.group, format.hadamard, type);
  if (header[1] != tag) {
    throw std::invalid_argument("packet " + std::to_string(number) + " holds " + describe_tag(header[1]) +
                                ", expected " + describe_tag(tag));
  }
  if (header[0] != uint64_t(row.digest)) {
    throw std::invalid_argument("packet " + std::to_string(number) + " holds other sizes than the " +
                                std::to_string(row.blocks) + " blocks of 32 elements expected here" +
                                (is_sparse(format.kind) ? ", another share of them" : "") + ", or is corrupt");
  }
}

// The packets of all ranks.
template <typename Args>
void check_ranks(const Args& args, const Layout& layout, const Format& format, ElementType type) {
  check_stride(args.stride, layout);
  for (int64_t r = 0; r < args.ranks; ++r) {
    check_header(args.packets + r * args.stride, format, layout.packets[0], type, r);
  }
}

void check_same_segments(const Layout& a, const Layout& b) {
  bool same = a.segment_count == b.segment_count;
  for (int64_t i = 0; same && i < a.segment_count; ++i) {
    const Segment &left = a.segments[i], &right = b.segments[i];
    same = left.length == right.length && left.block == right.block && left.origin == right.origin &&
           left.kept == right.kept;
  }
  if (!same) throw std::invalid_argument("the packets read and the packet written are of different segments");
}

void refuse_sparse(const Format& format, const char* what) {
  if (is_sparse(format.kind)) throw std::invalid_argument(std::string("packets of top-k cannot ") + what);
}

template <typename Args>
void over_groups(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int threads) {
  int64_t grain = (kGrainElements + args.format.group - 1) / args.format.group;
  parallel_for(args.layout.groups(), grain, threads, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// TopK's work is cut at segments, of which many may be small: no more threads than its elements are worth.
template <typename Args>
int sparse_threads(const Args& args, int threads) {
  int64_t elements = args.layout.groups() * args.format.group;
  return int(std::clamp<int64_t>(elements / kGrainElements, 1, std::max(threads, 1)));
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.push_back(isa.name);
  return names;
}

std::string current_isa() { return chosen().load()->name; }

void set_isa(const std::string& name) { chosen() = &find_isa(name); }

void clear(const DecodeArgs& args, ElementType packet_type, int threads) {
  check_stride(args.stride, args.layout);
  for (int64_t p = 0; p < args.layout.packet_count; ++p) {
    check_header(args.packets + p * args.stride, args.format, args.layout.packets[p], packet_type, p);
  }
  sparse_clear(args, sparse_threads(args, threads));
}

void encode(const EncodeArgs& args, int threads) {
  write_headers(args);
  if (is_sparse(args.format.kind)) return sparse_encode(sparse_kernels(), args, sparse_threads(args, threads));
  over_groups(kernels().encode, args, threads);
}

void encode_rounded(const EncodeArgs& args, int threads) {
  refuse_sparse(args.format, "be made of rounded elements");
  if (args.type == ElementType::kFloat32) return encode(args, threads);
  write_headers(args);
  over_groups(kernels().encode_rounded, args, threads);
}

void encode_difference(const EncodeDifferenceArgs& args, int threads) {
  refuse_sparse(args.format, "encode the difference of two buffers");
  write_headers(args);
  over_groups(kernels().encode_difference, args, threads);
}

void decode(const DecodeArgs& args, int threads) {
  if (args.add) refuse_sparse(args.format, "be added to a buffer");
  check_stride(args.stride, args.layout);
  for (int64_t p = 0; p < args.layout.packet_count; ++p) {
    check_header(args.packets + p * args.stride, args.format, args.layout.packets[p], args.type, p);
  }
  if (is_sparse(args.format.kind)) return sparse_decode(sparse_kernels(), args, sparse_threads(args, threads));
  over_groups(kernels().decode, args, threads);
}

void reduce(const ReduceArgs& args, int threads) {
  check_ranks(args, args.layout, args.format, args.type);
  if (is_sparse(args.format.kind)) return sparse_reduce(sparse_kernels(), args, sparse_threads(args, threads));
  over_groups(kernels().reduce, args, threads);
}

void reduce_encode(const ReduceEncodeArgs& args, ElementType type, int threads) {
  check_same_segments(args.from, args.layout);
  check_stride(args.nbytes, args.layout);
  check_ranks(args, args.from, args.from_format, type);
  if (is_sparse(args.format.kind)) {
    // Which may yet refuse a packet for its words.
    sparse_reduce_encode(sparse_kernels(), args, sparse_threads(args, threads));
  } else {
    over_groups(kernels().reduce_encode, args, threads);
  }
  write_header(args.packet, args.format, args.layout, 0, type);
}

}  // namespace cpu
}  // namespace smallreduce
