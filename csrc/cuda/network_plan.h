// Where the numbers of a chain of per-species networks stand: in the parameters, in their packed
// form, and among what a row of a tile keeps. Passed to kernels by value.
//
// Packed form of one layer, from LayerPlan::packed on: W^T [in_room, out_room], then
// W [out_room, in_room], then b [out_room]. Rooms are widths rounded up to 4; what is behind the
// widths is 0, so that products run over whole rooms.
#pragma once

#include <string>

#include "../core/config.h"
#include "../core/network_shape.h"
#include "launch.h"

namespace kinml::cuda {

inline constexpr int kVector = 4;  // numbers that a thread loads at a time
KINML_HD int room_of(int width) {
  return (width + kVector - 1) / kVector * kVector;
}

struct LayerPlan {
  int in, out;
  int parameters;  // W [out, in] row-major, then b [out]
  int packed;
  int column;  // where its outputs begin in a row of a hidden array

  KINML_HD int in_room() const { return room_of(in); }
  KINML_HD int out_room() const { return room_of(out); }
  KINML_HD int transposed() const { return packed; }
  KINML_HD int straight() const { return packed + in_room() * out_room(); }
  KINML_HD int bias() const { return packed + 2 * in_room() * out_room(); }
  KINML_HD int packed_end() const { return bias() + out_room(); }
};

inline constexpr int kMostLayers = 256;      // of all species and levels
inline constexpr int kMostActivations = 16;  // layers of one network

struct ChainPlan {
  int n_levels = 0, n_species = 0, n_layers = 0;
  bool biases = false;
  int parameters = 0, packed = 0;  // numbers of the chain
  int hidden = 0;                  // numbers of one hidden array of a row: room for every layer
  int widest = 0;                  // room of the widest layer's outputs
  int features = 0;  // room of a row of features: descriptor, energy of the level below
  int activations[kMostActivations] = {};
  LayerPlan layers[kMostLayers] = {};

  KINML_HD const LayerPlan& layer(int level, int species, int l) const {
    return layers[(level * n_species + species) * n_layers + l];
  }
};

// Throws Error where there are more layers than a kernel takes.
inline ChainPlan plan_chain(const NetworkChain& networks) {
  ChainPlan plan;
  plan.n_levels = static_cast<int>(networks.n_levels());
  plan.n_species = static_cast<int>(networks.n_species());
  plan.n_layers = static_cast<int>(networks.shapes[0].n_layers);
  plan.biases = networks.shapes[0].biases;
  const int layers = plan.n_levels * plan.n_species * plan.n_layers;
  if (layers > kMostLayers || plan.n_layers > kMostActivations)
    throw Error("on a GPU there may be " + std::to_string(kMostLayers) + " layers in all and " +
                std::to_string(kMostActivations) + " in a network; these networks have " +
                std::to_string(layers) + " and " + std::to_string(plan.n_layers) +
                ": use the CPU, or fewer layers");
  std::int64_t parameters = 0, packed = 0;
  for (int l = 0; l < plan.n_layers; ++l)
    plan.activations[l] = static_cast<int>(networks.shapes[0].activations[l]);
  for (int k = 0; k < plan.n_levels; ++k)
    for (int s = 0; s < plan.n_species; ++s) {
      int column = 0;
      for (int l = 0; l < plan.n_layers; ++l) {
        LayerPlan& layer = plan.layers[(k * plan.n_species + s) * plan.n_layers + l];
        layer.in = static_cast<int>(networks.shapes[k].size(s, l));
        layer.out = static_cast<int>(networks.shapes[k].size(s, l + 1));
        layer.parameters = static_cast<int>(parameters);
        layer.packed = static_cast<int>(packed);
        layer.column = column;
        column += layer.out_room();
        parameters += std::int64_t(layer.out) * (layer.in + (plan.biases ? 1 : 0));
        packed += 2 * std::int64_t(layer.in_room()) * layer.out_room() + layer.out_room();
        if (packed > 2147483647)
          throw Error("on a GPU the networks may have 2^30 weights; these have more: use the CPU");
        plan.widest = layer.out_room() > plan.widest ? layer.out_room() : plan.widest;
        if (l == 0 && layer.in_room() > plan.features) plan.features = layer.in_room();
      }
      plan.hidden = column > plan.hidden ? column : plan.hidden;
    }
  plan.parameters = static_cast<int>(parameters);
  plan.packed = static_cast<int>(packed);
  return plan;
}

// Item i of packed_items(plan) of the packed form: writes it from the parameters.
struct PackedPlace {
  int layer;      // of ChainPlan::layers
  int parameter;  // or -1: 0
};
KINML_HD PackedPlace packed_place(const ChainPlan& plan, int i) {
  // The last layer that begins at or before i.
  int low = 0, high = plan.n_levels * plan.n_species * plan.n_layers;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (plan.layers[middle].packed <= i)
      low = middle;
    else
      high = middle;
  }
  const LayerPlan& layer = plan.layers[low];
  int input, output;
  if (i < layer.straight()) {
    input = (i - layer.transposed()) / layer.out_room();
    output = (i - layer.transposed()) % layer.out_room();
  } else if (i < layer.bias()) {
    output = (i - layer.straight()) / layer.in_room();
    input = (i - layer.straight()) % layer.in_room();
  } else {
    output = i - layer.bias();
    return {low, plan.biases && output < layer.out
                     ? layer.parameters + layer.out * layer.in + output
                     : -1};
  }
  const bool weight = input < layer.in && output < layer.out;
  return {low, weight ? layer.parameters + output * layer.in + input : -1};
}

}  // namespace kinml::cuda
