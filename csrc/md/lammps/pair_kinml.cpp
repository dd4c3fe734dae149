/* ----------------------------------------------------------------------
   pair_style kinml; see pair_kinml.h.
   Distributed under the GNU General Public License, version 2, as LAMMPS.
------------------------------------------------------------------------- */
#include "pair_kinml.h"

#include <atom.h>
#include <comm.h>
#include <domain.h>
#include <error.h>
#include <force.h>
#include <memory.h>
#include <neigh_list.h>
#include <neighbor.h>
#include <timer.h>
#include <update.h>
#include <utils.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

using namespace LAMMPS_NS;

namespace {
constexpr int kDim = 3;
// What compute pair shows: energies' and forces' deviations, grades.
enum { ENERGY_DEVIATION, LARGEST_DEVIATION, MEAN_DEVIATION, LARGEST_GRADE, MEAN_GRADE, N_EXTRA };
}  // namespace

PairKinML::PairKinML(LAMMPS* lmp)
    : Pair(lmp),
      potential(nullptr),
      precision(KINML_AS_TRAINED),
      n_members(0),
      cutoff(0),
      energy_unit(1),
      n_centres(0),
      sent(nullptr),
      committee{
          .keyword = "committee",
          .of_atoms = "force_deviation",
          .of_structure = "largest_force_deviation",
          .header =
              "# step, standard deviation of the members' energies, of their forces on an atom: "
              "largest, mean",
          .halts = "the members' forces on an atom differ by"},
      grade{.keyword = "grade",
            .of_atoms = "grade",
            .of_structure = "largest_grade",
            .header = "# step, extrapolation grades of the atoms: largest, mean",
            .halts = "an atom has the extrapolation grade"} {
  restartinfo = 0;
  one_coeff = 1;
  manybody_flag = 1;
  single_enable = 0;
  respa_enable = 0;
  writedata = 0;
  // Virials come from the pairs of each centre.
  no_virial_fdotr_compute = 1;
  centroidstressflag = CENTROID_NOTAVAIL;
  comm_reverse = comm_reverse_off = kDim;
  nextra = N_EXTRA;
  pvector = new double[N_EXTRA]();
}

PairKinML::~PairKinML() {
  for (const Watch* watch : {&committee, &grade})
    for (FILE* file : {watch->report, watch->structures})
      if (file) fclose(file);
  kinml_close(potential);
  delete[] pvector;
  if (allocated && !copymode) {
    memory->destroy(setflag);
    memory->destroy(cutsq);
  }
}

/* pair_style kinml [precision trained|double|single]
                    [committee N FILE [write X FILE] [halt Y]]
                    [grade N FILE [write X FILE] [halt Y]] */

void PairKinML::settings(int narg, char** arg) {
  precision = KINML_AS_TRAINED;
  committee.every = grade.every = 0;
  Watch* watch = nullptr;
  int i = 0;
  const auto value = [&](const char* of) -> std::string {
    if (++i >= narg) error->all(FLERR, "pair_style kinml: {} is followed by nothing", of);
    return arg[i];
  };
  const auto number = [&](const char* of) { return utils::numeric(FLERR, value(of), false, lmp); };
  for (; i < narg; ++i) {
    const std::string word = arg[i];
    if (word == "precision") {
      const std::string name = value("precision");
      if (name == "trained")
        precision = KINML_AS_TRAINED;
      else if (name == "double")
        precision = KINML_DOUBLE;
      else if (name == "single")
        precision = KINML_SINGLE;
      else
        error->all(FLERR, "pair_style kinml: precision is trained, double or single, not {}", name);
    } else if (word == "committee" || word == "grade") {
      watch = word == "grade" ? &grade : &committee;
      watch->every = utils::inumeric(FLERR, value(watch->keyword), false, lmp);
      if (watch->every < 1)
        error->all(FLERR, "pair_style kinml: {} needs a number of steps > 0", word);
      watch->report_name = value(watch->keyword);
    } else if (word == "write" && watch) {
      watch->write_above = number("write");
      watch->structures_name = value("write");
    } else if (word == "halt" && watch) {
      watch->halt_above = number("halt");
    } else {
      error->all(
          FLERR,
          "pair_style kinml: {} is no keyword here: precision, committee, grade, and after these "
          "two write and halt",
          word);
    }
  }
}

void PairKinML::allocate() {
  allocated = 1;
  const int n = atom->ntypes;
  memory->create(setflag, n + 1, n + 1, "pair:setflag");
  memory->create(cutsq, n + 1, n + 1, "pair:cutsq");
  for (int i = 0; i <= n; ++i)
    for (int j = 0; j <= n; ++j) setflag[i][j] = 0;
}

/* pair_coeff * * MODEL ELEMENT ...: one element, or NULL, for each type */

void PairKinML::coeff(int narg, char** arg) {
  if (!allocated) allocate();
  const int n = atom->ntypes;
  if (narg < 3 || strcmp(arg[0], "*") != 0 || strcmp(arg[1], "*") != 0)
    error->all(FLERR, "pair_style kinml: give pair_coeff * * MODEL and an element for each type");
  if (narg != 3 + n)
    error->all(
        FLERR,
        "pair_style kinml: pair_coeff has {} elements for {} atom types: give one for each, or "
        "NULL for a type of another pair style",
        narg - 3, n);
  kinml_close(potential);
  potential = kinml_open(arg[2], precision);
  if (!potential) error->all(FLERR, "pair_style kinml: {}", kinml_error());
  n_members = kinml_n_members(potential);
  cutoff = kinml_cutoff(potential);
  species_of_type.assign(n + 1, -1);
  for (int type = 1; type <= n; ++type) {
    const std::string element = arg[2 + type];
    if (element == "NULL") continue;
    species_of_type[type] = static_cast<int>(kinml_species(potential, element.c_str()));
    if (species_of_type[type] < 0) {
      std::string known;
      for (std::int64_t k = 0; k < kinml_n_elements(potential); ++k)
        known += std::string(" ") + kinml_element(potential, k);
      error->all(FLERR, "pair_style kinml: the model {} does not know the element {}, only{}",
                 arg[2], element, known);
    }
  }
  int count = 0;
  for (int i = 1; i <= n; ++i)
    for (int j = i; j <= n; ++j) {
      setflag[i][j] = species_of_type[i] >= 0 && species_of_type[j] >= 0;
      count += setflag[i][j];
    }
  if (count == 0) error->all(FLERR, "pair_style kinml: no atom type has an element");
  if (kinml_is_difference(potential))
    error->all(
        FLERR,
        "pair_style kinml: {} gives differences from another level of theory (delta learning), "
        "not energies: train a model of whole energies",
        arg[2]);
  if (committee.every > 0 && n_members < 2)
    error->all(FLERR, "pair_style kinml: {} is one model: a committee has several members", arg[2]);
  if (grade.every > 0 && !kinml_has_grades(potential))
    error->all(FLERR,
               "pair_style kinml: {} has no extrapolation grades: export it with --training-data",
               arg[2]);
  if (comm->me == 0)
    utils::logmesg(lmp, "kinml: {}, {} member(s), cutoff {} A, {} precision\n", arg[2], n_members,
                   cutoff, kinml_precision_of(potential) == KINML_SINGLE ? "single" : "double");
}

void PairKinML::init_style() {
  if (strcmp(update->unit_style, "metal") == 0)
    energy_unit = 1.0;
  else if (strcmp(update->unit_style, "real") == 0)
    energy_unit = utils::get_conversion_factor(utils::ENERGY, utils::METAL2REAL);
  else
    error->all(FLERR, "pair_style kinml: units are metal or real, not {}", update->unit_style);
  if (domain->dimension != 3) error->all(FLERR, "pair_style kinml: the dimension must be 3");
  neighbor->add_request(this, NeighConst::REQ_FULL);
  open_reports(committee);
  open_reports(grade);
}

double PairKinML::init_one(int i, int j) {
  if (setflag[i][j] == 0)
    error->all(FLERR, "pair_style kinml: the types {} and {} have no pair_coeff", i, j);
  return cutoff;
}

void PairKinML::compute(int eflag, int vflag) {
  ev_init(eflag, vflag);
  if (neighbor->ago == 0 || static_cast<int>(place_of.size()) != atom->nlocal + atom->nghost) {
    // Ghosts must be there as far as the cutoff.
    if (comm->get_comm_cutoff() < cutoff + neighbor->skin)
      error->all(
          FLERR,
          "pair_style kinml: ghost atoms are known up to {} A only, cutoff and skin are {} A: "
          "give comm_modify cutoff a larger value, or leave it out",
          comm->get_comm_cutoff(), cutoff + neighbor->skin);
    find_pairs();
  }
  gather_positions();

  const kinml_atoms atoms = {static_cast<std::int64_t>(atom_of.size()),
                             n_centres,
                             positions.data(),
                             species.data(),
                             nullptr,
                             nullptr,
                             starts.data(),
                             neighbours.data()};
  energies.resize(n_members);
  forces.resize(kDim * n_members * atoms.n);
  atomic_energies.resize(eflag_atom ? n_members * atoms.n : 0);
  virials.resize(vflag_either ? kDim * kDim * n_members * atoms.n : 0);
  const auto wanted = [](std::vector<double>& of) { return of.empty() ? nullptr : of.data(); };
  const auto now = [&](const Watch& watch) {
    return watch.every > 0 && update->ntimestep % watch.every == 0;
  };
  grades.resize(now(grade) ? atoms.n : 0);
  const kinml_results results = {energies.data(), forces.data(), wanted(atomic_energies),
                                 wanted(virials), wanted(grades)};
  if (kinml_compute(potential, &atoms, &results, comm->nthreads) != 0)
    error->one(FLERR, "pair_style kinml: {}", kinml_error());
  add_forces();
  tally();
  if (now(committee)) judge_committee();
  if (now(grade)) judge_environments();
}

/* The atoms of this process and its ghosts, and the list of neighbours, when LAMMPS has a new one. */

void PairKinML::find_pairs() {
  const int n_all = atom->nlocal + atom->nghost;
  atom_of.clear();
  place_of.assign(n_all, -1);
  const auto add = [&](int i) {
    place_of[i] = static_cast<int>(atom_of.size());
    atom_of.push_back(i);
  };
  for (int ii = 0; ii < list->inum; ++ii)
    if (species_of_type[atom->type[list->ilist[ii]]] >= 0) add(list->ilist[ii]);
  n_centres = static_cast<std::int64_t>(atom_of.size());
  for (int i = 0; i < n_all; ++i)
    if (place_of[i] < 0 && species_of_type[atom->type[i]] >= 0) add(i);
  species.resize(atom_of.size());
  for (std::size_t p = 0; p < atom_of.size(); ++p)
    species[p] = species_of_type[atom->type[atom_of[p]]];

  starts.assign(1, 0);
  neighbours.clear();
  for (std::int64_t p = 0; p < n_centres; ++p) {
    const int i = atom_of[p];
    for (int jj = 0; jj < list->numneigh[i]; ++jj) {
      const int j = place_of[list->firstneigh[i][jj] & NEIGHMASK];
      if (j >= 0) neighbours.push_back(j);
    }
    starts.push_back(static_cast<std::int64_t>(neighbours.size()));
  }
  starts.resize(atom_of.size() + 1, static_cast<std::int64_t>(neighbours.size()));
}

void PairKinML::gather_positions() {
  positions.resize(kDim * atom_of.size());
  for (std::size_t p = 0; p < atom_of.size(); ++p)
    std::copy_n(atom->x[atom_of[p]], kDim, positions.data() + kDim * p);
}

/* Forces on atoms of other processes reach them by LAMMPS's own way with newton on. */

void PairKinML::add_forces() {
  double* of_all = force->newton_pair ? &atom->f[0][0] : nullptr;
  if (!of_all) {
    sent_memory.assign(kDim * place_of.size(), 0.0);
    of_all = sent = sent_memory.data();
  }
  const double share = energy_unit / static_cast<double>(n_members);
  const std::size_t numbers = kDim * atom_of.size();
  for (std::size_t p = 0; p < atom_of.size(); ++p)
    for (int d = 0; d < kDim; ++d) {
      double sum = 0;
      for (std::int64_t m = 0; m < n_members; ++m) sum += forces[m * numbers + kDim * p + d];
      of_all[kDim * atom_of[p] + d] += share * sum;
    }
  if (force->newton_pair) return;
  comm->reverse_comm(this);
  for (int i = 0; i < atom->nlocal; ++i)
    for (int d = 0; d < kDim; ++d) atom->f[i][d] += sent[kDim * i + d];
}

void PairKinML::tally() {
  const double share = energy_unit / static_cast<double>(n_members);
  const std::size_t n = atom_of.size();
  if (eflag_global)
    for (const double energy : energies) eng_vdwl += share * energy;
  if (eflag_atom)
    for (std::int64_t m = 0; m < n_members; ++m)
      for (std::int64_t p = 0; p < n_centres; ++p)
        eatom[atom_of[p]] += share * atomic_energies[m * n + p];
  if (!vflag_either) return;
  // LAMMPS's order: xx yy zz xy xz yz, of position (x) force: the strain derivative with a minus.
  constexpr int rows[6] = {0, 1, 2, 0, 0, 1}, columns[6] = {0, 1, 2, 1, 2, 2};
  for (std::int64_t m = 0; m < n_members; ++m)
    for (std::int64_t p = 0; p < n_centres; ++p) {
      const double* const w = virials.data() + kDim * kDim * (m * n + p);
      for (int k = 0; k < 6; ++k) {
        const double v =
            -share * 0.5 * (w[kDim * rows[k] + columns[k]] + w[kDim * columns[k] + rows[k]]);
        if (vflag_global) virial[k] += v;
        if (vflag_atom) vatom[atom_of[p]][k] += v;
      }
    }
}

/* Deviations are standard deviations of a sample (divisor M - 1), times the factors of a calibrated
   ensemble: of the energy, and of an atom's force the length of those of its components. */

void PairKinML::judge_committee() {
  const std::size_t n = atom_of.size();
  std::vector<double> own(energies), whole(n_members);
  for (double& energy : own) energy *= energy_unit;
  MPI_Allreduce(own.data(), whole.data(), static_cast<int>(n_members), MPI_DOUBLE, MPI_SUM, world);
  const auto deviation = [&](const auto& value) {
    double mean = 0, squares = 0;
    for (std::int64_t m = 0; m < n_members; ++m) mean += value(m) / n_members;
    for (std::int64_t m = 0; m < n_members; ++m) squares += (value(m) - mean) * (value(m) - mean);
    return squares / (n_members - 1);
  };
  // Whole forces of each member: those of ghosts are brought home.
  std::vector<std::vector<double>> of_members;
  for (std::int64_t m = 0; m < n_members; ++m) {
    sent_memory.assign(kDim * place_of.size(), 0.0);
    sent = sent_memory.data();
    for (std::size_t p = 0; p < n; ++p)
      for (int d = 0; d < kDim; ++d)
        sent[kDim * atom_of[p] + d] = energy_unit * forces[kDim * (m * n + p) + d];
    comm->reverse_comm(this);
    of_members.emplace_back(sent, sent + kDim * atom->nlocal);
  }
  committee.values.assign(atom->nmax, 0.0);
  for (std::int64_t p = 0; p < n_centres; ++p) {
    const int i = atom_of[p];
    double squares = 0;
    for (int d = 0; d < kDim; ++d)
      squares += deviation([&](std::int64_t m) { return of_members[m][kDim * i + d]; });
    committee.values[i] =
        std::sqrt(squares) * kinml_forces_factor(potential, species_of_type[atom->type[i]]);
  }
  const double of_energy = std::sqrt(deviation([&](std::int64_t m) { return whole[m]; })) *
                           kinml_energy_factor(potential);
  if (comm->me == 0) pvector[ENERGY_DEVIATION] = of_energy;
  judge(committee, &of_energy, LARGEST_DEVIATION);
}

void PairKinML::judge_environments() {
  grade.values.assign(atom->nmax, 0.0);
  for (std::int64_t p = 0; p < n_centres; ++p) grade.values[atom_of[p]] = grades[p];
  judge(grade, nullptr, LARGEST_GRADE);
}

/* Report the largest and the mean value of the atoms, which compute pair has from there, behind
   another number of the structure; do what is to be done about the largest. */

void PairKinML::judge(Watch& watch, const double* before, int place) {
  double largest = 0, sums[2] = {0, 0};
  for (std::int64_t p = 0; p < n_centres; ++p) {
    largest = std::max(largest, watch.values[atom_of[p]]);
    sums[0] += watch.values[atom_of[p]];
    sums[1] += 1;
  }
  double largest_of_all = 0, of_all[2];
  MPI_Allreduce(&largest, &largest_of_all, 1, MPI_DOUBLE, MPI_MAX, world);
  MPI_Allreduce(sums, of_all, 2, MPI_DOUBLE, MPI_SUM, world);
  const double mean = of_all[1] > 0 ? of_all[0] / of_all[1] : 0.0;
  if (comm->me == 0) {  // compute pair adds up those of all processes
    pvector[place] = largest_of_all;
    pvector[place + 1] = mean;
  }
  if (watch.report) {
    fprintf(watch.report, BIGINT_FORMAT, update->ntimestep);
    if (before) fprintf(watch.report, " %.10g", *before);
    fprintf(watch.report, " %.10g %.10g\n", largest_of_all, mean);
    fflush(watch.report);
  }
  if (largest_of_all > watch.write_above) write_structure(watch, largest_of_all);
  if (largest_of_all > watch.halt_above) {
    if (comm->me == 0)
      utils::logmesg(lmp, "kinml: the run halts at step {}: {} {:.6g}, more than {:.6g}\n",
                     update->ntimestep, watch.halts, largest_of_all, watch.halt_above);
    timer->force_timeout();
  }
}

/* Append the atoms of all processes to an extended XYZ file. */

void PairKinML::write_structure(const Watch& watch, double largest) {
  constexpr int kColumns = 5;  // id, type, position
  std::vector<double> own;
  for (int i = 0; i < atom->nlocal; ++i) {
    own.push_back(atom->tag ? static_cast<double>(atom->tag[i]) : i + 1);
    own.push_back(atom->type[i]);
    own.insert(own.end(), atom->x[i], atom->x[i] + kDim);
  }
  int n = static_cast<int>(own.size());
  std::vector<int> counts(comm->nprocs), places(comm->nprocs);
  MPI_Gather(&n, 1, MPI_INT, counts.data(), 1, MPI_INT, 0, world);
  for (int r = 1; r < comm->nprocs; ++r) places[r] = places[r - 1] + counts[r - 1];
  std::vector<double> all(comm->me == 0 ? places.back() + counts.back() : 0);
  MPI_Gatherv(own.data(), n, MPI_DOUBLE, all.data(), counts.data(), places.data(), MPI_DOUBLE, 0,
              world);
  FILE* const structures = watch.structures;
  if (!structures) return;
  std::vector<const double*> rows;
  for (std::size_t i = 0; i < all.size(); i += kColumns) rows.push_back(all.data() + i);
  std::sort(rows.begin(), rows.end(), [](auto a, auto b) { return a[0] < b[0]; });
  const double* const h = domain->h;  // xx yy zz yz xz xy
  const auto periodic = [&](int k) { return domain->periodicity[k] ? 'T' : 'F'; };
  fprintf(structures,
          "%zu\nLattice=\"%.10g 0 0 %.10g %.10g 0 %.10g %.10g %.10g\" pbc=\"%c %c %c\" "
          "step=" BIGINT_FORMAT " %s=%.10g Properties=species:S:1:pos:R:3\n",
          rows.size(), h[0], h[5], h[1], h[4], h[3], h[2], periodic(0), periodic(1), periodic(2),
          update->ntimestep, watch.of_structure, largest);
  for (const double* const row : rows) {
    const int s = species_of_type[static_cast<int>(row[1])];
    fprintf(structures, "%s %.10g %.10g %.10g\n", s < 0 ? "X" : kinml_element(potential, s), row[2],
            row[3], row[4]);
  }
  fflush(structures);
}

void PairKinML::open_reports(Watch& watch) {
  if (comm->me != 0 || watch.every == 0) return;
  const auto opened = [&](FILE*& file, const std::string& name) {
    if (file || name.empty()) return;
    file = fopen(name.c_str(), "w");
    if (!file)
      error->one(FLERR, "pair_style kinml: {} cannot be written ({})", name, std::strerror(errno));
  };
  if (!watch.report) {
    opened(watch.report, watch.report_name);
    fprintf(watch.report, "%s\n", watch.header);
  }
  opened(watch.structures, watch.structures_name);
}

int PairKinML::pack_reverse_comm(int n, int first, double* buffer) {
  std::copy_n(sent + kDim * first, kDim * n, buffer);
  return kDim * n;
}

void PairKinML::unpack_reverse_comm(int n, int* where, double* buffer) {
  for (int i = 0; i < n; ++i)
    for (int d = 0; d < kDim; ++d) sent[kDim * where[i] + d] += buffer[kDim * i + d];
}

double PairKinML::memory_usage() {
  return Pair::memory_usage() +
         static_cast<double>(neighbours.capacity() + starts.capacity() + species.capacity() +
                             positions.capacity() + sent_memory.capacity() + energies.capacity() +
                             forces.capacity() + atomic_energies.capacity() + virials.capacity() +
                             grades.capacity()) *
             sizeof(double);
}

void* PairKinML::extract(const char* name, int& dim) {
  dim = 0;
  return strcmp(name, "cut") == 0 ? &cutoff : nullptr;
}

/* For fix pair: what is watched of atoms, as of the last report. */

void* PairKinML::extract_peratom(const char* name, int& n_columns) {
  n_columns = 0;
  for (Watch* watch : {&committee, &grade}) {
    if (strcmp(name, watch->of_atoms) != 0 || watch->every == 0) continue;
    if (watch->values.empty()) watch->values.assign(atom->nmax, 0.0);
    return watch->values.data();
  }
  return nullptr;
}
