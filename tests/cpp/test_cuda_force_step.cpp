// Energies, forces and their gradient on the GPU, the kernels run on the host (csrc/cuda/group.h),
// against the entries on the CPU.
//
//   test_cuda_force_step          everything (seconds)
//   test_cuda_force_step small    fewer and smaller molecules, for valgrind and the sanitizers
#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../../csrc/cpu/force_step_cpu.h"
#include "../../csrc/cuda/force_step_cuda.h"
#include "check.h"
#include "models.h"
#include "molecules.h"

namespace {

namespace cpu = kinml::cpu;
namespace cuda = kinml::cuda;
using kinml::Levels;
using namespace models;

bool small_run = false;

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
  Index n_members;
  Levels levels;
  bool with_jacobian = true;
  std::vector<T> weights;
  std::vector<double> sae, e;
  std::vector<T> r;
  Task task;

  Problem(const Model& m, const Batch& b, bool stored, Index members, Levels which)
      : model(m),
        batch(b),
        data(m, b, stored),
        n_members(members),
        levels(which),
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
  Index rows() const { return levels == Levels::all ? model.n_levels : 1; }
  ForceBatch<T> view(bool of_chosen) const {
    ForceBatch<T> v = data.view(of_chosen ? &chosen : nullptr);
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
    const NetworkLevels networks = model.levels();
    cpu::energy_forces<T>(networks, weights.data(), n_members, view(false), sae.data(), levels,
                          x.energies.data(), with_jacobian ? x.forces.data() : nullptr, 1);
    cpu::energy_forces_backward<T>(networks, weights.data(), view(false), levels, e.data(),
                                   r.data(), x.gradient.data(), 1);
    const cpu::ForceLoss loss{task.energies.data(),       task.forces.data(),
                              task.energy_weights.data(), task.force_weights.data(),
                              task.energy_scale,          task.force_scale};
    cpu::force_step<T>(networks, weights.data(), view(true), loss, x.step.losses.data(),
                       x.step.gradient.data(), x.step.residuals.data(), x.step.errors.data(), 1);
    return x;
  }
  Results<T> on_gpu() const {
    Results<T> x = room();
    const cuda::ChainPlan plan = cuda::plan_chain(model.levels());
    const auto memory = [](std::int64_t bytes) { return std::vector<double>((bytes + 7) / 8); };
    const auto begin = [](std::vector<double>& m) { return reinterpret_cast<char*>(m.data()); };
    std::vector<double> space =
        memory(cuda::energy_forces_workspace<T>(plan, n_members, view(false)));
    cuda::energy_forces<T>(plan, weights.data(), n_members, view(false), sae.data(), levels,
                           x.energies.data(), with_jacobian ? x.forces.data() : nullptr,
                           begin(space), nullptr);
    space = memory(cuda::force_step_workspace<T>(plan, view(false)));
    cuda::energy_forces_backward<T>(plan, weights.data(), view(false), levels, e.data(), r.data(),
                                    x.gradient.data(), begin(space), nullptr);
    const std::vector<double> scales = {task.energy_scale, task.force_scale};
    const cuda::ForceLoss loss{task.energies.data(), task.forces.data(), task.energy_weights.data(),
                               task.force_weights.data(), scales.data()};
    space = memory(cuda::force_step_workspace<T>(plan, view(true)));
    cuda::force_step<T>(plan, weights.data(), view(true), loss, x.step.losses.data(),
                        x.step.gradient.data(), x.step.residuals.data(), x.step.errors.data(),
                        begin(space), nullptr);
    return x;
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
                 Levels levels = Levels::all) {
  for (const bool stored : {false, true}) {
    Problem<T> p(model, batch, stored, n_members, levels);
    check_problem(p);
    if (!stored) continue;
    p.with_jacobian = false;
    check_problem(p);
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
    check_batch<T>(chain, batch_of({5, 1, 0, 9, 34}), 1, Levels::highest);
  }
  check::section("ensembles");
  check_batch<T>(model, batch_of({4, 0, 35, 9}), 3);
  check_batch<T>(Model(p, {7, 4}, {1, 1, 0}, true, 2), batch_of({4, 0, 35, 9}), 3, Levels::highest);
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

  check::section("what is not there");
  Batch batch = batch_of({4, 3, 5});
  const Data<T> data(model, batch, false);
  const cuda::ChainPlan plan = cuda::plan_chain(model.levels());
  const auto energies_of = [&](const ForceBatch<T>& view) {
    std::vector<double> energies(3), space(cuda::energy_forces_workspace<T>(plan, 1, view) / 8 + 1);
    std::vector<T> forces(3 * batch.n_atoms());
    cuda::energy_forces<T>(plan, data.weights.data(), 1, view, nullptr, Levels::all,
                           energies.data(), forces.data(), reinterpret_cast<char*>(space.data()),
                           nullptr);
    return energies;
  };
  const std::vector<double> good = energies_of(data.view());
  for (const Index kind : {Index(-1), Index(2), Index(1) << 40}) {
    std::vector<Index> species = batch.species;
    species[5] = kind;
    ForceBatch<T> view = data.view();
    view.species = species.data();
    const std::vector<double> energies = energies_of(view);
    CHECK(energies[0] == good[0] && std::isnan(energies[1]) && energies[2] == good[2]);
  }
  std::vector<Index> structures = {0, 7, -2};
  ForceBatch<T> view = data.view(&structures);
  const std::vector<double> energies = energies_of(view);
  CHECK(energies[0] == good[0] && std::isnan(energies[1]) && std::isnan(energies[2]));
}

}  // namespace

int main(int argc, char** argv) {
  small_run = argc > 1 && std::string(argv[1]) == "small";
  check_all<double>();
  check_all<float>();
  return check::finish();
}
