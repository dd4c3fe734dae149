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
  // What is looked at every so many steps: how far the members' forces differ, how far the
  // environments of atoms are from those of the training data.
  struct Watch {
    const char* keyword;
    const char* of_atoms;  // for fix pair
    const char* of_structure;
    const char* header;
    const char* halts;  // because of the largest value of any atom
    int every = 0;      // steps from one report to the next, 0: none
    std::string report_name = {}, structures_name = {};
    double write_above = kNever, halt_above = kNever;
    FILE *report = nullptr, *structures = nullptr;
    std::vector<double> values = {};  // [nmax] of atoms, of the last report
  };
  static constexpr double kNever = 1e300;

  void judge_committee();
  void judge_environments();
  void judge(Watch&, const double*, int);
  void write_structure(const Watch&, double);
  void open_reports(Watch&);

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
  std::vector<double> energies, forces, atomic_energies, virials, grades;

  double* sent;  // [nall, 3] what reverse_comm sends and adds to
  std::vector<double> sent_memory;

  Watch committee, grade;
};

}  // namespace LAMMPS_NS

#endif
