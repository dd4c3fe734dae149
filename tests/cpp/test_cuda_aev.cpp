// Atomic environment vectors on the GPU, their kernels run on the host (csrc/cuda/group.h), against
// those on the CPU.
//
//   test_cuda_aev          everything (seconds)
//   test_cuda_aev small    fewer and smaller molecules, for valgrind and the sanitizers
//   test_cuda_aev few      every kernel with a few, for lanes that are threads
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/aev_cpu.h"
#include "../../csrc/cuda/aev_cuda.h"
#include "../../csrc/cuda/aev_group.h"
#include "../../csrc/cuda/pairs.h"
#include "check.h"
#include "guarded.h"
#include "molecules.h"

namespace {

namespace cuda = kinml::cuda;
using namespace molecules;
using cuda::AevProduct;
using cuda::StepOrder;
using kinml::System;

bool small_run = false, few_run = false;

constexpr StepOrder kOrders[] = {StepOrder::forward, StepOrder::backward, StepOrder::shuffled};

// Tolerances of values that are computed in the two ways, relative and in units of the largest.
template <class T>
constexpr Real kRelative = sizeof(T) == 8 ? 1e-11L : 2e-4L;
template <class T>
constexpr Real kAbsolute = sizeof(T) == 8 ? 2e-14L : 1e-5L;

// ---- both libraries ---------------------------------------------------------------------------

template <class T>
struct Results {
  std::vector<T> forward, jvp, vjp, hvp;

  bool all_nan(Index atom, Index length) const {
    const auto nan = [](const std::vector<T>& x, Index begin, Index n) {
      return std::all_of(x.begin() + begin, x.begin() + begin + n,
                         [](T value) { return std::isnan(value); });
    };
    return nan(forward, atom * length, length) && nan(jvp, atom * length, length) &&
           nan(vjp, 3 * atom, 3) && nan(hvp, 3 * atom, 3);
  }
};
template <class T>
bool same_bits(const Results<T>& a, const Results<T>& b) {
  return molecules::same_bits(a.forward, b.forward) && molecules::same_bits(a.jvp, b.jvp) &&
         molecules::same_bits(a.vjp, b.vjp) && molecules::same_bits(a.hvp, b.hvp);
}

// Where neighbours are looked for: as the library decides, or by what a test gives.
enum class Search { automatic, whole_structures, cells };

// A batch in memory that ends where its numbers end, as is all that is computed from it.
template <class T>
struct Problem {
  const AevParameters& p;
  Index n_structures, n_atoms;
  std::vector<T> x, g, v;
  std::vector<Index> species, offsets;

  Problem(const AevParameters& parameters, const Batch& batch)
      : p(parameters),
        n_structures(batch.n_structures()),
        n_atoms(batch.n_atoms()),
        x(as<T>(batch.coordinates)),
        g(as<T>(random_numbers(batch.n_atoms() * parameters.length()))),
        v(as<T>(random_numbers(3 * batch.n_atoms()))),
        species(batch.species),
        offsets(batch.offsets) {}

  static std::vector<T> room(Index n) {
    return std::vector<T>(n, std::numeric_limits<T>::quiet_NaN());
  }
  System<T> view() const {
    return {n_atoms, n_structures, species.data(), offsets.data(), x.data()};
  }

  Results<T> cpu() const {
    Results<T> r{room(n_atoms * p.length()), room(n_atoms * p.length()), room(3 * n_atoms),
                 room(3 * n_atoms)};
    kinml::cpu::aev_forward<T>(p, view(), r.forward.data(), 1);
    kinml::cpu::aev_jvp<T>(p, view(), v.data(), r.jvp.data(), 1);
    kinml::cpu::aev_vjp<T>(p, view(), g.data(), r.vjp.data(), 1);
    kinml::cpu::aev_hvp<T>(p, view(), g.data(), v.data(), r.hvp.data(), 1);
    return r;
  }

  template <class A>
  static void copy(const std::vector<A>& from, Guarded<A>& to) {
    std::copy(from.begin(), from.end(), to.data());
  }
  template <class F>
  std::vector<T> run(AevProduct product, Index numbers, const F& f) const {
    const Index bytes = cuda::aev_workspace<T>(p, product, view());
    CHECK(bytes % 16 == 0);
    Guarded<char> workspace(bytes, char(0xff));
    Guarded<T> out(numbers, std::numeric_limits<T>::quiet_NaN());
    f(out.data(), workspace.data());
    return std::vector<T>(out.data(), out.data() + numbers);
  }
  // f(system, cells, g, v) with everything on the device.
  template <class F>
  void on_device(Search search, const F& f) const {
    Guarded<T> dx(3 * n_atoms, 0), dg(n_atoms * p.length(), 0), dv(3 * n_atoms, 0);
    Guarded<Index> ds(n_atoms, 0), offs(n_structures + 1, 0);
    Guarded<char> memory(cuda::aev_cells_bytes(n_atoms), char(0xff));
    copy(x, dx), copy(g, dg), copy(v, dv), copy(species, ds), copy(offsets, offs);
    const System<T> system{n_atoms, n_structures, ds.data(), offs.data(), dx.data()};
    cuda::Cells cells;
    if (search == Search::cells) cells = cuda::aev_cells<T>(p, system, memory.data(), nullptr);
    f(system, search == Search::automatic ? nullptr : &cells, dg.data(), dv.data());
  }

  Results<T> twin(Search search = Search::automatic) const {
    Results<T> r;
    on_device(search,
              [&](const System<T>& system, const cuda::Cells* cells, const T* dg, const T* dv) {
                const Index length = n_atoms * p.length();
                r.forward = run(AevProduct::forward, length, [&](T* out, char* workspace) {
                  cuda::aev_forward<T>(p, system, out, workspace, nullptr, cells);
                });
                r.jvp = run(AevProduct::jvp, length, [&](T* out, char* workspace) {
                  cuda::aev_jvp<T>(p, system, dv, out, workspace, nullptr, cells);
                });
                r.vjp = run(AevProduct::vjp, 3 * n_atoms, [&](T* out, char* workspace) {
                  cuda::aev_vjp<T>(p, system, dg, out, workspace, nullptr, cells);
                });
                r.hvp = run(AevProduct::hvp, 3 * n_atoms, [&](T* out, char* workspace) {
                  cuda::aev_hvp<T>(p, system, dg, dv, out, workspace, nullptr, cells);
                });
              });
    return r;
  }
  std::vector<T> twin_jacobian(Index columns, Search search = Search::automatic) const {
    std::vector<T> result;
    on_device(search, [&](const System<T>& system, const cuda::Cells* cells, const T*, const T*) {
      result =
          run(AevProduct::jacobian, n_atoms * p.length() * columns, [&](T* out, char* workspace) {
            cuda::aev_jacobian<T>(p, system, columns, out, workspace, nullptr, cells);
          });
    });
    return result;
  }
};

template <class T>
void check_same(const std::vector<T>& got, const std::vector<T>& expected, Real scale = 1) {
  CHECK(got.size() == expected.size());
  const Real size = std::max<Real>(1, largest(expected));
  for (std::size_t i = 0; i < std::min(got.size(), expected.size()); ++i)
    CHECK_CLOSE(got[i], expected[i], kRelative<T>, scale * kAbsolute<T> * size);
}
template <class T>
void check_same(const Results<T>& got, const Results<T>& expected) {
  // Sums of products with numbers of both signs lose digits.
  check_same(got.forward, expected.forward);
  check_same(got.jvp, expected.jvp, 10);
  check_same(got.vjp, expected.vjp, 50);
  check_same(got.hvp, expected.hvp, 50);
}

// Against the CPU, in all orders of the steps.
template <class T>
void check_problem(const Problem<T>& problem, Search search = Search::automatic,
                   bool all_orders = true) {
  Results<T> first;
  for (const StepOrder order : kOrders) {
    cuda::step_order() = order;
    Results<T> own = problem.twin(search);
    if (order == StepOrder::forward) {
      first = std::move(own);
      check_same(first, problem.cpu());
      if (!all_orders || few_run) break;
    } else {
      CHECK(same_bits(first, own));
    }
  }
  cuda::step_order() = StepOrder::forward;
}

// ---- tests --------------------------------------------------------------------------------------

// Each triple of a pair of species once, and its members find it.
void test_triples() {
  check::section("numbers of triples");
  const int most = small_run ? 9 : 40;
  for (int n_a = 0; n_a <= most; ++n_a)
    for (int n_b = 0; n_b <= most; ++n_b)
      for (const bool same : {false, true}) {
        if (same && n_a != n_b) continue;
        const int total = cuda::count_triples(n_a, n_b, same);
        CHECK(total == (same ? n_a * (n_a - 1) / 2 : n_a * n_b));
        std::vector<int> seen(n_a * n_b);
        bool good = true;
        for (int t = 0; t < total; ++t) {
          const cuda::TripleMembers m = cuda::triple_members(n_a, n_b, same, t);
          good = good && m.a >= 0 && m.a < n_a && m.b >= 0 && m.b < n_b && !(same && m.a == m.b);
          if (!good) break;
          const int place = same ? std::min(m.a, m.b) * n_b + std::max(m.a, m.b) : m.a * n_b + m.b;
          good = seen[place]++ == 0;
        }
        CHECK(good);
        if (total == 0 || (n_a > 12 && n_a % 7 != 0) || (n_b > 12 && n_b % 5 != 0)) continue;
        // Of any part of the triples, and only in as many steps as its rows have.
        for (int begin = 0; begin < total; begin += 1 + total / 9)
          for (int end = begin + 1; end <= total; end += 1 + total / 7)
            for (const bool of_a : {true, false})
              for (int own = 0; own < (of_a ? n_a : n_b); ++own) {
                std::vector<int> found(total);
                cuda::for_triples_of(n_a, n_b, same, of_a, own, begin, end, [&](int t, int other) {
                  good = good && t >= begin && t < end;
                  if (!good) return;
                  ++found[t];
                  const cuda::TripleMembers m = cuda::triple_members(n_a, n_b, same, t);
                  if (same)
                    good = (m.a == own && m.b == other) || (m.b == own && m.a == other);
                  else
                    good = of_a ? m.a == own && m.b == other : m.b == own && m.a == other;
                });
                for (int t = 0; t < total && good; ++t) {
                  const cuda::TripleMembers m = cuda::triple_members(n_a, n_b, same, t);
                  const bool member = same ? m.a == own || m.b == own : (of_a ? m.a : m.b) == own;
                  good = found[t] == (member && t >= begin && t < end);
                }
              }
        CHECK(good);
      }
  // A list of kMostOfCrowd: no overflow.
  const int n = cuda::kMostOfCrowd, total = cuda::count_triples(n, n, true);
  const cuda::TripleMembers last = cuda::triple_members(n, n, true, total - 1);
  CHECK(total == 536854528 && last.a == n / 2 - 1 && last.b == n - 1);
}

void test_species_pairs() {
  check::section("walk over species pairs");
  for (int repeat = 0; repeat < 50; ++repeat) {
    const int n_species = static_cast<int>(random_index(1, 5));
    std::vector<int> near(n_species);
    for (int& k : near) k = static_cast<int>(random_index(0, 4));
    const int sum = std::accumulate(near.begin(), near.end(), 0);
    cuda::PairCursor pair;
    int pairs = 0;
    for (; pair.a < n_species; pair.next(near.data(), n_species)) {
      CHECK(pair.a <= pair.b && pair.b < n_species);
      ++pairs;
    }
    CHECK(pairs == n_species * (n_species + 1) / 2 && pair.begin == sum * (sum - 1) / 2);
  }
}

void test_cell_numbers() {
  check::section("cells");
  const double size = cuda::cell_size(5.2), infinite = std::numeric_limits<double>::infinity();
  const Index most = cuda::kCellsOfAxis - 1;
  CHECK(size > 5.2 && cuda::cell_of(std::nan(""), size) == 0);
  CHECK(cuda::cell_of(-infinite, size) == 0 && cuda::cell_of(infinite, size) == most);
  CHECK(cuda::cell_of(-1e30, size) == 0 && cuda::cell_of(1e30, size) == most);
  CHECK(cuda::cell_of(0, size) == most / 2 + 1 && cuda::cell_of(-1e-9, size) == most / 2);
  for (int repeat = 0; repeat < 2000; ++repeat) {
    // Atoms within the cutoff of one another are in the same or an adjacent cell.
    const double reach = repeat % 2 == 0 ? 20 : 60000;
    const float a = static_cast<float>(uniform(-reach, reach));
    const float b = a + static_cast<float>(uniform(-5.2, 5.2));
    if (std::fabs(b - a) > 5.2f) continue;
    CHECK(std::abs(cuda::cell_of(a, size) - cuda::cell_of(b, size)) <= 1);
  }
  // Ranges hold the adjacent cells and no other one, also at the ends of the grid and of a
  // structure.
  const auto one = [&](Index s, Index x, Index y, Index z) {
    int found = 0;
    for (Index t = s > 0 ? s - 1 : 0; t <= s + 1; ++t)
      for (const Index ox : {Index(0), Index(1), Index(2), x - 1, x, x + 1, most - 1, most})
        for (const Index oy : {Index(0), Index(1), y - 2, y - 1, y, y + 1, most - 1, most})
          for (const Index oz : {Index(0), Index(1), z - 1, z, z + 1, z + 2, most - 1, most}) {
            if (std::min({ox, oy, oz}) < 0 || std::max({ox, oy, oz}) > most) continue;
            const Index key = cuda::cell_key(t, ox, oy, oz);
            int ranges = 0;
            for (int i = 0; i < cuda::kCellRanges; ++i)
              ranges += key >= cuda::range_key(s, x, y, z, i, false) &&
                        key < cuda::range_key(s, x, y, z, i, true);
            const bool adjacent =
                t == s && std::abs(ox - x) <= 1 && std::abs(oy - y) <= 1 && std::abs(oz - z) <= 1;
            CHECK(ranges == adjacent);
            found += adjacent;
          }
    CHECK(found > 0);
  };
  for (const Index s : {Index(0), Index(1), (Index(1) << 21) - 2})
    for (const Index x : {Index(0), Index(1), Index(700), most - 1, most}) {
      one(s, x, 5, 5), one(s, 5, x, 5), one(s, 5, 5, x), one(s, x, x, x);
    }
  CHECK(cuda::cell_key((Index(1) << 21) - 1, most, most, most) ==
        std::numeric_limits<Index>::max());

  check::section("searches");
  const std::vector<Index> offsets = {0, 0, 3, 3, 4, 9, 9};
  const Index expected[] = {1, 1, 1, 3, 4, 4, 4, 4, 4};
  for (Index atom = 0; atom < 9; ++atom)
    CHECK(cuda::structure_of(offsets.data(), 6, atom) == expected[atom]);
  for (Index key = -1; key < 11; ++key)
    CHECK(cuda::lower_bound(offsets.data(), 7, key) ==
          std::lower_bound(offsets.begin(), offsets.end(), key) - offsets.begin());
  CHECK(cuda::lower_bound(nullptr, 0, 3) == 0);
}

Batch molecules_of(const AevParameters& p, Index count, Index largest_size) {
  Batch batch;
  batch.finish_structure();
  for (Index s = 0; s < count; ++s) {
    batch.add_molecule(random_index(1, largest_size), p);
    if (s % 3 == 0) batch.finish_structure();
  }
  return batch;
}

template <class T>
void test_parameters(const NamedParameters& set) {
  check::section(set.name);
  const AevParameters& p = set.parameters;
  check_problem(Problem<T>(p, molecules_of(p, small_run ? 3 : 5, small_run ? 8 : 25)));
}

// Numbers of near neighbours at and beside the chunks' ends; of neighbours beside the room for few.
template <class T>
void test_sizes() {
  for (const Index n_species : {1, 2, 3}) {
    const AevParameters p = aevmod(n_species, 5, 3, 2, 5.2, 3.8, 0.95);
    Batch batch;
    for (const Index n : small_run
                             ? std::vector<Index>{1, 2, 3, 7, 9, 10}
                             : std::vector<Index>{1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 17, 24}) {
      check::section("clusters");
      batch.add_cluster(n, p);
    }
    check_problem(Problem<T>(p, batch), Search::automatic, n_species == 2);
  }
  for (const Index n :
       small_run ? std::vector<Index>{50} : std::vector<Index>{48, 49, 50, 51, 75}) {
    check::section("neighbours that do not fit on the chip");
    const AevParameters p = aevmod(2, 4, 3, 2, 5.2, 2.6, 0.95);
    Batch batch;
    batch.add_random(n, 2, 3, 3, 3, p, 0.3);
    batch.add_molecule(4, p);
    check_problem(Problem<T>(p, batch), Search::automatic, n == 50);
  }
}

template <class T>
void test_empty() {
  check::section("nothing");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  Batch batch;
  for (int structures = 0; structures < 3; ++structures) {
    check_problem(Problem<T>(p, batch));
    CHECK(Problem<T>(p, batch).twin_jacobian(0).empty());
    batch.finish_structure();
  }
  check::section("one atom");
  batch.add_atom(1, 2, 3, 1);
  batch.finish_structure();
  check_problem(Problem<T>(p, batch));
  check_problem(Problem<T>(p, batch), Search::cells);
  CHECK(largest(Problem<T>(p, batch).twin_jacobian(3)) == 0);
  check::section("lists without a number");
  for (int missing = 0; missing < 3; ++missing) {
    AevParameters less = aevmod(2, 3, 2, 4, 5.2, 3.8, 0.95);
    (missing == 0   ? less.radial_shifts
     : missing == 1 ? less.angular_shifts
                    : less.sections)
        .clear();
    const Problem<T> problem(less, molecules_of(less, 2, 9));
    // The CPU's kernels do not take them all; the others must stay what they are.
    const Results<T> got = problem.twin();
    CHECK(all_finite(got.forward) && all_finite(got.jvp));
    CHECK(all_finite(got.vjp) && all_finite(got.hvp));
    const Real terms = std::sqrt(static_cast<Real>(problem.g.size()) + 1);
    CHECK_CLOSE(dot(got.jvp, problem.g), dot(got.vjp, problem.v), 0, 1e3 * kAbsolute<T> * terms);
  }
}

template <class T>
void test_degenerate() {
  for (const double beta : {0.95, 1.0})
    for (const double zeta : {8.0, 14.1, 1.0}) {
      check::section("coincident and collinear atoms");
      AevParameters p = aevmod(2, 8, 4, 5, 5.2, 3.8, beta);
      p.zeta = zeta;
      Batch batch;
      for (const double x : {0.0, 1.0, 2.25, -1.5, 3.0}) batch.add_atom(x, 0, 0, x > 1.5);
      batch.finish_structure();
      check_problem(Problem<T>(p, batch));
      batch.add_atom(0.1, 0.2, 0.3, 0);
      batch.add_atom(0.1, 0.2, 0.3, 1);
      batch.add_atom(1.1, 0.4, -0.3, 0);
      batch.add_atom(0.1, 0.2, 0.3, 1);
      batch.finish_structure();
      const Problem<T> problem(p, batch);
      const Results<T> got = problem.twin();
      CHECK(all_finite(got.forward) && all_finite(got.jvp));
      CHECK(all_finite(got.vjp) && all_finite(got.hvp));
      if (beta < 1) check_problem(problem);
    }
  check::section("at the cutoff");
  const AevParameters p = aevmod(1, 6, 3, 4, 5.0, 3.5, 0.95);
  Batch batch;
  for (const double r : {3.5, 5.0, 3.4999998, 3.5000002, 4.9999995, 5.0000005}) {
    batch.add_atom(0, 0, 0, 0);
    batch.add_atom(r, 0, 0, 0);
    batch.add_atom(0, 1.5, 0, 0);
    batch.finish_structure();
  }
  check_problem(Problem<T>(p, batch));
  check::section("far beyond the angular cutoff");
  AevParameters wide = aevmod(1, 6, 3, 4, 300.0, 1.5, 0.95);
  Batch far;
  far.add_atom(0, 0, 0, 0);
  far.add_atom(1, 0, 0, 0);
  far.add_atom(0, 1, 0, 0);
  far.add_atom(150, 200, 0, 0);
  far.finish_structure();
  check_problem(Problem<T>(wide, far));
}

// NaN and species that are not there: NaN in all that depends on them, and in nothing else.
template <class T>
void test_spoiled() {
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  Batch batch;
  batch.add_molecule(7, p);
  batch.add_molecule(9, p);
  batch.add_molecule(6, p);
  const Index first = 7, last = 16, length = p.length();
  const auto check_spoiled = [&](const Problem<T>& problem, const Results<T>& clean) {
    for (const StepOrder order : kOrders) {
      cuda::step_order() = order;
      const Results<T> got = problem.twin();
      // All atoms are within reach of one another.
      for (Index i = first; i < last; ++i) CHECK(got.all_nan(i, length));
      for (Index i = 0; i < batch.n_atoms(); ++i) {
        if (i >= first && i < last) continue;
        CHECK(
            !std::memcmp(&got.forward[i * length], &clean.forward[i * length], length * sizeof(T)));
        CHECK(!std::memcmp(&got.vjp[3 * i], &clean.vjp[3 * i], 3 * sizeof(T)));
        CHECK(!std::memcmp(&got.hvp[3 * i], &clean.hvp[3 * i], 3 * sizeof(T)));
      }
      CHECK(std::isnan(problem.twin_jacobian(27)[(first + 1) * length * 27]));
    }
    cuda::step_order() = StepOrder::forward;
  };
  check::section("a coordinate that is not a number");
  batch.coordinates.assign(batch.coordinates.size(), 0);
  for (Index i = 0; i < batch.n_atoms(); ++i)
    for (int d = 0; d < 3; ++d)
      batch.coordinates[3 * i + d] = static_cast<float>(uniform(-1.4, 1.4));
  Problem<T> problem(p, batch);
  const Results<T> clean = problem.twin();
  check_same(clean, problem.cpu());
  Problem<T> spoiled = problem;
  spoiled.x[3 * 10 + 1] = std::numeric_limits<T>::quiet_NaN();
  const Results<T> got = spoiled.twin();
  for (Index i = first; i < last; ++i)
    CHECK(std::isnan(got.vjp[3 * i]) && std::isnan(got.hvp[3 * i]));
  for (Index i = 0; i < batch.n_atoms(); ++i) {
    const bool own = i >= first && i < last;
    bool any = false;
    for (Index d = 0; d < length; ++d) any = any || std::isnan(got.forward[i * length + d]);
    CHECK(any == own);
  }
  for (const Index species : {Index(2), Index(-1), std::numeric_limits<Index>::min(),
                              std::numeric_limits<Index>::max()}) {
    check::section("a species that is not there");
    Problem<T> other = problem;
    other.species[12] = species;
    check_spoiled(other, clean);
  }
}

// A cluster of n atoms within reach of one another, an atom that sees its edge, and others beside it;
// then small molecules, so that there are not many atoms a structure.
Batch crowd_of(Index n, const AevParameters& p, Index molecules) {
  Batch batch;
  for (Index i = 0; i < n; ++i)
    batch.add_atom(uniform(-0.8, 0.8), uniform(-0.8, 0.8), uniform(-0.8, 0.8), i % 2);
  batch.add_atom(batch.coordinates[0] + 2.9, batch.coordinates[1], batch.coordinates[2], 0);
  for (const double x : {10.0, 11.0, 12.0}) batch.add_atom(x, 0, 0, 1);
  batch.finish_structure();
  for (Index s = 0; s < molecules; ++s) batch.add_molecule(3, p);
  return batch;
}

// More neighbours than a warp's list has room for.
template <class T>
void test_crowds() {
  check::section("more neighbours than fit into a list");
  const AevParameters tiny = aevmod(2, 2, 1, 1, 3.0, 0.3, 0.95);
  const Index most = cuda::kMostNeighbours;
  // One more than fits is as one less; and what lists of large structures had room for.
  for (const Index n : small_run ? std::vector<Index>{1030} : std::vector<Index>{300, most, 1101}) {
    const Problem<T> one(tiny, crowd_of(n, tiny, 0)), some(tiny, crowd_of(n, tiny, 9));
    CHECK(cuda::aev_structures_are_large(one.n_structures, one.n_atoms));
    CHECK(!cuda::aev_structures_are_large(some.n_structures, some.n_atoms));
    check_problem(some, Search::automatic, n > most && sizeof(T) == 4 && !small_run);
    for (const Search search : {Search::automatic, Search::whole_structures, Search::cells})
      check_problem(one, search, n > most && search == Search::cells && !small_run);
  }
  {
    // A crowd may have what makes its results NaN as well; it spoils nothing else.
    Problem<T> problem(tiny, crowd_of(most + 2, tiny, 20));
    const Results<T> clean = problem.twin();
    problem.species[1] = 7;
    const Results<T> got = problem.twin();
    const Index length = tiny.length();
    CHECK(all_finite(clean.forward) && all_finite(clean.vjp));
    for (Index i = 0; i < problem.n_atoms; ++i) {
      if (i < most + 2) CHECK(got.all_nan(i, length));
      if (i < problem.offsets[1]) continue;
      CHECK(!std::memcmp(&got.forward[i * length], &clean.forward[i * length], length * sizeof(T)));
      CHECK(!std::memcmp(&got.vjp[3 * i], &clean.vjp[3 * i], 3 * sizeof(T)));
    }
  }
  check::section("images of a small cell");
  AevParameters images = tiny;
  images.radial_cutoff = 5.2, images.angular_cutoff = 1.1;
  Batch crystal;
  crystal.add_atom(0.1, 0.2, 0.3, 0);
  crystal.add_atom(0.5, 0.8, 0.6, 1);
  crystal.finish_structure();
  const Problem<T> periodic(images, crystal);
  const std::vector<double> cell = {1.0, 0, 0, 0.1, 1.0, 0, 0, 0.2, 0.95};  // 551 images an atom
  const std::vector<Index> along = {1, 1, 1};
  const auto within = [&](System<T> system) {
    system.cells = cell.data();
    system.periodic = along.data();
    return system;
  };
  const Index of_rows = 2 * images.length();
  std::vector<T> row = Problem<T>::room(of_rows), sum = Problem<T>::room(6);
  kinml::cpu::aev_forward<T>(images, within(periodic.view()), row.data(), 1);
  kinml::cpu::aev_vjp<T>(images, within(periodic.view()), periodic.g.data(), sum.data(), 1);
  periodic.on_device(
      Search::automatic, [&](const System<T>& bare, const cuda::Cells*, const T* g, const T*) {
        const System<T> system = within(bare);
        const auto run = [&](AevProduct product, const std::vector<T>& expected, const auto& f) {
          Guarded<char> workspace(cuda::aev_workspace<T>(images, product, system), char(0xff));
          Guarded<T> out(static_cast<Index>(expected.size()), T(0));
          f(out.data(), workspace.data());
          check_same(std::vector<T>(out.data(), out.data() + expected.size()), expected, 10);
        };
        run(AevProduct::forward, row, [&](T* out, char* space) {
          cuda::aev_forward<T>(images, system, out, space, nullptr);
        });
        run(AevProduct::vjp, sum,
            [&](T* out, char* space) { cuda::aev_vjp<T>(images, system, g, out, space, nullptr); });
      });
  check::section("Jacobian of a crowd");
  // Of two centres, since it is large; the others are ghosts.
  const Problem<T> problem(tiny, crowd_of(most + 2, tiny, 0));
  const Index columns = 3 * problem.n_atoms, numbers = problem.n_atoms * tiny.length() * columns;
  Guarded<Index> centres(1, 2);
  std::vector<T> expected = Problem<T>::room(numbers), got;
  problem.on_device(
      Search::automatic, [&](System<T> system, const cuda::Cells*, const T*, const T*) {
        system.centres = centres.data();
        const Index bytes = cuda::aev_workspace<T>(tiny, AevProduct::jacobian, system);
        Guarded<char> workspace(bytes, char(0xff));
        Guarded<T> out(numbers, std::numeric_limits<T>::quiet_NaN());
        cuda::aev_jacobian<T>(tiny, system, columns, out.data(), workspace.data(), nullptr);
        got.assign(out.data(), out.data() + numbers);
      });
  System<T> view = problem.view();
  view.centres = centres.data();
  kinml::cpu::aev_jacobian<T>(tiny, view, columns, expected.data(), 1);
  check_same(got, expected, 10);
}

template <class T>
void test_large() {
  const AevParameters p = aevmod(2, 5, 2, 3, 4.2, 2.9, 0.95);
  struct Box {
    const char* name;
    Index n;
    double lx, ly, lz;
  };
  const Box boxes[] = {
      {"large: cube", small_run ? 210 : 450, small_run ? 14.0 : 18.0, small_run ? 14.0 : 18.0,
       small_run ? 14.0 : 18.0},
      {"large: rod", 220, 150.0, 5, 5},
      {"large: far apart", 205, 1e5, 5, 1e5},
      {"large: dense", small_run ? 203 : 260, 7, 7, 7},
  };
  for (const Box& box : boxes) {
    check::section(box.name);
    Batch batch;
    batch.add_random(box.n, 2, box.lx, box.ly, box.lz, p, 0.5);
    // The structures of a batch may overlap.
    if (box.lx == 150.0) {
      batch.finish_structure();
      batch.add_random(400, 2, 30.0, 30.0, 5, p, 0.5);
    }
    const Problem<T> problem(p, batch);
    CHECK(cuda::aev_structures_are_large(problem.n_structures, problem.n_atoms) || box.lx == 150.0);
    const bool all_orders = box.lx < 20 && !(box.lx == 7);
    check_problem(problem, Search::whole_structures, all_orders && !small_run);
    check_problem(problem, Search::cells, all_orders);
    const bool large = cuda::aev_structures_are_large(problem.n_structures, problem.n_atoms);
    CHECK(
        same_bits(problem.twin(), problem.twin(large ? Search::cells : Search::whole_structures)));
    if (small_run) break;
  }
  // Cells with structures that are not large.
  check::section("cells of small structures");
  check_problem(Problem<T>(p, molecules_of(p, 6, 25)), Search::cells);

  check::section("a place that is not a number, by cells");
  Batch batch;
  batch.add_random(202, 2, 40, 40, 40, p, 0.5);
  Problem<T> problem(p, batch);
  problem.x[3 * 17] = std::numeric_limits<T>::quiet_NaN();
  const Results<T> got = problem.twin();
  CHECK(got.all_nan(17, p.length()));
}

template <class T>
void test_jacobian(const NamedParameters& set) {
  check::section((std::string("Jacobian: ") + set.name).c_str());
  const AevParameters& p = set.parameters;
  Batch batch;
  batch.add_random(6, p.n_species, 9, 9, 9, p);
  batch.finish_structure();  // no atoms
  batch.add_random(2, p.n_species, 3, 3, 3, p);
  batch.add_random(9, p.n_species, 18, 4, 3, p);
  batch.add_random(1, p.n_species, 3, 3, 3, p);
  const Problem<T> problem(p, batch);
  const Index columns = 3 * 9 + 5;
  std::vector<T> expected = Problem<T>::room(problem.n_atoms * p.length() * columns);
  kinml::cpu::aev_jacobian<T>(p, problem.view(), columns, expected.data(), 1);
  std::vector<T> first;
  for (const StepOrder order : kOrders) {
    cuda::step_order() = order;
    std::vector<T> own = problem.twin_jacobian(columns);
    if (order == StepOrder::forward)
      first = std::move(own);
    else
      CHECK(molecules::same_bits(first, own));
    if (small_run && order == StepOrder::backward) break;
  }
  cuda::step_order() = StepOrder::forward;
  check_same(first, expected, 10);
  check_same(problem.twin_jacobian(columns, Search::cells), expected, 10);
}

// Without the CPU's kernels: products against differences of the rows.
void test_differences() {
  check::section("differences");
  const AevParameters p = aevmod(2, 6, 4, 3, 5.2, 3.8, 0.95);
  Batch batch = molecules_of(p, 3, 12);
  const Problem<double> problem(p, batch);
  const Results<double> own = problem.twin();
  const double h = 1e-3;
  std::vector<Real> jvp(own.jvp.size()), hvp(own.hvp.size());
  const double weights[4][2] = {{-2, 1}, {-1, -8}, {1, 8}, {2, -1}};
  for (const auto& [steps, weight] : weights) {
    Problem<double> moved = problem;
    for (std::size_t i = 0; i < moved.x.size(); ++i) moved.x[i] += steps * h * problem.v[i];
    const Results<double> r = moved.twin();
    for (std::size_t i = 0; i < jvp.size(); ++i) jvp[i] += weight * r.forward[i] / (12 * h);
    for (std::size_t i = 0; i < hvp.size(); ++i) hvp[i] += weight * r.vjp[i] / (12 * h);
  }
  check_close(own.jvp, jvp, 1e-6L, 1e-7L * std::max<Real>(1, largest(jvp)));
  check_close(own.hvp, hvp, 1e-6L, 1e-6L * std::max<Real>(1, largest(hvp)));
  CHECK_CLOSE(dot(own.vjp, problem.v), dot(own.jvp, problem.g), 1e-11L, 1e-11L);
}

// The longest lists that are taken, which do not fit on the chip, and one more.
template <class T>
void test_limits() {
  check::section("long lists");
  const int most = cuda::kMaxShifts;
  const AevParameters p = aevmod(2, most, most, most, 5.2, 3.8, 0.95);
  Batch batch;
  batch.add_molecule(5, p);
  check_problem(Problem<T>(p, batch), Search::automatic, false);
  for (int which = 0; which < 3; ++which) {
    AevParameters longer = p;
    std::vector<double>& list = which == 0   ? longer.radial_shifts
                                : which == 1 ? longer.angular_shifts
                                             : longer.sections;
    list.push_back(1.0);
    std::string message;
    try {
      cuda::aev_workspace<T>(longer, AevProduct::forward, Problem<T>(p, batch).view());
    } catch (const cuda::Error& error) {
      message = error.what();
    }
    CHECK(message.find("64") != std::string::npos && message.find("65") != std::string::npos);
  }
}

// Every kernel, with a few atoms.
template <class T>
void test_few() {
  const std::vector<NamedParameters> sets = parameter_sets();
  test_parameters<T>(sets[0]);
  test_jacobian<T>(sets[0]);
  test_large<T>();
}

template <class T>
void test_all() {
  const std::vector<NamedParameters> sets = parameter_sets();
  for (const NamedParameters& set : sets) test_parameters<T>(set);
  for (const std::size_t i : {0, 4, 10}) test_jacobian<T>(sets[i]);
  test_sizes<T>();
  test_empty<T>();
  test_degenerate<T>();
  test_spoiled<T>();
  test_crowds<T>();
  test_large<T>();
  test_limits<T>();
}

}  // namespace

int main(int argc, char** argv) {
  few_run = argc > 1 && std::string(argv[1]) == "few";
  small_run = few_run || (argc > 1 && std::string(argv[1]) == "small");
  if (few_run) {
    test_few<float>();
    return check::finish();
  }
  test_triples();
  test_species_pairs();
  test_cell_numbers();
  test_differences();
  test_all<double>();
  test_all<float>();
  return check::finish();
}
