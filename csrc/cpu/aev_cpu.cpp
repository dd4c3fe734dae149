#include "aev_cpu.h"

#include <algorithm>

#include "aev_environments.h"
#include "guarded.h"
#include "repulsion_kernels.h"
#include "tile.h"

namespace kinml::cpu {

namespace {

// Smaller structures share a task.
constexpr std::int64_t kTaskAtoms = 64;
// Centres whose environments are in memory at one time.
constexpr std::int64_t kCentres = 32;
// Gradients of a large structure are summed in this many parts, each in the order of its centres.
constexpr std::int64_t kParts = 32;

enum class Product { forward, jvp, vjp, hvp, jacobian };

// Arguments of one call, with the rows of the first atom of a structure.
template <class T>
struct Task {
  Product product;
  std::int64_t length;   // D
  std::int64_t columns;  // of the Jacobian
  const T* gradient;     // [n_atoms, D]
  const T* tangent;      // [n_atoms, 3]
  T* out;
  T* virials;                         // [n_atoms, 9] of vjp, or null
  const RepulsionPair<T>* repulsion;  // [n_species, n_species] of what has no vector; else null

  bool to_coordinates() const { return product == Product::vjp || product == Product::hvp; }
  std::int64_t out_stride() const {
    return to_coordinates() ? 3 : product == Product::jacobian ? length * columns : length;
  }
  Task from(std::int64_t atom) const {
    Task task = *this;
    if (gradient != nullptr) task.gradient += atom * length;
    if (tangent != nullptr) task.tangent += atom * 3;
    task.out += atom * out_stride();
    if (virials != nullptr) task.virials += 9 * atom;
    return task;
  }
};

// Column 3 q + d of J_i is J_i v for the unit vector v of coordinate d of atom q.
template <class T>
void jacobian(const AevTables<T>& tables, Environments<T>& environments, const Environment<T>& e,
              const Task<T>& task) {
  const std::int64_t i = e.begin, size = task.length * task.columns;
  std::vector<T> direction(3 * e.structure.n_atoms, T(0)), column(task.length);
  T* const out = task.out + i * size;
  std::fill(out, out + size, T(0));
  T* const scratch = environments.scratch(e);
  for (std::int64_t p = -1; p < e.n_pairs; ++p) {  // -1: the centre itself
    const std::int64_t atom = p < 0 ? i : e.index[p];
    for (std::int64_t c = 3 * atom; c < 3 * atom + 3; ++c) {
      direction[c] = T(1);
      // The kernels write the row of atom i.
      if (task.repulsion != nullptr)
        KINML_CALL_KERNEL(repulsion_tangent_rows, task.repulsion, tables, e, direction.data(),
                          column.data() - i);
      else
        KINML_CALL_KERNEL(aev_tangent_rows, tables, e, direction.data(), nullptr, column.data(), 0,
                          scratch);
      direction[c] = T(0);
      for (std::int64_t d = 0; d < task.length; ++d) out[d * task.columns + c] = column[d];
    }
  }
}

// What run_centres does for a repulsion.
template <class T>
void run_repulsion(const AevTables<T>& tables, Environments<T>& environments,
                   const Environment<T>& e, const Task<T>& task) {
  switch (task.product) {
    case Product::forward:
      KINML_CALL_KERNEL(repulsion_rows, task.repulsion, tables, e, task.out);
      break;
    case Product::jvp:
      KINML_CALL_KERNEL(repulsion_tangent_rows, task.repulsion, tables, e, task.tangent, task.out);
      break;
    case Product::vjp:
    case Product::hvp:
      KINML_CALL_KERNEL(repulsion_transposed, task.repulsion, tables, e, task.gradient, task.out,
                        task.virials);
      break;
    case Product::jacobian:
      jacobian(tables, environments, e, task);
      break;
  }
}

// Centres [begin, end) of the structure that the environments were last set to.
template <class T>
void run_centres(const AevTables<T>& tables, Environments<T>& environments, const Task<T>& task,
                 std::int64_t begin, std::int64_t end) {
  const std::int64_t step = task.product == Product::jacobian ? 1 : kCentres;
  for (std::int64_t first = begin; first < end; first += step) {
    environments.clear();
    const std::int64_t last = std::min(first + step, end);
    const T* const direction = task.product == Product::hvp ? task.tangent : nullptr;
    if (task.repulsion != nullptr) {
      run_repulsion(tables, environments, environments.find(first, last, direction), task);
      continue;
    }
    const Environment<T> e = environments.make(first, last, direction);
    switch (task.product) {
      case Product::forward:
        KINML_CALL_KERNEL(aev_rows, tables, e, task.out, task.length);
        break;
      case Product::jvp:
        KINML_CALL_KERNEL(aev_tangent_rows, tables, e, task.tangent, nullptr, task.out, task.length,
                          environments.scratch(e));
        break;
      case Product::vjp:
      case Product::hvp:
        KINML_CALL_KERNEL(aev_transposed, tables, e, task.gradient, task.length, task.out,
                          task.virials, environments.scratch(e));
        break;
      case Product::jacobian:
        jacobian(tables, environments, e, task);
        break;
    }
  }
}

// How the structures of a system are worked on: ranges of small ones, and large ones by themselves.
struct Tasks {
  std::vector<Range> small;  // that share a task
  std::vector<std::int64_t> large;
};
template <class T>
Tasks tasks_of(const System<T>& system) {
  Tasks tasks;
  std::int64_t atoms = 0;
  for (std::int64_t s = 0; s < system.n_structures; ++s) {
    const std::int64_t n = system.rows(s);
    if (n > kLargeStructure) {
      tasks.large.push_back(s);
      atoms = kTaskAtoms;  // the next small structure begins a new range
      continue;
    }
    if (tasks.small.empty() || atoms >= kTaskAtoms) {
      tasks.small.push_back({s, s + 1});
      atoms = n;
    } else {
      tasks.small.back().last = s + 1;
      atoms += n;
    }
  }
  return tasks;
}

// One large structure by all threads: tasks of some centres; gradients in parts that are then added
// in order. `whole` has the rows of its first atom.
template <class T>
void run_large(const AevTables<T>& tables, const System<T>& system, std::int64_t s,
               const Task<T>& whole, int n_threads) {
  const std::int64_t n = system.atoms(s), rows = system.rows(s);
  const std::int64_t wanted = (rows + kTaskAtoms - 1) / kTaskAtoms;
  const std::int64_t n_tasks = whole.to_coordinates() ? std::min(kParts, wanted) : wanted;
  std::vector<T> parts(whole.to_coordinates() ? n_tasks * 3 * n : 0);
  Environments<T> shared(tables);
  shared.set_structure(system, s);
  const auto some_centres = [&](std::int64_t item) {
    Environments<T> environments(tables);
    environments.share_structure(shared);
    Task<T> task = whole;
    if (task.to_coordinates()) task.out = parts.data() + item * 3 * n;
    run_centres(tables, environments, task, item * rows / n_tasks, (item + 1) * rows / n_tasks);
  };
  guarded_parallel_for(n_tasks, n_threads, some_centres);
  if (!whole.to_coordinates()) return;
  const std::int64_t block = 4096;
  parallel_for((3 * n + block - 1) / block, n_threads, [&](std::int64_t item) {
    const std::int64_t end = std::min(3 * n, (item + 1) * block);
    for (std::int64_t p = 0; p < n_tasks; ++p)
      for (std::int64_t i = item * block; i < end; ++i) whole.out[i] += parts[p * 3 * n + i];
  });
}

template <class T>
void run(const AevParameters& parameters, const System<T>& system, Product product,
         const T* gradient, const T* tangent, std::int64_t columns, T* out, int n_threads,
         T* virials = nullptr) {
  const AevTableStorage<T> tables(parameters);
  const std::vector<RepulsionPair<T>> repulsion = parameters.is_repulsion()
                                                      ? repulsion_pairs<T>(parameters.repulsion)
                                                      : std::vector<RepulsionPair<T>>();
  const Task<T> all{product, parameters.length(),
                    columns, gradient,
                    tangent, out,
                    virials, parameters.is_repulsion() ? repulsion.data() : nullptr};
  // What is added to, and what ghosts have.
  if (all.to_coordinates() || system.centres != nullptr)
    std::fill_n(out, all.out_stride() * system.n_atoms, T(0));
  if (virials != nullptr) std::fill_n(virials, 9 * system.n_atoms, T(0));
  const Tasks tasks = tasks_of(system);
  const auto small_structures = [&](std::int64_t item) {
    Environments<T> environments(tables);
    for (std::int64_t s = tasks.small[item].first; s < tasks.small[item].last; ++s) {
      if (system.rows(s) == 0) continue;
      environments.set_structure(system, s);
      run_centres(tables, environments, all.from(system.offsets[s]), 0, system.rows(s));
    }
  };
  guarded_parallel_for(static_cast<std::int64_t>(tasks.small.size()), n_threads, small_structures);
  for (const std::int64_t s : tasks.large)
    run_large(tables, system, s, all.from(system.offsets[s]), n_threads);
}

}  // namespace

template <class T>
void aev_forward(const AevParameters& parameters, const System<T>& system, T* aev, int n_threads) {
  run<T>(parameters, system, Product::forward, nullptr, nullptr, 0, aev, n_threads);
}
template <class T>
void aev_jvp(const AevParameters& parameters, const System<T>& system, const T* tangent, T* out,
             int n_threads) {
  run<T>(parameters, system, Product::jvp, nullptr, tangent, 0, out, n_threads);
}
template <class T>
void aev_vjp(const AevParameters& parameters, const System<T>& system, const T* gradient, T* out,
             int n_threads, T* virials) {
  run<T>(parameters, system, Product::vjp, gradient, nullptr, 0, out, n_threads, virials);
}
template <class T>
void aev_hvp(const AevParameters& parameters, const System<T>& system, const T* gradient,
             const T* tangent, T* out, int n_threads) {
  run<T>(parameters, system, Product::hvp, gradient, tangent, 0, out, n_threads);
}
template <class T>
void aev_jacobian(const AevParameters& parameters, const System<T>& system, std::int64_t columns,
                  T* out, int n_threads) {
  run<T>(parameters, system, Product::jacobian, nullptr, nullptr, columns, out, n_threads);
}

#define KINML_INSTANTIATE(T)                                                                     \
  template void aev_forward<T>(const AevParameters&, const System<T>&, T*, int);                 \
  template void aev_jvp<T>(const AevParameters&, const System<T>&, const T*, T*, int);           \
  template void aev_vjp<T>(const AevParameters&, const System<T>&, const T*, T*, int, T*);       \
  template void aev_hvp<T>(const AevParameters&, const System<T>&, const T*, const T*, T*, int); \
  template void aev_jacobian<T>(const AevParameters&, const System<T>&, std::int64_t, T*, int);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu
