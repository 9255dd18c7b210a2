// Feeds damaged packets to every decoder of the CPU kernels, on buffers that end where the data end, for AddressSanitizer to
// watch (tests/cpp/fuzz). Whatever the packet, a decoder either refuses it and leaves its output alone, or writes no more
// than the packet can hold. Kinds, layouts, threads, residuals, and where packets begin and how far apart they are, all vary.
//
//     fuzz_packets ITERATIONS [SEED]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <vector>

#include "cpu/dispatch.h"
#include "cpu/sparse.h"
#include "formats/layout.h"
#include "formats/packet.h"

namespace {

using namespace smallreduce;
using namespace smallreduce::SR_TARGET;

using Random = std::mt19937_64;
using Bytes = std::unique_ptr<uint8_t[]>;  // of exactly as many bytes as asked for: the sanitizer knows where they end

Bytes bytes(int64_t count) { return Bytes(new uint8_t[size_t(std::max<int64_t>(count, 1))]); }

int64_t below(Random& random, int64_t end) { return int64_t(random() % uint64_t(std::max<int64_t>(end, 1))); }

const Kind kKinds[] = {Kind::kTopKFloat32,  Kind::kTopKBFloat16, Kind::kTopKFloat16, Kind::kInt2,
                       Kind::kInt4,         Kind::kInt8,         Kind::kSign,        Kind::kCastFloat32,
                       Kind::kCastBFloat16, Kind::kCastFloat16,  Kind::kCastE4M3,    Kind::kCastE5M2};
const ElementType kTypes[] = {ElementType::kFloat32, ElementType::kBFloat16, ElementType::kFloat16};

int64_t element_bytes(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

struct Case {
  Format format;
  ElementType type;
  LayoutTables tables;
  int64_t extent;
  Layout layout() const {
    return {tables.segments.data(), int64_t(tables.segments.size()) - 1, tables.packets.data(),
            int64_t(tables.packets.size())};
  }
};

bool is_integer(Kind kind) { return kind == Kind::kInt2 || kind == Kind::kInt4 || kind == Kind::kInt8; }

Case random_case(Random& random) {
  // Mostly sparse packets, of which more can be wrong than of the others.
  Kind kind = kKinds[random() % 4 != 0 ? random() % 3 : random() % std::size(kKinds)];
  Format format{kind, 32 * (1 + below(random, 4)), is_integer(kind) && random() % 2 == 0, random() % 2 == 0};
  Case made{format, kTypes[random() % 3], {}, 0};
  // One packet, which is what can be reduced, or several: cut evenly, or of whole segments.
  int64_t packet_count = random() % 4 != 0 ? 1 : 2 + below(random, 2);
  std::optional<std::vector<int64_t>> packet_of;
  if (random() % 2 == 0) packet_of.emplace();
  std::vector<int64_t> offsets, lengths;
  for (int64_t count = 1 + below(random, 3); count > 0; --count) {
    int64_t length = below(random, 300);
    if (random() % 64 == 0) length = 65000 + below(random, 1500);  // words that skip, and work for several threads
    offsets.push_back(made.extent + below(random, 3));
    lengths.push_back(length);
    made.extent = offsets.back() + length;
    if (packet_of) packet_of->push_back(below(random, packet_count));
  }
  if (packet_of) std::sort(packet_of->begin(), packet_of->end());
  int64_t denominator = 1 + below(random, 400);
  made.tables = build_layout(offsets, lengths, packet_of, packet_count, made.format,
                             {1 + below(random, denominator), denominator}, made.type);
  return made;
}

// A format that a sum of such packets may be written in: another one, where every element is sent.
Format random_written(Random& random, const Format& read) {
  if (is_sparse(read.kind)) return read;
  Kind kind = kKinds[3 + random() % (std::size(kKinds) - 3)];
  if (read.hadamard && !is_integer(kind)) kind = Kind::kInt4;
  return {kind, 32 * (1 + below(random, 4)), read.hadamard, random() % 2 == 0};
}

// The tables of the one packet of `made` in another format.
LayoutTables tables_of(const Case& made, const Format& format) {
  if (is_sparse(format.kind)) return made.tables;
  std::vector<int64_t> offsets, lengths;
  for (size_t i = 0; i + 1 < made.tables.segments.size(); ++i) {
    offsets.push_back(made.tables.segments[i].offset);
    lengths.push_back(made.tables.segments[i].length);
  }
  return build_layout(offsets, lengths, std::nullopt, 1, format, {1, 1}, made.type);
}

// Damages the packet; false if it was left as it is.
bool damage(Random& random, const Case& made, const Packet& row, uint8_t* packet) {
  int64_t words = words_offset(made.format.kind, row.values);
  switch (random() % 8) {
    case 0: return false;
    case 1:  // the header
      packet[below(random, kHeaderBytes)] ^= uint8_t(1 + below(random, 255));
      return true;
    case 2:  // anything behind it
      for (int64_t i = kHeaderBytes; i < row.nbytes; ++i) packet[i] = uint8_t(random());
      return true;
    case 3:  // a few bytes
      for (int64_t i = 1 + below(random, 8); i > 0 && row.nbytes > kHeaderBytes; --i) {
        packet[kHeaderBytes + below(random, row.nbytes - kHeaderBytes)] = uint8_t(random());
      }
      return true;
    default:
      if (!is_sparse(made.format.kind) || row.nbytes <= words) return true;
      // Words that are right in form: skips where there were none and values where there were skips.
      for (int64_t i = 1 + below(random, 4); i > 0; --i) {
        uint16_t choices[] = {0, 1, kSkip, kSkip - 1, uint16_t(random() % 300), uint16_t(random())};
        memcpy(packet + words + 2 * below(random, (row.nbytes - words) / 2), &choices[random() % 6], 2);
      }
      return true;
  }
}

[[noreturn]] void fail(const char* what, uint64_t seed) {
  std::fprintf(stderr, "%s (seed %llu)\n", what, static_cast<unsigned long long>(seed));
  std::abort();
}

// Runs a decoder over an output full of a pattern. Returns whether it refused.
template <typename Decode>
bool decodes(uint8_t* output, int64_t nbytes, uint64_t seed, Decode decode) {
  constexpr uint8_t kPattern = 0x5a;
  std::fill(output, output + nbytes, kPattern);
  try {
    decode();
    return true;
  } catch (const std::invalid_argument&) {
    bool untouched = std::all_of(output, output + nbytes, [](uint8_t byte) { return byte == kPattern; });
    if (!untouched) fail("a refused packet was written from", seed);
    return false;
  }
}

// Error feedback's memory; null every other time.
struct Residual {
  std::unique_ptr<float[]> values;
  int64_t count;
};

Residual random_residual(Random& random, int64_t blocks) {
  Residual residual{nullptr, kBlock * blocks};
  if (random() % 2 == 0) return residual;
  residual.values.reset(new float[size_t(residual.count)]);
  for (int64_t i = 0; i < residual.count; ++i) {
    uint32_t finite = uint32_t(random()) & 0xff7fffffu;  // no exponent of ones alone
    memcpy(&residual.values[size_t(i)], &finite, sizeof finite);
  }
  return residual;
}

void expect_finite(const Residual& residual, uint64_t seed) {
  for (int64_t i = 0; residual.values && i < residual.count; ++i) {
    if (!std::isfinite(residual.values[size_t(i)])) fail("a residual is not finite", seed);
  }
}

struct Counts { int64_t taken, refused; };

void run_one(uint64_t seed, Counts& counts) {
  Random random(seed);
  Case made = random_case(random);
  Layout layout = made.layout();
  Kind kind = made.format.kind;
  int threads = 1 + int(below(random, 3));
  int64_t output_nbytes = made.extent * element_bytes(made.type);
  int64_t ranks = layout.packet_count == 1 ? 1 + below(random, 3) : 1, packet_count = ranks * layout.packet_count;
  int64_t scratch_nbytes = is_sparse(kind) ? cpu::sparse_scratch_nbytes(layout, ranks, threads) : 0;
  // new[] of bytes is aligned to 16. Packets begin at any byte, with gaps between them; the last ends where the memory does.
  Bytes input = bytes(output_nbytes), output = bytes(output_nbytes), scratch = bytes(scratch_nbytes);
  int64_t skip = below(random, 16), stride = below(random, 20);
  int64_t last_nbytes = layout.packets[layout.packet_count - 1].nbytes, longest = last_nbytes;
  for (const Packet& row : made.tables.packets) longest = std::max(longest, row.nbytes);
  stride += longest;
  Bytes memory = bytes(skip + (packet_count - 1) * stride + last_nbytes);
  uint8_t* packets = memory.get() + skip;

  bool damaged = false;
  for (int64_t r = 0; r < ranks; ++r) {
    for (int64_t i = 0; i < output_nbytes; ++i) input[size_t(i)] = uint8_t(random());
    Residual residual = random_residual(random, layout.segments[layout.segment_count].origin);
    cpu::encode({input.get(), made.type, residual.values.get(), layout, made.format, seed, 0, packets + r * stride,
                 stride, scratch.get()},
                threads);
    expect_finite(residual, seed);
    if (is_sparse(kind)) continue;
    Bytes original = bytes(4 * made.extent);
    for (int64_t i = 0; i < 4 * made.extent; ++i) original[size_t(i)] = uint8_t(random());
    cpu::encode_rounded(
        {original.get(), made.type, nullptr, layout, made.format, seed, 0, packets + r * stride, stride, nullptr},
        threads);
    if (random() % 2 == 0) continue;
    std::vector<float> minuend(size_t(made.extent), float(r));
    cpu::encode_difference(
        {minuend.data(), input.get(), made.type, layout, made.format, seed, 0, packets + r * stride, stride}, threads);
  }
  for (int64_t p = 0; p < packet_count; ++p) {
    damaged |= damage(random, made, layout.packets[p % layout.packet_count], packets + p * stride);
  }
  auto expect = [&](bool taken) {
    ++(taken ? counts.taken : counts.refused);
    if (!taken && !damaged) fail("a packet was refused that is right", seed);
    return taken;
  };
  expect(decodes(output.get(), output_nbytes, seed, [&] {
    cpu::decode({packets, stride, layout, made.format, output.get(), made.type, scratch.get()}, threads);
  }));
  if (!is_sparse(kind)) {
    expect(decodes(output.get(), output_nbytes, seed, [&] {
      cpu::decode({packets, stride, layout, made.format, output.get(), made.type, nullptr, true}, threads);
    }));
  } else {
    expect(decodes(output.get(), output_nbytes, seed, [&] {
      cpu::clear({packets, stride, layout, made.format, output.get(), made.type, scratch.get()}, made.type, threads);
    }));
  }
  if (layout.packet_count > 1) return;
  expect(decodes(output.get(), output_nbytes, seed, [&] {
    cpu::reduce({packets, ranks, stride, 0.5f, layout, made.format, output.get(), made.type, scratch.get()}, threads);
  }));
  Residual residual = random_residual(random, layout.packets[0].blocks);
  std::vector<float> before(residual.values.get(), residual.values ? residual.values.get() + residual.count : nullptr);
  Format written = random_written(random, made.format);
  LayoutTables tables = tables_of(made, written);
  Layout into{tables.segments.data(), layout.segment_count, tables.packets.data(), 1};
  int64_t reduced_nbytes = tables.packets[0].nbytes;
  Bytes reduced = bytes(skip + reduced_nbytes);
  uint8_t* packet = reduced.get() + skip;
  bool encoded = expect(decodes(packet, reduced_nbytes, seed, [&] {
    cpu::reduce_encode({packets, ranks, stride, 0.5f, layout, made.format, into, written, residual.values.get(), seed,
                        0, packet, reduced_nbytes, scratch.get()},
                       made.type, threads);
  }));
  if (encoded) {
    expect_finite(residual, seed);
    // What was made of whatever came in is right in form.
    if (!decodes(output.get(), output_nbytes, seed, [&] {
          cpu::decode({packet, reduced_nbytes, into, written, output.get(), made.type, scratch.get()}, threads);
        })) {
      fail("a packet was made that is not right", seed);
    }
  } else if (!before.empty() && memcmp(before.data(), residual.values.get(), before.size() * sizeof(float)) != 0) {
    fail("a refused packet changed a residual", seed);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 2) {
    std::fprintf(stderr, "usage: fuzz_packets ITERATIONS [SEED]\n");
    return 2;
  }
  int64_t iterations = std::atoll(arguments[1]);
  uint64_t first = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 1;
  Counts counts{0, 0};
  for (int64_t i = 0; i < iterations; ++i) run_one(first + uint64_t(i), counts);
  std::printf("%lld packets damaged at random: decoders took %lld and refused %lld\n",
              static_cast<long long>(iterations), static_cast<long long>(counts.taken),
              static_cast<long long>(counts.refused));
  return counts.taken > 0 && counts.refused > 0 ? 0 : 1;
}
