#include "hessian_cpu.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../core/repulsion.h"
#include "aev_environments.h"
#include "chain.h"
#include "guarded.h"
#include "hessian_kernels.h"
#include "prepared_weights.h"
#include "repulsion_kernels.h"

namespace kinml::cpu {

namespace {

using Index = std::int64_t;

// Centres whose second derivatives are in memory at one time.
constexpr Index kCentresInMemory = 128;

// The first layers' weights of all networks in the order of the products.
template <class T>
class HessianNetworks {
 public:
  HessianNetworks(const Model<T>& model, const AevTables<T>& tables, int n_threads)
      : n_species_(model.networks.n_species()),
        n_rows_(model.n_members * model.networks.n_levels()),
        networks_(n_species_ * n_rows_) {
    const NetworkChain& chain = model.networks;
    const T* weights = model.weights;
    for (Index row = 0; row < n_rows_; ++row) {
      const NetworkShape& shape = chain.shapes[row % chain.n_levels()];
      for (Index s = 0; s < n_species_; ++s) {
        networks_[s * n_rows_ + row] = {shape.n_layers,    shape.sizes + s * (shape.n_layers + 1),
                                        shape.activations, shape.biases,
                                        weights,           nullptr};
        weights += shape.parameters_of(s);
      }
    }
    Index total = 0, most = 0;
    for (const HessianNetwork<T>& network : networks_) {
      total += packed_numbers(tables, network);
      most = std::max(most, padded(network.size(1)));
    }
    T* packed = memory_.template get<T>(total);
    for (HessianNetwork<T>& network : networks_) {
      network.packed = packed;
      packed += packed_numbers(tables, network);
    }
    guarded_parallel_for(static_cast<Index>(networks_.size()), n_threads, [&](Index i) {
      thread_local Scratch scratch;
      KINML_CALL_KERNEL(hessian_pack, tables, networks_[i],
                        scratch.get<T>(hessian_depth(tables) * most));
    });
  }
  // [n_members, n_levels] of a species.
  const HessianNetwork<T>* of(Index species) const { return networks_.data() + species * n_rows_; }

 private:
  Index n_species_, n_rows_;
  std::vector<HessianNetwork<T>> networks_;
  Scratch memory_;
};

// What a centre gives.
template <class T>
struct Centre {
  Index chosen, atom;  // of the structure
  std::vector<std::int32_t> neighbours;
  std::vector<T> derivatives;  // [outputs, 3 m, hessian_columns(m)]
};

template <class T>
class Hessians {
 public:
  Hessians(const Model<T>& model, const System<T>& system, Index first_level, const Index* atoms,
           Index n_rows, Index columns, T* out, int n_threads)
      : model_(model),
        system_(system),
        first_level_(first_level),
        n_outputs_(model.n_members * (model.networks.n_levels() - first_level)),
        n_rows_(atoms == nullptr ? system.n_atoms : n_rows),
        columns_(columns),
        out_(out),
        n_threads_(n_threads),
        tables_(model.aev),
        networks_(model, tables_, n_threads),
        rows_(system.n_atoms, atoms == nullptr ? 0 : -1) {
    for (Index row = 0; row < n_rows_; ++row) rows_[atoms == nullptr ? row : atoms[row]] = row;
    if (model.aev.repulsion.any()) repulsion_ = repulsion_pairs<T>(model.aev.repulsion);
  }

  void run() {
    std::fill_n(out_, n_outputs_ * n_rows_ * 3 * columns_, T(0));
    for (Index i = 0; i < system_.count(); ++i) {
      const Index s = system_.structure(i);
      for (Index a = 0; a < system_.rows(s); ++a) {
        centres_.push_back({i, a, {}, {}});
        if (static_cast<Index>(centres_.size()) == kCentresInMemory) finish();
      }
    }
    finish();
  }

 private:
  void finish() {
    if (centres_.empty()) return;
    const Index first = centres_.front().chosen, last = centres_.back().chosen;
    std::vector<std::unique_ptr<Environments<T>>> structures;
    for (Index i = first; i <= last; ++i) {
      structures.push_back(std::make_unique<Environments<T>>(tables_));
      structures.back()->set_structure(system_, system_.structure(i));
    }
    guarded_parallel_for(static_cast<Index>(centres_.size()), n_threads_, [&](Index c) {
      evaluate(*structures[centres_[c].chosen - first], centres_[c]);
    });
    std::vector<Index> starts{0};
    for (std::size_t c = 1; c <= centres_.size(); ++c)
      if (c == centres_.size() || centres_[c].chosen != centres_[c - 1].chosen)
        starts.push_back(static_cast<Index>(c));
    parallel_for(static_cast<Index>(starts.size()) - 1, n_threads_, [&](Index i) {
      for (Index c = starts[i]; c < starts[i + 1]; ++c) add(centres_[c]);
    });
    centres_.clear();
  }

  void evaluate(const Environments<T>& structure, Centre<T>& centre) const {
    Environments<T> environments(tables_);
    environments.share_structure(structure);
    Environment<T> e = environments.find(centre.atom, centre.atom + 1);
    const Index species = e.structure.species[centre.atom];
    const HessianNetwork<T>* const networks = networks_.of(species);
    const Index n_levels = model_.networks.n_levels();
    const Index first = system_.offsets[system_.structure(centre.chosen)];
    bool wanted = rows_[first + centre.atom] >= 0;
    for (Index k = 0; k < e.n_pairs; ++k) wanted = wanted || rows_[first + e.index[k]] >= 0;
    if (!wanted) return;
    environments.finish(e);
    centre.neighbours.assign(e.index, e.index + e.n_pairs);
    centre.derivatives.resize(n_outputs_ * 3 * e.n_pairs * hessian_columns(e.n_pairs));
    thread_local Scratch scratch;
    KINML_CALL_KERNEL(
        hessian_centre, tables_, e, networks, model_.n_members, n_levels, first_level_,
        repulsion_.empty() ? nullptr : repulsion_.data() + species * tables_.n_species,
        centre.derivatives.data(), scratch.get<T>(hessian_scratch(tables_, e, networks, n_levels)));
  }

  // Blocks at and above the diagonal say what those below are.
  void add(const Centre<T>& centre) const {
    const Index m = static_cast<Index>(centre.neighbours.size()), width = hessian_columns(m);
    const Index first = system_.offsets[system_.structure(centre.chosen)];
    std::vector<T> sums(9 * m);  // of the blocks of a neighbour with all
    for (Index output = 0; output < n_outputs_; ++output) {
      const T* const from = centre.derivatives.data() + output * 3 * m * width;
      T* const out = out_ + output * n_rows_ * 3 * columns_;
      // Adds value(x, y) to the block of two atoms, if it is wanted.
      const auto add_to = [&](Index a, Index b, const auto& value) {
        const Index row = rows_[first + a];
        if (row < 0) return;
        T* const to = out + 3 * row * columns_ + 3 * b;
        for (Index x = 0; x < 3; ++x)
          for (Index y = 0; y < 3; ++y) to[x * columns_ + y] += value(x, y);
      };
      std::fill(sums.begin(), sums.end(), T(0));
      for (Index j = 0; j < m; ++j)
        for (Index k = j; k < m; ++k) {
          const auto block = [&](Index x, Index y) {
            return j == k && x > y ? from[(3 * j + y) * width + 3 * k + x]
                                   : from[(3 * j + x) * width + 3 * k + y];
          };
          for (Index x = 0; x < 3; ++x)
            for (Index y = 0; y < 3; ++y) {
              sums[9 * j + 3 * x + y] += block(x, y);
              if (j != k) sums[9 * k + 3 * y + x] += block(x, y);
            }
          const Index a = centre.neighbours[j], b = centre.neighbours[k];
          add_to(a, b, block);
          if (j != k) add_to(b, a, [&](Index x, Index y) { return block(y, x); });
        }
      T total[9] = {};
      for (Index j = 0; j < m; ++j) {
        const T* const sum = sums.data() + 9 * j;
        for (Index x = 0; x < 9; ++x) total[x] += sum[x];
        add_to(centre.neighbours[j], centre.atom,
               [&](Index x, Index y) { return -sum[3 * x + y]; });
        add_to(centre.atom, centre.neighbours[j],
               [&](Index x, Index y) { return -sum[3 * y + x]; });
      }
      add_to(centre.atom, centre.atom,
             [&](Index x, Index y) { return T(0.5) * (total[3 * x + y] + total[3 * y + x]); });
    }
  }

  const Model<T>& model_;
  const System<T>& system_;
  Index first_level_, n_outputs_, n_rows_, columns_;
  T* out_;
  int n_threads_;
  AevTableStorage<T> tables_;
  HessianNetworks<T> networks_;
  std::vector<Index> rows_;  // [n_atoms] of the result, or -1
  std::vector<RepulsionPair<T>> repulsion_;
  std::vector<Centre<T>> centres_;
};

// ---- products with one vector -------------------------------------------------------------------

// A few whole structures: their environments, those that move along v, and what they give.
template <class T>
class ProductTile {
 public:
  ProductTile(const System<T>& system, Range range, const AevTables<T>& tables,
              const NetworkChain& chain, std::int64_t network_memory, const T* v)
      : tile_(system, range, chain.n_species()),
        tables_(tables),
        environments_(tables),
        arrays_(chain, tile_, network_memory, 1 + chain.n_levels()) {
    for (Index i = 0; i < tile_.count(); ++i) {
      environments_.set_structure(system, tile_.structure(i));
      const Index n = tile_.rows(i);
      still_.push_back(environments_.make(0, n));
      moving_.push_back(environments_.make(0, n, v + 3 * tile_.first_atom(i)));
      if (n == 0) continue;
      KINML_CALL_KERNEL(aev_rows, tables, still_[i], rows(arrays_.features, i), arrays_.stride);
      KINML_CALL_KERNEL(aev_tangent_rows, tables, still_[i], v + 3 * tile_.first_atom(i), nullptr,
                        rows(tangents(), i), arrays_.stride, environments_.scratch(still_[i]));
    }
  }
  const Tile<T>& tile() const { return tile_; }

  // d g_k of all levels, behind g_k, of one member.
  void derive(const PackedChain<T>& chain) {
    const Index n = tile_.n_rows(), stride = arrays_.stride, length = arrays_.length;
    const Ascent<T> ascent =
        ascend(tile_, chain, arrays_, Height::gradients, true, arrays_.gradients);
    std::vector<T> moved(n, T(0)), change(padded(n));
    for (Index k = 0; k < arrays_.n_levels; ++k) {
      NetworkTile<T> of_tile = network_tile(tile_, arrays_, k, true);
      of_tile.tangents = tangents();
      of_tile.tangent_stride = stride;
      for (Index p = 0; k > 0 && p < n; ++p) tangents()[row(p) + length] = moved[p];
      chain[k].tangent(of_tile, change.data());
      chain[k].second_backward(of_tile, nullptr, derivative(k), stride);
      for (Index p = 0; p < n; ++p) {
        T* const g = derivative(k) + row(p);
        if (k > 0) {
          chain_add(g, ascent.gradients[k - 1] + row(p), g[length] - T(1), length);
          chain_add(g, derivative(k - 1) + row(p), arrays_.slopes(k)[p], length);
        }
        moved[p] += change[p];
      }
    }
  }

  // out [3 atoms] = H v of structure i at level k
  void product(Index i, Index k, const RepulsionPair<T>* repulsion, T* out) {
    std::fill_n(out, 3 * tile_.atoms(i), T(0));
    if (tile_.rows(i) == 0) return;
    KINML_CALL_KERNEL(aev_transposed, tables_, still_[i], rows(derivative(k), i), arrays_.stride,
                      out, nullptr, environments_.scratch(still_[i]));
    KINML_CALL_KERNEL(aev_transposed, tables_, moving_[i], rows(arrays_.gradients[k], i),
                      arrays_.stride, out, nullptr, environments_.scratch(moving_[i]));
    if (repulsion == nullptr) return;
    const std::vector<T> ones(tile_.rows(i), T(1));
    KINML_CALL_KERNEL(repulsion_transposed, repulsion, tables_, moving_[i], ones.data(), out,
                      nullptr);
  }

 private:
  T* tangents() const { return arrays_.outputs[0]; }
  T* derivative(Index k) const { return arrays_.outputs[1 + k]; }
  Index row(Index place) const { return tile_.order().rows[place] * arrays_.stride; }
  T* rows(T* matrix, Index i) const { return matrix + tile_.first_row(i) * arrays_.stride; }

  Tile<T> tile_;
  const AevTables<T>& tables_;
  Environments<T> environments_;
  TileArrays<T> arrays_;
  std::vector<Environment<T>> still_, moving_;
};

}  // namespace

template <class T>
void hessian_products(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                      const T* v, T* products, int n_threads, const std::byte* prepared) {
  const NetworkChain& chain = model.networks;
  const std::vector<PackedChain<T>> members = prepared != nullptr
                                                  ? prepared_members(model, prepared)
                                                  : packed_members(model, true, n_threads);
  const AevTableStorage<T> tables(model.aev);
  std::vector<RepulsionPair<T>> repulsion;
  if (model.aev.repulsion.any()) repulsion = repulsion_pairs<T>(model.aev.repulsion);
  const std::vector<Range> tiles = tiles_of(system, {0, system.count()}, true);
  guarded_parallel_for(static_cast<Index>(tiles.size()), n_threads, [&](Index t) {
    const std::int64_t memory = members[0].tile_memory(count_rows(system, tiles[t]));
    ProductTile<T> made(system, tiles[t], tables, chain, memory, v);
    T* out = products;
    for (const PackedChain<T>& member : members) {
      made.derive(member);
      for (Index k = first_level; k < chain.n_levels(); ++k, out += 3 * system.n_atoms)
        for (Index i = 0; i < made.tile().count(); ++i)
          made.product(i, k, repulsion.empty() ? nullptr : repulsion.data(),
                       out + 3 * made.tile().first_atom(i));
    }
  });
}

template <class T>
void energy_hessians(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                     const std::int64_t* atoms, std::int64_t n_rows, std::int64_t columns,
                     T* hessians, int n_threads) {
  Hessians<T>(model, system, first_level, atoms, n_rows, columns, hessians, n_threads).run();
}

#define KINML_DEFINE_HESSIANS(T)                                                                   \
  template void energy_hessians<T>(const Model<T>&, const System<T>&, std::int64_t,                \
                                   const std::int64_t*, std::int64_t, std::int64_t, T*, int);      \
  template void hessian_products<T>(const Model<T>&, const System<T>&, std::int64_t, const T*, T*, \
                                    int, const std::byte*);
KINML_DEFINE_HESSIANS(double)
KINML_DEFINE_HESSIANS(float)
#undef KINML_DEFINE_HESSIANS

}  // namespace kinml::cpu
