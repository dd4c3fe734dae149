// The groups of arguments of the ops (schema.cpp), checked, as the structs of csrc/core. What an
// entry of a list is called and where it stands is known here and in kinml_fast/ops.py alone.
//
// Values of indices are not looked at here: on a GPU that would wait for it.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "../core/loss.h"
#include "../core/model.h"
#include "../core/system.h"
#include "checks.h"

namespace kinml::ops {

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

// Entry `place` of a list; undefined where it is null or beyond the end.
inline at::Tensor entry(const OptionalTensors& list, size_t place) {
  if (place >= list.size()) return {};
  const std::optional<at::Tensor> found = list.get(place);
  return found.has_value() ? *found : at::Tensor();
}

// ---- System ------------------------------------------------------------------------------------

struct SystemArguments {
  enum Place : size_t {
    kCoordinates,
    kSpecies,
    kOffsets,
    kFeatures,
    kJacobian,
    kCells,
    kPeriodic,
    kCentres,
    kPairStarts,
    kNeighbours,
    kShifts,
    kEntries
  };

  at::Tensor coordinates, species, offsets, features, jacobian;  // contiguous
  at::Tensor cells, periodic, centres, pair_starts, neighbours, shifts;
  at::Tensor structures;  // the chosen ones

  explicit SystemArguments(const OptionalTensors& list, const at::Tensor& chosen = {}) {
    TORCH_CHECK(list.size() <= kEntries, "kinml_fast: a system has at most ", int(kEntries),
                " tensors, got ", list.size());
    const auto given = [&](Place place) {
      const at::Tensor t = entry(list, place);
      return t.defined() ? t.contiguous() : t;
    };
    coordinates = given(kCoordinates);
    species = given(kSpecies);
    offsets = given(kOffsets);
    features = given(kFeatures);
    jacobian = given(kJacobian);
    cells = given(kCells);
    periodic = given(kPeriodic);
    centres = given(kCentres);
    pair_starts = given(kPairStarts);
    neighbours = given(kNeighbours);
    shifts = given(kShifts);
    TORCH_CHECK(
        coordinates.defined() != features.defined(),
        "kinml_fast: a system has either coordinates or stored descriptors (features), got ",
        coordinates.defined() ? "both" : "neither");
    check_floating(numbers(), name());
    if (stored()) {
      TORCH_CHECK(features.dim() == 2, "kinml_fast: features must have shape [n_atoms, D], got ",
                  features.sizes());
    } else {
      TORCH_CHECK(coordinates.dim() == 2 && coordinates.size(1) == 3,
                  "kinml_fast: coordinates must have shape [n_atoms, 3], got ",
                  coordinates.sizes());
    }
    for (const auto& [t, what] : {std::pair(&species, "species"), std::pair(&offsets, "offsets")}) {
      TORCH_CHECK(t->defined(), "kinml_fast: a system needs ", what, ", got none");
      check_index(*t, what);
    }
    TORCH_CHECK(species.size(0) == n_atoms(), "kinml_fast: ", name(), " have ", n_atoms(),
                " atoms but species has ", species.size(0));
    TORCH_CHECK(offsets.size(0) >= 1,
                "kinml_fast: offsets must have n_structures + 1 entries, got none");
    if (jacobian.defined()) {
      TORCH_CHECK(features.defined(),
                  "kinml_fast: a stored Jacobian needs the stored descriptors beside it");
      check_same_type(jacobian, "jacobian", features, "features");
      TORCH_CHECK(jacobian.dim() == 3 && jacobian.size(0) == features.size(0) &&
                      jacobian.size(1) == features.size(1),
                  "kinml_fast: jacobian must have shape [", features.size(0), ", ",
                  features.size(1), ", columns], got ", jacobian.sizes());
      check_here(jacobian, "jacobian");
    }
    check_here(species, "species");
    check_here(offsets, "offsets");
    check_surroundings();
    if (!chosen.defined()) return;
    check_index(chosen, "structures");
    check_here(chosen, "structures");
    structures = chosen.contiguous();
  }

  // Cells, ghosts and given pairs.
  void check_surroundings() const {
    const std::array given{
        std::pair(&cells, "cells"),           std::pair(&periodic, "periodic"),
        std::pair(&centres, "centres"),       std::pair(&pair_starts, "pair_starts"),
        std::pair(&neighbours, "neighbours"), std::pair(&shifts, "shifts")};
    for (const auto& [t, what] : given) {
      if (!t->defined()) continue;
      TORCH_CHECK(!stored(), "kinml_fast: stored descriptors have no ", what);
      check_here(*t, what);
    }
    const int64_t n = n_structures();
    TORCH_CHECK(cells.defined() == periodic.defined(), "kinml_fast: ",
                cells.defined()
                    ? "cells need periodic beside them, which says along which of their "
                      "vectors structures repeat"
                    : "periodic needs the cells beside it");
    if (cells.defined()) {
      check_doubles(cells, "cells", {n, 3, 3});
      check_indices(periodic, "periodic", {n, 3});
    }
    if (centres.defined()) check_indices(centres, "centres", {n});
    TORCH_CHECK(pair_starts.defined() == neighbours.defined(),
                "kinml_fast: given pairs are pair_starts and neighbours, got only ",
                neighbours.defined() ? "neighbours" : "pair_starts");
    TORCH_CHECK(!shifts.defined() || (neighbours.defined() && cells.defined()),
                "kinml_fast: shifts are those of given pairs and need neighbours and cells");
    if (!neighbours.defined()) return;
    check_indices(pair_starts, "pair_starts", {n_atoms() + 1});
    check_index(neighbours, "neighbours");
    if (shifts.defined()) check_indices(shifts, "shifts", {neighbours.size(0), 3});
  }

  // What atoms have: coordinates or stored descriptors; its device and type are those of all.
  const at::Tensor& numbers() const { return stored() ? features : coordinates; }
  const char* name() const { return stored() ? "features" : "coordinates"; }
  bool stored() const { return features.defined(); }
  bool has_forces() const { return !stored() || jacobian.defined(); }
  int64_t n_atoms() const { return numbers().size(0); }
  int64_t n_structures() const { return offsets.size(0) - 1; }
  int64_t count() const { return structures.defined() ? structures.size(0) : n_structures(); }

  void check_here(const at::Tensor& t, const char* what) const {
    check_device(t, what, numbers(), name());
  }
  // A tensor [n_atoms, columns] beside the system, contiguous.
  at::Tensor checked_rows(const at::Tensor& t, const char* what, int64_t columns) const {
    check_same_type(t, what, numbers(), name());
    check_matrix(t, what, n_atoms(), columns);
    check_here(t, what);
    return t.contiguous();
  }

  template <class T>
  System<T> view() const {
    // An empty tensor may have no address, but is there.
    const auto pointer = []<class Number = T>(const at::Tensor& t, Number = 0) -> const Number* {
      static constexpr Number nothing = 0;
      if (!t.defined()) return nullptr;
      return t.numel() > 0 ? t.const_data_ptr<Number>() : &nothing;
    };
    System<T> system;
    system.n_atoms = n_atoms();
    system.n_structures = n_structures();
    system.species = species.const_data_ptr<int64_t>();
    system.offsets = offsets.const_data_ptr<int64_t>();
    system.coordinates = pointer(coordinates);
    system.features = pointer(features);
    system.jacobian = pointer(jacobian);
    if (jacobian.defined()) system.columns = jacobian.size(2);
    system.cells = pointer(cells, double(0));
    system.periodic = pointer(periodic, int64_t(0));
    system.centres = pointer(centres, int64_t(0));
    system.pair_starts = pointer(pair_starts, int64_t(0));
    system.neighbours = pointer(neighbours, int64_t(0));
    system.shifts = pointer(shifts, int64_t(0));
    if (neighbours.defined()) system.n_pairs = neighbours.size(0);
    if (structures.defined()) {
      // An empty choice is not all.
      static constexpr int64_t none = 0;
      system.chosen = structures.numel() > 0 ? structures.const_data_ptr<int64_t>() : &none;
      system.n_chosen = structures.size(0);
    }
    return system;
  }
};

// The coordinates of a system that must have them.
inline at::Tensor coordinates_of(const OptionalTensors& system) {
  at::Tensor coordinates = entry(system, SystemArguments::kCoordinates);
  TORCH_CHECK(coordinates.defined(), "kinml_fast: this op needs coordinates, got none");
  return coordinates;
}

// ---- Model -------------------------------------------------------------------------------------

struct ModelArguments {
  AevParameters aev;  // n_species 0 for stored descriptors
  NetworkChain networks;
  at::Tensor parameters, sae;  // contiguous; sae may be undefined
  int64_t n_members = 1;
  int64_t first_level;

  // Of the levels from `first` on. The lists must outlive the object.
  ModelArguments(const SystemArguments& system, const at::Tensor& parameters_,
                 const std::optional<at::Tensor>& sae_, at::ArrayRef<double> descriptor,
                 at::IntArrayRef packed, int64_t first)
      : networks(unpack_networks(packed)),
        parameters(parameters_.contiguous()),
        first_level(first) {
    check_same_type(parameters, "parameters", system.numbers(), system.name());
    TORCH_CHECK(parameters.dim() == 1 || parameters.dim() == 2,
                "kinml_fast: parameters must be one flat tensor, or [n_members, n] for an "
                "ensemble, got shape ",
                parameters.sizes());
    if (system.stored()) {
      aev.n_species = 0;
      check_networks(networks, system.features.size(1), parameters);
      TORCH_CHECK(descriptor.empty() || !unpack_descriptor(descriptor).repulsion.any(),
                  "kinml_fast: stored descriptors do not tell how atoms repel each other");
    } else {
      aev = unpack_descriptor(descriptor);
      check_networks(networks, aev.length(), parameters);
      TORCH_CHECK(networks.n_species() == aev.n_species, "kinml_fast: the networks are for ",
                  networks.n_species(), " species, the descriptor for ", aev.n_species);
    }
    TORCH_CHECK(first_level >= 0 && first_level < n_levels(),
                "kinml_fast: first_level = ", first_level, " is not in [0, ", n_levels(), ")");
    system.check_here(parameters, "parameters");
    if (ensemble()) n_members = parameters.size(0);
    if (!sae_.has_value()) return;
    system.check_here(*sae_, "sae");
    sae = sae_->contiguous();
    auto expected = shape<int64_t>({networks.n_species()});
    if (n_levels() - first_level == 1 && sae.dim() + 1 == static_cast<int64_t>(expected.size()))
      expected.erase(expected.end() - 2);  // R = 1 may be left out
    check_doubles(sae, "sae", expected);
  }

  int64_t n_levels() const { return networks.n_levels(); }
  bool ensemble() const { return parameters.dim() == 2; }

  // Shape of outputs: [R, ...] or, of an ensemble, [n_members, R, ...].
  template <class Number>
  c10::SmallVector<Number, 5> shape(std::initializer_list<Number> last) const {
    c10::SmallVector<Number, 5> result;
    if (ensemble()) result.push_back(parameters.size(0));
    result.push_back(n_levels() - first_level);
    result.insert(result.end(), last.begin(), last.end());
    return result;
  }

  template <class T>
  Model<T> view() const {
    return {aev, networks, parameters.const_data_ptr<T>(), n_members,
            sae.defined() ? sae.const_data_ptr<double>() : nullptr};
  }
};

// ---- Loss --------------------------------------------------------------------------------------

struct LossArguments {
  enum Place : size_t {
    kEnergies,
    kEnergyWeights,
    kForces,
    kForceWeights,
    kScales,
    kCounts,
    kStresses,
    kStressWeights,
    kEntries
  };

  // Of n_levels levels of the structures of a system. The list must outlive the object.
  LossArguments(const OptionalTensors& list, int64_t n_levels, const SystemArguments& system,
                const at::Tensor& like)
      : loss_{} {
    const int64_t n_structures = system.n_structures(), n_atoms = system.n_atoms();
    const bool with_forces = system.has_forces(), with_cells = system.cells.defined();
    loss_.n_levels = n_levels;
    loss_.n_structures = n_structures;
    loss_.n_atoms = n_atoms;
    TORCH_CHECK(list.size() >= kStresses && list.size() <= kEntries, "kinml_fast: a loss has ",
                int(kStresses), " to ", int(kEntries), " tensors, got ", list.size());
    const auto numbers = [&](Place place, const char* name, at::IntArrayRef shape) {
      const at::Tensor t = entry(list, place);
      TORCH_CHECK(t.defined(), "kinml_fast: a loss needs ", name, ", got none");
      check_doubles(t, name, shape);
      check_device(t, name, like, "parameters");
      return t.const_data_ptr<double>();
    };
    loss_.energies = numbers(kEnergies, "energy_targets", {n_levels, n_structures});
    loss_.energy_weights = numbers(kEnergyWeights, "energy_weights", {n_levels, n_structures});
    const bool with_stresses = entry(list, kStresses).defined();
    const int64_t n_terms = with_stresses ? 3 : 2;
    loss_.scales = numbers(kScales, "scales", {n_terms});
    loss_.counts = numbers(kCounts, "counts", {n_terms, n_levels});
    if (with_stresses) {
      TORCH_CHECK(with_cells, "kinml_fast: a loss of stresses needs the cells of the system");
      loss_.stresses = numbers(kStresses, "stress_targets", {n_levels, n_structures, 3, 3});
      loss_.stress_weights = numbers(kStressWeights, "stress_weights", {n_levels, n_structures});
    }
    if (!with_forces || !entry(list, kForces).defined()) return;
    loss_.forces = numbers(kForces, "force_targets", {n_levels, n_atoms, 3});
    loss_.force_weights = numbers(kForceWeights, "force_weights", {n_levels, n_structures});
  }

  const Loss& view() const { return loss_; }

 private:
  Loss loss_;
};

// Of how many levels a loss is, where it alone tells.
inline int64_t levels_of(const OptionalTensors& loss) {
  const at::Tensor targets = entry(loss, LossArguments::kEnergies);
  TORCH_CHECK(targets.defined() && targets.dim() == 2,
              "kinml_fast: a loss needs energy_targets of shape [levels, n_structures]");
  return targets.size(0);
}

// Where a step writes: losses, gradient, energy_residuals, errors of components.
struct StepResults {
  at::Tensor losses, gradient, energy_residuals, errors;

  // Of n structures.
  StepResults(at::TensorList list, const Loss& loss, int64_t n, const at::Tensor& parameters) {
    const int64_t n_levels = loss.n_levels;
    TORCH_CHECK(list.size() == 4, "kinml_fast: this step has 4 results, got ", list.size());
    losses = list[0];
    gradient = list[1];
    energy_residuals = list[2];
    check_doubles(losses, "losses", {loss.n_terms()});
    check_doubles(energy_residuals, "energy_residuals", {n_levels, n});
    errors = list[3];
    check_doubles(errors, "force_errors", {n_levels, n, loss.error_numbers()});
    check_same_type(gradient, "gradient", parameters, "parameters");
    TORCH_CHECK(gradient.sizes() == parameters.sizes() && gradient.is_contiguous(),
                "kinml_fast: gradient must be contiguous and have the shape of parameters, ",
                parameters.sizes(), ", got ", gradient.sizes());
    for (const at::Tensor& t : list) check_device(t, "a result", parameters, "parameters");
  }
};

// ---- Networks on features that are there -------------------------------------------------------

// The networks of one level and the atoms that they are for, in contiguous memory (features: rows
// of any stride).
struct NetworkArguments {
  NetworkShape shape;
  at::Tensor features, rows, owners, starts, parameters;

  NetworkArguments(const at::Tensor& features_, at::TensorList order, const at::Tensor& parameters_,
                   at::IntArrayRef packed)
      : features(features_.dim() == 2 && features_.stride(1) == 1 ? features_
                                                                  : features_.contiguous()),
        parameters(parameters_.contiguous()) {
    TORCH_CHECK(order.size() == 3, "kinml_fast: an order of atoms is rows, owners and starts, got ",
                order.size(), " tensors");
    rows = order[0].contiguous();
    owners = order[1].contiguous();
    starts = order[2].contiguous();
    check_floating(features, "features");
    check_same_type(parameters, "parameters", features, "features");
    TORCH_CHECK(features.dim() == 2, "kinml_fast: features must have shape [n, D], got ",
                features.sizes());
    check_index(rows, "rows");
    check_index(owners, "owners");
    check_index(starts, "starts");
    for (const auto& [t, name] :
         {std::pair(&rows, "rows"), std::pair(&owners, "owners"), std::pair(&starts, "starts"),
          std::pair(&parameters, "parameters")})
      check_device(*t, name, features, "features");
    TORCH_CHECK(owners.size(0) == rows.size(0), "kinml_fast: rows has ", rows.size(0),
                " atoms, owners has ", owners.size(0));
    TORCH_CHECK(parameters.dim() == 1, "kinml_fast: parameters must be one flat tensor, got shape ",
                parameters.sizes());
    const NetworkChain chain = unpack_networks(packed);
    TORCH_CHECK(chain.n_levels() == 1 && chain.n_species() == starts.size(0) - 1,
                "kinml_fast: the networks are for ", chain.n_species(), " species and ",
                chain.n_levels(), " levels, the atoms are sorted by ", starts.size(0) - 1,
                " species, of one level");
    check_networks(chain, features.size(1), parameters);
    shape = chain.shapes[0];
  }

  int64_t n() const { return rows.size(0); }

  // Single-atom energies [n_species], contiguous; undefined where there are none.
  at::Tensor checked_sae(const std::optional<at::Tensor>& sae) const {
    if (!sae.has_value()) return {};
    TORCH_CHECK(
        sae->scalar_type() == at::kDouble && sae->dim() == 1 && sae->size(0) == shape.n_species,
        "kinml_fast: sae must be float64 of shape [", shape.n_species, "], got ",
        sae->scalar_type(), " of shape ", sae->sizes());
    check_device(*sae, "sae", features, "features");
    return sae->contiguous();
  }
  // dL/dE [n_structures], contiguous.
  at::Tensor checked_gradient(const at::Tensor& grad_energies) const {
    TORCH_CHECK(grad_energies.scalar_type() == at::kDouble && grad_energies.dim() == 1,
                "kinml_fast: grad_energies must be float64 of shape [n_structures]");
    check_device(grad_energies, "grad_energies", features, "features");
    return grad_energies.contiguous();
  }
  // What the forward pass kept [n, saved_per_atom], contiguous.
  at::Tensor checked_saved(const at::Tensor& saved) const {
    check_same_type(saved, "saved", features, "features");
    check_matrix(saved, "saved", n(), shape.saved_per_atom());
    return saved.contiguous();
  }
  // Directions of the features, of their shape, contiguous.
  at::Tensor checked_tangents(const at::Tensor& tangents) const {
    check_same_type(tangents, "tangents", features, "features");
    check_matrix(tangents, "tangents", features.size(0), features.size(1));
    return tangents.contiguous();
  }
};

}  // namespace kinml::ops
