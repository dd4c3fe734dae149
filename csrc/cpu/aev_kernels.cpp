// Atomic environment vectors, their Jacobian products and their Hessian product on the CPU.
//
// One template does all: with plain numbers it gives the vector a_i (forward) and the product
// J_i^T g (vjp); with dual numbers, whose tangents move along a direction v, it gives J_i v (jvp)
// and the derivative of g . J_i v (hvp).
//
// A centre is worked through in three steps, each over whole registers:
//   neighbours  cells -> neighbours sorted by species, with unit vectors, distances, cutoffs
//   radial      one neighbour at a time, lanes over the shifts
//   angular     for each species pair, triples in chunks: geometry (lanes over triples), factors
//               E_l (lanes over shifts) and P_m (lanes over sections), then the contraction
//               out[l][m] += F_l P_m, or its transpose for the products with g
// A triple so costs n_angular + n_sections factors and an outer product, no arccos, no J.
#include "aev_kernels.h"

#include <initializer_list>

#include "../core/aev_layout.h"
#include "../core/aev_terms.h"
#include "denormals.h"
#include "simd.h"

namespace kinml {
inline namespace KINML_ISA {

// Found by argument-dependent lookup from the formulas of core.
template <class T, int W>
KINML_HD Vec<T, W> square_root(Vec<T, W> x) {
  return sqrt(x);
}
template <class T>
KINML_HD Dual<T> square_root(Dual<T> x) {
  const T r = square_root(x.value);
  return {r, x.tangent / (r + r)};
}
template <class T, int W>
KINML_HD SineCosine<Vec<T, W>> sine_cosine(Vec<T, W> x) {
  return sine_cosine_series<T>(x);
}
namespace {

using cpu::AevMode;
using cpu::AevTables;
using cpu::AevTask;
using cpu::kChunk;
using cpu::kMaxLanes;
using cpu::padded;
using cpu::StructureView;

constexpr int kChunkRoom = kChunk + kMaxLanes;  // registers are stored whole

// Numbers in memory: a plane of values and, for dual numbers, a plane of tangents.
template <class T>
struct Planes {
  T* value;
  T* tangent;
};

// The register type and the memory access of plain (kDual = false) or dual numbers.
template <class T, int W, bool kDual>
struct Lanes;

template <class T, int W>
struct Lanes<T, W, false> {
  using V = Vec<T, W>;
  using L = V;
  static KINML_HD L constant(T x) { return V(x); }
  static KINML_HD L plain(V x) { return x; }
  static KINML_HD L load(Planes<T> p, std::int64_t i) { return V::load(p.value + i); }
  static KINML_HD L broadcast(Planes<T> p, std::int64_t i) { return V(p.value[i]); }
  static KINML_HD void store(Planes<T> p, std::int64_t i, L x) { x.store(p.value + i); }
  // The sum of the lanes, in addition to what is there already if `add`.
  static KINML_HD void store_sum(Planes<T> p, std::int64_t i, L x, bool add) {
    p.value[i] = (add ? p.value[i] : T(0)) + reduce_add(x);
  }
  static KINML_HD L scale(V a, L x) { return a * x; }
  static KINML_HD V result(L x) { return x; }  // the part that the caller wants
  static KINML_HD L choose(V a, V b, L if_ge, L otherwise) {
    return select_ge(a, b, if_ge, otherwise);
  }
};

template <class T, int W>
struct Lanes<T, W, true> {
  using V = Vec<T, W>;
  using L = Dual<V>;
  static KINML_HD L constant(T x) { return L(V(x), V(T(0))); }
  static KINML_HD L plain(V x) { return L(x, V(T(0))); }
  static KINML_HD L load(Planes<T> p, std::int64_t i) {
    return L(V::load(p.value + i), V::load(p.tangent + i));
  }
  static KINML_HD L broadcast(Planes<T> p, std::int64_t i) {
    return L(V(p.value[i]), V(p.tangent[i]));
  }
  static KINML_HD void store(Planes<T> p, std::int64_t i, L x) {
    x.value.store(p.value + i);
    x.tangent.store(p.tangent + i);
  }
  static KINML_HD void store_sum(Planes<T> p, std::int64_t i, L x, bool add) {
    p.value[i] = (add ? p.value[i] : T(0)) + reduce_add(x.value);
    p.tangent[i] = (add ? p.tangent[i] : T(0)) + reduce_add(x.tangent);
  }
  static KINML_HD L scale(V a, L x) { return L(a * x.value, a * x.tangent); }
  static KINML_HD V result(L x) { return x.tangent; }
  static KINML_HD L choose(V a, V b, L if_ge, L otherwise) {
    return L(select_ge(a, b, if_ge.value, otherwise.value),
             select_ge(a, b, if_ge.tangent, otherwise.tangent));
  }
};

template <class T, int W>
KINML_HD Vec<T, W> value_of_lanes(Vec<T, W> x) {
  return x;
}
template <class T, int W>
KINML_HD Vec<T, W> value_of_lanes(Dual<Vec<T, W>> x) {
  return x.value;
}

// The first `count` lanes, zero in the others.
template <class T, int W>
KINML_HD Vec<T, W> keep_first(Vec<T, W> x, std::int64_t count) {
  Vec<T, W> lane;
  for (int i = 0; i < W; ++i) lane.raw[i] = static_cast<T>(i);
  return lane.raw < Vec<T, W>(static_cast<T>(count)).raw ? x.raw : Vec<T, W>(T(0)).raw;
}

// Takes aligned pieces from the workspace of a task.
template <class T>
struct Arena {
  T* next;
  T* numbers(std::int64_t n) {
    T* p = next;
    next += padded(n);
    return p;
  }
  std::int32_t* integers(std::int64_t n) {  // an int32 is never longer than a T
    return reinterpret_cast<std::int32_t*>(numbers(n));
  }
  Planes<T> planes(std::int64_t n) {
    T* value = numbers(n);
    return {value, numbers(n)};
  }
};

// Neighbours of one centre, all arrays in species order.
template <class T>
struct Neighbours {
  std::int32_t* index;          // [n] atom
  std::int32_t* species_start;  // [n_species + 1]
  Planes<T> ux, uy, uz;         // [n] unit vector from the centre
  Planes<T> r, inverse_r;       // [n]
  Planes<T> fc, slope;          // [n] radial cutoff function, 0 beyond it
  T *gx, *gy, *gz;              // [n] derivative with respect to the displacement (vjp, hvp)
  // The angular ones among them, compact.
  std::int32_t* position;                             // [m] place among the neighbours
  std::int32_t* angular_species_start;                // [n_species + 1]
  Planes<T> ax, ay, az, ar, inverse_ar, afc, aslope;  // [m]
  T *hx, *hy, *hz;                                    // [m]
  // Candidates before they are sorted.
  std::int32_t* candidate;
  T* candidate_r2;

  static Neighbours from(Arena<T>& arena, std::int64_t room, int n_species) {
    Neighbours nb;
    nb.index = arena.integers(room);
    nb.species_start = arena.integers(n_species + 1);
    for (Planes<T>* p : {&nb.ux, &nb.uy, &nb.uz, &nb.r, &nb.inverse_r, &nb.fc, &nb.slope, &nb.ax,
                         &nb.ay, &nb.az, &nb.ar, &nb.inverse_ar, &nb.afc, &nb.aslope})
      *p = arena.planes(room);
    for (T** p : {&nb.gx, &nb.gy, &nb.gz, &nb.hx, &nb.hy, &nb.hz, &nb.candidate_r2})
      *p = arena.numbers(room);
    nb.position = arena.integers(room);
    nb.angular_species_start = arena.integers(n_species + 1);
    nb.candidate = arena.integers(room);
    return nb;
  }
};

// Triples of a chunk and their factors.
template <class T>
struct Chunk {
  Planes<T> c, s, ratio;             // cos(theta), sin(theta), dsin/dcos = -ratio
  Planes<T> mean_r;                  // (R_ij + R_ik) / 2
  Planes<T> weight;                  // factor fc(R_ij) fc(R_ik)
  Planes<T> radial, radial_slope;    // [kChunkRoom, padded n_angular] E_l, dE_l/dR
  Planes<T> section, section_slope;  // [kChunkRoom, padded n_sections] P_m, dP_m/dc
  Planes<T> sum, sum_r, sum_c;       // g.EP, g.E'P, g.EP'

  static Chunk from(Arena<T>& arena, std::int64_t angular_row, std::int64_t section_row) {
    Chunk chunk;
    for (Planes<T>* p : {&chunk.c, &chunk.s, &chunk.ratio, &chunk.mean_r, &chunk.weight, &chunk.sum,
                         &chunk.sum_r, &chunk.sum_c})
      *p = arena.planes(kChunkRoom);
    chunk.radial = arena.planes(kChunkRoom * angular_row);
    chunk.radial_slope = arena.planes(kChunkRoom * angular_row);
    chunk.section = arena.planes(kChunkRoom * section_row);
    chunk.section_slope = arena.planes(kChunkRoom * section_row);
    return chunk;
  }
};

// Triples of one first atom j with consecutive second atoms k.
struct Run {
  std::int32_t j, k, count, first;
};

template <class T, int W, bool kDual, bool kTranspose>
class Centre {
  using La = Lanes<T, W, kDual>;
  using V = typename La::V;
  using L = typename La::L;

 public:
  Centre(const AevTables<T>& tables, const StructureView<T>& structure, T* workspace)
      : t_(tables),
        s_(structure),
        layout_{tables.n_species, tables.n_radial, tables.n_angular, tables.n_sections},
        radial_row_(padded(tables.n_radial, W)),
        angular_row_(padded(tables.n_angular, W)),
        section_row_(padded(tables.n_sections, W)) {
    Arena<T> arena{workspace};
    room_ = structure.max_candidates + 2 * kMaxLanes;
    nb_ = Neighbours<T>::from(arena, room_, tables.n_species);
    chunk_ = Chunk<T>::from(arena, angular_row_, section_row_);
    row_ = arena.numbers(row_length());
    column_ = arena.numbers(layout_.length());
  }

  // Neighbours of `centre`; the displacement's tangent is v_j - v_i.
  void find_neighbours(std::int64_t centre) {
    gather_candidates(centre);
    const std::int32_t n = nb_.species_start[t_.n_species];
    const V zero(T(0));
    const L one = La::constant(T(1));
    const V radial_cutoff(t_.radial_cutoff);
    for (std::int32_t k = 0; k < n; k += W) {
      const L x = La::load(nb_.ux, k), y = La::load(nb_.uy, k), z = La::load(nb_.uz, k);
      const L r2 = x * x + y * y + z * z;
      const V r2_value = value_of_lanes(r2);
      // Coincident atoms have no direction: their unit vector and its derivatives are zero.
      const V tiny(std::numeric_limits<T>::min());
      const L safe = La::choose(r2_value, tiny, r2, one);
      const L r_safe = square_root(safe);
      const L inverse = La::choose(r2_value, tiny, one / r_safe, La::constant(T(0)));
      const L r = La::choose(r2_value, tiny, r_safe, La::constant(T(0)));
      La::store(nb_.ux, k, x * inverse);
      La::store(nb_.uy, k, y * inverse);
      La::store(nb_.uz, k, z * inverse);
      La::store(nb_.r, k, r);
      La::store(nb_.inverse_r, k, inverse);
      const Cutoff<L> fc = cutoff(r, t_.radial_cutoff);
      const V rv = value_of_lanes(r);
      La::store(nb_.fc, k, La::choose(radial_cutoff, rv, fc.value, La::constant(T(0))));
      La::store(nb_.slope, k, La::choose(radial_cutoff, rv, fc.slope, La::constant(T(0))));
      if constexpr (kTranspose) {
        zero.store(nb_.gx + k);
        zero.store(nb_.gy + k);
        zero.store(nb_.gz + k);
      }
    }
    compact_angular();
    const std::int32_t m = nb_.angular_species_start[t_.n_species];
    for (std::int32_t k = 0; k < m; k += W) {
      const Cutoff<L> fc = cutoff(La::load(nb_.ar, k), t_.angular_cutoff);
      La::store(nb_.afc, k, fc.value);
      La::store(nb_.aslope, k, fc.slope);
      if constexpr (kTranspose) {
        zero.store(nb_.hx + k);
        zero.store(nb_.hy + k);
        zero.store(nb_.hz + k);
      }
    }
  }

  // out [D] = a_i (plain) or J_i v (dual)
  void row(T* out) {
    for (std::int64_t i = 0; i < row_length(); i += W) V(T(0)).store(row_ + i);
    radial_forward();
    angular<false>();
    unpad<true>(out);
  }

  // Adds J_i^T g (plain) or its derivative along v (dual) to out [n_atoms, 3].
  void transpose(std::int64_t centre, const T* gradient, T* out) {
    unpad<false>(const_cast<T*>(gradient));
    radial_transpose();
    angular<true>();
    const std::int32_t m = nb_.angular_species_start[t_.n_species];
    for (std::int32_t k = 0; k < m; ++k) {
      const std::int32_t p = nb_.position[k];
      nb_.gx[p] += nb_.hx[k];
      nb_.gy[p] += nb_.hy[k];
      nb_.gz[p] += nb_.hz[k];
    }
    T x = 0, y = 0, z = 0;
    const std::int32_t n = nb_.species_start[t_.n_species];
    for (std::int32_t k = 0; k < n; ++k) {
      T* o = out + 3 * std::int64_t(nb_.index[k]);
      o[0] += nb_.gx[k];
      o[1] += nb_.gy[k];
      o[2] += nb_.gz[k];
      x += nb_.gx[k];
      y += nb_.gy[k];
      z += nb_.gz[k];
    }
    out[3 * centre] -= x;
    out[3 * centre + 1] -= y;
    out[3 * centre + 2] -= z;
  }

  // out [D, columns]: column 3 q + d is the derivative with respect to coordinate d of atom q.
  void jacobian(std::int64_t centre, T* out, std::int64_t columns)
    requires kDual
  {
    const std::int64_t length = layout_.length();
    for (std::int64_t i = 0; i < length * columns; ++i) out[i] = T(0);
    unit_direction_ = 0;
    unit_atom_ = centre;
    find_neighbours(centre);  // how many there are
    const std::int32_t n = nb_.species_start[t_.n_species];
    for (std::int32_t q = -1; q < n; ++q) {  // -1: the centre itself
      for (int d = 0; d < 3; ++d) {
        unit_direction_ = d;
        unit_atom_ = q < 0 ? centre : nb_.index[q];
        find_neighbours(centre);
        row(column_);
        for (std::int64_t i = 0; i < length; ++i)
          out[i * columns + 3 * unit_atom_ + d] = column_[i];
      }
    }
    unit_direction_ = -1;
  }

 private:
  std::int64_t row_length() const {
    return layout_.n_species * radial_row_ +
           std::int64_t(layout_.n_pairs()) * layout_.n_angular * section_row_;
  }
  T* radial_block(int species) { return row_ + species * radial_row_; }
  T* angular_block(int a, int b) {
    return row_ + layout_.n_species * radial_row_ +
           std::int64_t(layout_.pair(a, b)) * layout_.n_angular * section_row_;
  }

  static KINML_HD Cutoff<L> cutoff(L r, T radius) {
    return cutoff_function(r, La::constant(T(1) / radius), La::constant(T(3.14159265358979323846)),
                           La::constant(T(0.5)));
  }

  T tangent_of(std::int64_t atom, int axis) const {
    if (unit_direction_ >= 0) return atom == unit_atom_ && axis == unit_direction_ ? T(1) : T(0);
    return s_.tangent[3 * atom + axis];
  }

  // Atoms within the longer cutoff, sorted by species; displacements into ux, uy, uz.
  void gather_candidates(std::int64_t centre) {
    const T longest = t_.radial_cutoff > t_.angular_cutoff ? t_.radial_cutoff : t_.angular_cutoff;
    const T limit = longest * longest;
    const T* xi = s_.coordinates + 3 * centre;
    std::int32_t* start = nb_.species_start;
    for (int a = 0; a <= t_.n_species; ++a) start[a] = 0;
    std::int32_t found = 0;
    const std::int32_t cell = s_.atom_cell[centre];
    const int cz = cell % s_.nz, cy = cell / s_.nz % s_.ny, cx = cell / s_.nz / s_.ny;
    for (int ix = cx > 0 ? cx - 1 : 0; ix <= cx + 1 && ix < s_.nx; ++ix)
      for (int iy = cy > 0 ? cy - 1 : 0; iy <= cy + 1 && iy < s_.ny; ++iy) {
        const int z0 = cz > 0 ? cz - 1 : 0;
        const int z1 = cz + 1 < s_.nz ? cz + 1 : s_.nz - 1;
        const std::int32_t* row = s_.cell_starts + (std::int64_t(ix) * s_.ny + iy) * s_.nz;
        for (std::int32_t p = row[z0]; p < row[z1 + 1]; ++p) {
          const std::int32_t atom = s_.cell_atoms[p];
          const T* xj = s_.coordinates + 3 * std::int64_t(atom);
          const T dx = xj[0] - xi[0], dy = xj[1] - xi[1], dz = xj[2] - xi[2];
          const T r2 = dx * dx + dy * dy + dz * dz;
          if (r2 > limit || atom == centre) continue;
          nb_.candidate[found++] = atom;
          ++start[s_.species[atom] + 1];
        }
      }
    for (int a = 0; a < t_.n_species; ++a) start[a + 1] += start[a];
    std::int32_t* next = nb_.angular_species_start;  // a free array for now
    for (int a = 0; a < t_.n_species; ++a) next[a] = start[a];
    for (std::int32_t p = 0; p < found; ++p) {
      const std::int32_t atom = nb_.candidate[p];
      const std::int32_t k = next[s_.species[atom]]++;
      const T* xj = s_.coordinates + 3 * std::int64_t(atom);
      nb_.index[k] = atom;
      nb_.ux.value[k] = xj[0] - xi[0];
      nb_.uy.value[k] = xj[1] - xi[1];
      nb_.uz.value[k] = xj[2] - xi[2];
      if constexpr (kDual) {
        nb_.ux.tangent[k] = tangent_of(atom, 0) - tangent_of(centre, 0);
        nb_.uy.tangent[k] = tangent_of(atom, 1) - tangent_of(centre, 1);
        nb_.uz.tangent[k] = tangent_of(atom, 2) - tangent_of(centre, 2);
      }
    }
    for (Planes<T> p : {nb_.ux, nb_.uy, nb_.uz})
      for (int i = 0; i < W; ++i) {  // the lanes beyond the last neighbour
        p.value[found + i] = T(0);
        if constexpr (kDual) p.tangent[found + i] = T(0);
      }
  }

  static void copy(Planes<T> from, std::int32_t i, Planes<T> to, std::int32_t j) {
    to.value[j] = from.value[i];
    if constexpr (kDual) to.tangent[j] = from.tangent[i];
  }

  void compact_angular() {
    std::int32_t m = 0;
    for (int a = 0; a < t_.n_species; ++a) {
      nb_.angular_species_start[a] = m;
      for (std::int32_t k = nb_.species_start[a]; k < nb_.species_start[a + 1]; ++k) {
        if (nb_.r.value[k] > t_.angular_cutoff) continue;
        nb_.position[m] = k;
        copy(nb_.ux, k, nb_.ax, m);
        copy(nb_.uy, k, nb_.ay, m);
        copy(nb_.uz, k, nb_.az, m);
        copy(nb_.r, k, nb_.ar, m);
        copy(nb_.inverse_r, k, nb_.inverse_ar, m);
        ++m;
      }
    }
    nb_.angular_species_start[t_.n_species] = m;
    for (Planes<T> p : {nb_.ax, nb_.ay, nb_.az, nb_.ar, nb_.inverse_ar})
      for (int i = 0; i < W; ++i) {
        p.value[m + i] = T(0);
        if constexpr (kDual) p.tangent[m + i] = T(0);
      }
  }

  void radial_forward() {
    const V minus_eta(-t_.radial_eta);
    for (int a = 0; a < t_.n_species; ++a) {
      T* block = radial_block(a);
      for (std::int32_t k = nb_.species_start[a]; k < nb_.species_start[a + 1]; ++k) {
        const L r = La::broadcast(nb_.r, k);
        const L fc = La::scale(V(t_.radial_factor), La::broadcast(nb_.fc, k));
        for (std::int64_t l = 0; l < radial_row_; l += W) {
          const L x = r - La::plain(V::load(t_.radial_shifts + l));
          const L term = exp(La::scale(minus_eta, x * x)) * fc;
          (V::load(block + l) + La::result(term)).store(block + l);
        }
      }
    }
  }

  void radial_transpose() {
    const V minus_eta(-t_.radial_eta);
    for (int a = 0; a < t_.n_species; ++a) {
      const T* g = radial_block(a);
      for (std::int32_t k = nb_.species_start[a]; k < nb_.species_start[a + 1]; ++k) {
        const L r = La::broadcast(nb_.r, k);
        const L fc = La::broadcast(nb_.fc, k);
        const L slope = La::broadcast(nb_.slope, k);
        L sum = La::constant(T(0));
        for (std::int64_t l = 0; l < radial_row_; l += W) {
          const L x = r - La::plain(V::load(t_.radial_shifts + l));
          const L e = exp(La::scale(minus_eta, x * x));
          const L derivative = e * (slope + La::scale(V(T(-2) * t_.radial_eta), x * fc));
          sum += La::scale(V::load(g + l), derivative);
        }
        // Lanes hold partial sums: g_k = (sum of lanes) * u, by linearity lane by lane.
        sum = La::scale(V(t_.radial_factor), sum);
        nb_.gx[k] += reduce_add(La::result(sum * La::broadcast(nb_.ux, k)));
        nb_.gy[k] += reduce_add(La::result(sum * La::broadcast(nb_.uy, k)));
        nb_.gz[k] += reduce_add(La::result(sum * La::broadcast(nb_.uz, k)));
      }
    }
  }

  // All triples, species pair by species pair, in chunks.
  template <bool kTransposed>
  void angular() {
    const std::int32_t* start = nb_.angular_species_start;
    Run runs[kChunk];
    for (int a = 0; a < t_.n_species; ++a) {
      if (start[a] == start[a + 1]) continue;
      for (int b = a; b < t_.n_species; ++b) {
        T* block = angular_block(a, b);
        int n_runs = 0;
        std::int32_t n_triples = 0;
        for (std::int32_t j = start[a]; j < start[a + 1]; ++j) {
          for (std::int32_t k = a == b ? j + 1 : start[b]; k < start[b + 1];) {
            const std::int32_t left = start[b + 1] - k;
            const std::int32_t free = kChunk - n_triples;
            const std::int32_t count = left < free ? left : free;
            runs[n_runs++] = {j, k, count, n_triples};
            n_triples += count;
            k += count;
            if (n_triples == kChunk) {
              chunk<kTransposed>(block, runs, n_runs, n_triples);
              n_runs = 0;
              n_triples = 0;
            }
          }
        }
        if (n_triples > 0) chunk<kTransposed>(block, runs, n_runs, n_triples);
      }
    }
  }

  template <bool kTransposed>
  void chunk(T* block, const Run* runs, int n_runs, std::int32_t n) {
    geometry(runs, n_runs);
    factors<kTransposed>(n);
    if constexpr (kTransposed) {
      contract_transposed(block, n);
      pull_back(runs, n_runs);
    } else {
      contract(block, n);
    }
  }

  void geometry(const Run* runs, int n_runs) {
    const L one = La::constant(T(1));
    const V half(T(0.5));
    const V unit(T(1)), minus_unit(T(-1));
    for (int i = 0; i < n_runs; ++i) {
      const Run run = runs[i];
      const L jx = La::broadcast(nb_.ax, run.j), jy = La::broadcast(nb_.ay, run.j),
              jz = La::broadcast(nb_.az, run.j), jr = La::broadcast(nb_.ar, run.j);
      const L jw = La::scale(V(t_.angular_factor), La::broadcast(nb_.afc, run.j));
      for (std::int32_t q = 0; q < run.count; q += W) {
        const std::int32_t k = run.k + q, to = run.first + q;
        const L cosine =
            jx * La::load(nb_.ax, k) + jy * La::load(nb_.ay, k) + jz * La::load(nb_.az, k);
        L c = La::scale(V(t_.beta), cosine);
        c = La::choose(value_of_lanes(c), unit, one, c);  // clip(c, -1, 1)
        c = La::choose(minus_unit, value_of_lanes(c), -one, c);
        // With beta = 1 and collinear atoms theta has a kink; there dsin/dcos is set to 0 and the
        // derivative is the mean over all directions.
        const L s2 = one - c * c;
        const V smallest(T(16) * std::numeric_limits<T>::epsilon());
        const L s_safe = square_root(La::choose(value_of_lanes(s2), smallest, s2, one));
        const L zero = La::constant(T(0));
        La::store(chunk_.c, to, c);
        La::store(chunk_.s, to, La::choose(value_of_lanes(s2), smallest, s_safe, zero));
        La::store(chunk_.ratio, to, La::choose(value_of_lanes(s2), smallest, c / s_safe, zero));
        La::store(chunk_.mean_r, to, La::scale(half, jr + La::load(nb_.ar, k)));
        La::store(chunk_.weight, to, jw * La::load(nb_.afc, k));
      }
    }
  }

  // X^(zeta - 1)
  KINML_HD L power(L x) const {
    if (t_.integer_zeta > 0) return integer_power(x, La::constant(T(1)), t_.integer_zeta - 1);
    const V tiny(sizeof(T) == 8 ? T(1e-60) : T(1e-12));
    const L safe = La::choose(value_of_lanes(x), tiny, x, La::plain(tiny));
    return exp(La::scale(V(t_.zeta - T(1)), log(safe)));
  }

  template <bool kTransposed>
  void factors(std::int32_t n) {
    const V minus_eta(-t_.angular_eta), minus_two_eta(T(-2) * t_.angular_eta);
    const V half(T(0.5)), half_zeta(T(0.5) * t_.zeta);
    const L half_lane = La::plain(half);
    for (std::int32_t t = 0; t < n; ++t) {
      const L r = La::broadcast(chunk_.mean_r, t);
      [[maybe_unused]] L weight = La::broadcast(chunk_.weight, t);
      for (std::int64_t l = 0; l < angular_row_; l += W) {
        const L x = r - La::plain(V::load(t_.angular_shifts + l));
        const L e = exp(La::scale(minus_eta, x * x));
        const std::int64_t to = t * angular_row_ + l;
        if constexpr (kTransposed) {
          La::store(chunk_.radial, to, e);
          La::store(chunk_.radial_slope, to, La::scale(minus_two_eta, x * e));
        } else {
          La::store(chunk_.radial, to, e * weight);
        }
      }
    }
    for (std::int32_t t = 0; t < n; ++t) {
      const L c = La::broadcast(chunk_.c, t), s = La::broadcast(chunk_.s, t);
      for (std::int64_t m = 0; m < section_row_; m += W) {
        const V cos_m = V::load(t_.section_cos + m), sin_m = V::load(t_.section_sin + m);
        const L x = half_lane + La::scale(half, La::scale(cos_m, c) + La::scale(sin_m, s));
        const L below = power(x);
        const std::int64_t to = t * section_row_ + m;
        La::store(chunk_.section, to, below * x);
        if constexpr (kTransposed) {
          const L ratio = La::broadcast(chunk_.ratio, t);
          const L slope = La::plain(cos_m) - La::scale(sin_m, ratio);
          La::store(chunk_.section_slope, to, La::scale(half_zeta, below * slope));
        }
      }
    }
  }

  // block[l][m] += sum_t left[t][l] right[t][m], eight rows at a time in registers.
  template <int kRows>
  void contract_rows(T* block, const T* left, const T* right, std::int32_t n) const {
    for (std::int64_t m = 0; m < section_row_; m += W) {
      V acc[kRows];
      for (int l = 0; l < kRows; ++l) acc[l] = V::load(block + l * section_row_ + m);
      for (std::int32_t t = 0; t < n; ++t) {
        const V p = V::load(right + t * section_row_ + m);
        for (int l = 0; l < kRows; ++l) acc[l] += V(left[t * angular_row_ + l]) * p;
      }
      for (int l = 0; l < kRows; ++l) acc[l].store(block + l * section_row_ + m);
    }
  }
  void contract_planes(T* block, const T* left, const T* right, std::int32_t n) const {
    int l = 0;
    for (; l + 8 <= t_.n_angular; l += 8)
      contract_rows<8>(block + l * section_row_, left + l, right, n);
    for (; l + 4 <= t_.n_angular; l += 4)
      contract_rows<4>(block + l * section_row_, left + l, right, n);
    for (; l < t_.n_angular; ++l) contract_rows<1>(block + l * section_row_, left + l, right, n);
  }
  void contract(T* block, std::int32_t n) const {
    if constexpr (kDual) {  // d(F P) = dF P + F dP
      contract_planes(block, chunk_.radial.tangent, chunk_.section.value, n);
      contract_planes(block, chunk_.radial.value, chunk_.section.tangent, n);
    } else {
      contract_planes(block, chunk_.radial.value, chunk_.section.value, n);
    }
  }

  // For each triple: sum = g.(E P), sum_r = g.(dE/dR P), sum_c = g.(E dP/dc); kRows rows of g stay
  // in registers (0: any number, from memory).
  template <int kRows>
  void contract_transposed_rows(const T* g, std::int32_t n) {
    const int rows = kRows > 0 ? kRows : t_.n_angular;
    for (std::int64_t m = 0; m < section_row_; m += W) {
      V held[kRows > 0 ? kRows : 1];
      if constexpr (kRows > 0)
        for (int l = 0; l < kRows; ++l) held[l] = V::load(g + l * section_row_ + m);
      for (std::int32_t t = 0; t < n; ++t) {
        L h = La::constant(T(0)), h_r = h;
        for (int l = 0; l < rows; ++l) {
          const V gv = kRows > 0 ? held[kRows > 0 ? l : 0] : V::load(g + l * section_row_ + m);
          h += La::scale(gv, La::broadcast(chunk_.radial, t * angular_row_ + l));
          h_r += La::scale(gv, La::broadcast(chunk_.radial_slope, t * angular_row_ + l));
        }
        const L p = La::load(chunk_.section, t * section_row_ + m);
        const L slope = La::load(chunk_.section_slope, t * section_row_ + m);
        La::store_sum(chunk_.sum, t, h * p, m > 0);
        La::store_sum(chunk_.sum_r, t, h_r * p, m > 0);
        La::store_sum(chunk_.sum_c, t, h * slope, m > 0);
      }
    }
  }
  void contract_transposed(const T* g, std::int32_t n) {
    if (t_.n_angular == 8)
      contract_transposed_rows<8>(g, n);
    else if (t_.n_angular == 4)
      contract_transposed_rows<4>(g, n);
    else
      contract_transposed_rows<0>(g, n);
  }

  // From the three sums of a triple to the derivatives with respect to both displacements.
  void pull_back(const Run* runs, int n_runs) {
    const V factor(t_.angular_factor), half_factor(T(0.5) * t_.angular_factor);
    const V beta_factor(t_.beta * t_.angular_factor);
    for (int i = 0; i < n_runs; ++i) {
      const Run run = runs[i];
      const L jx = La::broadcast(nb_.ax, run.j), jy = La::broadcast(nb_.ay, run.j),
              jz = La::broadcast(nb_.az, run.j), j_inverse = La::broadcast(nb_.inverse_ar, run.j);
      const L jfc = La::broadcast(nb_.afc, run.j), jslope = La::broadcast(nb_.aslope, run.j);
      V sum_x(T(0)), sum_y(T(0)), sum_z(T(0));
      for (std::int32_t q = 0; q < run.count; q += W) {
        const std::int32_t k = run.k + q, from = run.first + q;
        const L kx = La::load(nb_.ax, k), ky = La::load(nb_.ay, k), kz = La::load(nb_.az, k);
        const L kfc = La::load(nb_.afc, k), kslope = La::load(nb_.aslope, k);
        const L k_inverse = La::load(nb_.inverse_ar, k);
        const L s = La::scale(factor, La::load(chunk_.sum, from));
        const L common = La::scale(half_factor, La::load(chunk_.sum_r, from)) * (jfc * kfc);
        const L by_jr = s * (jslope * kfc) + common;
        const L by_kr = s * (jfc * kslope) + common;
        const L by_cos = La::scale(beta_factor, La::load(chunk_.sum_c, from)) * (jfc * kfc);
        const L cosine = jx * kx + jy * ky + jz * kz;
        const L on_j = by_cos * j_inverse, on_k = by_cos * k_inverse;
        const L along_j = by_jr - on_j * cosine, along_k = by_kr - on_k * cosine;
        const std::int32_t count = run.count - q;
        sum_x += keep_first(La::result(along_j * jx + on_j * kx), count);
        sum_y += keep_first(La::result(along_j * jy + on_j * ky), count);
        sum_z += keep_first(La::result(along_j * jz + on_j * kz), count);
        add(nb_.hx + k, keep_first(La::result(along_k * kx + on_k * jx), count));
        add(nb_.hy + k, keep_first(La::result(along_k * ky + on_k * jy), count));
        add(nb_.hz + k, keep_first(La::result(along_k * kz + on_k * jz), count));
      }
      nb_.hx[run.j] += reduce_add(sum_x);
      nb_.hy[run.j] += reduce_add(sum_y);
      nb_.hz[run.j] += reduce_add(sum_z);
    }
  }
  static KINML_HD void add(T* p, V x) { (V::load(p) + x).store(p); }

  // Between the padded row_ and the [D] vector: row_ -> vector, or vector -> row_ with zero
  // padding.
  template <bool kOut>
  void unpad(T* vector) {
    for (int a = 0; a < t_.n_species; ++a)
      move<kOut>(radial_block(a), vector + layout_.radial_begin(a), t_.n_radial, radial_row_);
    T* block = angular_block(0, 0);
    vector += layout_.radial_length();
    const std::int64_t rows = std::int64_t(layout_.n_pairs()) * t_.n_angular;
    if (section_row_ == t_.n_sections) {
      move<kOut>(block, vector, rows * section_row_, rows * section_row_);
      return;
    }
    for (std::int64_t r = 0; r < rows; ++r)
      move<kOut>(block + r * section_row_, vector + r * t_.n_sections, t_.n_sections, section_row_);
  }
  template <bool kOut>
  static void move(T* row, T* vector, std::int64_t n, std::int64_t room) {
    if constexpr (kOut) {
      for (std::int64_t i = 0; i < n; ++i) vector[i] = row[i];
    } else {
      for (std::int64_t i = 0; i < n; ++i) row[i] = vector[i];
      for (std::int64_t i = n; i < room; ++i) row[i] = T(0);
    }
  }

  const AevTables<T>& t_;
  const StructureView<T>& s_;
  AevLayout layout_;
  std::int64_t radial_row_, angular_row_, section_row_, room_;
  Neighbours<T> nb_;
  Chunk<T> chunk_;
  T* row_;
  T* column_;
  int unit_direction_ = -1;  // jacobian: the coordinate whose derivative is taken
  std::int64_t unit_atom_ = -1;
};

template <class T, int W>
void run_task(const AevTables<T>& tables, const StructureView<T>& structure,
              const AevTask<T>& task) {
  const FlushDenormals<T> flush;
  const AevLayout layout{tables.n_species, tables.n_radial, tables.n_angular, tables.n_sections};
  const std::int64_t length = layout.length();
  switch (task.mode) {
    case AevMode::forward: {
      Centre<T, W, false, false> centre(tables, structure, task.workspace);
      for (std::int64_t i = task.begin; i < task.end; ++i) {
        centre.find_neighbours(i);
        centre.row(task.out + i * length);
      }
      return;
    }
    case AevMode::jvp: {
      Centre<T, W, true, false> centre(tables, structure, task.workspace);
      for (std::int64_t i = task.begin; i < task.end; ++i) {
        centre.find_neighbours(i);
        centre.row(task.out + i * length);
      }
      return;
    }
    case AevMode::vjp: {
      Centre<T, W, false, true> centre(tables, structure, task.workspace);
      for (std::int64_t i = task.begin; i < task.end; ++i) {
        centre.find_neighbours(i);
        centre.transpose(i, task.gradient + i * length, task.out);
      }
      return;
    }
    case AevMode::hvp: {
      Centre<T, W, true, true> centre(tables, structure, task.workspace);
      for (std::int64_t i = task.begin; i < task.end; ++i) {
        centre.find_neighbours(i);
        centre.transpose(i, task.gradient + i * length, task.out);
      }
      return;
    }
    case AevMode::jacobian: {
      Centre<T, W, true, false> centre(tables, structure, task.workspace);
      for (std::int64_t i = task.begin; i < task.end; ++i)
        centre.jacobian(i, task.out + i * length * task.columns, task.columns);
      return;
    }
  }
}

// The register width: fewest registers for a row of sections, then the narrowest.
template <class T>
void choose_width(const AevTables<T>& tables, const StructureView<T>& structure,
                  const AevTask<T>& task) {
  constexpr int native = kNativeWidth<T>;
  const auto registers = [&](int width) { return (tables.n_sections + width - 1) / width; };
  if constexpr (native >= 16) {
    if (registers(16) < registers(8)) return run_task<T, 16>(tables, structure, task);
  }
  if constexpr (native >= 8) {
    if (registers(8) < registers(4)) return run_task<T, 8>(tables, structure, task);
  }
  if constexpr (native >= 4) {
    return run_task<T, 4>(tables, structure, task);
  } else {
    return run_task<T, 2>(tables, structure, task);
  }
}

}  // namespace

void aev_centres(const AevTables<double>& tables, const StructureView<double>& structure,
                 const AevTask<double>& task) {
  choose_width(tables, structure, task);
}
void aev_centres(const AevTables<float>& tables, const StructureView<float>& structure,
                 const AevTask<float>& task) {
  choose_width(tables, structure, task);
}

}  // namespace KINML_ISA
}  // namespace kinml
