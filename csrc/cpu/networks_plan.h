// What networks_cpu.cpp hands to the kernels of one instruction set: where everything stands.
#pragma once

#include <cstdint>

namespace kinml::cpu {

// One layer of one species.
struct NetworkLayer {
  std::int64_t in, out;
  std::int64_t stride;      // numbers between rows of z, h and delta of this layer
  std::int64_t column;      // sum of the strides of the layers before
  std::int64_t weights;     // offset in the parameters of W [out, in]
  std::int64_t biases;      // offset in the parameters of b [out], or -1
  std::int64_t packed;      // offset in the packed parameters, for z = W h, or -1: not needed
  std::int64_t transposed;  // the same for W^T delta
  std::int64_t last;        // the same for its last number alone: the last column of W
};

struct NetworkPlan {
  std::int64_t n_species;
  std::int64_t n_layers;
  const NetworkLayer* layers;       // [n_species, n_layers]
  const std::int64_t* activations;  // [n_layers]
  const std::int64_t* starts;       // [n_species + 1], or null: a tile brings its own
  std::int64_t scratch_per_atom;    // for one of z, h, delta of all layers

  const NetworkLayer* of(std::int64_t species) const { return layers + species * n_layers; }
};

// Consecutive atoms of one species. Their delta_l stand at
// deltas + offset * scratch_per_atom + count * column, as [count, stride] matrices.
struct NetworkSegment {
  std::int64_t species, first, count;
  std::int64_t offset;
};

// The piece of a segment that one thread takes at a time.
struct NetworkPiece {
  const NetworkSegment* segment;
  std::int64_t first, count;  // first counts from the beginning of the segment
};

// Pieces begin at multiples of this, because the last layer has one number per atom, and whole
// registers of them are worked on.
inline constexpr std::int64_t kPieceUnit = 16;
// Atoms of one piece at most, and of one of many pieces of a small batch.
inline constexpr std::int64_t kPieceAtoms = 48;
inline constexpr std::int64_t kSmallPieceAtoms = 32;
static_assert(kPieceAtoms % kPieceUnit == 0 && kSmallPieceAtoms % kPieceUnit == 0);
// Atoms over which weight gradients are summed in registers before they are added to memory.
inline constexpr std::int64_t kSumAtoms = 64;
// Numbers that may be read behind scratch matrices.
inline constexpr std::int64_t kSlack = 64;
// What a tile keeps of every layer: z, h, delta, curve, dh, mu, scratch_per_atom numbers an atom
// each.
inline constexpr std::int64_t kTileValues = 6;

}  // namespace kinml::cpu
