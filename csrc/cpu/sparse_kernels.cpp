// The kernels of TopK, compiled once per instruction set (SR_TARGET names it; CMakeLists.txt sets the flags).
#include <algorithm>
#include <vector>

#include "cpu/lanes.h"
#include "cpu/sparse.h"
#include "cpu/store.h"
#include "formats/elements.h"

namespace smallreduce::SR_TARGET {
namespace {

using cpu::Candidate;
using cpu::SparsePart;
using cpu::SparseSource;
using cpu::SparseTarget;

// The magnitude as sections 5 and 11 order it: every NaN alike, above Inf.
SR_FN uint32_t magnitude_key(uint32_t bits) {
  uint32_t magnitude = bits & ~kSignBit;
  return magnitude > kInfBits ? kNanBits : magnitude;
}
// Of all bit patterns: at_least_bits() sees them before they are made alike.
constexpr uint32_t kSmallestNan = kInfBits + 1;
constexpr uint32_t kNoKey = kNanBits + 1;  // above all keys

SR_FN float limited_sum(float value, float residual) {
  float sum = value + residual;
  return is_finite(value) ? limit_to_finite(sum) : sum;
}

// ---- where values come from ----------------------------------------------------------------------------------------

// A worker's elements.
template <typename Buffer>
class Elements {
 public:
  SR_MEMBER explicit Elements(const SparseSource& source)
      : input_(static_cast<const typename Buffer::Storage*>(source.input)) {}

  SR_MEMBER void load(int64_t begin, int64_t count, float* __restrict tile) {
    for (int64_t i = 0; i < count; ++i) tile[i] = Buffer::load(input_[begin + i]);
  }
  // The elements where they lie, or null.
  SR_MEMBER const float* direct(int64_t begin) const {
    if constexpr (sizeof(typename Buffer::Storage) == sizeof(float)) return input_ + begin;
    return nullptr;
  }

 private:
  const typename Buffer::Storage* input_;
};

template <Kind kKind>
SR_FN float load_value(const uint8_t* values, int64_t number) {
  if constexpr (kKind == Kind::kTopKFloat32) {
    float value;
    memcpy(&value, values + 4 * number, sizeof value);
    return value;
  } else {
    uint16_t value;
    memcpy(&value, values + 2 * number, sizeof value);
    return kKind == Kind::kTopKBFloat16 ? float_from_bfloat16(value) : Float16::to_float(value);
  }
}

// The sum of the ranks' packets. Loads go forward.
template <Kind kKind>
class PacketSum {
 public:
  explicit PacketSum(const SparseSource& source) : source_(source), next_(size_t(source.ranks), 0) {}

  void load(int64_t begin, int64_t count, float* __restrict tile) {
    for (int64_t i = 0; i < count; ++i) tile[i] = 0.0f;
    for (int64_t rank = 0; rank < source_.ranks; ++rank) {
      const uint32_t* indices = source_.indices + rank * source_.index_stride;
      const uint8_t* values = source_.values + rank * source_.stride;
      int64_t& next = next_[size_t(rank)];
      if (next < source_.kept && indices[next] < begin) {
        next = std::lower_bound(indices + next, indices + source_.kept, uint32_t(begin)) - indices;
      }
      for (; next < source_.kept && int64_t(indices[next]) < begin + count; ++next) {
        tile[indices[next] - begin] += load_value<kKind>(values, next) * source_.factor;
      }
    }
  }
  const float* direct(int64_t) const { return nullptr; }

 private:
  const SparseSource& source_;
  std::vector<int64_t> next_;  // of each rank's entries, the first not yet passed
};

// What is selected from: the elements, after error feedback.
template <typename Origin>
class Compensated {
 public:
  // `stored`: the compensated values stand in the residual already, where they are finite.
  SR_MEMBER Compensated(const SparseSource& source, bool stored)
      : origin_(source), residual_(source.residual), stored_(stored) {}

  // `count` values from `begin` on; whole blocks can be read.
  SR_MEMBER const float* view(int64_t begin, int64_t count, float* __restrict tile) {
    if (!residual_ && count % kBlock == 0) {
      if (const float* direct = origin_.direct(begin)) return direct;
    }
    origin_.load(begin, count, tile);
    if (residual_) compensate(residual_ + begin, count, tile);
    for (int64_t i = count; i % kBlock != 0; ++i) tile[i] = 0.0f;
    return tile;
  }

  // Replaces the residual by the values that view() gave.
  SR_MEMBER void keep(int64_t begin, int64_t count, const float* __restrict values) {
    float* __restrict e = residual_ + begin;
    for (int64_t i = 0; i < count; ++i) e[i] = is_finite(values[i]) ? values[i] : e[i];
  }

 private:
  SR_MEMBER void compensate(const float* __restrict e, int64_t count, float* __restrict tile) const {
    if (stored_) {
      for (int64_t i = 0; i < count; ++i) tile[i] = is_finite(tile[i]) ? e[i] : tile[i];
    } else {
      for (int64_t i = 0; i < count; ++i) tile[i] = limited_sum(tile[i], e[i]);
    }
  }

  Origin origin_;
  float* residual_;
  bool stored_;
};

// Calls visit(index, bits) for the elements of [begin, end) whose key reaches the threshold, which visit may raise.
template <typename Origin, typename Visit>
SR_FN void for_each_reaching(Compensated<Origin>& source, int64_t begin, int64_t end, const uint32_t& threshold,
                             bool keep, Visit visit) {
  float tile[kTile];
  for (int64_t first = begin; first < end; first += kTile) {
    int64_t count = std::min(end - first, kTile);
    const float* values = source.view(first, count, tile);
    if (keep) source.keep(first, count, values);
    for (int64_t b = 0; b < count; b += kBlock) {
      uint32_t reaching = at_least_bits(values + b, std::min(threshold, kSmallestNan));
      if (count - b < kBlock) reaching &= (1u << (count - b)) - 1;
      for (; reaching != 0; reaching &= reaching - 1) {
        int64_t i = b + __builtin_ctz(reaching);
        visit(first + i, bits_of(values[i]));
      }
    }
  }
}

// ---- selection -----------------------------------------------------------------------------------------------------

struct Quota {
  uint32_t key;  // of the last that is selected
  int64_t ties;  // how many of this key are
};

// The kept-th largest key. for_each(visit) calls visit(key) for all of them, in three passes: one for each digit of the key.
template <typename ForEach>
SR_FN Quota select_by_radix(int64_t kept, ForEach for_each) {
  constexpr int kShifts[3] = {20, 10, 0}, kBits[3] = {11, 10, 10};
  uint32_t prefix = 0;
  int64_t ties = kept;
  for (int level = 0; level < 3; ++level) {
    int64_t counts[1 << 11] = {};
    int shift = kShifts[level], above = shift + kBits[level];
    for_each([&](uint32_t key) {
      if (key >> above == prefix) ++counts[key >> shift & ((1u << kBits[level]) - 1)];
    });
    uint32_t digit = (1u << kBits[level]) - 1;
    while (counts[digit] < ties) ties -= counts[digit--];
    prefix = prefix << kBits[level] | digit;
  }
  return {prefix, ties};
}

// The kept-th largest of `count` keys.
template <typename ForEach>
SR_FN Quota select_key(int64_t kept, int64_t count, ForEach for_each) {
  constexpr int64_t kFew = 4096;
  if (count > kFew) return select_by_radix(kept, for_each);
  uint32_t keys[kFew];
  uint32_t* end = keys;
  for_each([&](uint32_t key) { *end++ = key; });
  std::nth_element(keys, keys + (kept - 1), end, std::greater<uint32_t>());
  uint32_t last = keys[kept - 1];
  return {last, kept - std::count_if(keys, keys + kept, [last](uint32_t key) { return key > last; })};
}

// Writes the values and words of what is selected, in ascending order, and what they lose into the residual.
template <Kind kKind>
class Selected {
 public:
  SR_MEMBER Selected(const SparseSource& source, const SparseTarget& target)
      : residual_(source.residual),
        value_(target.values),
        word_(target.words),
        end_(target.words + 2 * word_count(source.length, target.kept)) {}

  SR_MEMBER void add(int64_t index, uint32_t bits) {
    for (; index - cursor_ >= kSkipElements; cursor_ += kSkipElements) write_word(kSkip);
    write_word(uint16_t(index - cursor_));
    cursor_ = index + 1;
    float value = float_of(bits), sent = write_value(value);
    if (residual_ && is_finite(value)) residual_[index] = limit_to_finite(value - sent);
  }

  SR_MEMBER void finish() {
    while (word_ != end_) write_word(kSkip);
  }

 private:
  SR_MEMBER void write_word(uint16_t word) {
    memcpy(word_, &word, sizeof word);
    word_ += sizeof word;
  }
  SR_MEMBER float write_value(float value) {
    if constexpr (kKind == Kind::kTopKFloat32) {
      float sent = canonical_nan(value);
      memcpy(value_, &sent, sizeof sent);
      value_ += sizeof sent;
      return sent;
    } else {
      uint16_t sent = kKind == Kind::kTopKBFloat16 ? bfloat16_from_float(value) : uint16_t(Float16::from_float(value));
      memcpy(value_, &sent, sizeof sent);
      value_ += sizeof sent;
      return kKind == Kind::kTopKBFloat16 ? float_from_bfloat16(sent) : Float16::to_float(sent);
    }
  }

  float* residual_;
  uint8_t* value_;
  uint8_t* word_;
  uint8_t* end_;
  int64_t cursor_ = 0;
};

template <Kind kKind, typename Origin>
uint32_t estimate(const SparseSource& source, int64_t kept) {
  cpu::Sampling sampling = cpu::sampling_of(source.length, kept);
  if (sampling.samples == 0) return kNoKey;
  // Lines of 16 neighbours, which cost what one element costs; where they stand varies, lest they meet the rows of a matrix.
  constexpr int64_t kLine = 16;
  int64_t lines = sampling.samples / kLine, distance = source.length / lines;
  uint32_t keys[cpu::kMostSamples];
  Compensated<Origin> values(source, false);
  for (int64_t line = 0; line < lines; ++line) {
    float tile[kBlock];
    int64_t begin = line * distance + int64_t(mix64(uint64_t(line)) % uint64_t(distance - kLine + 1));
    const float* sample = values.view(begin, kLine, tile);
    for (int64_t i = 0; i < kLine; ++i) keys[line * kLine + i] = magnitude_key(bits_of(sample[i]));
  }
  uint32_t* chosen = keys + (sampling.rank - 1);
  std::nth_element(keys, chosen, keys + sampling.samples, std::greater<uint32_t>());
  // Where even so many are zero, the others are few enough to be the candidates.
  return std::max(*chosen, 1u);
}

template <Kind kKind, typename Origin>
void collect(const SparseSource& source, uint32_t threshold, SparsePart& part) {
  part.count = 0;
  if (threshold == kNoKey && !source.residual) return;
  Compensated<Origin> values(source, false);
  int64_t count = 0;
  for_each_reaching(values, part.begin, part.end, threshold, source.residual != nullptr, [&](int64_t i, uint32_t bits) {
    if (count < part.capacity) part.candidates[count] = {uint32_t(i), bits};
    ++count;
  });
  part.count = count;
}

template <Kind kKind, typename Origin>
void select(const SparseSource& source, uint32_t threshold, const SparsePart* parts, int64_t part_count,
            const SparseTarget& target) {
  int64_t found = 0;
  bool complete = true;
  for (int64_t p = 0; p < part_count; ++p) {
    found += parts[p].count;
    complete &= parts[p].count <= parts[p].capacity;
  }
  Selected<kKind> selected(source, target);
  if (complete && found >= target.kept) {
    auto for_each = [&](auto visit) {
      for (const SparsePart* part = parts; part != parts + part_count; ++part) {
        for (int64_t i = 0; i < part->count; ++i) visit(part->candidates[i]);
      }
    };
    Quota quota = select_key(target.kept, found, [&](auto visit) {
      for_each([&](const Candidate& candidate) { visit(magnitude_key(candidate.bits)); });
    });
    for_each([&](const Candidate& candidate) {
      uint32_t key = magnitude_key(candidate.bits);
      if (key > quota.key || (key == quota.key && quota.ties-- > 0)) selected.add(candidate.index, candidate.bits);
    });
  } else {
    const uint32_t all = 0;
    // If nothing but zeros is missing, or all are wanted, they need not be counted.
    Quota quota = target.kept == source.length || (complete && threshold <= 1)
                      ? Quota{0, target.kept - found}
                      : select_key(target.kept, source.length, [&](auto visit) {
                          Compensated<Origin> values(source, true);
                          for_each_reaching(values, 0, source.length, all, false,
                                            [&](int64_t, uint32_t bits) { visit(magnitude_key(bits)); });
                        });
    uint32_t reached = quota.key;
    Compensated<Origin> values(source, true);
    for_each_reaching(values, 0, source.length, reached, false, [&](int64_t index, uint32_t bits) {
      uint32_t key = magnitude_key(bits);
      if (key < quota.key || (key == quota.key && quota.ties == 0)) return;
      if (key == quota.key && --quota.ties == 0) ++reached;
      selected.add(index, bits);
    });
  }
  selected.finish();
}

template <Kind kKind, typename Buffer>
void expand_into(const SparseSource& source, int64_t begin, int64_t end, bool stream, void* output) {
  auto* to = static_cast<typename Buffer::Storage*>(output);
  PacketSum<kKind> sum(source);
  float tile[kTile];
  for (int64_t first = begin; first < end; first += kTile) {
    int64_t count = std::min(end - first, kTile);
    sum.load(first, count, tile);
    store<Buffer>(tile, count, stream, to + first);
  }
  if (stream) finish_streaming();
}

// ---- the table -----------------------------------------------------------------------------------------------------

#define SR_FOR_ORIGIN(KERNEL, ...)                                                            \
  if (!source.input) return KERNEL<kKind, PacketSum<kKind>>(__VA_ARGS__);                     \
  switch (source.type) {                                                                      \
    case ElementType::kFloat32: break;                                                        \
    case ElementType::kBFloat16: return KERNEL<kKind, Elements<BFloat16Buffer>>(__VA_ARGS__); \
    case ElementType::kFloat16: return KERNEL<kKind, Elements<Float16Buffer>>(__VA_ARGS__);   \
  }                                                                                           \
  return KERNEL<kKind, Elements<Float32Buffer>>(__VA_ARGS__);

template <Kind kKind>
struct ForKind {
  static uint32_t run_estimate(const SparseSource& source, int64_t kept) { SR_FOR_ORIGIN(estimate, source, kept) }
  static void run_collect(const SparseSource& source, uint32_t threshold, SparsePart& part) {
    SR_FOR_ORIGIN(collect, source, threshold, part)
  }
  static void run_select(const SparseSource& source, uint32_t threshold, const SparsePart* parts, int64_t part_count,
                         const SparseTarget& target) {
    SR_FOR_ORIGIN(select, source, threshold, parts, part_count, target)
  }
  static void run_expand(const SparseSource& source, int64_t begin, int64_t end, bool stream, ElementType type,
                         void* output) {
    switch (type) {
      case ElementType::kFloat32: return expand_into<kKind, Float32Buffer>(source, begin, end, stream, output);
      case ElementType::kBFloat16: return expand_into<kKind, BFloat16Buffer>(source, begin, end, stream, output);
      case ElementType::kFloat16: return expand_into<kKind, Float16Buffer>(source, begin, end, stream, output);
    }
  }
};

#define SR_FOR_KIND(METHOD, ...)                                                             \
  if (kind == Kind::kTopKBFloat16) return ForKind<Kind::kTopKBFloat16>::METHOD(__VA_ARGS__); \
  if (kind == Kind::kTopKFloat16) return ForKind<Kind::kTopKFloat16>::METHOD(__VA_ARGS__);   \
  return ForKind<Kind::kTopKFloat32>::METHOD(__VA_ARGS__);

uint32_t any_estimate(const SparseSource& source, Kind kind, int64_t kept) { SR_FOR_KIND(run_estimate, source, kept) }
void any_collect(const SparseSource& source, Kind kind, uint32_t threshold, SparsePart& part) {
  SR_FOR_KIND(run_collect, source, threshold, part)
}
void any_select(const SparseSource& source, Kind kind, uint32_t threshold, const SparsePart* parts, int64_t part_count,
                const SparseTarget& target) {
  SR_FOR_KIND(run_select, source, threshold, parts, part_count, target)
}
void any_expand(const SparseSource& source, Kind kind, int64_t begin, int64_t end, bool stream, ElementType type,
                void* output) {
  SR_FOR_KIND(run_expand, source, begin, end, stream, type, output)
}

}  // namespace

extern const cpu::SparseKernels sparse_kernels;
const cpu::SparseKernels sparse_kernels = {any_estimate, any_collect, any_select, any_expand};

}  // namespace smallreduce::SR_TARGET
