// All ops of kinml_fast: their only definition. Python's side of it is kinml_fast/ops.py.
//
// Groups of arguments that always go together are one list each, so that another tensor of a group
// costs an entry there and no signature:
//
//   Tensor?[] system   structures (SystemArguments): coordinates [n_atoms, 3] in angstrom, species
//                      [n_atoms] int64, offsets [n_structures + 1] int64, stored descriptors
//                      [n_atoms, D], stored Jacobians [n_atoms, D, columns]. Descriptors come from
//                      the coordinates, or are the stored ones: then there are no coordinates.
//                      With coordinates also: cells [n_structures, 3, 3] float64 in angstrom, rows
//                      are vectors, and periodic [n_structures, 3] int64, along which of them;
//                      centres [n_structures] int64, how many of the first atoms have energies;
//                      pairs that are given: pair_starts [n_atoms + 1], neighbours [n_pairs],
//                      shifts [n_pairs, 3] in cells, int64 (csrc/core/system.h)
//   Tensor[] order     atoms sorted by species: rows, owners, starts (species_order)
//   Tensor?[] loss     targets and weights (LossArguments): energies [K, n], weights of energies
//                      [K, n], forces [K, n_atoms, 3], weights of forces [K, n], scales [2], counts
//                      [2, K]; all float64. With stresses [K, n, 3, 3] in eV/angstrom^3 and their
//                      weights [K, n] at the end scales [3] and counts [3, K]. csrc/core/loss.h has
//                      the formula
//   float[] descriptor AEVParameters.packed(); not looked at (may be empty) for stored descriptors
//   int[] networks     the chain of networks (csrc/core/network_shape.h): K levels of theory,
//                      S species, L layers, 1 with biases or 0, [L] codes of
//                      kinml_fast.nn.networks.ACTIVATIONS, [K, S, L + 1] widths
//
// parameters: one flat tensor, level after level, species after species, layer after layer,
// W [out, in] then b [out]. D: length of the AEV.
//
// Differentiation (autograd.cpp), C++ only, so that scripted modules keep it without Python:
//   aev -> aev_vjp -> aev_jvp, aev_hvp; aev_jvp -> aev_vjp, aev_hvp; aev_hvp -> error
//   aev -> aev_virials (of the cells) -> error
//   networks -> networks_backward -> networks_second_backward -> error; networks_forward -> error
//   energy_forces, energy_forces_virials -> energy_forces_backward (of the parameters) -> error
//   energy_hessians, hessian_products -> error
#include <torch/library.h>

TORCH_LIBRARY(kinml_fast, m) {
  // ---- atomic environment vectors; the system has coordinates

  // a [n_atoms, D]
  m.def("aev(Tensor?[] system, float[] descriptor) -> Tensor");
  // gradient g [n_atoms, D] -> J^T g [n_atoms, 3]
  m.def("aev_vjp(Tensor?[] system, Tensor gradient, float[] descriptor) -> Tensor");
  // The virials [n_structures, 3, 3] float64 of sum_i g_i . a_i: sums over pairs of its derivative by
  // the displacement (x) the displacement
  m.def("aev_virials(Tensor?[] system, Tensor gradient, float[] descriptor) -> Tensor");
  // tangent v [n_atoms, 3] -> J v [n_atoms, D]
  m.def("aev_jvp(Tensor?[] system, Tensor tangent, float[] descriptor) -> Tensor");
  // d/dx (g . J v) [n_atoms, 3]
  m.def("aev_hvp(Tensor?[] system, Tensor gradient, Tensor tangent, float[] descriptor) -> Tensor");
  // J [n_atoms, D, 3 max_atoms], zero-padded; no autograd
  m.def("aev_jacobian(Tensor?[] system, int max_atoms, float[] descriptor) -> Tensor");

  // ---- networks of one level on features that are there

  // Atoms sorted by species (stable): rows [n_atoms] atom index, owners [n_atoms] structure index,
  // starts [n_species + 1].
  m.def(
      "species_order(Tensor species, Tensor offsets, int n_species) -> "
      "(Tensor rows, Tensor owners, Tensor starts)");

  // Energies [n_structures] float64: sum over atoms of network output + sae[species].
  // features [*, D], read through the order's rows; sae [n_species] float64.
  m.def(
      "networks(Tensor features, Tensor[] order, Tensor parameters, Tensor? sae, int[] networks, "
      "SymInt n_structures) -> Tensor");
  // The same, and what the backward pass needs (empty unless save).
  m.def(
      "networks_forward(Tensor features, Tensor[] order, Tensor parameters, Tensor? sae, "
      "int[] networks, SymInt n_structures, bool save) -> (Tensor energies, Tensor saved)");
  // Gradients of features (zero rows for atoms outside of the batch) and parameters; each empty
  // unless wanted.
  m.def(
      "networks_backward(Tensor grad_energies, Tensor features, Tensor[] order, "
      "Tensor parameters, Tensor saved, int[] networks, bool[2] wanted) -> "
      "(Tensor grad_features, Tensor grad_parameters)");
  // Derivatives of sum(grad_features * tangents), with the grad_features [*, D] of
  // networks_backward: with respect to grad_energies, features and parameters; each empty unless
  // wanted.
  m.def(
      "networks_second_backward(Tensor tangents, Tensor grad_energies, Tensor features, "
      "Tensor[] order, Tensor parameters, int[] networks, bool[3] wanted) -> "
      "(Tensor, Tensor, Tensor)");

  // ---- energies and forces in one pass over the molecules (csrc/cpu/force_step_cpu.h)

  // Energies [R, n_structures] float64 (with sae [R, n_species]) and forces [R, n_atoms, 3] =
  // -dE/dx of the R = K - first_level levels from first_level on; forces [R, 0, 3] without
  // Jacobians. Differentiable with respect to the parameters. parameters [M, n] are those of an
  // ensemble: then outputs and sae have one more dimension M before all others, and no derivative.
  // prepared: what prepare_weights gave for these parameters, which changes no bit.
  m.def(
      "energy_forces(Tensor?[] system, Tensor parameters, Tensor? sae, float[] descriptor, "
      "int[] networks, int first_level, Tensor? prepared=None) -> (Tensor energies, Tensor "
      "forces)");
  // The same from coordinates with the virials [R, n_structures, 3, 3], float64: the derivative of
  // the energy by a strain of places and cell; and what atoms have of energies, [R, n_atoms] float64
  // with sae, and of virials, [R, n_atoms, 3, 3], empty unless atomic, without derivatives.
  m.def(
      "energy_forces_virials(Tensor?[] system, Tensor parameters, Tensor? sae, float[] descriptor, "
      "int[] networks, int first_level, bool atomic, Tensor? prepared=None) -> (Tensor energies, "
      "Tensor forces, Tensor virials, Tensor atomic_energies, Tensor atomic_virials)");
  // The parameters [n] or [M, n] in the order in which this processor reads them, for many calls:
  // opaque bytes [bytes] uint8, which another type or instruction set refuses. As long as the
  // parameters are the same, so is the tensor: it is not to be written to. Empty on a GPU, which
  // has no use for it. No autograd.
  m.def("prepare_weights(Tensor parameters, int[] networks) -> Tensor");
  // Gradient of sum grad_energies E + sum grad_forces F + sum grad_virials W with respect to the
  // parameters.
  m.def(
      "energy_forces_backward(Tensor grad_energies, Tensor grad_forces, Tensor?[] system, "
      "Tensor parameters, float[] descriptor, int[] networks, int first_level, "
      "Tensor? grad_virials=None) -> Tensor");
  // Second derivatives [R, n_atoms, 3, 3 max_atoms] of the energies by the coordinates of each
  // structure, whose atoms are max_atoms at most; zero behind them. Given atoms [n] int64, different
  // ones, the rows [R, n, ...] of these. From coordinates; with a dimension M before all others for
  // an ensemble. No autograd.
  m.def(
      "energy_hessians(Tensor?[] system, Tensor parameters, float[] descriptor, int[] networks, "
      "int first_level, SymInt max_atoms, Tensor? atoms=None) -> Tensor");
  // Their products with v [n_atoms, 3] of the parameters' type: the derivative along v of the gradient,
  // [R, n_atoms, 3]; otherwise the same. No autograd. prepared: as of energy_forces.
  m.def(
      "hessian_products(Tensor?[] system, Tensor parameters, Tensor v, float[] descriptor, "
      "int[] networks, int first_level, Tensor? prepared=None) -> Tensor");
  // Forward and backward pass of a training batch: `structures` [n] of the data set that system and
  // loss describe. Results: losses [2], L_E and L_F, float64; gradient of the loss with respect to
  // the parameters; energy_residuals [K, n] = E - target, force_errors [K, n, 3] = sum |dF|, sum dF^2,
  // max |dF| over the components of a structure, 0 without weight, both float64. With stresses in
  // the loss, losses [3] and errors [K, n, 6], the same of the 9 components of the stress. Without
  // Jacobians, or without force targets, training is on energies. No autograd.
  m.def(
      "force_step(Tensor?[] system, Tensor structures, Tensor parameters, Tensor?[] loss, "
      "Tensor(a!)[] results, float[] descriptor, int[] networks) -> ()");

  // The same in two calls, for a batch that n_ranks processes share (kinml_fast/ops.py).
  // How many bytes a message has.
  m.def(
      "message_bytes(Tensor?[] system, Tensor structures, Tensor?[] loss, Tensor parameters, "
      "int n_ranks) -> int");
  // What a process says of its share of a batch: message [bytes] uint8, whose last two numbers
  // (float64) are the caller's.
  m.def(
      "force_step_share(Tensor?[] system, Tensor structures, Tensor parameters, Tensor?[] loss, "
      "Tensor(a!) message, float[] descriptor, int[] networks, int rank, int n_ranks) -> ()");
  // The batch, from messages [n_ranks, bytes] of all processes. Results as of force_step.
  m.def(
      "force_step_join(Tensor?[] system, Tensor structures, Tensor?[] loss, Tensor messages, "
      "Tensor(a!)[] results) -> ()");

  // ---- optimizer

  // One step of Adam or AdamW (csrc/core/adam.h) on a flat parameter, in place; largest for
  // amsgrad. step: float64, the steps that were done before; one more afterwards. No autograd.
  m.def(
      "adam_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!) mean, Tensor(c!) square, "
      "Tensor(d!)? largest, float learning_rate, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, Tensor(e!) step) -> ()");
}
