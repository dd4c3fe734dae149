// How several processes share a training batch, so that their number changes no bit of the result.
//
// The parts of a batch, which depend on the batch only, are the leaves of a binary tree: node i of
// height h holds the parts i 2^h .. (i + 1) 2^h, as far as there are such, and its gradient is the
// sum of its two children's (or that of its only child). One process sums the whole tree. Of
// several, each takes some parts in a row, sums the largest nodes that these make up, and sends
// those; the rest of the tree is summed by all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "config.h"

namespace kinml {
inline namespace KINML_ISA {

// Parts [first, last) of a batch.
struct Parts {
  std::int64_t first, last;

  KINML_HD std::int64_t count() const { return last - first; }
};

// Those of one of n_ranks processes.
KINML_HD Parts parts_of_rank(std::int64_t n_parts, std::int64_t rank, std::int64_t n_ranks) {
  return {n_parts * rank / n_ranks, n_parts * (rank + 1) / n_ranks};
}

// Where the largest node ends that begins with part `first` and holds only these of n parts.
KINML_HD std::int64_t node_end(std::int64_t first, Parts parts, std::int64_t n_parts) {
  std::int64_t size = 1;
  while (first % (2 * size) == 0 &&
         (first + 2 * size <= parts.last || (parts.last == n_parts && first + size < n_parts)))
    size *= 2;
  return first + size < parts.last ? first + size : parts.last;
}

KINML_HD std::int64_t count_nodes(Parts parts, std::int64_t n_parts) {
  std::int64_t count = 0;
  for (std::int64_t first = parts.first; first < parts.last; ++count)
    first = node_end(first, parts, n_parts);
  return count;
}

// Adds up the nodes of a whole tree, or of a node, in their order. Sum is what stands for a node: a
// number, or the address of some.
template <class Sum>
class TreeSum {
 public:
  static constexpr int kHeights = 16;  // 2^16 parts, at most

  // add(left, right, place) gives left + right; `place` < kHeights is that of left.
  template <class Add>
  KINML_HD void push(Sum node, std::int64_t n_parts, const Add& add) {
    nodes_[depth_] = node;
    parts_[depth_] = n_parts;
    ++depth_;
    while (depth_ > 1 && parts_[depth_ - 2] == parts_[depth_ - 1]) add_last_two(add);
  }
  // When there are no more; at least one was there.
  template <class Add>
  KINML_HD Sum total(const Add& add) {
    while (depth_ > 1) add_last_two(add);
    return nodes_[0];
  }

 private:
  template <class Add>
  KINML_HD void add_last_two(const Add& add) {
    --depth_;
    nodes_[depth_ - 1] = add(nodes_[depth_ - 1], nodes_[depth_], depth_ - 1);
    parts_[depth_ - 1] *= 2;
  }

  Sum nodes_[kHeights];  // not yet added, each larger than the next
  std::int64_t parts_[kHeights];
  int depth_ = 0;
};

// What a process sends to all others, in bytes: gradients of its nodes [nodes, n_weights],
// energy_residuals [K, n] and errors [K, n, error_numbers] of its n structures; with room for the most
// that any of them has, so that all messages have one length. The last kNotes numbers (double) are
// the caller's.
struct Message {
  static constexpr std::int64_t kNotes = 2, kAlignment = 64;

  std::int64_t node_bytes, residuals, errors, bytes;

  // number_bytes: of a weight
  static KINML_HD Message of(std::int64_t nodes, std::int64_t structures, std::int64_t n_levels,
                             std::int64_t n_weights, std::int64_t number_bytes, int error_numbers) {
    const std::int64_t numbers = sizeof(double), energies = n_levels * structures * numbers;
    Message message;
    message.node_bytes = n_weights * number_bytes;
    message.residuals = aligned(nodes * message.node_bytes);
    message.errors = message.residuals + energies;
    message.bytes = aligned(message.errors + error_numbers * energies + kNotes * numbers);
    return message;
  }

  template <class T, class Byte>
  KINML_HD auto* gradient(Byte* message, std::int64_t node) const {
    return at<T>(message + node * node_bytes);
  }
  template <class Byte>
  KINML_HD auto* energy_residuals(Byte* message) const {
    return at<double>(message + residuals);
  }
  template <class Byte>
  KINML_HD auto* component_errors(Byte* message) const {
    return at<double>(message + errors);
  }

 private:
  template <class Number>
  static KINML_HD Number* at(std::byte* place) {
    return reinterpret_cast<Number*>(place);
  }
  template <class Number>
  static KINML_HD const Number* at(const std::byte* place) {
    return reinterpret_cast<const Number*>(place);
  }
  static KINML_HD std::int64_t aligned(std::int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }
};

}  // namespace KINML_ISA
}  // namespace kinml
