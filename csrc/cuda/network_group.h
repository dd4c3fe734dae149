// The passes of the per-species networks for the rows (atoms) of a tile, by one block. Formulas and
// names: csrc/cpu/networks_cpu.h.
//
// Rows are sorted by species. Each product has items of 4 x 4 results, of which a thread keeps the
// sums in registers; where there are fewer items than threads, the inner dimension is divided too
// and the parts are added in order.
#pragma once

#include "../core/activation.h"
#include "group.h"
#include "network_plan.h"

namespace kinml::cuda {

// Numbers that lie beside one another, loaded at once.
template <class T>
struct alignas(16) Vector {
  T x[kVector];
};
template <class T>
KINML_DEVICE Vector<T> load_vector(const T* p) {
  return *reinterpret_cast<const Vector<T>*>(p);
}

inline constexpr int kMostParts = 4;  // of the inner dimension of a product

// Rows of a tile and how they are cut into fours, in the memory of the block.
struct TileRows {
  int n;         // rows
  int n_fours;   // of which the last of a species may have fewer rows
  int* starts;   // [n_species + 1]
  int* species;  // [n_fours]
  int* first;    // [n_fours] first row

  KINML_HD static int most_fours(int rows, int n_species) { return rows / kVector + n_species; }
  KINML_HD void take(Pieces& pieces, int rows, int n_species) {
    starts = pieces.take<int>(n_species + 1);
    species = pieces.take<int>(most_fours(rows, n_species));
    first = pieces.take<int>(most_fours(rows, n_species));
  }
  KINML_DEVICE int species_of(int row) const {
    int s = 0;
    while (row >= starts[s + 1]) ++s;
    return s;
  }
  // From starts, which must be written; one step.
  KINML_DEVICE void cut(const Block& block, int n_species) {
    n = starts[n_species];
    n_fours = 0;
    for (int s = 0; s < n_species; ++s)
      n_fours += (starts[s + 1] - starts[s] + kVector - 1) / kVector;
    block.each(n_species, [&](int s) {
      int place = 0;
      for (int before = 0; before < s; ++before)
        place += (starts[before + 1] - starts[before] + kVector - 1) / kVector;
      for (int row = starts[s]; row < starts[s + 1]; row += kVector, ++place) {
        species[place] = s;
        first[place] = row;
      }
    });
  }
};

// What the passes of one network of the chain keep of a tile, row after row with a stride; columns
// as in LayerPlan::column.
template <class T>
struct HiddenArrays {
  T* values;    // h
  T* slopes;    // f'(z)
  T* bends;     // f''(z), then f''(z) delta^h, then (with dz) mu
  T* deltas;    // delta
  T* tangents;  // dh
  int stride;
  std::int64_t size;  // of one array

  // One set for each of so many networks.
  KINML_HD void take(Pieces& pieces, int rows, int hidden, bool second, int n_networks = 1) {
    stride = hidden;
    size = std::int64_t(rows) * hidden;
    const std::int64_t n = n_networks * size;
    values = pieces.take<T>(n);
    slopes = pieces.take<T>(n);
    deltas = pieces.take<T>(n);
    bends = second ? pieces.take<T>(n) : nullptr;
    tangents = second ? pieces.take<T>(n) : nullptr;
  }
  KINML_DEVICE HiddenArrays of(int level) const {
    HiddenArrays arrays = *this;
    arrays.values += level * size;
    arrays.slopes += level * size;
    arrays.deltas += level * size;
    if (bends != nullptr) arrays.bends += level * size;
    if (tangents != nullptr) arrays.tangents += level * size;
    return arrays;
  }
};

// One matrix for each species: [inner, columns] with rows of `columns` numbers.
template <class T>
struct Factor {
  const T* numbers;
  int inner, columns;
};

// The rows to multiply it with: [rows, stride], of which a species' numbers begin at
// column_of(species).
template <class T, class ColumnOf>
struct LeftFactor {
  const T* numbers;
  int stride;
  ColumnOf column_of;
};

// sums[i][j] += sum over d in [begin, end) of rows[i][d] factor[d][column + j]
template <class T>
KINML_DEVICE void multiply_fours(const T* const (&rows)[kVector], const Factor<T>& factor,
                                 int column, int begin, int end, T (&sums)[kVector][kVector]) {
  for (int d = begin; d < end; d += kVector) {
    Vector<T> x[kVector];
    KINML_UNROLL
    for (int i = 0; i < kVector; ++i) x[i] = load_vector(rows[i] + d);
    KINML_UNROLL
    for (int e = 0; e < kVector; ++e) {
      const Vector<T> y =
          load_vector(factor.numbers + std::int64_t(d + e) * factor.columns + column);
      KINML_UNROLL
      for (int i = 0; i < kVector; ++i) KINML_UNROLL
      for (int j = 0; j < kVector; ++j) sums[i][j] += x[i].x[e] * y.x[j];
    }
  }
}

// finish(row, column, species, sum over d of left[row][d] factor[d][column]) for all rows and all
// columns of their species' factor.
// parts  // [kMostParts, rows, most_columns], or null: the inner dimension stays whole
template <class T, class ColumnOf, class FactorOf, class Finish>
KINML_DEVICE void product(const Block& block, const TileRows& rows,
                          const LeftFactor<T, ColumnOf>& left, const FactorOf& factor_of,
                          int most_columns, T* parts, const Finish& finish) {
  const int column_fours = most_columns / kVector;
  const int items = rows.n_fours * column_fours;
  if (items == 0) return;
  int n_parts = parts == nullptr ? 1 : block.threads() / items;
  n_parts = n_parts < 1 ? 1 : n_parts > kMostParts ? kMostParts : n_parts;
  block.each(items * n_parts, [&](int item) {
    const int part = item / items, four = item % items / column_fours;
    const int column = item % column_fours * kVector;
    const int s = rows.species[four];
    const Factor<T> factor = factor_of(s);
    if (column >= factor.columns) return;
    const int first = rows.first[four];
    const int left_rows = rows.starts[s + 1] - first;
    // Rows behind the last of the species are the last once more.
    const T* from[kVector];
    KINML_UNROLL
    for (int i = 0; i < kVector; ++i)
      from[i] = left.numbers + left.column_of(s) +
                std::int64_t(first + (i < left_rows ? i : left_rows - 1)) * left.stride;
    // Whole fours of the inner dimension.
    const int fours = factor.inner / kVector;
    T sums[kVector][kVector] = {};
    multiply_fours(from, factor, column, fours * part / n_parts * kVector,
                   fours * (part + 1) / n_parts * kVector, sums);
    KINML_UNROLL
    for (int i = 0; i < kVector; ++i) KINML_UNROLL
    for (int j = 0; j < kVector; ++j) {
      if (i >= left_rows) continue;
      if (n_parts == 1)
        finish(first + i, column + j, s, sums[i][j]);
      else
        parts[(std::int64_t(part) * rows.n + first + i) * most_columns + column + j] = sums[i][j];
    }
  });
  if (n_parts == 1) return;
  block.each(rows.n * most_columns, [&](int item) {
    const int row = item / most_columns, column = item % most_columns;
    const int s = rows.species_of(row);
    if (column >= factor_of(s).columns) return;
    T sum = 0;
    for (int part = 0; part < n_parts; ++part)
      sum += parts[std::int64_t(part) * rows.n * most_columns + item];
    finish(row, column, s, sum);
  });
}

// Numbers [begin, begin + n) of the packed form.
template <class T>
KINML_DEVICE void pack_piece(const Block& block, const ChainPlan& plan, const T* parameters,
                             T* packed, std::int64_t begin, int n) {
  block.each(n, [&](int item) {
    const std::int64_t i = begin + item;
    if (i >= plan.packed) return;
    const PackedPlace from = packed_place(plan, static_cast<int>(i));
    packed[i] = from.parameter < 0 ? T(0) : parameters[from.parameter];
  });
}

// Numbers [begin, begin + n) of the sum of parts [n_parts, size], in order.
template <class T>
KINML_DEVICE void sum_piece(const Block& block, const T* parts, std::int64_t n_parts,
                            std::int64_t size, std::int64_t begin, int n, T* sums) {
  block.each(n, [&](int item) {
    const std::int64_t i = begin + item;
    if (i >= size) return;
    T sum = 0;
    for (std::int64_t part = 0; part < n_parts; ++part) sum += parts[part * size + i];
    sums[i] = sum;
  });
}

// The network of one level, for the rows of a tile.
template <class T>
struct TileNetwork {
  const ChainPlan* plan;
  int level;
  const T* packed;  // [plan->packed]
  HiddenArrays<T> hidden;
  T* parts;  // [kMostParts, rows, plan->widest]

  KINML_DEVICE const LayerPlan& layer(int s, int l) const { return plan->layer(level, s, l); }
  KINML_DEVICE Factor<T> transposed(int s, int l) const {
    const LayerPlan& of = layer(s, l);
    return {packed + of.transposed(), of.in_room(), of.out_room()};
  }
  KINML_DEVICE Factor<T> straight(int s, int l) const {
    const LayerPlan& of = layer(s, l);
    return {packed + of.straight(), of.out_room(), of.in_room()};
  }
  KINML_DEVICE int most_out(int l) const {
    int most = 0;
    for (int s = 0; s < plan->n_species; ++s)
      most = layer(s, l).out_room() > most ? layer(s, l).out_room() : most;
    return most;
  }
  KINML_DEVICE int most_in(int l) const {
    int most = 0;
    for (int s = 0; s < plan->n_species; ++s)
      most = layer(s, l).in_room() > most ? layer(s, l).in_room() : most;
    return most;
  }
  KINML_DEVICE int last() const { return plan->n_layers - 1; }
  KINML_DEVICE std::int64_t place(int row, int s, int l, int column) const {
    return std::int64_t(row) * hidden.stride + layer(s, l).column + column;
  }
  // W_l times the features or, above the first layer, the outputs `below`.
  template <class Finish>
  KINML_DEVICE void multiply(const Block& block, const TileRows& rows, const T* features,
                             int stride, const T* below, int l, const Finish& finish) const {
    const auto column_of = [&](int s) { return l == 0 ? 0 : layer(s, l - 1).column; };
    const LeftFactor<T, decltype(column_of)> left{l == 0 ? features : below,
                                                  l == 0 ? stride : hidden.stride, column_of};
    product(block, rows, left, [&](int s) { return transposed(s, l); }, most_out(l), parts, finish);
  }

  // h, slopes and (if `second`) bends of all layers; the energies f are the values of the last.
  // features  // [rows, stride] with 0 behind the inputs of a species
  KINML_DEVICE void forward(const Block& block, const TileRows& rows, const T* features, int stride,
                            bool second) const {
    for (int l = 0; l <= last(); ++l) {
      const int code = plan->activations[l];
      multiply(block, rows, features, stride, hidden.values, l,
               [&](int row, int column, int s, T sum) {
                 const T z = sum + packed[layer(s, l).bias() + column];
                 const std::int64_t at = place(row, s, l, column);
                 with_activation(code, [&](auto f) {
                   const T h = f.value(z);
                   hidden.values[at] = h;
                   hidden.slopes[at] = f.slope(z, h);
                   if (second) hidden.bends[at] = f.curvature(z, h);
                 });
               });
    }
  }

  // From the seeds t: deltas, and (if `second`) bends become f'' delta^h.
  // seed(row)  // t
  template <class Seed>
  KINML_DEVICE void backward(const Block& block, const TileRows& rows, const Seed& seed,
                             bool second) const {
    const auto keep = [&](int row, int s, int l, int column, T value) {
      const std::int64_t at = place(row, s, l, column);
      hidden.deltas[at] = value * hidden.slopes[at];
      if (second) hidden.bends[at] *= value;
    };
    seed_rows(block, rows, [&](int row, int s, int column) {
      keep(row, s, last(), column, column == 0 ? seed(row) : T(0));
    });
    for (int l = last(); l > 0; --l)
      descend(block, rows, hidden.deltas, l, parts,
              [&](int row, int column, int s, T sum) { keep(row, s, l - 1, column, sum); });
  }

  // Along directions v: tangents dh, and bends become f'' delta^h dz; grad f . v is the tangent of
  // the last layer.
  // v  // [rows, stride] with 0 behind the inputs of a species
  KINML_DEVICE void tangent(const Block& block, const TileRows& rows, const T* v,
                            int stride) const {
    for (int l = 0; l <= last(); ++l)
      multiply(block, rows, v, stride, hidden.tangents, l, [&](int row, int column, int s, T sum) {
        const std::int64_t at = place(row, s, l, column);
        hidden.tangents[at] = sum * hidden.slopes[at];
        hidden.bends[at] *= sum;
      });
  }

  // From the seeds e: bends become mu.
  template <class Seed>
  KINML_DEVICE void second_backward(const Block& block, const TileRows& rows,
                                    const Seed& seed) const {
    const auto keep = [&](int row, int s, int l, int column, T value) {
      const std::int64_t at = place(row, s, l, column);
      hidden.bends[at] += value * hidden.slopes[at];
    };
    seed_rows(block, rows, [&](int row, int s, int column) {
      keep(row, s, last(), column, column == 0 ? seed(row) : T(0));
    });
    for (int l = last(); l > 0; --l)
      descend(block, rows, hidden.bends, l, parts,
              [&](int row, int column, int s, T sum) { keep(row, s, l - 1, column, sum); });
  }

  // t grad f from deltas, dS/da from mu: with respect to the features.
  // outputs  // hidden.deltas or hidden.bends
  // to       // [rows, stride], written up to the room of a species' inputs
  KINML_DEVICE void feature_gradients(const Block& block, const TileRows& rows, const T* outputs,
                                      T* to, int stride) const {
    descend(
        block, rows, outputs, 0, static_cast<T*>(nullptr),
        [&](int row, int column, int, T sum) { to[std::int64_t(row) * stride + column] = sum; });
  }

  // to[row] += the derivative by the input `column` of layer 0, from deltas or mu.
  KINML_DEVICE void add_input_gradient(const Block& block, const TileRows& rows, const T* outputs,
                                       int column, T* to) const {
    block.each(rows.n, [&](int row) {
      const int s = rows.species_of(row);
      const Factor<T> factor = straight(s, 0);
      T sum = 0;
      for (int o = 0; o < factor.inner; ++o)
        sum += outputs[place(row, s, 0, o)] *
               factor.numbers[std::int64_t(o) * factor.columns + column];
      to[row] += sum;
    });
  }

  // gradient  // [plan->parameters] of the chain; those of this level are added to
  // v         // as in tangent, with mu in bends; or null: of t f alone, with deltas
  KINML_DEVICE void weight_gradients(const Block& block, const TileRows& rows, const T* features,
                                     int stride, const T* v, int v_stride, T* gradient) const {
    const T* const outputs = v != nullptr ? hidden.bends : hidden.deltas;
    for (int l = 0; l <= last(); ++l) {
      const int out_fours = most_out(l) / kVector, in_fours = most_in(l) / kVector;
      const int weights = plan->n_species * out_fours * in_fours;
      const int biases = plan->biases ? plan->n_species * out_fours : 0;
      block.each(weights + biases, [&](int item) {
        if (item >= weights) {
          const int s = (item - weights) / out_fours, o = (item - weights) % out_fours * kVector;
          add_bias_gradients(rows, s, l, o, outputs, gradient);
          return;
        }
        const int s = item / (out_fours * in_fours);
        const int o = item / in_fours % out_fours * kVector, d = item % in_fours * kVector;
        const LayerPlan& to = layer(s, l);
        if (o >= to.out || d >= to.in || rows.starts[s] == rows.starts[s + 1]) return;
        T sums[kVector][kVector] = {};
        const auto add = [&](const Vector<T>& x, const Vector<T>& y) {
          KINML_UNROLL
          for (int i = 0; i < kVector; ++i) KINML_UNROLL
          for (int j = 0; j < kVector; ++j) sums[i][j] += x.x[i] * y.x[j];
        };
        for (int row = rows.starts[s]; row < rows.starts[s + 1]; ++row) {
          add(load_vector(outputs + place(row, s, l, o)),
              load_vector(l == 0 ? features + std::int64_t(row) * stride + d
                                 : hidden.values + place(row, s, l - 1, d)));
          if (v == nullptr) continue;
          add(load_vector(hidden.deltas + place(row, s, l, o)),
              load_vector(l == 0 ? v + std::int64_t(row) * v_stride + d
                                 : hidden.tangents + place(row, s, l - 1, d)));
        }
        T* const begin = gradient + to.parameters;
        KINML_UNROLL
        for (int i = 0; i < kVector; ++i) KINML_UNROLL
        for (int j = 0; j < kVector; ++j)
          if (o + i < to.out && d + j < to.in) begin[(o + i) * to.in + d + j] += sums[i][j];
      });
    }
  }

 private:
  // Of the biases of outputs o .. o + 3.
  KINML_DEVICE void add_bias_gradients(const TileRows& rows, int s, int l, int o, const T* outputs,
                                       T* gradient) const {
    const LayerPlan& to = layer(s, l);
    if (o >= to.out || rows.starts[s] == rows.starts[s + 1]) return;
    T sums[kVector] = {};
    for (int row = rows.starts[s]; row < rows.starts[s + 1]; ++row) {
      const Vector<T> mu = load_vector(outputs + place(row, s, l, o));
      KINML_UNROLL
      for (int i = 0; i < kVector; ++i) sums[i] += mu.x[i];
    }
    T* const begin = gradient + to.parameters + to.out * to.in + o;
    KINML_UNROLL
    for (int i = 0; i < kVector; ++i)
      if (o + i < to.out) begin[i] += sums[i];
  }
  // The rows of the last layer: f(row, species, column) for its room of columns.
  template <class F>
  KINML_DEVICE void seed_rows(const Block& block, const TileRows& rows, const F& f) const {
    block.each(rows.n * kVector, [&](int item) {
      const int row = item / kVector;
      f(row, rows.species_of(row), item % kVector);
    });
  }
  // The product of deltas (or mu) of layer l with its weights: for the outputs of the layer below.
  template <class Finish>
  KINML_DEVICE void descend(const Block& block, const TileRows& rows, const T* outputs, int l,
                            T* parts_or_null, const Finish& finish) const {
    const auto column_of = [&](int s) { return layer(s, l).column; };
    const LeftFactor<T, decltype(column_of)> left{outputs, hidden.stride, column_of};
    product(
        block, rows, left, [&](int s) { return straight(s, l); }, most_in(l), parts_or_null,
        finish);
  }
};

}  // namespace kinml::cuda
