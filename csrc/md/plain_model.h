// The plain model file, which `kinml-fast export --format plain` writes: a model without torch.
//
// It is a safetensors file (https://github.com/huggingface/safetensors): eight bytes, little-endian,
// the length of a header; the header, JSON; the numbers of its tensors. The tensors are `weights`
// [M, n] (F64 or F32, in the order of csrc/torch/schema.cpp) and `sae` [M, K, S] (F64, eV), and,
// if there are extrapolation grades, `grade` [S, D, D] (F64). The header's __metadata__ has, as texts,
//   format          "kinml_fast.plain"
//   format_version  "1", or "2" with a repulsion: what does not know it must refuse the file
//   crc32           of all tensors' bytes, eight hexadecimal digits
//   model           JSON: elements, descriptor (AEVParameters), layers [S][L], activations [L],
//                   biases, dtype, fidelities [K], baseline (null: whole energies),
//                   and where there is one repulsion (kind "zbl", charges [S], radii [S] in angstrom,
//                   inner, outer: core/repulsion.h)
//   units, single_atom_energies, training, version   JSON, for people; not read here
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/model.h"

namespace kinml::md {

// One sentence: the file, what is wrong with it, what to do.
struct ModelFileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct PlainModel {
  std::string path;
  std::vector<std::string> elements;  // [S], by species
  AevParameters aev;
  std::vector<std::int64_t> sizes;        // [K, S, L + 1] widths
  std::vector<std::int64_t> activations;  // [L] codes
  bool biases;
  bool single;                           // whether it was trained in float32
  std::vector<std::int64_t> fidelities;  // [K] levels of theory, lowest first
  std::optional<std::int64_t> baseline;  // the level that energies are differences from
  std::int64_t n_members;                // M
  std::vector<double> weights;           // [M, n]
  std::vector<double> sae;               // [M, K, S] single-atom energies, eV
  // Of the members' standard deviations at the highest level, of energies and of forces on atoms of
  // each element; 1 unless the ensemble is calibrated.
  double energy_factor = 1.0;
  std::vector<double> forces_factors;  // [S], or nothing
  std::vector<double> grade;           // [S, D, D] matrices of grades' forms, or nothing

  std::int64_t n_species() const { return static_cast<std::int64_t>(elements.size()); }
  std::int64_t n_levels() const { return static_cast<std::int64_t>(fidelities.size()); }
  NetworkChain chain() const;  // points into this object
  // Of all members, at the highest level.
  std::vector<double> highest_sae() const;  // [M, S]
  // Beyond which atoms do not feel one another, angstrom.
  double cutoff() const;
};

// Throws ModelFileError.
PlainModel read_plain_model(const std::string& path);

}  // namespace kinml::md
