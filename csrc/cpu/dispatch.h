// Chooses the instruction set, writes what is not a group's (headers, padding), and spreads the groups over threads.
#pragma once

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace smallreduce::cpu {

std::vector<std::string> supported_isas();  // from the plainest to the widest
std::string current_isa();
void set_isa(const std::string& name);  // throws std::invalid_argument if it is not one of supported_isas()

// Throw std::invalid_argument if a packet is not what layout and format say.
void encode(const EncodeArgs& args, int threads);
// Of an fp32 buffer rounded to the type, without residual. No TopK.
void encode_rounded(const EncodeArgs& args, int threads);
void encode_difference(const EncodeDifferenceArgs& args, int threads);
void decode(const DecodeArgs& args, int threads);
void reduce(const ReduceArgs& args, int threads);
void reduce_encode(const ReduceEncodeArgs& args, ElementType type, int threads);
// Zeros the elements of a buffer, of any type, that packets of TopK of a buffer of `packet_type` hold.
void clear(const DecodeArgs& args, ElementType packet_type, int threads);

}  // namespace smallreduce::cpu
