#include "formats/layout.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "formats/packet.h"

namespace smallreduce {
namespace {

using namespace smallreduce::SR_TARGET;

constexpr int64_t kMaxBlocks = int64_t(1) << 28;  // the random bits count pairs of elements in 32 bits

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

void check(const std::vector<int64_t>& offsets, const std::vector<int64_t>& lengths,
           const std::optional<std::vector<int64_t>>& packet_of, int64_t packet_count, const Format& format,
           Ratio ratio) {
  if (offsets.size() != lengths.size()) refuse("offsets and lengths differ in number");
  if (packet_count < 1) refuse("packet_count is " + std::to_string(packet_count) + ", expected at least 1");
  if (format.group < kBlock || format.group % kBlock != 0 || format.group > kMaxGroup) {
    refuse("group is " + std::to_string(format.group) + ", expected a multiple of 32 from 32 to " +
           std::to_string(kMaxGroup));
  }
  if (is_sparse(format.kind) &&
      !(0 < ratio.numerator && ratio.numerator <= ratio.denominator && ratio.denominator <= kMaxDenominator)) {
    refuse("the ratio is " + std::to_string(ratio.numerator) + "/" + std::to_string(ratio.denominator) +
           ", expected a fraction of at most 1 whose denominator is at most " + std::to_string(kMaxDenominator));
  }
  int64_t blocks = 0;
  for (size_t i = 0; i < offsets.size(); ++i) {
    if (offsets[i] < 0 || lengths[i] < 0) refuse("segment " + std::to_string(i) + " has a negative offset or length");
    blocks += ceil_div(lengths[i], kBlock);
    if (blocks > kMaxBlocks) refuse("the segments hold more than 2^33 elements, the most that one layout takes");
  }
  if (!packet_of) return;
  if (packet_of->size() != offsets.size()) refuse("packet_of and offsets differ in number");
  if (!std::is_sorted(packet_of->begin(), packet_of->end())) refuse("packet_of is not ascending");
  if (!packet_of->empty() && (packet_of->front() < 0 || packet_of->back() >= packet_count)) {
    refuse("packet_of names a packet outside 0 to " + std::to_string(packet_count - 1));
  }
}

}  // namespace

LayoutTables build_layout(const std::vector<int64_t>& offsets, const std::vector<int64_t>& lengths,
                          const std::optional<std::vector<int64_t>>& packet_of, int64_t packet_count,
                          const Format& format, Ratio ratio, ElementType type) {
  check(offsets, lengths, packet_of, packet_count, format, ratio);
  bool sparse = is_sparse(format.kind);
  int64_t total_groups = 0;
  for (int64_t length : lengths) total_groups += ceil_div(length, format.group);

  uint64_t empty_digest = mix64(packet_tag(format.kind, format.group, format.hadamard, type));
  LayoutTables tables;
  tables.packets.assign(size_t(packet_count), Packet{int64_t(empty_digest), 0, 0, 0, 0});
  std::vector<int64_t> words(size_t(packet_count), 0);

  int64_t group = 0, origin = 0, packet = 0;
  for (size_t i = 0; i < offsets.size(); ++i) {
    for (int64_t done = 0; done < lengths[i];) {
      int64_t piece = lengths[i] - done;
      if (packet_of) {
        packet = (*packet_of)[i];
      } else {
        auto end_of = [&](int64_t p) { return total_groups * (p + 1) / packet_count; };
        while (end_of(packet) <= group) ++packet;
        piece = std::min(piece, (end_of(packet) - group) * format.group);
      }
      if (sparse && piece > kMaxSparseSegment) {
        refuse("segment " + std::to_string(i) + " has " + std::to_string(piece) +
               " elements in one packet; top-k takes fewer than 2^32");
      }
      Packet& row = tables.packets[size_t(packet)];
      // The numerator is below 2^30 and a piece below 2^32.
      int64_t kept = sparse ? ceil_div(piece * ratio.numerator, ratio.denominator) : 0;
      int64_t& word = words[size_t(packet)];
      tables.segments.push_back(
          {group, offsets[i] + done, piece, packet, row.blocks, row.groups, origin, kept, row.values, word});
      int64_t groups = ceil_div(piece, format.group), blocks = ceil_div(piece, kBlock);
      row.digest = int64_t(mix64(uint64_t(row.digest) ^ uint64_t(piece)));
      if (sparse) {
        row.digest = int64_t(mix64(uint64_t(row.digest) ^ uint64_t(kept)));
        row.values += kept;
        word += word_count(piece, kept);
      }
      row.groups += groups;
      row.blocks += blocks;
      group += groups;
      origin += blocks;
      done += piece;
    }
  }
  for (size_t p = 0; p < tables.packets.size(); ++p) {
    Packet& row = tables.packets[p];
    row.nbytes = sparse ? sparse_packet_nbytes(format.kind, row.values, words[p])
                        : packet_nbytes(format.kind, row.groups, row.blocks);
  }
  tables.segments.push_back({total_groups, 0, 0, 0, 0, 0, origin, 0, 0, 0});
  return tables;
}

}  // namespace smallreduce
