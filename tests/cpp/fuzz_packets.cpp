// Feeds damaged packets to every decoder of the CPU kernels, on buffers that end where the data end, for AddressSanitizer to
// watch (tests/cpp/fuzz). Whatever the packet, a decoder either refuses it and leaves its output alone, or writes no more
// than the packet can hold.
//
//     fuzz_packets ITERATIONS [SEED]
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
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

const Kind kKinds[] = {Kind::kTopKFloat32, Kind::kTopKBFloat16, Kind::kTopKFloat16,
                       Kind::kInt4,        Kind::kSign,         Kind::kCastE4M3};
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

Case random_case(Random& random) {
  // Mostly sparse packets, of which more can be wrong than of the others.
  Kind kind = kKinds[random() % 4 != 0 ? random() % 3 : random() % std::size(kKinds)];
  Case made{{kind, 32 * (1 + below(random, 4)), false, false}, kTypes[random() % 3], {}, 0};
  std::vector<int64_t> offsets, lengths;
  for (int64_t count = 1 + below(random, 3); count > 0; --count) {
    int64_t length = below(random, 300);
    if (random() % 64 == 0) length = 65000 + below(random, 1500);
    offsets.push_back(made.extent + below(random, 3));
    lengths.push_back(length);
    made.extent = offsets.back() + length;
  }
  int64_t denominator = 1 + below(random, 400);
  made.tables = build_layout(offsets, lengths, std::nullopt, 1, made.format,
                             {1 + below(random, denominator), denominator}, made.type);
  return made;
}

// Damages the packet; false if it was left as it is.
bool damage(Random& random, const Case& made, uint8_t* packet) {
  const Packet& row = made.tables.packets[0];
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

struct Counts { int64_t taken, refused; };

void run_one(uint64_t seed, Counts& counts) {
  Random random(seed);
  Case made = random_case(random);
  Layout layout = made.layout();
  Kind kind = made.format.kind;
  const Packet& row = made.tables.packets[0];
  int64_t output_nbytes = made.extent * element_bytes(made.type), ranks = 1 + below(random, 3);
  int64_t scratch_nbytes = is_sparse(kind) ? cpu::sparse_scratch_nbytes(layout, ranks, 1) : 0;
  // new[] of bytes is aligned to 16.
  Bytes input = bytes(output_nbytes), output = bytes(output_nbytes), scratch = bytes(scratch_nbytes);
  Bytes packets = bytes(ranks * row.nbytes), packet = bytes(row.nbytes);
  for (int64_t i = 0; i < output_nbytes; ++i) input[size_t(i)] = uint8_t(random());

  bool damaged = false;
  for (int64_t r = 0; r < ranks; ++r) {
    uint8_t* to = packets.get() + r * row.nbytes;
    cpu::encode({input.get(), made.type, nullptr, layout, made.format, seed, 0, to, row.nbytes, scratch.get()}, 1);
    damaged |= damage(random, made, to);
  }
  auto expect = [&](bool taken) {
    ++(taken ? counts.taken : counts.refused);
    if (!taken && !damaged) fail("a packet was refused that is right", seed);
  };
  expect(decodes(output.get(), output_nbytes, seed, [&] {
    cpu::reduce({packets.get(), ranks, row.nbytes, 0.5f, layout, made.format, output.get(), made.type, scratch.get()},
                1);
  }));
  expect(decodes(output.get(), output_nbytes, seed, [&] {
    cpu::decode({packets.get(), row.nbytes, layout, made.format, output.get(), made.type, scratch.get()}, 1);
  }));
  if (is_sparse(kind)) {
    expect(decodes(output.get(), output_nbytes, seed, [&] {
      cpu::clear({packets.get(), row.nbytes, layout, made.format, output.get(), made.type, scratch.get()}, made.type,
                 1);
    }));
  }
  bool encoded = false;
  try {
    cpu::reduce_encode(
        {packets.get(), ranks, row.nbytes, 0.5f, layout, made.format, nullptr, seed, 0, packet.get(), scratch.get()},
        made.type, 1);
    encoded = true;
  } catch (const std::invalid_argument&) {
    if (!damaged) fail("packets were refused that are right", seed);
  }
  // What was made of whatever came in is right in form.
  if (encoded && !decodes(output.get(), output_nbytes, seed, [&] {
        cpu::decode({packet.get(), row.nbytes, layout, made.format, output.get(), made.type, scratch.get()}, 1);
      })) {
    fail("a packet was made that is not right", seed);
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
