#include "repulsion_cuda.h"

#include <algorithm>
#include <limits>

#include "aev_cuda.h"
#include "pairs.h"

namespace kinml::cuda {

namespace {

using Index = std::int64_t;

// What is added, of all atoms of the data set.
template <class T>
struct Terms {
  T *ones, *energies;  // [n_atoms]
  T* gradient;         // [n_atoms, 3]
  T* virials;          // [n_atoms, 3, 3]
  char* products;      // workspace of either product

  Terms(const AevParameters& parameters, const System<T>& system, Pieces& pieces)
      : ones(pieces.take<T>(system.n_atoms)),
        energies(pieces.take<T>(system.n_atoms)),
        gradient(pieces.take<T>(3 * system.n_atoms)),
        virials(pieces.take<T>(9 * system.n_atoms)),
        products(
            pieces.take<char>(std::max(aev_workspace<T>(parameters, AevProduct::forward, system),
                                       aev_workspace<T>(parameters, AevProduct::vjp, system)))) {}
};

template <class T>
struct OnesKernel {
  static constexpr int kThreads = 256;
  Index n;
  T* out;

  KINML_DEVICE void operator()(const Block& block) const {
    each_in_grid(block, n, [&](Index i) { out[i] = T(1); });
  }
};

// Blocks of a structure have shares of its atoms; the first one also has its energy.
template <class T>
struct RepulsionKernel {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksOfStructure = 16;
  System<T> system;
  Index n_rows;
  Outputs<T> outputs;
  const T *energies, *gradient, *virials;

  KINML_DEVICE void operator()(const Block& block) const {
    const Index i = block.index() / kBlocksOfStructure, share = block.index() % kBlocksOfStructure;
    const Index s = system.structure(i);
    const AtomRange range = atoms_of(system, s);
    if (range.begin < 0) return;  // whose results are NaN already
    const Index n = range.end - range.begin, count = system.rows(s);
    const Index centres = count >= 0 && count <= n ? count : 0;
    if (share == 0) add_energy(block, i, range.begin, centres);
    const Index first = range.begin + share * n / kBlocksOfStructure;
    const Index last = range.begin + (share + 1) * n / kBlocksOfStructure;
    block.each(static_cast<int>(last - first), [&](int item) {
      const Index a = first + item;
      for (Index row = 0; row < n_rows; ++row) {
        const Index place = row * system.n_atoms + a;
        for (int d = 0; d < 3; ++d) outputs.forces[3 * place + d] -= gradient[3 * a + d];
        if (a >= range.begin + centres) continue;
        if (outputs.atomic_energies != nullptr)
          outputs.atomic_energies[place] += static_cast<double>(energies[a]);
        for (int x = 0; outputs.atomic_virials != nullptr && x < 9; ++x)
          outputs.atomic_virials[9 * place + x] += virials[9 * a + x];
      }
    });
  }
  KINML_DEVICE void add_energy(const Block& block, Index i, Index begin, Index centres) const {
    double* const partial = reinterpret_cast<double*>(block.memory());  // [kThreads]
    block.each(kThreads, [&](int item) {
      double sum = 0;
      for (Index a = item; a < centres; a += kThreads)
        sum += static_cast<double>(energies[begin + a]);
      partial[item] = sum;
    });
    block.each(static_cast<int>(n_rows), [&](int row) {
      double sum = 0;
      for (int item = 0; item < kThreads; ++item) sum += partial[item];
      outputs.energies[row * system.count() + i] += sum;
    });
  }
};

}  // namespace

template <class T>
std::int64_t repulsion_workspace(const AevParameters& parameters, const System<T>& system) {
  Pieces pieces(nullptr);
  const Terms<T> counted(parameters.of_repulsion(), system, pieces);
  return pieces.taken();
}

template <class T>
void add_repulsion(const AevParameters& parameters, const System<T>& system, std::int64_t n_rows,
                   const Outputs<T>& outputs, char* workspace, Stream stream) {
  Pieces pieces(workspace);
  const AevParameters own = parameters.of_repulsion();
  const Terms<T> terms(own, system, pieces);
  const OnesKernel<T> ones{system.n_atoms, terms.ones};
  launch(ones, blocks_for(system.n_atoms, ones.kThreads), stream);
  aev_forward(own, system, terms.energies, terms.products, stream);
  T* const virials = outputs.atomic_virials == nullptr ? nullptr : terms.virials;
  aev_vjp(own, system, static_cast<const T*>(terms.ones), terms.gradient, terms.products, stream,
          nullptr, virials);
  const RepulsionKernel<T> kernel{system,         n_rows,         outputs,
                                  terms.energies, terms.gradient, terms.virials};
  launch(kernel, system.count() * kernel.kBlocksOfStructure, stream,
         {kernel.kThreads * Index(sizeof(double))});
}

#define KINML_INSTANTIATE(T)                                                                       \
  template Index repulsion_workspace<T>(const AevParameters&, const System<T>&);                   \
  template void add_repulsion<T>(const AevParameters&, const System<T>&, Index, const Outputs<T>&, \
                                 char*, Stream);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cuda
