/* -*- c++ -*- ----------------------------------------------------------
   pair_style kinml: ANI-type neural network potentials of kinml_fast.

   This file and the others of this folder are a plugin for LAMMPS and, like LAMMPS, are
   distributed under the GNU General Public License, version 2. What they call, csrc/md and below,
   is under the licence of kinml_fast and knows nothing of LAMMPS.
------------------------------------------------------------------------- */
#ifndef LMP_PAIR_KINML_H
#define LMP_PAIR_KINML_H

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include <pair.h>
#include "../kinml.h"

namespace LAMMPS_NS {

class PairKinML : public Pair {
 public:
  explicit PairKinML(class LAMMPS*);
  ~PairKinML() override;

  void settings(int, char**) override;
  void coeff(int, char**) override;
  void init_style() override;
  double init_one(int, int) override;
  void compute(int, int) override;

  int pack_reverse_comm(int, int, double*) override;
  void unpack_reverse_comm(int, int*, double*) override;
  double memory_usage() override;
  void* extract(const char*, int&) override;
  void* extract_peratom(const char*, int&) override;

 private:
  void allocate();
  void find_pairs();
  void gather_positions();
  void add_forces();
  void tally();
  void judge_committee();
  void write_structure(double);
  void open_reports();

  kinml_potential* potential;
  kinml_precision precision;
  std::int64_t n_members;
  std::vector<int> species_of_type;  // [ntypes + 1] -1: none
  double cutoff, energy_unit;        // Angstrom; of LAMMPS in eV

  // Atoms as the potential takes them: those with energies first.
  std::vector<int> atom_of;   // index in LAMMPS
  std::vector<int> place_of;  // [nall] and back, -1: none
  std::vector<std::int64_t> species, starts, neighbours;
  std::vector<double> positions;
  std::int64_t n_centres;
  // What the potential finds of all members: kinml_results.
  std::vector<double> energies, forces, atomic_energies, virials;

  double* sent;  // [nall, 3] what reverse_comm sends and adds to
  std::vector<double> sent_memory;

  // The committee.
  int every;  // steps from one report to the next, 0: none
  std::string report_name, structures_name;
  double write_above, halt_above;  // eV/Angstrom
  FILE *report, *structures;
  std::vector<double> deviations;  // [nmax] of forces
  bool judged;                     // whether any have been found
};

}  // namespace LAMMPS_NS

#endif
