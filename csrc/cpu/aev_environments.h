// Environments of centres, with their memory: what aev_cpu.cpp and force_step_cpu.cpp share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../core/system.h"
#include "aev_kernels.h"
#include "aev_tables.h"
#include "cell_grid.h"
#include "images.h"
#include "scratch.h"

namespace kinml::cpu {

// Products of vectors alone: a structure with more centres is worked on by several threads.
inline constexpr std::int64_t kLargeStructure = 512;
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
  void set_structure(const System<T>& system, std::int64_t s) {
    const std::int64_t first = system.offsets[s], n_atoms = system.atoms(s);
    structure_ = {};
    structure_.n_atoms = n_atoms;
    structure_.coordinates = system.coordinates + 3 * first;
    structure_.species = system.species + first;
    if (system.pair_starts != nullptr) {
      structure_.pair_starts = system.pair_starts + first;
      structure_.neighbours = system.neighbours;
      structure_.shifts = system.is_periodic(s) ? system.shifts : nullptr;
      structure_.cell = system.cells == nullptr ? nullptr : system.cells + 9 * s;
      structure_.first_atom = first;
      for (std::int64_t a = 0; a < system.rows(s); ++a)
        structure_.max_candidates = std::max(
            structure_.max_candidates, structure_.pair_starts[a + 1] - structure_.pair_starts[a]);
    } else if (system.is_periodic(s)) {
      images_.build(Lattice(system.cells + 9 * s, system.periodic + 3 * s), structure_.coordinates,
                    n_atoms, cell_size_);
      structure_.places = images_.places();
      structure_.place_atoms = images_.atoms();
      grid_.build(images_.places(), images_.count(), cell_size_);
      grid_.describe(structure_);
    } else {
      grid_.build(structure_.coordinates, n_atoms, cell_size_);
      grid_.describe(structure_);
    }
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
  Images images_;
  CellGrid grid_;
  StructureView<T> structure_{};
};

}  // namespace kinml::cpu
