// Environments of centres, with their memory: what aev_cpu.cpp and force_step_cpu.cpp share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "aev_cpu.h"
#include "aev_kernels.h"
#include "scratch.h"

namespace kinml::cpu {

// Parameters in the type of the computation, padded for whole registers.
template <class T>
struct AevTableStorage : AevTables<T> {
  std::vector<T> storage;

  explicit AevTableStorage(const AevParameters& p) {
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
    this->angular_step = static_cast<T>(even_step(p));
    this->angular_shrink =
        static_cast<T>(std::exp(-2 * p.angular_eta * even_step(p) * even_step(p)));
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

 private:
  // The distance of evenly spaced angular shifts, or 0: they are not, or the gaussian of the middle
  // one leaves the range of T within the cutoff.
  static double even_step(const AevParameters& p) {
    const std::vector<double>& shifts = p.angular_shifts;
    const double step = shifts.size() > 1 ? shifts[1] - shifts[0] : 0.0;
    for (std::size_t l = 1; l < shifts.size(); ++l)
      if (std::abs(shifts[l] - shifts[0] - l * step) > 1e-12 * p.angular_cutoff) return 0.0;
    const double middle = shifts[shifts.size() / 2];
    const double farthest = std::max(std::abs(middle), std::abs(p.angular_cutoff - middle));
    const double limit = sizeof(T) == 8 ? 500.0 : 50.0;
    const bool inside =
        p.angular_eta * farthest * farthest < limit && 2 * p.angular_eta * step * farthest < limit;
    return step > 0 && inside ? step : 0.0;
  }
};

// A structure with more atoms is worked on by several threads, with one piece for each.
inline constexpr std::int64_t kLargeStructure = 512;
// Up to this many atoms all pairs are tried: a cell list would cost more.
inline constexpr std::int64_t kOneCell = 64;

// Sorts the atoms of one structure into cells.
class CellGrid {
 public:
  template <class T>
  void build(const T* x, std::int64_t n, double cell_size) {
    dims_[0] = dims_[1] = dims_[2] = 1;
    double low[3] = {0, 0, 0};
    if (n > kOneCell) {
      for (int d = 0; d < 3; ++d) {
        double lo = std::numeric_limits<double>::infinity(), hi = -lo;
        for (std::int64_t i = 0; i < n; ++i) {  // NaN changes neither
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
      bool known = true;
      for (int d = 0; d < 3; ++d) {
        std::int64_t c = 0;
        if (dims_[d] > 1) {
          const double place = (x[3 * i + d] - low[d]) * inverse_[d];
          c = place >= 1 ? static_cast<std::int64_t>(std::min(place, dims_[d] - 1.0)) : 0;
        }
        known = known && !std::isnan(x[3 * i + d]);
        cell = cell * dims_[d] + c;
      }
      cell_[i] = known ? static_cast<std::int32_t>(cell) : -1;
    }
    // An atom whose place is not a number keeps the first other one company, whose vector it
    // spoils: alone nobody would notice it.
    const auto other =
        std::find_if(cell_.begin(), cell_.end(), [](auto cell) { return cell >= 0; });
    const std::int32_t home = other == cell_.end() ? 0 : *other;
    for (std::int32_t& cell : cell_) {
      if (cell < 0) cell = home;
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

// Memory that is taken piece by piece and given back all at once.
class Bump {
 public:
  template <class T>
  T* take(std::int64_t count) {
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;
    if (kExactMemory || blocks_.empty() || used_ + bytes > blocks_.back().size) {
      const std::size_t size =
          kExactMemory ? bytes : std::max(bytes, std::max(std::size_t(1) << 18, total_));
      blocks_.push_back({std::make_unique<Scratch>(), nullptr, size});
      blocks_.back().memory = blocks_.back().owner->get<char>(size);
      total_ += size;
      used_ = 0;
    }
    char* const p = blocks_.back().memory + used_;
    used_ += bytes;
    return reinterpret_cast<T*>(p);
  }
  // Forgets all pieces. One block that holds as much as all before is left after a while, unless
  // that is more than a thread should keep.
  void clear() {
    used_ = 0;
    if (blocks_.size() <= 1 && total_ <= kKept && !kExactMemory) return;
    const std::size_t size = total_;
    blocks_.clear();
    total_ = 0;
    if (size <= kKept && !kExactMemory) take<char>(static_cast<std::int64_t>(size));
    used_ = 0;
  }

 private:
  static constexpr std::size_t kKept = std::size_t(64) << 20;
  struct Block {
    std::unique_ptr<Scratch> owner;
    char* memory;
    std::size_t size;
  };
  std::vector<Block> blocks_;
  std::size_t used_ = 0, total_ = 0;
};

// One thread's environments. Throws std::bad_alloc only.
template <class T>
class Environments {
 public:
  explicit Environments(const AevTables<T>& tables)
      : tables_(tables),
        cell_size_(std::max<double>(tables.radial_cutoff, tables.angular_cutoff)),
        memory_(thread_memory()) {
    clear();
  }
  void clear() { memory_.clear(); }

  // The structure whose environments are made next, sorted into cells.
  void set_structure(std::int64_t n_atoms, const T* coordinates, const std::int64_t* species) {
    structure_ = {};
    structure_.n_atoms = n_atoms;
    structure_.coordinates = coordinates;
    structure_.species = species;
    grid_.build(coordinates, n_atoms, cell_size_);
    grid_.describe(structure_);
  }
  // The structure of others, whose cells must live as long as new environments are made.
  void share_structure(const Environments& others) { structure_ = others.structure_; }

  // Centres [begin, end); `direction` [n_atoms, 3] makes the environment dual.
  Environment<T> make(std::int64_t begin, std::int64_t end, const T* direction = nullptr) {
    Environment<T> e = find(begin, end, direction);
    finish(e);
    return e;
  }
  // Its two stages.
  Environment<T> find(std::int64_t begin, std::int64_t end, const T* direction = nullptr) {
    Environment<T> e{};
    e.structure = structure_;
    e.begin = begin;
    e.end = end;
    e.direction = direction;
    e.pairs = memory_.template take<T>(pair_memory(tables_, e));
    KINML_CALL_KERNEL(aev_neighbours, tables_, e);
    return e;
  }
  void finish(Environment<T>& e) {
    e.triples = memory_.template take<T>(e.triple_numbers);
    KINML_CALL_KERNEL(aev_triples, tables_, e, scratch(e));
  }
  // For a pass over an environment; lost at the next call.
  T* scratch(const Environment<T>& e) {
    return thread_scratch().template get<T>(scratch_memory(tables_, e));
  }
  // For aev_transposed_many; lost as well.
  T* many_scratch(const Environment<T>& e) {
    return thread_scratch().template get<T>(many_scratch_memory(tables_, e));
  }

 private:
  static Bump& thread_memory() {
    thread_local Bump memory;
    return memory;
  }
  static Scratch& thread_scratch() {
    thread_local Scratch scratch;
    return scratch;
  }

  const AevTables<T>& tables_;
  double cell_size_;
  Bump& memory_;
  CellGrid grid_;
  StructureView<T> structure_{};
};

}  // namespace kinml::cpu
