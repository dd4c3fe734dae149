// The shares of processes in a training batch (core/shares.h), by its structures.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/shares.h"
#include "tile.h"

namespace kinml::cpu {

// What one process does of a batch.
struct BatchShare {
  Parts parts;
  Range structures;                 // places in the batch
  std::vector<std::int64_t> nodes;  // [n + 1] where nodes begin, and where the last one ends
};

// The shares of n_ranks processes, of a batch that is cut into these parts.
inline std::vector<BatchShare> shares_of(const std::vector<Range>& parts, std::int64_t n_ranks) {
  const std::int64_t n_parts = static_cast<std::int64_t>(parts.size());
  std::vector<BatchShare> shares;
  std::int64_t begin = 0;
  for (std::int64_t rank = 0; rank < n_ranks; ++rank) {
    const Parts own = parts_of_rank(n_parts, rank, n_ranks);
    const std::int64_t end = own.count() > 0 ? parts[own.last - 1].last : begin;
    shares.push_back({own, {begin, end}, {own.first}});
    for (std::int64_t first = own.first; first < own.last; shares.back().nodes.push_back(first))
      first = node_end(first, own, n_parts);
    begin = end;
  }
  return shares;
}

template <class T>
Message message_of(const std::vector<BatchShare>& shares, std::int64_t n_levels,
                   std::int64_t n_weights, int error_numbers) {
  std::int64_t nodes = 0, structures = 0;
  for (const BatchShare& share : shares) {
    nodes = std::max(nodes, static_cast<std::int64_t>(share.nodes.size()) - 1);
    structures = std::max(structures, share.structures.last - share.structures.first);
  }
  return Message::of(nodes, structures, n_levels, n_weights, sizeof(T), error_numbers);
}

}  // namespace kinml::cpu
