// Weights in the order in which the passes of an evaluation read them (networks_cpu.h), made once
// for many calls: for one small molecule that takes as long as all else. They are plain bytes, aligned
// to 64, which say what they are of: type, instruction set, shapes, members.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "../core/model.h"
#include "chain.h"

namespace kinml::cpu {

template <class T>
std::int64_t prepared_bytes(const Model<T>& model);
// prepared  // [prepared_bytes]; what no pass reads stays as it is
template <class T>
void prepare_weights(const Model<T>& model, std::byte* prepared, int n_threads);

// Why such bytes are not those of a model, a clause; empty: they are. Of the weights a few are
// compared.
template <class T>
std::string misfit(const Model<T>& model, const std::byte* prepared, std::int64_t bytes);

// The networks of the members, on bytes that fit; model and bytes must outlive them.
template <class T>
std::vector<PackedChain<T>> prepared_members(const Model<T>& model, const std::byte* prepared);

}  // namespace kinml::cpu
