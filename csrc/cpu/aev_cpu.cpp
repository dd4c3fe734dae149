#include "aev_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <new>

#include "../core/aev_layout.h"
#include "aev_kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace kinml::cpu {

std::int64_t AevParameters::length() const {
  return AevLayout{static_cast<int>(n_species), static_cast<int>(radial_shifts.size()),
                   static_cast<int>(angular_shifts.size()), static_cast<int>(sections.size())}
      .length();
}

template <class T>
std::int64_t aev_workspace(const AevTables<T>& tables, std::int64_t max_candidates) {
  const std::int64_t room = padded(max_candidates + 2 * kMaxLanes);
  const std::int64_t triples = kChunk + kMaxLanes;
  const std::int64_t neighbours = 40 * room + 2 * padded(tables.n_species + 1);
  const std::int64_t chunk = 16 * padded(triples) + 4 * triples * padded(tables.n_angular) +
                             4 * triples * padded(tables.n_sections) + 8 * kMaxLanes;
  const std::int64_t pairs = std::int64_t(tables.n_species) * (tables.n_species + 1) / 2;
  const std::int64_t row = tables.n_species * padded(tables.n_radial) +
                           pairs * tables.n_angular * padded(tables.n_sections);
  return neighbours + chunk + 2 * padded(row) + 4 * kMaxLanes;
}

namespace {

// A structure with more atoms is cut into several tasks; smaller ones share a task.
constexpr std::int64_t kLargeStructure = 512;
constexpr std::int64_t kTaskAtoms = 64;
// Gradients of a large structure are summed in this many parts, each in the order of its centres.
constexpr std::int64_t kParts = 32;
// Up to this many atoms all pairs are tried: a cell list would cost more.
constexpr std::int64_t kOneCell = 64;

// Parameters in the type of the computation, padded for whole registers.
template <class T>
struct Tables : AevTables<T> {
  std::vector<T> storage;

  explicit Tables(const AevParameters& p) {
    this->n_species = static_cast<int>(p.n_species);
    this->n_radial = static_cast<int>(p.radial_shifts.size());
    this->n_angular = static_cast<int>(p.angular_shifts.size());
    this->n_sections = static_cast<int>(p.sections.size());
    this->radial_eta = static_cast<T>(p.radial_eta);
    this->radial_cutoff = static_cast<T>(p.radial_cutoff);
    this->radial_factor = static_cast<T>(p.radial_factor);
    this->angular_eta = static_cast<T>(p.angular_eta);
    this->angular_cutoff = static_cast<T>(p.angular_cutoff);
    this->angular_factor = static_cast<T>(p.angular_factor);
    this->beta = static_cast<T>(p.beta);
    this->zeta = static_cast<T>(p.zeta);
    const bool whole = p.zeta >= 1 && p.zeta <= 1024 && p.zeta == std::floor(p.zeta);
    this->integer_zeta = whole ? static_cast<int>(p.zeta) : -1;
    std::vector<double> cosines, sines;
    for (const double alpha : p.sections) {
      cosines.push_back(std::cos(alpha));
      sines.push_back(std::sin(alpha));
    }
    const std::vector<double>* lists[] = {&p.radial_shifts, &p.angular_shifts, &cosines, &sines};
    const T** places[] = {&this->radial_shifts, &this->angular_shifts, &this->section_cos,
                          &this->section_sin};
    std::size_t starts[4];
    for (int i = 0; i < 4; ++i) {
      starts[i] = storage.size();
      for (const double x : *lists[i]) storage.push_back(static_cast<T>(x));
      while (storage.size() % kMaxLanes != 0) storage.push_back(storage.back());
    }
    for (int i = 0; i < 4; ++i) *places[i] = storage.data() + starts[i];
  }
};

// Sorts the atoms of one structure into cells.
class CellGrid {
 public:
  template <class T>
  void build(const T* x, std::int64_t n, double cell_size) {
    dims_[0] = dims_[1] = dims_[2] = 1;
    double low[3] = {0, 0, 0};
    if (n > kOneCell) {
      for (int d = 0; d < 3; ++d) {
        double lo = x[d], hi = x[d];
        for (std::int64_t i = 1; i < n; ++i) {
          lo = std::min<double>(lo, x[3 * i + d]);
          hi = std::max<double>(hi, x[3 * i + d]);
        }
        low[d] = lo;
        // The bound keeps the grid small when atoms are far apart.
        const double cells = std::floor((hi - lo) / cell_size);
        // Coordinates that are not finite give one cell.
        dims_[d] = cells >= 1 ? static_cast<int>(std::min(cells, std::cbrt(8.0 * n) + 1)) : 1;
        inverse_[d] = hi > lo ? dims_[d] / (hi - lo) : 0.0;
      }
    }
    const std::int64_t n_cells = std::int64_t(dims_[0]) * dims_[1] * dims_[2];
    starts_.assign(n_cells + 1, 0);
    atoms_.resize(n);
    cell_.resize(n);
    for (std::int64_t i = 0; i < n; ++i) {
      std::int64_t cell = 0;
      for (int d = 0; d < 3; ++d) {
        std::int64_t c = 0;
        if (dims_[d] > 1) {
          const double place = (x[3 * i + d] - low[d]) * inverse_[d];
          c = place >= 1 ? static_cast<std::int64_t>(std::min(place, dims_[d] - 1.0)) : 0;
        }
        cell = cell * dims_[d] + c;
      }
      cell_[i] = static_cast<std::int32_t>(cell);
      ++starts_[cell + 1];
    }
    for (std::int64_t c = 0; c < n_cells; ++c) starts_[c + 1] += starts_[c];
    next_.assign(starts_.begin(), starts_.end() - 1);
    for (std::int64_t i = 0; i < n; ++i) atoms_[next_[cell_[i]]++] = static_cast<std::int32_t>(i);
    max_candidates_ = 0;
    for (int ix = 0; ix < dims_[0]; ++ix)
      for (int iy = 0; iy < dims_[1]; ++iy)
        for (int iz = 0; iz < dims_[2]; ++iz)
          max_candidates_ = std::max(max_candidates_, around(ix, iy, iz));
  }

  template <class T>
  void describe(StructureView<T>& view) const {
    view.cell_starts = starts_.data();
    view.cell_atoms = atoms_.data();
    view.atom_cell = cell_.data();
    view.nx = dims_[0];
    view.ny = dims_[1];
    view.nz = dims_[2];
    view.max_candidates = max_candidates_;
  }

 private:
  std::int64_t around(int cx, int cy, int cz) const {
    std::int64_t total = 0;
    for (int ix = std::max(cx - 1, 0); ix <= std::min(cx + 1, dims_[0] - 1); ++ix)
      for (int iy = std::max(cy - 1, 0); iy <= std::min(cy + 1, dims_[1] - 1); ++iy) {
        const std::int64_t row = (std::int64_t(ix) * dims_[1] + iy) * dims_[2];
        total +=
            starts_[row + std::min(cz + 1, dims_[2] - 1) + 1] - starts_[row + std::max(cz - 1, 0)];
      }
    return total;
  }

  int dims_[3] = {1, 1, 1};
  double inverse_[3] = {0, 0, 0};
  std::vector<std::int32_t> starts_, atoms_, cell_, next_;
  std::int64_t max_candidates_ = 0;
};

template <class T>
StructureView<T> view_of(const AevBatch<T>& batch, const T* tangent, std::int64_t structure) {
  const std::int64_t first = batch.offsets[structure];
  StructureView<T> view{};
  view.n_atoms = batch.offsets[structure + 1] - first;
  view.coordinates = batch.coordinates + 3 * first;
  view.species = batch.species + first;
  view.tangent = tangent == nullptr ? nullptr : tangent + 3 * first;
  return view;
}

Scratch& thread_workspace() {
  thread_local Scratch scratch;
  return scratch;
}

template <class T>
void run(const AevParameters& parameters, const AevBatch<T>& batch, AevMode mode, const T* gradient,
         const T* tangent, std::int64_t columns, T* out, int n_threads) {
  const Tables<T> tables(parameters);
  const std::int64_t length = parameters.length();
  const double cell_size = std::max(parameters.radial_cutoff, parameters.angular_cutoff);
  const bool to_coordinates = mode == AevMode::vjp || mode == AevMode::hvp;
  // Numbers per atom in the output and in the gradient.
  const std::int64_t out_stride = to_coordinates              ? 3
                                  : mode == AevMode::jacobian ? length * columns
                                                              : length;
  const auto task_of = [&](std::int64_t first) {
    AevTask<T> task{};
    task.mode = mode;
    task.gradient = gradient == nullptr ? nullptr : gradient + first * length;
    task.out = out + first * out_stride;
    task.columns = columns;
    return task;
  };
  if (to_coordinates) std::fill(out, out + 3 * batch.offsets[batch.n_structures], T(0));

  // Small structures: tasks of whole structures.
  struct Range {
    std::int64_t first, last;
  };
  std::vector<Range> ranges;
  std::vector<std::int64_t> large;
  std::int64_t atoms = 0;
  for (std::int64_t s = 0; s < batch.n_structures; ++s) {
    const std::int64_t n = batch.offsets[s + 1] - batch.offsets[s];
    if (n > kLargeStructure) {
      large.push_back(s);
      atoms = kTaskAtoms;  // the next small structure begins a new range
      continue;
    }
    if (ranges.empty() || atoms >= kTaskAtoms) {
      ranges.push_back({s, s + 1});
      atoms = n;
    } else {
      ranges.back().last = s + 1;
      atoms += n;
    }
  }
  // An exception must not leave a parallel region: it is raised again behind it.
  std::atomic<bool> out_of_memory{false};
  const auto guarded = [&](const auto& work) {
    return [&](std::int64_t item) {
      try {
        work(item);
      } catch (const std::bad_alloc&) {
        out_of_memory = true;
      }
    };
  };
  const auto small_structures = [&](std::int64_t item) {
    thread_local CellGrid grid;
    for (std::int64_t s = ranges[item].first; s < ranges[item].last; ++s) {
      StructureView<T> view = view_of(batch, tangent, s);
      if (view.n_atoms == 0) continue;
      grid.build(view.coordinates, view.n_atoms, cell_size);
      grid.describe(view);
      AevTask<T> task = task_of(batch.offsets[s]);
      task.begin = 0;
      task.end = view.n_atoms;
      task.workspace = thread_workspace().get<T>(aev_workspace<T>(tables, view.max_candidates));
      KINML_CALL_KERNEL(aev_centres, tables, view, task);
    }
  };
  parallel_for(static_cast<std::int64_t>(ranges.size()), n_threads, guarded(small_structures));

  // Large structures: tasks of some centres; gradients in parts that are then added in order.
  for (const std::int64_t s : large) {
    StructureView<T> view = view_of(batch, tangent, s);
    CellGrid grid;
    grid.build(view.coordinates, view.n_atoms, cell_size);
    grid.describe(view);
    const std::int64_t n = view.n_atoms;
    const std::int64_t n_tasks = to_coordinates
                                     ? std::min(kParts, (n + kTaskAtoms - 1) / kTaskAtoms)
                                     : (n + kTaskAtoms - 1) / kTaskAtoms;
    std::vector<T> parts(to_coordinates ? n_tasks * 3 * n : 0);
    const AevTask<T> whole = task_of(batch.offsets[s]);
    const auto some_centres = [&](std::int64_t item) {
      AevTask<T> task = whole;
      task.begin = item * n / n_tasks;
      task.end = (item + 1) * n / n_tasks;
      if (to_coordinates) task.out = parts.data() + item * 3 * n;
      task.workspace = thread_workspace().get<T>(aev_workspace<T>(tables, view.max_candidates));
      KINML_CALL_KERNEL(aev_centres, tables, view, task);
    };
    parallel_for(n_tasks, n_threads, guarded(some_centres));
    if (to_coordinates) {
      const std::int64_t block = 4096;
      parallel_for((3 * n + block - 1) / block, n_threads, [&](std::int64_t item) {
        const std::int64_t end = std::min(3 * n, (item + 1) * block);
        for (std::int64_t p = 0; p < n_tasks; ++p)
          for (std::int64_t i = item * block; i < end; ++i) whole.out[i] += parts[p * 3 * n + i];
      });
    }
  }
  if (out_of_memory) throw std::bad_alloc();
}

}  // namespace

template <class T>
void aev_forward(const AevParameters& parameters, const AevBatch<T>& batch, T* aev, int n_threads) {
  run<T>(parameters, batch, AevMode::forward, nullptr, nullptr, 0, aev, n_threads);
}
template <class T>
void aev_jvp(const AevParameters& parameters, const AevBatch<T>& batch, const T* tangent, T* out,
             int n_threads) {
  run<T>(parameters, batch, AevMode::jvp, nullptr, tangent, 0, out, n_threads);
}
template <class T>
void aev_vjp(const AevParameters& parameters, const AevBatch<T>& batch, const T* gradient, T* out,
             int n_threads) {
  run<T>(parameters, batch, AevMode::vjp, gradient, nullptr, 0, out, n_threads);
}
template <class T>
void aev_hvp(const AevParameters& parameters, const AevBatch<T>& batch, const T* gradient,
             const T* tangent, T* out, int n_threads) {
  run<T>(parameters, batch, AevMode::hvp, gradient, tangent, 0, out, n_threads);
}
template <class T>
void aev_jacobian(const AevParameters& parameters, const AevBatch<T>& batch, std::int64_t columns,
                  T* out, int n_threads) {
  run<T>(parameters, batch, AevMode::jacobian, nullptr, nullptr, columns, out, n_threads);
}

#define KINML_INSTANTIATE(T)                                                                       \
  template void aev_forward<T>(const AevParameters&, const AevBatch<T>&, T*, int);                 \
  template void aev_jvp<T>(const AevParameters&, const AevBatch<T>&, const T*, T*, int);           \
  template void aev_vjp<T>(const AevParameters&, const AevBatch<T>&, const T*, T*, int);           \
  template void aev_hvp<T>(const AevParameters&, const AevBatch<T>&, const T*, const T*, T*, int); \
  template void aev_jacobian<T>(const AevParameters&, const AevBatch<T>&, std::int64_t, T*, int);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu
