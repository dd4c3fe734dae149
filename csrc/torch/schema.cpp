// All ops of kinml_fast: their only definition.
//
// coordinates [n_atoms, 3], species [n_atoms] int64, offsets [n_structures + 1] int64: a ragged
// batch of molecules. descriptor: AEVParameters.packed(). D: length of the AEV.
//
// Differentiation (autograd.cpp), C++ only, so that scripted modules keep it without Python:
//   aev -> aev_vjp -> aev_jvp, aev_hvp; aev_jvp -> aev_vjp, aev_hvp; aev_hvp -> error
//   networks -> networks_backward -> networks_second_backward -> error; networks_forward -> error
//   energy_forces, energy_forces_stored -> their backward (of the parameters) -> error
#include <torch/library.h>

TORCH_LIBRARY(kinml_fast, m) {
  // a [n_atoms, D]
  m.def("aev(Tensor coordinates, Tensor species, Tensor offsets, float[] descriptor) -> Tensor");
  // gradient g [n_atoms, D] -> J^T g [n_atoms, 3]
  m.def(
      "aev_vjp(Tensor coordinates, Tensor species, Tensor offsets, Tensor gradient, "
      "float[] descriptor) -> Tensor");
  // tangent v [n_atoms, 3] -> J v [n_atoms, D]
  m.def(
      "aev_jvp(Tensor coordinates, Tensor species, Tensor offsets, Tensor tangent, "
      "float[] descriptor) -> Tensor");
  // d/dx (g . J v) [n_atoms, 3]
  m.def(
      "aev_hvp(Tensor coordinates, Tensor species, Tensor offsets, Tensor gradient, "
      "Tensor tangent, float[] descriptor) -> Tensor");
  // J [n_atoms, D, 3 max_atoms], zero-padded; no autograd
  m.def(
      "aev_jacobian(Tensor coordinates, Tensor species, Tensor offsets, int max_atoms, "
      "float[] descriptor) -> Tensor");

  // Atoms sorted by species (stable): rows [n_atoms] atom index, owners [n_atoms] structure index,
  // starts [n_species + 1].
  m.def(
      "species_order(Tensor species, Tensor offsets, int n_species) -> "
      "(Tensor rows, Tensor owners, Tensor starts)");
  // The same for each batch of `structures` in turn: rows and owners (index within the batch) of
  // all batches behind each other, starts [n_batches, n_species + 1] within the batch,
  // firsts [n_batches + 1] where each batch begins in rows.
  m.def(
      "plan_batches(Tensor species, Tensor offsets, Tensor structures, int batch_size, "
      "int n_species) -> (Tensor rows, Tensor owners, Tensor starts, Tensor firsts)");

  // Energies [n_structures] float64: sum over atoms of network output + sae[species].
  // features [*, D]; rows, owners, starts as above; parameters: one flat tensor, species after
  // species, layer after layer, W [out, in] then b [out]; sizes [n_species * (n_layers + 1)];
  // activations [n_layers], codes of kinml_fast.nn.networks.ACTIVATIONS; sae [n_species] float64.
  m.def(
      "networks(Tensor features, Tensor rows, Tensor owners, Tensor starts, Tensor parameters, "
      "Tensor? sae, int[] sizes, int[] activations, bool biases, SymInt n_structures) -> Tensor");
  // The same, and what the backward pass needs (empty unless save).
  m.def(
      "networks_forward(Tensor features, Tensor rows, Tensor owners, Tensor starts, "
      "Tensor parameters, Tensor? sae, int[] sizes, int[] activations, bool biases, "
      "SymInt n_structures, bool save) -> (Tensor energies, Tensor saved)");
  // Gradients of features (zero rows for atoms outside of the batch) and parameters; each empty
  // unless asked for.
  m.def(
      "networks_backward(Tensor grad_energies, Tensor features, Tensor rows, Tensor owners, "
      "Tensor starts, Tensor parameters, Tensor saved, int[] sizes, int[] activations, "
      "bool biases, bool of_features, bool of_parameters) -> "
      "(Tensor grad_features, Tensor grad_parameters)");
  // Derivatives of sum(grad_features * tangents), with the grad_features [*, D] of
  // networks_backward: with respect to grad_energies, features and parameters; each empty unless
  // asked for.
  m.def(
      "networks_second_backward(Tensor tangents, Tensor grad_energies, Tensor features, "
      "Tensor rows, Tensor owners, Tensor starts, Tensor parameters, int[] sizes, "
      "int[] activations, bool biases, bool of_grad_energies, bool of_features, "
      "bool of_parameters) -> (Tensor, Tensor, Tensor)");
  // Forward and backward pass of a training batch on energies: residuals = energies - targets
  // [n_structures] float64; gradient, with respect to the parameters, of
  //   scale * sum_s weights[s] residuals[s]^2 / (number of weights that are not 0)
  // (zero if there is none). What networks and its derivative give, in one call; no autograd.
  m.def(
      "energy_step(Tensor features, Tensor rows, Tensor owners, Tensor starts, Tensor parameters, "
      "Tensor targets, Tensor weights, Tensor(a!) residuals, Tensor(b!) gradient, float scale, "
      "int[] sizes, int[] activations, bool biases) -> ()");

  // Energies [n_structures] float64 (with sae) and forces [n_atoms, 3] = -dE/dx, in one pass over
  // the molecules. Differentiable with respect to the parameters.
  //
  // Several levels of theory have a chain of networks (csrc/cpu/force_step_cpu.h):
  // sizes [K * n_species * (n_layers + 1)], level after level, and parameters in the same order.
  // Outputs are those of the highest level, with sae [n_species]; if `levels`, of all, in one more
  // dimension [K, ...], with sae [K, n_species]. parameters [M, n] are those of an ensemble: then
  // the outputs and sae have one more dimension M before all others, and no derivative.
  m.def(
      "energy_forces(Tensor coordinates, Tensor species, Tensor offsets, Tensor parameters, "
      "Tensor? sae, float[] descriptor, int[] sizes, int[] activations, bool biases, "
      "bool levels=False) -> (Tensor energies, Tensor forces)");
  // The same from stored descriptors [n_atoms, D] and Jacobians [n_atoms, D, columns], of which a
  // structure of n atoms has the first 3 n columns; the rest is padding of any content. Without
  // Jacobians the forces are empty, [..., 0, 3].
  m.def(
      "energy_forces_stored(Tensor features, Tensor? jacobian, Tensor species, Tensor offsets, "
      "Tensor parameters, Tensor? sae, int[] sizes, int[] activations, bool biases, "
      "bool levels=False) -> (Tensor energies, Tensor forces)");
  // Gradient of sum grad_energies E + sum grad_forces F with respect to the parameters.
  m.def(
      "energy_forces_backward(Tensor grad_energies, Tensor grad_forces, Tensor coordinates, "
      "Tensor species, Tensor offsets, Tensor parameters, float[] descriptor, int[] sizes, "
      "int[] activations, bool biases, bool levels=False) -> Tensor");
  m.def(
      "energy_forces_stored_backward(Tensor grad_energies, Tensor grad_forces, Tensor features, "
      "Tensor? jacobian, Tensor species, Tensor offsets, Tensor parameters, int[] sizes, "
      "int[] activations, bool biases, bool levels=False) -> Tensor");
  // Forward and backward pass of a training batch on energies and forces: `structures` [n] of a
  // data set, whose targets and weights are float64 with one row per structure or atom.
  //   L_E = sum_k sum_s energy_weights_ks dE_ks^2 / n_E,k    n_E,k, n_F,k: structures of the batch
  //   L_F = sum_k sum_s force_weights_ks mean_c dF_ksc^2 / n_F,k      whose weight at level k is
  //   not 0
  // energy_residuals [n] = E - target; force_errors [n, 3] = sum |dF|, sum dF^2, max |dF| over the
  // components of a structure, 0 without weight; losses = L_E, L_F; gradient = that of
  // scales[0] L_E + scales[1] L_F with respect to the parameters. Of several levels, targets,
  // weights, residuals and errors have one more dimension K before all others. No autograd.
  m.def(
      "force_step(Tensor coordinates, Tensor species, Tensor offsets, Tensor structures, "
      "Tensor parameters, Tensor energy_targets, Tensor force_targets, Tensor energy_weights, "
      "Tensor force_weights, Tensor scales, Tensor(a!) energy_residuals, "
      "Tensor(b!) force_errors, Tensor(c!) losses, Tensor(d!) gradient, float[] descriptor, "
      "int[] sizes, int[] activations, bool biases) -> ()");
  // Without Jacobians training is on energies: force targets and weights are not looked at.
  m.def(
      "force_step_stored(Tensor features, Tensor? jacobian, Tensor species, Tensor offsets, "
      "Tensor structures, Tensor parameters, Tensor energy_targets, Tensor force_targets, "
      "Tensor energy_weights, Tensor force_weights, Tensor scales, "
      "Tensor(a!) energy_residuals, Tensor(b!) force_errors, Tensor(c!) losses, "
      "Tensor(d!) gradient, int[] sizes, int[] activations, bool biases) -> ()");

  // One step of Adam or AdamW (csrc/core/adam.h) on a flat parameter, in place; largest for
  // amsgrad. step: float32, the steps that were done before; one more afterwards. No autograd.
  m.def(
      "adam_step(Tensor(a!) parameter, Tensor gradient, Tensor(b!) mean, Tensor(c!) square, "
      "Tensor(d!)? largest, float learning_rate, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, Tensor(e!) step) -> ()");
}
