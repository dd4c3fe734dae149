// Energies, forces and their gradient on the GPU, the kernels run on the host (csrc/cuda/group.h),
// against the entries on the CPU.
//
//   test_cuda_force_step          everything (seconds)
//   test_cuda_force_step small    fewer and smaller molecules, for valgrind and the sanitizers
//   test_cuda_force_step few      every kernel with a few, for lanes that are threads
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/force_step_cpu.h"
#include "../../csrc/cuda/force_step_cuda.h"
#include "../../csrc/cuda/large_structures.h"
#include "check.h"
#include "models.h"
#include "molecules.h"

namespace {

namespace cpu = kinml::cpu;
namespace cuda = kinml::cuda;
using namespace models;

bool small_run = false, few_run = false;

template <class T>
constexpr double kNan = std::numeric_limits<T>::quiet_NaN();

// Everything that both devices compute of a batch.
template <class T>
struct Results {
  std::vector<double> energies;  // [n_members, R, count]
  std::vector<T> forces;         // [n_members, R, n_atoms, 3]
  std::vector<T> gradient;       // of given e and r, with the first member's weights
  Step<T> step;
};

// A batch with weights of several members, and what is asked.
template <class T>
struct Problem {
  const Model& model;
  const Batch& batch;
  Data<T> data;
  std::vector<Index> chosen;
  Index n_members, first_level;
  bool with_jacobian = true;
  bool energies_only = false;  // and forces: no gradients
  std::vector<T> weights;
  std::vector<double> sae, e;
  std::vector<T> r;
  Task task;

  Problem(const Model& m, const Batch& b, bool stored, Index members, Index first)
      : model(m),
        batch(b),
        data(m, b, stored),
        n_members(members),
        first_level(first),
        task(b, m.n_levels) {
    // Some structures, one of them twice.
    for (Index s = 0; s < b.n_structures(); ++s)
      if (s % 3 != 1) chosen.push_back(s);
    if (!chosen.empty()) chosen.push_back(chosen.front());
    for (Index i = 0; i < members; ++i)
      for (const double w : m.weights)
        weights.push_back(static_cast<T>(i == 0 ? w : static_cast<float>(w * uniform(0.8, 1.2))));
    sae = random_numbers(members * rows() * m.aev.n_species);
    e = random_numbers(rows() * b.n_structures());
    r = as<T>(random_numbers(rows() * 3 * b.n_atoms()));
  }
  Index rows() const { return model.n_levels - first_level; }
  kinml::Model<T> with_weights() const { return model.view(weights, n_members, sae.data()); }
  System<T> view(bool of_chosen) const {
    System<T> v = data.view(of_chosen ? &chosen : nullptr);
    if (!with_jacobian) v.jacobian = nullptr;
    return v;
  }
  Results<T> room() const {
    const Index n = batch.n_structures(), c = static_cast<Index>(chosen.size()) * model.n_levels;
    const Index f = with_jacobian ? 3 * batch.n_atoms() : 0;
    Results<T> x;
    x.energies.assign(n_members * rows() * n, kNan<double>);
    x.forces.assign(n_members * rows() * f, static_cast<T>(kNan<T>));
    x.gradient.assign(model.weights.size(), static_cast<T>(kNan<T>));
    x.step = {std::vector<double>(2, kNan<double>), std::vector<double>(c, kNan<double>),
              std::vector<double>(3 * c, kNan<double>),
              std::vector<T>(model.weights.size(), static_cast<T>(kNan<T>))};
    return x;
  }

  Results<T> on_cpu() const {
    Results<T> x = room();
    const kinml::Model<T> m = with_weights();
    cpu::energy_forces<T>(m, view(false), first_level, {x.energies.data(), x.forces.data()}, 1);
    if (energies_only) return x;
    cpu::energy_forces_backward<T>(m, view(false), first_level, e.data(), r.data(), nullptr,
                                   x.gradient.data(), 1);
    const BatchLoss loss(task, chosen, with_jacobian);
    cpu::force_step<T>(m, view(true), loss.view, x.step.losses.data(), x.step.gradient.data(),
                       x.step.residuals.data(), x.step.errors.data(), 1);
    return x;
  }
  Results<T> on_gpu() const {
    Results<T> x = room();
    const kinml::Model<T> m = with_weights();
    const auto memory = [](std::int64_t bytes) { return std::vector<double>((bytes + 7) / 8); };
    const auto begin = [](std::vector<double>& m) { return reinterpret_cast<char*>(m.data()); };
    std::vector<double> space = memory(cuda::energy_forces_workspace<T>(m, view(false)));
    cuda::energy_forces<T>(m, view(false), first_level, {x.energies.data(), x.forces.data()},
                           begin(space), nullptr);
    if (energies_only) return x;
    space = memory(cuda::force_step_workspace<T>(m, view(false)));
    cuda::energy_forces_backward<T>(m, view(false), first_level, e.data(), r.data(), nullptr,
                                    x.gradient.data(), begin(space), nullptr);
    x.step = step_on_gpu();
    return x;
  }
  Step<T> step_on_gpu() const {
    Step<T> step = room().step;
    const kinml::Model<T> m = with_weights();
    // Structures that do not exist count for nothing.
    std::vector<Index> counted = chosen;
    std::erase_if(counted, [&](Index s) { return s < 0 || s >= batch.n_structures(); });
    const BatchLoss loss(task, counted, with_jacobian);
    std::vector<double> space(cuda::force_step_workspace<T>(m, view(true)) / 8 + 1);
    cuda::force_step<T>(m, view(true), loss.view, step.losses.data(), step.gradient.data(),
                        step.residuals.data(), step.errors.data(),
                        reinterpret_cast<char*>(space.data()), nullptr);
    return step;
  }
};

template <class T, class Number>
void compare(const std::vector<Number>& a, const std::vector<Number>& b) {
  double most = 1e-3;
  for (const Number x : b)
    if (!std::isnan(x)) most = std::max(most, std::abs(static_cast<double>(x)));
  const double rtol = sizeof(T) == 8 ? 1e-11 : 1e-3;
  for (std::size_t i = 0; i < b.size(); ++i)
    if (std::isnan(b[i]))
      CHECK(std::isnan(a[i]));
    else
      CHECK_CLOSE(a[i], b[i], rtol, rtol * most);
}
template <class T>
void check_problem(const Problem<T>& p) {
  const Results<T> expected = p.on_cpu(), found = p.on_gpu();
  compare<T>(found.energies, expected.energies);
  compare<T>(found.forces, expected.forces);
  compare<T>(found.gradient, expected.gradient);
  compare<T>(found.step.losses, expected.step.losses);
  compare<T>(found.step.gradient, expected.step.gradient);
  compare<T>(found.step.residuals, expected.step.residuals);
  compare<T>(found.step.errors, expected.step.errors);
  for (const auto order : {cuda::StepOrder::backward, cuda::StepOrder::shuffled}) {
    if (few_run) break;
    cuda::step_order() = order;
    const Results<T> again = p.on_gpu();
    CHECK(same_bits(again.energies, found.energies) && same_bits(again.forces, found.forces) &&
          same_bits(again.gradient, found.gradient) &&
          same_bits(again.step.losses, found.step.losses) &&
          same_bits(again.step.gradient, found.step.gradient) &&
          same_bits(again.step.residuals, found.step.residuals) &&
          same_bits(again.step.errors, found.step.errors));
  }
  cuda::step_order() = cuda::StepOrder::forward;
}

// From coordinates, from stored Jacobians, and from descriptors alone.
template <class T>
void check_batch(const Model& model, const Batch& batch, Index n_members = 1,
                 Index first_level = 0) {
  for (const bool stored : {false, true}) {
    Problem<T> p(model, batch, stored, n_members, first_level);
    check_problem(p);
    if (!stored) continue;
    p.with_jacobian = false;
    check_problem(p);
  }
}

// Structures that all blocks work on together: energies and forces alone go that way.
template <class T>
void check_large() {
  check::section("large structures");
  const AevParameters p = aevmod(2, 4, 2, 3, 4.2, 2.9, 0.95);
  Batch batch;
  batch.add_random(small_run ? 270 : 420, 2, 17, 17, 17, p, 0.5);
  if (!small_run) batch.add_random(300, 2, 40, 9, 12, p, 0.5);
  for (const Index n_levels : {1, 3}) {
    if (few_run && n_levels > 1) break;
    const Model model(p, {7, 4}, {1, 1, 0}, n_levels > 1, n_levels);
    for (const Index first_level : {Index(0), n_levels - 1}) {
      Problem<T> problem(model, batch, false, n_levels == 1 ? 2 : 1, first_level);
      CHECK(cuda::structures_are_large(problem.view(false)));
      problem.energies_only = true;
      check_problem(problem);
      if (small_run || first_level > 0) continue;
      const cuda::Device less{1024, cuda::current_device().multiprocessors};
      cuda::pretend_device(&less);
      check_problem(problem);
      cuda::pretend_device(nullptr);
    }
  }
}

// Structures that a batch names several times: in one tile, one block and several blocks, small ones
// and some that are larger than a tile.
template <class T>
void check_repeated() {
  check::section("structures named more than once");
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  Batch batch;
  for (const Index n : {3, 35, 5, 0, 40}) batch.add_molecule(n, p);
  std::vector<Index> many;  // two, the same ones, for each block
  for (Index i = 0; i < 512; ++i) many.push_back(i < 508 ? i / 2 % 2 * 2 : i % 2 == 0 ? 4 : 1);
  many[506] = many[507] = 4;
  const std::vector<std::vector<Index>> choices = {{0, 0, 2, 0}, {4, 1, 1, 4, 0, 4, 3, 3}, many};
  for (const Index n_levels : {1, 2}) {
    const Model model(p, {7, 4}, {1, 1, 0}, true, n_levels);
    for (const bool stored : {false, true})
      for (const std::vector<Index>& choice : choices) {
        if (few_run && (stored || n_levels > 1)) continue;
        if (choice.size() > 10 && (small_run || n_levels > 1)) continue;
        Problem<T> problem(model, batch, stored, 1, 0);
        problem.chosen = choice;
        check_problem(problem);
      }
  }
}

// Atoms of one structure with more neighbours than a warp has room for on the chip, and with fewer:
// alone, where it has more room, and with small molecules.
template <class T>
void check_lists() {
  check::section("more neighbours than there is room for on the chip");
  const AevParameters p = aevmod(2, 2, 2, 1, 5.2, 1.6, 0.95);
  const Model model(p, {4}, {1, 0}, true);
  for (const Index side : {4, 5}) {
    if (few_run && side > 4) break;
    Batch batch;
    const auto add = [&](double x, double y, double z) {
      const auto near = [](double c) { return c + uniform(-0.1, 0.1); };
      batch.add_atom(near(x), near(y), near(z), random_index(0, 1));
    };
    for (Index i = 0; i < side * side * side; ++i)
      add(0.95 * static_cast<double>(i % side), 0.95 * static_cast<double>(i / side % side),
          0.95 * static_cast<double>(i / side / side));
    for (int i = 0; i < 9; ++i) add(5.0 + 1.2 * i, 5.0, 4.0);
    batch.finish_structure();
    if (!few_run) check_problem(Problem<T>(model, batch, false, 1, 0));
    for (const Index n : {3, 1, 5, 4}) batch.add_molecule(n, p);
    check_problem(Problem<T>(model, batch, false, 1, 0));
  }
}

// An atom with more neighbours than the lists of all warps have room for.
template <class T>
void check_crowd() {
  check::section("a crowd");
  const AevParameters p = aevmod(1, 2, 1, 1, 3.0, 0.3, 0.95);
  Batch batch;
  for (Index i = 0; i < 1030; ++i)
    batch.add_atom(uniform(-0.8, 0.8), uniform(-0.8, 0.8), uniform(-0.8, 0.8), 0);
  batch.finish_structure();
  for (int s = 0; s < 8; ++s) batch.add_molecule(s % 3, p);
  const Model model(p, {4}, {1, 0}, true);
  Problem<T> problem(model, batch, false, 1, 0);
  CHECK(!cuda::structures_are_large(problem.view(false)));
  problem.chosen = {0, 4, 0};
  check_problem(problem);
  // The same alone, and fewer: large structures.
  for (const Index n : {300, 1101}) {
    Batch cluster;
    for (Index i = 0; i < n; ++i)
      cluster.add_atom(uniform(-0.8, 0.8), uniform(-0.8, 0.8), uniform(-0.8, 0.8), 0);
    cluster.finish_structure();
    Problem<T> large(model, cluster, false, 1, 0);
    CHECK(cuda::structures_are_large(large.view(false)));
    large.energies_only = true;
    check_problem(large);
  }
}

template <class T>
std::vector<double> energies_of(const kinml::Model<T>& model, const System<T>& system) {
  std::vector<double> energies(system.count());
  std::vector<double> space(cuda::energy_forces_workspace<T>(model, system) / 8 + 1);
  std::vector<T> forces(3 * system.n_atoms);
  cuda::energy_forces<T>(model, system, 0, {energies.data(), forces.data()},
                         reinterpret_cast<char*>(space.data()), nullptr);
  return energies;
}

// Species and structures that do not exist.
template <class T>
void check_missing() {
  check::section("what does not exist");
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  const Model model(p, {7, 4}, {1, 1, 0}, true);
  Batch small, large;
  for (const Index n : {4, 3, 5}) small.add_molecule(n, p);
  for (int i = 0; i < 3; ++i) large.add_random(260, 2, 40, 9, 12, p, 0.5);
  for (const Batch& batch : {small, large}) {
    const Data<T> data(model, batch, false);
    const kinml::Model<T> view = model.view(data.weights);
    const std::vector<double> good = energies_of(view, data.view());
    for (const Index kind : {Index(-1), Index(2), Index(1) << 40}) {
      std::vector<Index> species = batch.species;
      species[batch.offsets[1] + 1] = kind;
      System<T> system = data.view();
      system.species = species.data();
      const std::vector<double> energies = energies_of(view, system);
      CHECK(energies[0] == good[0] && std::isnan(energies[1]) && energies[2] == good[2]);
    }
  }
  const Data<T> data(model, small, false);
  const kinml::Model<T> view = model.view(data.weights);
  const std::vector<Index> structures = {0, 7, -2};
  const std::vector<double> good = energies_of(view, data.view());
  const std::vector<double> energies = energies_of(view, data.view(&structures));
  CHECK(energies[0] == good[0] && std::isnan(energies[1]) && std::isnan(energies[2]));
  for (const std::vector<Index>& chosen : {structures, {0, -2}, {7}, {0, 1, 2}}) {
    Problem<T> problem(model, small, false, 1, 0);
    problem.chosen = chosen;
    const Step<T> step = problem.step_on_gpu();
    const bool all = chosen.back() == 2;
    for (std::size_t i = 0; i < chosen.size(); ++i)
      CHECK(std::isnan(step.residuals[i]) == (chosen[i] != std::clamp<Index>(chosen[i], 0, 2)));
    CHECK(std::isnan(step.losses[0]) != all);
    for (const T number : step.gradient) CHECK(std::isnan(number) != all);
  }
}

// Every kernel, with and without memory on the chip.
template <class T>
void check_few() {
  check::section("every kernel");
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  Batch batch;
  for (const Index n : {0, 3, 9, 8, 34}) batch.add_molecule(n, p);
  check_batch<T>(Model(p, {7, 4}, {1, 1, 0}, true, 2), batch, 2);
  const Model model(p, {7, 4}, {1, 1, 0}, true);
  const cuda::Device less{1024, cuda::current_device().multiprocessors};
  cuda::pretend_device(&less);
  check_problem(Problem<T>(model, batch, false, 1, 0));
  cuda::pretend_device(nullptr);
  check_large<T>();
  check_repeated<T>();
  check_lists<T>();
}

// Nothing of a step is in the workspace that has room on the chip: of small molecules, and in float
// of liquids.
template <class T>
void check_on_chip() {
  check::section("memory on the chip");
  const AevParameters p = aevmod(2, 16, 8, 8, 5.2, 3.8, 0.95);
  const Model model(p, {48, 24, 12}, {1, 1, 1, 0}, true);
  for (const Index n : {10, 60}) {
    Batch batch;
    for (int i = 0; i < 5; ++i) batch.add_random(n, 2, 12, 12, 12, p);
    const Data<T> data(model, batch, false);
    const kinml::Model<T> view = model.view(data.weights);
    const auto bytes = [&] {
      return std::pair(cuda::energy_forces_workspace<T>(view, data.view()),
                       cuda::force_step_workspace<T>(view, data.view()));
    };
    const auto found = bytes();
    const cuda::Device endless{Index(1) << 40, cuda::current_device().multiprocessors};
    cuda::pretend_device(&endless);
    CHECK((found == bytes()) == (n == 10 || sizeof(T) == 4));
    cuda::pretend_device(nullptr);
  }
}

template <class T>
void check_all() {
  const AevParameters p = aevmod(2, 4, 2, 3, 5.2, 3.8, 0.95);
  const auto batch_of = [&](std::initializer_list<Index> sizes) {
    Batch batch;
    for (const Index n : sizes) batch.add_molecule(n, p);
    return batch;
  };
  check_on_chip<T>();
  check::section("tiles of molecules");
  const Model model(p, {7, 4}, {1, 1, 0}, true);
  check_batch<T>(model, Batch());
  check_batch<T>(model, batch_of({0}));
  check_batch<T>(model, batch_of({1}));
  check_batch<T>(model, batch_of({0, 3, 0, 0, 29, 1, 5, 16, 16, 17, 0}));
  check_batch<T>(model, batch_of({32, 31, 1, 33}));
  Batch many;
  for (int i = 0; i < 300; ++i) many.add_molecule(i % 3, p);  // more than there are blocks
  check_batch<T>(model, many);
  if (!small_run) {
    check::section("molecules larger than a tile");
    check_batch<T>(model, batch_of({33, 4, 64, 65, 49, 2, 50}));
  }
  check::section("every activation, with and without biases");
  for (Index code = 0; code < 7; ++code)
    check_batch<T>(Model(p, {5, 9}, {code, code, code}, code % 2 == 0), batch_of({3, 6, 1}));
  check::section("several levels");
  for (const Index n_levels : {2, 3}) {
    const Model chain(p, {7, 4}, {1, 1, 0}, true, n_levels);
    check_batch<T>(chain, batch_of({5, 1, 0, 9, 34}));
    check_batch<T>(chain, batch_of({5, 1, 0, 9, 34}), 1, n_levels - 1);
  }
  check::section("ensembles");
  check_batch<T>(model, batch_of({4, 0, 35, 9}), 3);
  check_batch<T>(Model(p, {7, 4}, {1, 1, 0}, true, 2), batch_of({4, 0, 35, 9}), 3, 1);
  check::section("descriptors");
  for (const auto& [name, parameters] : parameter_sets()) {
    if (small_run) break;
    Batch batch;
    for (const Index n : {7, 3, 12}) batch.add_molecule(n, parameters);
    check_batch<T>(Model(parameters, {6}, {1, 0}, true), batch);
  }
  check::section("memory in the workspace");
  const cuda::Device usual = cuda::current_device();
  for (const std::int64_t bytes : {1024, 24 * 1024, 60 * 1024, 110 * 1024}) {
    const cuda::Device less{bytes, usual.multiprocessors};
    cuda::pretend_device(&less);
    check_batch<T>(model, batch_of({3, 20, 11, 40}));
  }
  cuda::pretend_device(nullptr);

  check_large<T>();
  check_repeated<T>();
  if (!small_run) check_lists<T>();
  if (!small_run) check_crowd<T>();
  check_missing<T>();
}

}  // namespace

int main(int argc, char** argv) {
  few_run = argc > 1 && std::string(argv[1]) == "few";
  small_run = few_run || (argc > 1 && std::string(argv[1]) == "small");
  if (few_run) {
    check_few<float>();
    return check::finish();
  }
  check_all<double>();
  check_all<float>();
  return check::finish();
}
