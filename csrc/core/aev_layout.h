// The order of the numbers in an atomic environment vector (AEV). Nothing else knows it.
//
// [radial blocks in species order | angular blocks for the species pairs (0,0) (0,1) .. (1,1) ..]
//   radial block of species s:      n_radial numbers, shift l runs inside
//   angular block of a pair (a,b):  [n_angular, n_sections], shift l slow, section m fast
#pragma once

#include "config.h"

namespace kinml {
inline namespace KINML_ISA {

struct AevLayout {
  int n_species;
  int n_radial;
  int n_angular;
  int n_sections;

  KINML_HD int radial_length() const { return n_species * n_radial; }
  KINML_HD int n_pairs() const { return n_species * (n_species + 1) / 2; }
  KINML_HD int angular_block_length() const { return n_angular * n_sections; }
  // D, the length of the whole vector.
  KINML_HD int length() const { return radial_length() + n_pairs() * angular_block_length(); }

  KINML_HD int radial_begin(int species) const { return species * n_radial; }
  KINML_HD int radial(int species, int shift) const { return radial_begin(species) + shift; }
  // Index of the unordered pair; a <= b.
  KINML_HD int pair(int a, int b) const { return a * n_species - a * (a - 1) / 2 + (b - a); }
  KINML_HD int angular_begin(int a, int b) const {
    return radial_length() + pair(a, b) * angular_block_length();
  }
  KINML_HD int in_angular_block(int shift, int section) const {
    return shift * n_sections + section;
  }
};

}  // namespace KINML_ISA
}  // namespace kinml
