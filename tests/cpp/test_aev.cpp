// Atomic environment vectors on the CPU against a naive long double implementation, written from
// the definition (with arccos), and against finite differences of it.
//
//   test_aev          everything (seconds)
//   test_aev small    fewer and smaller molecules, for valgrind and the sanitizers
//
// The instruction set is the one of the processor or of KINML_CPU_ISA: run it once for each of
// baseline, avx2, avx512 (ctest does).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../csrc/cpu/aev_cpu.h"
#include "../../csrc/cpu/aev_environments.h"
#include "../../csrc/cpu/dispatch.h"
#include "check.h"
#include "guarded.h"
#include "molecules.h"

namespace {

using namespace molecules;
using kinml::System;

bool small_run = false;

// ---- the library ------------------------------------------------------------------------------

template <class T>
struct Library {
  const AevParameters& p;
  const Batch& batch;
  std::vector<T> x;
  int threads = 1;

  Library(const AevParameters& parameters, const Batch& b, int n_threads = 1)
      : p(parameters), batch(b), x(as<T>(b.coordinates)), threads(n_threads) {}

  System<T> view() const {
    return {batch.n_atoms(), batch.n_structures(), batch.species.data(), batch.offsets.data(),
            x.data()};
  }
  // Outputs begin as NaN: what is not written shows.
  static std::vector<T> room(Index n) {
    return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN());
  }
  std::vector<T> forward() const {
    std::vector<T> out = room(batch.n_atoms() * p.length());
    kinml::cpu::aev_forward<T>(p, view(), out.data(), threads);
    return out;
  }
  std::vector<T> jvp(const std::vector<T>& v) const {
    std::vector<T> out = room(batch.n_atoms() * p.length());
    kinml::cpu::aev_jvp<T>(p, view(), v.data(), out.data(), threads);
    return out;
  }
  std::vector<T> vjp(const std::vector<T>& g) const {
    std::vector<T> out = room(3 * batch.n_atoms());
    kinml::cpu::aev_vjp<T>(p, view(), g.data(), out.data(), threads);
    return out;
  }
  std::vector<T> hvp(const std::vector<T>& g, const std::vector<T>& v) const {
    std::vector<T> out = room(3 * batch.n_atoms());
    kinml::cpu::aev_hvp<T>(p, view(), g.data(), v.data(), out.data(), threads);
    return out;
  }
  std::vector<T> jacobian(Index columns) const {
    std::vector<T> out = room(batch.n_atoms() * p.length() * columns);
    kinml::cpu::aev_jacobian<T>(p, view(), columns, out.data(), threads);
    return out;
  }
};

// Tolerances by type: values and first derivatives; absolute ones for numbers of size `scale`.
template <class T>
constexpr bool is_double = sizeof(T) == 8;
template <class T>
constexpr Real kValue = is_double<T> ? 1e-12L : 5e-5L;
template <class T>
constexpr Real kGradient = is_double<T> ? 1e-10L : 5e-4L;
template <class T>
constexpr Real kFloor = is_double<T> ? 1e-14L : 2e-6L;
// With beta = 1 and atoms in a line: 16 times the root of the type's epsilon.
template <class T>
constexpr Real kLine = is_double<T> ? 2.4e-7L : 5.5e-3L;

// ---- tests ------------------------------------------------------------------------------------

Batch molecules(const AevParameters& p, Index count, Index largest_size) {
  Batch batch;
  for (Index s = 0; s < count; ++s) batch.add_molecule(random_index(1, largest_size), p);
  return batch;
}

template <class T>
void test_values(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  const Batch batch = molecules(p, small_run ? 3 : 12, small_run ? 12 : 40);
  const std::vector<Real> expected = reference(p, batch);
  check_close(Library<T>(p, batch).forward(), expected, kValue<T>,
              kFloor<T> * std::max<Real>(1, largest(expected)));
}

// jvp against differences of the reference; vjp, hvp and jacobian against jvp and identities.
template <class T>
void test_derivatives(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  const Batch batch = molecules(p, small_run ? 2 : 6, small_run ? 8 : 40);
  const Library<T> library(p, batch);
  const std::vector<double> v = random_numbers(3 * batch.n_atoms());
  const std::vector<double> w = random_numbers(3 * batch.n_atoms());
  const std::vector<double> g = random_numbers(batch.n_atoms() * p.length());
  const auto tv = as<T>(v), tw = as<T>(w), tg = as<T>(g);

  const std::vector<Real> tangent = reference_tangent(p, batch, v);
  const Real size = std::max<Real>(1, largest(tangent));
  const std::vector<T> jv = library.jvp(tv);
  check_close(jv, tangent, kGradient<T>, 10 * kFloor<T> * size + 1e-12L);

  // g . J v = v . J^T g; the sums have many terms of both signs.
  const std::vector<T> jtg = library.vjp(tg);
  const Real terms = std::sqrt(static_cast<Real>(tg.size()) + 1);
  CHECK_CLOSE(dot(jtg, v), dot(jv, g), kGradient<T>, 20 * kFloor<T> * size * terms);

  // J^T g component by component, against the same differences.
  if (batch.n_atoms() > 0) {
    for (int repeat = 0; repeat < 3; ++repeat) {
      const Index q = random_index(0, 3 * batch.n_atoms() - 1);
      std::vector<double> unit(3 * batch.n_atoms());
      unit[q] = 1;
      CHECK_CLOSE(jtg[q], dot(reference_tangent(p, batch, unit), g), kGradient<T>,
                  20 * kFloor<T> * size * terms);
    }
  }

  // hvp is symmetric, linear in the direction, and v . hvp(g, v) the second derivative along v.
  const std::vector<T> hv = library.hvp(tg, tv), hw = library.hvp(tg, tw);
  const Real curvature = std::max<Real>({1, largest(hv), largest(hw)});
  const Real tolerance = 100 * kFloor<T> * curvature * std::sqrt(3.0L * batch.n_atoms());
  CHECK_CLOSE(dot(hv, w), dot(hw, v), kGradient<T>, tolerance);
  const Real h = 2e-4L;
  Real second = -30 * dot(reference(p, batch), g);
  const Real weights[4][2] = {{-2, -1}, {-1, 16}, {1, 16}, {2, -1}};
  for (const auto& [steps, weight] : weights)
    second += weight * dot(reference(p, batch, &v, steps * h), g);
  second /= 12 * h * h;
  CHECK_CLOSE(dot(hv, v), second, is_double<T> ? 1e-7L : 1e-3L, 1e-8L * curvature + tolerance);
}

// Every component of hvp, in float64, against differences of the vjp.
void test_hessian(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  Batch batch = molecules(p, small_run ? 2 : 5, small_run ? 6 : 15);
  const std::vector<double> v = random_numbers(3 * batch.n_atoms());
  const std::vector<double> g = random_numbers(batch.n_atoms() * p.length());
  const std::vector<double> hv = Library<double>(p, batch).hvp(g, v);
  const std::vector<double> origin = batch.coordinates;
  const double h = 2e-4;
  std::vector<Real> expected(origin.size());
  const double weights[4][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};
  for (const auto& [steps, weight] : weights) {
    for (std::size_t i = 0; i < origin.size(); ++i)
      batch.coordinates[i] = origin[i] + steps * h * v[i];
    const std::vector<double> jtg = Library<double>(p, batch).vjp(g);
    for (std::size_t i = 0; i < origin.size(); ++i) expected[i] += weight * jtg[i] / (12 * h);
  }
  check_close(hv, expected, 1e-6L, 1e-8L * std::max<Real>(1, largest(expected)));
}

// Every column of the dense Jacobian is the product with a unit vector; the rest is zero. Molecules
// larger than the cutoffs: each atom has other neighbours, some have none.
template <class T>
void test_jacobian(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  Batch batch;
  batch.add_random(6, p.n_species, 9, 9, 9, p);
  batch.finish_structure();  // no atoms
  batch.add_random(2, p.n_species, 3, 3, 3, p);
  batch.add_random(9, p.n_species, 18, 4, 3, p);
  batch.add_random(1, p.n_species, 3, 3, 3, p);
  Index most = 0;
  for (Index s = 0; s < batch.n_structures(); ++s) most = std::max(most, batch.size(s));
  const Index columns = 3 * most + 5, length = p.length();
  const Library<T> library(p, batch);
  const std::vector<T> jacobian = library.jacobian(columns);
  CHECK(all_finite(jacobian));
  for (Index column = 0; column < columns; ++column) {
    // The same column of all structures at once.
    std::vector<T> unit(3 * batch.n_atoms());
    for (Index s = 0; s < batch.n_structures(); ++s)
      if (column < 3 * batch.size(s)) unit[3 * batch.offsets[s] + column] = 1;
    const std::vector<T> expected = library.jvp(unit);
    const Real size = std::max<Real>(1, largest(expected));
    for (Index i = 0; i < batch.n_atoms() * length; ++i)
      CHECK_CLOSE(jacobian[i * columns + column], expected[i], kGradient<T>, kFloor<T> * size);
  }
}

// Structures through the cell list, of several shapes, against all pairs in the reference.
template <class T>
void test_cells() {
  const AevParameters p = aevmod(2, 5, 2, 3, 4.2, 2.9, 0.95);
  struct Box {
    const char* name;
    Index n;
    double lx, ly, lz;
  };
  const Box boxes[] = {
      {"cells: cube", small_run ? 90 : 700, small_run ? 11.0 : 21.0, small_run ? 11.0 : 21.0,
       small_run ? 11.0 : 21.0},
      {"cells: rod", small_run ? 80 : 520, small_run ? 60.0 : 300.0, 5, 5},
      {"cells: sheet", small_run ? 80 : 600, small_run ? 22.0 : 55.0, small_run ? 22.0 : 55.0, 0},
      {"cells: far apart", 70, 5e4, 5e4, 5e4},
      {"cells: one long axis", 130, 4, 4, 2e3},
      {"cells: one more than fits into one", 65, 9, 9, 9},
  };
  for (const Box& box : boxes) {
    check::section(box.name);
    Batch batch;
    batch.add_random(box.n, 2, box.lx, box.ly, box.lz, p, 0.5);
    const Library<T> library(p, batch, 2);
    const std::vector<Real> expected = reference(p, batch);
    // Far from the origin a float has few digits left of a distance; here all are exact.
    check_close(library.forward(), expected, kValue<T>, 10 * kFloor<T>);
    const std::vector<double> v = random_numbers(3 * batch.n_atoms());
    const std::vector<double> g = random_numbers(batch.n_atoms() * p.length());
    const std::vector<T> jv = library.jvp(as<T>(v));
    if (is_double<T> && !small_run) check_close(jv, reference_tangent(p, batch, v), 1e-10L, 1e-11L);
    const std::vector<T> jtg = library.vjp(as<T>(g));
    const Real size = std::max<Real>(1, largest(jv)) * std::sqrt(static_cast<Real>(g.size()));
    CHECK_CLOSE(dot(jtg, v), dot(jv, g), kGradient<T>, 20 * kFloor<T> * size);
    const std::vector<double> w = random_numbers(3 * batch.n_atoms());
    const std::vector<T> hv = library.hvp(as<T>(g), as<T>(v)), hw = library.hvp(as<T>(g), as<T>(w));
    CHECK_CLOSE(dot(hv, w), dot(hw, v), kGradient<T>, 100 * kFloor<T> * size * largest(hv));
    // Atoms do not move the whole: forces add up to zero.
    for (int c = 0; c < 3; ++c) {
      Real sum = 0;
      for (Index i = 0; i < batch.n_atoms(); ++i) sum += jtg[3 * i + c];
      CHECK_CLOSE(sum, 0, 0, 20 * kFloor<T> * size);
    }
  }
  if (small_run) return;
  // The dense Jacobian of a structure that is cut into tasks.
  check::section("cells: Jacobian");
  const AevParameters tiny = aevmod(1, 2, 1, 1, 3.0, 2.5, 0.95);
  Batch batch;
  batch.add_random(530, 1, 19, 19, 19, tiny);
  const Library<T> library(tiny, batch, 2);
  const Index columns = 3 * batch.n_atoms();
  const std::vector<T> jacobian = library.jacobian(columns);
  const std::vector<double> v = random_numbers(columns);
  const std::vector<T> jv = library.jvp(as<T>(v));
  for (std::size_t i = 0; i < jv.size(); ++i) {
    Real sum = 0;
    for (Index c = 0; c < columns; ++c) sum += static_cast<Real>(jacobian[i * columns + c]) * v[c];
    CHECK_CLOSE(jv[i], sum, kGradient<T>, 20 * kFloor<T> * std::max<Real>(1, largest(jv)));
  }
}

Batch mixed_batch(const AevParameters& p) {
  Batch batch;
  batch.finish_structure();
  for (int s = 0; s < (small_run ? 4 : 30); ++s) {
    batch.add_molecule(random_index(1, small_run ? 8 : 40), p);
    if (s % 7 == 3) batch.finish_structure();
  }
  batch.add_random(530, p.n_species, 24, 24, 24, p);  // cut into tasks
  batch.add_molecule(5, p);
  batch.add_random(100, p.n_species, 13, 13, 13, p);  // cells, one task
  batch.finish_structure();
  return batch;
}

template <class T>
void test_same_bits() {
  const AevParameters p = aevmod(3, 5, 3, 4, 4.0, 2.8, 0.95);
  const Batch batch = mixed_batch(p);
  const auto g = as<T>(random_numbers(batch.n_atoms() * p.length()));
  const auto v = as<T>(random_numbers(3 * batch.n_atoms()));
  const Library<T> one(p, batch, 1);
  const std::vector<T> a = one.forward(), jv = one.jvp(v), jtg = one.vjp(g), hv = one.hvp(g, v);
  CHECK(all_finite(a) && all_finite(jv) && all_finite(jtg) && all_finite(hv));

  check::section("same bits for any number of threads");
  Batch few;
  for (int s = 0; s < 9; ++s) few.add_molecule(random_index(1, 20), p);
  const Index columns = 3 * 20;
  const std::vector<T> jacobian = Library<T>(p, few, 1).jacobian(columns);
  for (const int threads : {2, 3, 7}) {
    const Library<T> other(p, batch, threads);
    CHECK(same_bits(a, other.forward()));
    CHECK(same_bits(jv, other.jvp(v)));
    CHECK(same_bits(jtg, other.vjp(g)));
    CHECK(same_bits(hv, other.hvp(g, v)));
    CHECK(same_bits(jacobian, Library<T>(p, few, threads).jacobian(columns)));
  }

  // Nor does a structure know its neighbours in the batch.
  check::section("same bits alone and in a batch");
  for (Index s = 0; s < batch.n_structures(); ++s) {
    const Batch alone = batch.only(s);
    const Index first = batch.offsets[s], last = batch.offsets[s + 1], length = p.length();
    const std::vector<T> part(a.begin() + first * length, a.begin() + last * length);
    CHECK(same_bits(part, Library<T>(p, alone).forward()));
    const std::vector<T> own(g.begin() + first * length, g.begin() + last * length);
    const std::vector<T> force(jtg.begin() + 3 * first, jtg.begin() + 3 * last);
    CHECK(same_bits(force, Library<T>(p, alone).vjp(own)));
  }
}

// Several threads call the library at once, as a program with its own threads does.
void test_callers() {
  check::section("several callers");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  const Batch batch = molecules(p, 6, 15);
  const auto g = random_numbers(batch.n_atoms() * p.length());
  const std::vector<double> expected = Library<double>(p, batch).vjp(g);
  std::vector<std::vector<double>> results(4);
  std::vector<std::thread> callers;
  for (std::size_t i = 0; i < results.size(); ++i)
    callers.emplace_back(
        [&, i] { results[i] = Library<double>(p, batch, i % 2 == 0 ? 1 : 2).vjp(g); });
  for (std::thread& caller : callers) caller.join();
  for (const auto& result : results) CHECK(same_bits(result, expected));
}

template <class T>
void test_empty() {
  check::section("nothing");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  Batch none;
  for (int structures = 0; structures < 3; ++structures) {
    const Library<T> library(p, none, 2);
    CHECK(library.forward().empty() && library.vjp({}).empty() && library.jvp({}).empty());
    CHECK(library.hvp({}, {}).empty() && library.jacobian(0).empty());
    none.finish_structure();
  }
  check::section("one atom");
  Batch atom;
  atom.add_atom(1, 2, 3, 1);
  atom.finish_structure();
  const Library<T> library(p, atom);
  const std::vector<T> ones(p.length(), T(1));
  CHECK(largest(library.forward()) == 0 && largest(library.vjp(ones)) == 0);
  CHECK(largest(library.jvp({1, 1, 1})) == 0 && largest(library.hvp(ones, {1, 1, 1})) == 0);
  CHECK(largest(library.jacobian(3)) == 0);
}

// All ops are finite; forward agrees with the reference.
template <class T>
void check_degenerate(const AevParameters& p, const Batch& batch, Real atol) {
  const Library<T> library(p, batch);
  check_close(library.forward(), reference(p, batch), kValue<T>, atol);
  const auto g = as<T>(random_numbers(batch.n_atoms() * p.length()));
  const auto v = as<T>(random_numbers(3 * batch.n_atoms()));
  const std::vector<T> jv = library.jvp(v), jtg = library.vjp(g);
  CHECK(all_finite(jv));
  CHECK(all_finite(jtg));
  CHECK(all_finite(library.hvp(g, v)));
  CHECK(all_finite(library.jacobian(3 * batch.n_atoms())));
  const Real size = std::max<Real>(1, largest(jv)) * std::sqrt(static_cast<Real>(g.size()));
  CHECK_CLOSE(dot(jtg, v), dot(jv, g), kGradient<T>, 20 * kFloor<T> * size);
}

template <class T>
void test_coincident() {
  check::section("coincident atoms");
  for (const double beta : {0.95, 1.0}) {
    const AevParameters p = aevmod(2, 8, 4, 5, 5.2, 3.8, beta);
    Batch batch;
    batch.add_atom(0.1, 0.2, 0.3, 0);
    batch.add_atom(0.1, 0.2, 0.3, 1);
    batch.add_atom(1.1, 0.4, -0.3, 0);
    batch.add_atom(0.1, 0.2, 0.3, 1);
    batch.add_atom(-0.6, 0.9, 0.8, 1);
    batch.finish_structure();
    // Seen from others they stand in one line, where sin(theta) is uncertain (test_collinear).
    check_degenerate<T>(p, batch, beta < 1 ? kFloor<T> : kLine<T>);
  }
}

template <class T>
void test_collinear() {
  check::section("collinear atoms, beta 1");
  for (const double zeta : {8.0, 14.1, 1.0}) {
    AevParameters p = aevmod(2, 8, 4, 5, 5.2, 3.8, 1.0);
    p.zeta = zeta;
    Batch batch;
    for (const double x : {0.0, 1.0, 2.25, -1.5, 3.0}) batch.add_atom(x, 0, 0, x > 1.5);
    batch.finish_structure();
    check_degenerate<T>(p, batch, kFloor<T>);
    // In a slanted line cos(angle) is 1 but for rounding: sin(theta) is uncertain by the root of
    // it.
    Batch slanted;
    for (const double x : {0.0, 1.0, 2.25, -1.5, 3.0}) slanted.add_atom(x, 0.5 * x, -0.25 * x, 0);
    slanted.finish_structure();
    check_degenerate<T>(p, slanted, kLine<T>);
  }
}

// A distance beside a cutoff, and exactly at it.
template <class T>
void test_at_cutoff() {
  check::section("at the cutoff");
  const AevParameters p = aevmod(1, 6, 3, 4, 5.0, 3.5, 0.95);
  for (const double r : {3.5, 5.0, 3.4999998, 3.5000002, 4.9999995, 5.0000005}) {
    Batch batch;
    batch.add_atom(0, 0, 0, 0);
    batch.add_atom(r, 0, 0, 0);
    batch.add_atom(0, 1.5, 0, 0);
    batch.finish_structure();
    const Library<T> library(p, batch);
    check_close(library.forward(), reference(p, batch), kValue<T>, kFloor<T>);
    std::vector<double> v(9);
    v[3] = 1;
    const auto g = as<T>(random_numbers(3 * p.length()));
    CHECK(all_finite(library.hvp(g, as<T>(v))));
    CHECK_CLOSE(dot(library.vjp(g), v), dot(library.jvp(as<T>(v)), g), kGradient<T>,
                100 * kFloor<T>);
  }
}

// What the kernels make of one structure, called on memory that ends where their interface says and
// that holds junk before. Rows of vectors stand `stride` apart.
template <class T>
struct Kernels {
  std::vector<T> rows, tangent_rows, transposed, derivative;

  Kernels(const AevParameters& p, const Batch& batch, const std::vector<T>& gradient,
          const std::vector<T>& tangent, Index stride, T junk) {
    const Index n = batch.n_atoms(), length = p.length();
    kinml::cpu::AevTableStorage<T> tables(p);
    Guarded<T> lists(tables.storage.size(), T(0));
    std::copy(tables.storage.begin(), tables.storage.end(), lists.data());
    for (const T** list :
         {&tables.radial_shifts, &tables.angular_shifts, &tables.section_cos, &tables.section_sin})
      *list = lists.data() + (*list - tables.storage.data());

    Guarded<T> x(3 * n, T(0)), v(3 * n, T(0)), g(room(n, stride, length), junk);
    Guarded<Index> species(n, 0);
    std::copy(batch.coordinates.begin(), batch.coordinates.end(), x.data());
    std::copy(tangent.begin(), tangent.end(), v.data());
    std::copy(batch.species.begin(), batch.species.end(), species.data());
    for (Index i = 0; i < n; ++i)
      for (Index d = 0; d < length; ++d) g[i * stride + d] = gradient[i * length + d];

    kinml::cpu::CellGrid grid;
    grid.build(x.data(), n, std::max(p.radial_cutoff, p.angular_cutoff));
    for (const bool dual : {false, true}) {
      kinml::cpu::Environment<T> e{};
      e.structure.n_atoms = n;
      e.structure.coordinates = x.data();
      e.structure.species = species.data();
      grid.describe(e.structure);
      e.begin = 0;
      e.end = n;
      e.direction = dual ? v.data() : nullptr;
      Guarded<T> pairs(kinml::cpu::pair_memory<T>(tables, e), junk);
      e.pairs = pairs.data();
      KINML_CALL_KERNEL(aev_neighbours, tables, e);
      Guarded<T> triples(e.triple_numbers, junk);
      e.triples = triples.data();
      const auto scratch = [&] { return kinml::cpu::scratch_memory<T>(tables, e); };
      {
        Guarded<T> memory(scratch(), junk);
        KINML_CALL_KERNEL(aev_triples, tables, e, memory.data());
      }
      std::vector<T>& sums = dual ? derivative : transposed;
      {
        Guarded<T> memory(scratch(), junk), out(3 * n, T(0));
        KINML_CALL_KERNEL(aev_transposed, tables, e, g.data(), stride, out.data(), nullptr,
                          memory.data());
        sums.assign(out.data(), out.data() + 3 * n);
      }
      if (dual) continue;
      {
        Guarded<T> out(room(n, stride, length), T(kMark));
        KINML_CALL_KERNEL(aev_rows, tables, e, out.data(), stride);
        rows = without_gaps(out, n, stride, length);
      }
      {
        Guarded<T> memory(scratch(), junk), out(room(n, stride, length), T(kMark));
        KINML_CALL_KERNEL(aev_tangent_rows, tables, e, v.data(), nullptr, out.data(), stride,
                          memory.data());
        tangent_rows = without_gaps(out, n, stride, length);
      }
    }
  }

 private:
  static constexpr double kMark = -77.25;
  static Index room(Index n, Index stride, Index length) { return (n - 1) * stride + length; }
  // What stands between the rows must be as before.
  static std::vector<T> without_gaps(Guarded<T>& from, Index n, Index stride, Index length) {
    std::vector<T> result;
    for (Index i = 0; i < n; ++i) {
      result.insert(result.end(), &from[i * stride], &from[i * stride] + length);
      for (Index d = length; d < stride && i + 1 < n; ++d) CHECK(from[i * stride + d] == T(kMark));
    }
    return result;
  }
};

// Whole registers are read and written beyond the ends of lists of neighbours and triples: never
// beyond the memory, and what stands there has no influence.
template <class T>
void test_memory(const AevParameters& p, const Batch& batch) {
  const auto g = as<T>(random_numbers(batch.n_atoms() * p.length()));
  const auto v = as<T>(random_numbers(3 * batch.n_atoms()));
  const Kernels<T> one(p, batch, g, v, p.length(), std::numeric_limits<T>::quiet_NaN());
  const Kernels<T> other(p, batch, g, v, p.length() + 3, T(1e30));
  const Library<T> library(p, batch);
  CHECK(same_bits(one.rows, library.forward()) && same_bits(other.rows, one.rows));
  CHECK(same_bits(one.tangent_rows, library.jvp(v)));
  CHECK(same_bits(other.tangent_rows, one.tangent_rows));
  CHECK(same_bits(one.transposed, library.vjp(g)));
  CHECK(same_bits(other.transposed, one.transposed));
  CHECK(same_bits(one.derivative, library.hvp(g, v)));
  CHECK(same_bits(other.derivative, one.derivative));
  CHECK(all_finite(one.rows) && all_finite(one.tangent_rows));
  CHECK(all_finite(one.transposed) && all_finite(one.derivative));
}

// J^T g for several g at once, on memory that ends where the interface says and that holds junk
// before. The centres come in two parts, which add up.
template <class T>
std::vector<std::vector<T>> many_products(const AevParameters& p, const Batch& batch,
                                          const std::vector<std::vector<T>>& gradients,
                                          Index stride, T junk) {
  const Index n = batch.n_atoms(), length = p.length();
  const Index count = static_cast<Index>(gradients.size());
  const std::vector<T> x = as<T>(batch.coordinates);
  std::vector<std::unique_ptr<Guarded<T>>> g, out;
  std::vector<const T*> from;
  std::vector<T*> to;
  for (const std::vector<T>& gradient : gradients) {
    g.push_back(std::make_unique<Guarded<T>>((n - 1) * stride + length, junk));
    for (Index i = 0; i < n; ++i)
      std::copy_n(gradient.begin() + i * length, length, g.back()->data() + i * stride);
    out.push_back(std::make_unique<Guarded<T>>(3 * n, T(0)));
    from.push_back(g.back()->data());
    to.push_back(out.back()->data());
  }
  kinml::cpu::AevTableStorage<T> tables(p);
  kinml::cpu::Environments<T> environments(tables);
  environments.set_structure({n, 1, batch.species.data(), batch.offsets.data(), x.data()}, 0);
  for (const auto& [begin, end] : {std::pair{Index(0), n / 3}, std::pair{n / 3, n}}) {
    const kinml::cpu::Environment<T> e = environments.make(begin, end);
    Guarded<T> memory(kinml::cpu::many_scratch_memory<T>(tables, e), junk);
    KINML_CALL_KERNEL(aev_transposed_many, tables, e, from.data(), count, stride, to.data(),
                      nullptr, memory.data());
  }
  std::vector<std::vector<T>> result;
  for (T* const forces : to) result.emplace_back(forces, forces + 3 * n);
  return result;
}

template <class T>
void test_many(const AevParameters& p, const Batch& batch, Index count) {
  const Index size = batch.n_atoms() * p.length();
  std::vector<std::vector<T>> gradients;
  for (Index i = 0; i < count; ++i) gradients.push_back(as<T>(random_numbers(size)));
  const T nan = std::numeric_limits<T>::quiet_NaN();
  const auto products = many_products<T>(p, batch, gradients, p.length(), nan);
  const Library<T> library(p, batch);
  for (Index i = 0; i < count; ++i) {
    const std::vector<T> expected = library.vjp(gradients[i]);
    const Real scale = std::max<Real>(1, largest(expected));
    for (std::size_t c = 0; c < expected.size(); ++c)
      CHECK_CLOSE(products[i][c], expected[c], 0, (is_double<T> ? 1e-13L : 2e-5L) * scale);
  }
  // Neither the place among the others nor what they are matters, but for their number.
  const Index turn = random_index(0, count - 1), spoiled = random_index(0, count - 1);
  std::rotate(gradients.begin(), gradients.begin() + turn, gradients.end());
  if (count > 1) std::fill(gradients[spoiled].begin(), gradients[spoiled].end(), nan);
  const auto others = many_products<T>(p, batch, gradients, p.length() + 5, T(1e30));
  for (Index i = 0; i < count; ++i)
    if (count == 1 || i != spoiled) CHECK(same_bits(others[i], products[(i + turn) % count]));
}

template <class T>
void test_many() {
  check::section("several gradients");
  for (const NamedParameters& set : parameter_sets()) {
    Batch batch;
    batch.add_molecule(small_run ? 7 : 25, set.parameters);
    for (const Index count : {1, 2, 3, 4, 5, 8, 11, 16, 17, 20, 33})
      if (!small_run || count % 4 == 1) test_many<T>(set.parameters, batch, count);
  }
}

template <class T>
void test_memory() {
  check::section("memory");
  for (Index n_species = 1; n_species <= 4; ++n_species) {
    AevParameters uneven = aevmod(n_species, 5, 3, 9, 5.2, 3.8, 0.95);
    uneven.angular_shifts[1] += 0.1;
    uneven.zeta = 3.5;
    const AevParameters sets[] = {aevmod(n_species, 16, 8, 8, 5.2, 3.8, 0.95), uneven,
                                  aevmod(n_species, 17, 4, 16, 5.2, 3.8, 0.95),
                                  aevmod(n_species, 1, 1, 1, 3.0, 4.1, 1.0)};
    for (const AevParameters& p : sets) {
      // Neighbours of every atom within the angular cutoff.
      for (const Index near : {0, 1, 2, 7, 8, 9, 15, 16, 17, 33}) {
        if (small_run && near > 17) continue;
        Batch batch;
        batch.add_cluster(near + 1, p);
        test_memory<T>(p, batch);
        test_many<T>(p, batch, random_index(1, 20));
      }
      // Different ones for every atom.
      for (const double edge : {20.0, 9.0, 6.0}) {
        Batch batch;
        batch.add_random(small_run ? 20 : 50, n_species, edge, edge, edge, p, 0.5);
        test_memory<T>(p, batch);
        test_many<T>(p, batch, random_index(1, 20));
      }
    }
  }
}

// Rotation and translation change nothing; exchanging two atoms exchanges their vectors.
void test_symmetry() {
  check::section("symmetries");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  Batch batch;
  batch.add_molecule(12, p);
  const std::vector<double> before = Library<double>(p, batch).forward();
  Batch turned = batch;
  const double angle = 0.7, c = std::cos(angle), s = std::sin(angle);
  for (Index i = 0; i < batch.n_atoms(); ++i) {
    const double* x = batch.coordinates.data() + 3 * i;
    const double y[3] = {c * x[0] - s * x[2] + 3, s * x[0] + c * x[2] - 8, x[1] + 0.25};
    std::copy(y, y + 3, turned.coordinates.data() + 3 * i);
  }
  const std::vector<double> after = Library<double>(p, turned).forward();
  for (std::size_t i = 0; i < before.size(); ++i) CHECK_CLOSE(after[i], before[i], 1e-11L, 1e-13L);

  Batch reversed;
  for (Index i = batch.n_atoms() - 1; i >= 0; --i) {
    const double* x = batch.coordinates.data() + 3 * i;
    reversed.add_atom(x[0], x[1], x[2], batch.species[i]);
  }
  reversed.finish_structure();
  const std::vector<double> other = Library<double>(p, reversed).forward();
  for (Index i = 0; i < batch.n_atoms(); ++i)
    for (Index k = 0; k < p.length(); ++k)
      CHECK_CLOSE(other[(batch.n_atoms() - 1 - i) * p.length() + k], before[i * p.length() + k],
                  1e-12L, 1e-14L);
}

template <class T>
void test_type() {
  for (const NamedParameters& set : parameter_sets()) {
    test_values<T>(set);
    test_derivatives<T>(set);
    test_jacobian<T>(set);
  }
  test_cells<T>();
  test_memory<T>();
  test_many<T>();
  test_same_bits<T>();
  test_empty<T>();
  test_coincident<T>();
  test_collinear<T>();
  test_at_cutoff<T>();
}

}  // namespace

int main(int n_arguments, char** arguments) {
  small_run = n_arguments > 1 && std::string(arguments[1]) == "small";
  std::printf("instruction set: %s\n", kinml::cpu::isa_name());
  test_type<double>();
  test_type<float>();
  for (const NamedParameters& set : parameter_sets()) test_hessian(set);
  test_callers();
  test_symmetry();
  return check::finish();
}
