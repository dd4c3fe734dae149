// Energies, forces, and the gradient of any function of both with respect to the weights, on the
// CPU: coordinates (or stored Jacobians) in, no automatic differentiation.
//
// A batch is cut into tiles of a few whole structures; one thread takes a tile from start to end,
// so that everything about it stays in the thread's cache:
//   a = AEV(x), E = sum_i f(a_i)            environments are computed once and kept for all
//   products g = grad f(a),  F = -J^T g e = dL/dE, r = dL/dF                    the caller's loss,
//   structure by structure v = -J r                                then dL/dw is the gradient of
//   sum_i e f(a_i) + grad f(a_i) . v_i      tangents along v, one pass backwards (forward over
//                                           reverse: exact, as cheap as two passes)
// Weight gradients are summed in parts that depend on the batch only and then added in the order of
// a tree: the result has the same bits for any number of threads, and of processes.
//
// Several levels of theory, lowest first, have a chain of networks (NetworkLevels). Level k has the
// atomic energies eps_k = eps_{k-1} + f_k(a, eps_{k-1}), eps_{-1} = 0, and with p_k = df_k/da and
// c_k = df_k/deps the gradients g_k = p_k + (1 + c_k) g_{k-1}. Every network takes part in each
// pass once, whatever its place in the chain: of
//   S = sum_k e_k eps_k + g_k . v_k,        v_k = -J r_k
// the tangent of f_k is that along (U_k, T_k), where U_k = v_k + (1 + c_{k+1}) U_{k+1} gathers what
// the levels above ask for and T_k = g_{k-1} . U_k is how eps_{k-1} moves, and the seed of its pass
// backwards is q_k = q_{k+1} + e_k + m_{k+1}, with m_k the derivative of
// q_k f_k + grad f_k . (U_k, T_k) with respect to eps_{k-1}.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "../core/loss.h"
#include "../core/model.h"
#include "../core/outputs.h"
#include "../core/system.h"

namespace kinml::cpu {

// Outputs have the R = K - first_level levels from first_level on.
//
// Energies of an ensemble have the bits of a single model's; forces, which are computed for several
// members at once (aev_transposed_many), depend in rounding on their number but neither on the
// place of a member nor on the others.
//
// A structure of many centres is cut into tiles of some of them; whether it is depends on their
// number alone.
//
// prepared  // the weights of `model` from prepare_weights (prepared_weights.h), which gives the same
//           // bits; null: they are laid out in this call
template <class T>
void energy_forces(const Model<T>& model, const System<T>& system, std::int64_t first_level,
                   const Outputs<T>& outputs, int n_threads, const std::byte* prepared = nullptr);

// A model whose weights and tables are laid out once for many calls, on coordinates: for one small
// molecule that takes as long as all else. What `model` points to must stay, but for its weights.
template <class T>
class PreparedModel {
 public:
  PreparedModel(const Model<T>& model, int n_threads);
  ~PreparedModel();
  PreparedModel(const PreparedModel&) = delete;
  PreparedModel& operator=(const PreparedModel&) = delete;

  // energy_forces of the model, with its bits.
  void energy_forces(const System<T>& system, std::int64_t first_level, const Outputs<T>& outputs,
                     int n_threads) const;

 private:
  struct State;
  std::unique_ptr<const State> state_;
};

// gradient  // like the weights: that of sum e E + sum r F + sum w W
// e         // [R, count] dL/dE
// r         // [R, n_atoms, 3] dL/dF, rows of the data set's atoms; not read without forces
// w         // [R, count, 3, 3] dL/dW of the virials, from coordinates; null: 0
template <class T>
void energy_forces_backward(const Model<T>& model, const System<T>& system,
                            std::int64_t first_level, const double* e, const T* r, const double* w,
                            T* gradient, int n_threads);

// losses     // [2] L_E, L_F; with stresses [3], L_S
// gradient   // like the weights: that of the loss
// residuals  // [K, count] E - target
// errors     // [K, count, 3] ComponentErrors of each structure's forces; with stresses
//            // [K, count, 6], behind them those of the stress; 0 without weight
template <class T>
void force_step(const Model<T>& model, const System<T>& system, const Loss& loss, double* losses,
                T* gradient, double* residuals, double* errors, int n_threads);

// The same in two calls, for a batch that n_ranks processes share (core/shares.h): each computes its
// share, sends the others what it says of it, and joins what all have sent. The result has the bits
// of force_step for any number of processes. The system is the whole batch, of chosen structures.
//
// How long a message is, in bytes: a multiple of 64, like the place where it begins.
template <class T>
std::int64_t message_bytes(const System<T>& system, const Loss& loss, std::int64_t n_weights,
                           std::int64_t n_ranks);
template <class T>
void force_step_share(const Model<T>& model, const System<T>& system, const Loss& loss,
                      std::int64_t rank, std::int64_t n_ranks, std::byte* message, int n_threads);
// messages  // [n_ranks, message_bytes]
template <class T>
void force_step_join(const System<T>& system, const Loss& loss, const std::byte* messages,
                     std::int64_t n_ranks, std::int64_t n_weights, double* losses, T* gradient,
                     double* residuals, double* errors, int n_threads);

}  // namespace kinml::cpu
