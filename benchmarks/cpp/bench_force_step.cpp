// Where the time of a training step on energies and forces goes: the kernels of force_step_cpu.cpp,
// one after the other, on one thread, over tiles of real molecules.
//
//   cmake -B build -DKINML_WITH_TORCH=OFF -DKINML_BUILD_BENCHMARKS=ON && cmake --build build
//   python benchmarks/tasks.py build/c5h5.bin
//   build/bench_force_step build/c5h5.bin > build/kernels.json
//
// The file holds coordinates of C5H5 molecules, five C and then five H each, as raw float64. The
// output is what pytest's --kernels takes: seconds, floating-point operations and bytes for a batch
// of 50. A second argument gives the seconds to spend on a kernel (1).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <functional>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "../../csrc/cpu/aev_environments.h"
#include "../../csrc/cpu/force_step_cpu.h"
#include "../../csrc/cpu/force_step_kernels.h"
#include "../../csrc/cpu/networks_cpu.h"

namespace {

using namespace kinml;
using namespace kinml::cpu;
using Index = std::int64_t;
using Clock = std::chrono::steady_clock;

constexpr Index kAtoms = 10, kBatch = 50, kTile = 6, kLength = 224, kMembers = 8;

AevParameters descriptor() {
  const auto shifts = [](int n, double cutoff) {
    std::vector<double> list;
    for (int l = 0; l < n; ++l) list.push_back((l + 0.5) * cutoff / n);
    return list;
  };
  const auto eta = [](int n, double cutoff) { return std::pow(2.0 / 3.0 * cutoff / n, -2); };
  std::vector<double> sections;
  for (int m = 0; m < 8; ++m) sections.push_back(3.14159265358979323846 * m / 7);
  return {2,   shifts(16, 5.2), eta(16, 5.2), 5.2, 1.0, shifts(8, 3.8), eta(8, 3.8), 3.8,
          1.0, sections,        8.0,          0.95};
}

struct Row {
  const char* kernel;
  double seconds, flops, bytes;
};

// Seconds of processor time of this thread: what others do on the machine counts less.
double processor_seconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

// Median seconds of one batch's share in calls of `function`, each for kTile molecules.
double measure(double seconds, const std::function<void()>& before,
               const std::function<void()>& function) {
  std::vector<double> times;
  double total = 0;
  while (times.size() < 50 || total < seconds) {
    before();
    const auto start = Clock::now();
    function();
    times.push_back(std::chrono::duration<double>(Clock::now() - start).count());
    total += times.back();
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  return times[times.size() / 2] * kBatch / kTile;
}

// Whether it pays to keep what does not depend on the weights, for all structures of a data set,
// instead of computing it in every step: an epoch of all that a step does with descriptors (a, J^T g,
// J r), structures in random order, from kept memory and anew in turn. Medians, for a batch.
//
// Kept are the factors of pairs and triples (Environment) and the vectors a; `bytes` are theirs.
template <class T>
std::vector<Row> bench_kept(const std::vector<T>& coordinates, Index n_structures, double seconds) {
  const AevParameters parameters = descriptor();
  const AevTableStorage<T> tables(parameters);
  std::vector<Index> species, order(n_structures);
  for (Index a = 0; a < kAtoms; ++a) species.push_back(a < 5 ? 0 : 1);
  std::iota(order.begin(), order.end(), Index(0));
  std::mt19937_64 random(2);
  std::normal_distribution<double> normal;
  const Index of_rows = kAtoms * kLength, offsets[] = {0, kAtoms};
  std::vector<T> a(of_rows), g(of_rows), v(of_rows), r(3 * kAtoms), forces(3 * kAtoms);
  for (std::vector<T>* const numbers : {&g, &r})
    for (T& x : *numbers) x = static_cast<T>(0.1 * normal(random));
  Environments<T> environments(tables);
  const auto make = [&](Index s) {
    environments.set_structure(
        {kAtoms, 1, species.data(), offsets, coordinates.data() + 3 * kAtoms * s}, 0);
    return environments.make(0, kAtoms);
  };

  // One behind the other in one piece of memory.
  std::vector<T> memory, rows(n_structures * of_rows);
  std::vector<Environment<T>> kept;
  std::vector<Index> pairs, triples;
  double read = 0;  // numbers of all structures
  for (Index s = 0; s < n_structures; ++s) {
    environments.clear();
    const Environment<T> e = make(s);
    const auto keep = [&](const T* numbers, Index count, std::vector<Index>& places) {
      memory.resize(padded(static_cast<Index>(memory.size())));
      places.push_back(static_cast<Index>(memory.size()));
      memory.insert(memory.end(), numbers, numbers + count);
    };
    keep(e.pairs, pair_memory(tables, e), pairs);
    keep(e.triples, e.triple_numbers, triples);
    KINML_CALL_KERNEL(aev_rows, tables, e, rows.data() + s * of_rows, kLength);
    read += static_cast<double>((9 + tables.n_radial) * e.n_pairs + e.triple_numbers + of_rows);
    kept.push_back(e);
  }
  Scratch aligned;
  T* const begin = aligned.get<T>(memory.size());
  std::copy(memory.begin(), memory.end(), begin);
  for (Index s = 0; s < n_structures; ++s) {
    kept[s].pairs = begin + pairs[s];
    kept[s].triples = begin + triples[s];
  }

  const auto products = [&](const Environment<T>& e) {
    std::fill(forces.begin(), forces.end(), T(0));
    T* const scratch = environments.scratch(e);
    KINML_CALL_KERNEL(aev_transposed, tables, e, g.data(), kLength, forces.data(), nullptr,
                      scratch);
    KINML_CALL_KERNEL(aev_tangent_rows, tables, e, r.data(), nullptr, v.data(), kLength, scratch);
  };
  const auto anew = [&](Index s) {
    environments.clear();
    const Environment<T> e = make(s);
    KINML_CALL_KERNEL(aev_rows, tables, e, a.data(), kLength);
    products(e);
  };
  const auto from_kept = [&](Index s) {
    std::copy_n(rows.data() + s * of_rows, of_rows, a.data());
    products(kept[s]);
  };
  const auto epoch = [&](const auto& function) {
    std::shuffle(order.begin(), order.end(), random);
    const double start = processor_seconds();
    for (const Index s : order) function(s);
    return (processor_seconds() - start) * kBatch / static_cast<double>(n_structures);
  };
  std::vector<double> times[2];
  for (double total = 0; times[0].size() < 5 || total < 2 * seconds; total += times[1].back()) {
    times[0].push_back(epoch(anew));
    times[1].push_back(epoch(from_kept));
    total += times[0].back();
  }
  for (std::vector<double>& all : times)
    std::nth_element(all.begin(), all.begin() + all.size() / 2, all.end());
  const double bytes = read * sizeof(T) / static_cast<double>(n_structures) * kBatch;
  return {{"not in a step: descriptors, Jᵀg and J r", times[0][times[0].size() / 2], 0, 0},
          {"not in a step: the same from kept factors", times[1][times[1].size() / 2], 0, bytes}};
}

template <class T>
std::vector<Row> bench(const std::vector<double>& all, double seconds) {
  const Index n_structures = static_cast<Index>(all.size()) / (3 * kAtoms);
  const std::vector<T> coordinates(all.begin(), all.end());
  std::vector<Index> species, offsets{0};
  for (Index s = 0; s < n_structures; ++s) {
    for (Index a = 0; a < kAtoms; ++a) species.push_back(a < 5 ? 0 : 1);
    offsets.push_back(offsets.back() + kAtoms);
  }
  const std::vector<Index> sizes = {kLength, 48, 24, 12, 1, kLength, 48, 24, 12, 1};
  const std::vector<Index> activations = {1, 1, 1, 0};
  const NetworkShape shape{2, 4, sizes.data(), activations.data(), false};
  std::mt19937_64 random(1);
  std::normal_distribution<double> normal;
  std::vector<T> weights(2 * shape.parameters_of(0)), gradient(weights.size());
  for (T& w : weights) w = static_cast<T>(0.1 * normal(random));

  const AevParameters parameters = descriptor();
  const AevTableStorage<T> tables(parameters);
  Environments<T> environments(tables);
  const PackedNetworks<T> networks(shape, weights.data(), 1);
  const Index n = kTile * kAtoms;
  std::vector<Index> rows, starts{0, n / 2, n};
  for (int z = 0; z < 2; ++z)
    for (Index a = 0; a < n; ++a)
      if (species[a] == z) rows.push_back(a);
  std::vector<T> a(n * kLength), g(n * kLength), v(n * kLength), r(3 * n), forces(3 * n);
  std::vector<T> atomic(n), seeds(n, T(0.1));
  for (T& x : r) x = static_cast<T>(0.01 * normal(random));
  Scratch memory;
  NetworkTile<T> tile{a.data(), kLength, rows.data(), starts.data(),
                      memory.get<T>(networks.tile_memory(n))};

  // Another tile of the data set at each call, as in training.
  Index call = 0, first = 0;
  std::vector<Environment<T>> kept(kTile);
  double triples = 0, calls = 0;
  const auto choose = [&] { first = kTile * (call++ % (n_structures / kTile)); };
  const Index one[] = {0, kAtoms};
  const auto environment = [&](bool whole) {
    environments.clear();
    for (Index i = 0; i < kTile; ++i) {
      environments.set_structure(
          {kAtoms, 1, species.data(), one, coordinates.data() + 3 * kAtoms * (first + i)}, 0);
      kept[i] = environments.find(0, kAtoms);
      if (whole) environments.finish(kept[i]);
    }
  };
  const auto aev = [&] {
    for (Index i = 0; i < kTile; ++i)
      KINML_CALL_KERNEL(aev_rows, tables, kept[i], a.data() + i * kAtoms * kLength, kLength);
  };
  const auto prepared = [&] {
    choose();
    environment(true);
    for (const Environment<T>& e : kept) triples += static_cast<double>(e.n_triples);
    calls += kTile;
    aev();
  };
  const auto after_forward = [&] {
    prepared();
    tile.tangents = nullptr;
    networks.forward(tile, atomic.data());
  };
  const auto after_backward = [&] {
    after_forward();
    networks.backward(tile, nullptr, g.data(), kLength);
  };
  const auto tangents = [&] {
    for (Index i = 0; i < kTile; ++i)
      KINML_CALL_KERNEL(aev_tangent_rows, tables, kept[i], r.data() + 3 * kAtoms * i, nullptr,
                        v.data() + i * kAtoms * kLength, kLength, environments.scratch(kept[i]));
  };
  const auto before_tangent = [&] {
    after_backward();
    tangents();
    tile.tangents = v.data();
    tile.tangent_stride = kLength;
  };
  const auto after_tangent = [&] {
    before_tangent();
    networks.tangent(tile, nullptr);
  };
  const auto after_second = [&] {
    after_tangent();
    networks.second_backward(tile, seeds.data(), nullptr, 0);
  };

  std::vector<Row> result;
  const auto add = [&](const char* kernel, const std::function<void()>& before,
                       const std::function<void()>& function, double flops, double bytes = 0) {
    result.push_back({kernel, measure(seconds, before, function), flops, bytes});
  };
  const double atoms = kBatch * kAtoms;
  const double layer = 2.0 * kLength * 48 * atoms, others = 2.0 * (48 * 24 + 24 * 12 + 12) * atoms;
  prepared();
  for (int i = 0; i < 200; ++i) prepared();
  const double n_triples = triples / calls * kBatch;  // of a batch

  add(
      "weights packed", [] {}, [&] { const PackedNetworks<T> again(shape, weights.data(), 1); }, 0,
      0);
  result.back().seconds *= double(kTile) / kBatch;  // once a step
  result.back().bytes = 3.0 * weights.size() * sizeof(T);
  add(
      "neighbours", choose, [&] { environment(false); },
      40 * 90 * kBatch + 28.0 * 16 * 90 * kBatch);
  add(
      "triples",
      [&] {
        choose();
        environment(false);
      },
      [&] {
        for (Environment<T>& e : kept) environments.finish(e);
      },
      (40 + 3 * 28 + 2 * 8) * n_triples);
  add("AEV a", prepared, aev, (14 + 2 * 64) * n_triples);
  add("networks forward", prepared, [&] { networks.forward(tile, atomic.data()); }, layer + others);
  add(
      "networks backward to g", after_forward,
      [&] { networks.backward(tile, nullptr, g.data(), kLength); }, layer + others);
  add(
      "forces Jᵀg", after_backward,
      [&] {
        for (Index i = 0; i < kTile; ++i) {
          T* const to = forces.data() + 3 * kAtoms * i;
          std::fill_n(to, 3 * kAtoms, T(0));
          KINML_CALL_KERNEL(aev_transposed, tables, kept[i], g.data() + i * kAtoms * kLength,
                            kLength, to, nullptr, environments.scratch(kept[i]));
        }
      },
      (14 * 8 + 4 * 64) * n_triples);
  add("tangents Jr", after_backward, tangents, (20 + 4 * 64) * n_triples);
  add(
      "networks along the tangents", before_tangent, [&] { networks.tangent(tile, nullptr); },
      layer + others);
  add(
      "networks backward again", after_tangent,
      [&] { networks.second_backward(tile, seeds.data(), nullptr, 0); }, others);
  add(
      "weight gradients", after_second,
      [&] { networks.weight_gradients(tile, gradient.data(), false); }, 2 * (layer + others));
  const Index n_parts = 8;
  std::vector<T> parts(n_parts * weights.size());
  std::vector<const T*> leaves;
  std::vector<Index> firsts{0};
  for (Index part = 0; part < n_parts; ++part) {
    leaves.push_back(parts.data() + part * weights.size());
    firsts.push_back(part + 1);
  }
  add(
      "sum of weight gradients", [] {},
      [&] {
        KINML_CALL_KERNEL(sum_tree, leaves.data(), firsts.data(), n_parts,
                          static_cast<Index>(weights.size()), gradient.data());
      },
      0);
  result.back().seconds *= double(kTile) / kBatch;  // once a step
  result.back().bytes = double(n_parts) * weights.size() * sizeof(T);

  const std::vector<double> energies(n_structures), targets(3 * kAtoms * n_structures),
      ones(n_structures, 1.0);
  std::vector<Index> chosen(kBatch);
  std::vector<double> residuals(kBatch), errors(3 * kBatch), losses(2);
  System<T> system{kAtoms * n_structures, n_structures, species.data(), offsets.data(),
                   coordinates.data()};
  system.chosen = chosen.data();
  system.n_chosen = kBatch;
  const Model<T> model{parameters, {{shape}}, weights.data()};
  const double scales[] = {0.3, 0.7}, counts[] = {kBatch, kBatch};
  const Loss loss{1,
                  n_structures,
                  kAtoms * n_structures,
                  energies.data(),
                  ones.data(),
                  targets.data(),
                  ones.data(),
                  scales,
                  counts,
                  nullptr,
                  nullptr};
  add(
      "step",
      [&] {
        for (Index& s : chosen) s = static_cast<Index>(random() % n_structures);
      },
      [&] {
        force_step<T>(model, system, loss, losses.data(), gradient.data(), residuals.data(),
                      errors.data(), 1);
      },
      0);
  Row& step = result.back();
  step.seconds *= double(kTile) / kBatch;
  for (std::size_t i = 0; i + 1 < result.size(); ++i) step.flops += result[i].flops;

  // Not a part of a step: the evaluation of an ensemble.
  std::vector<std::vector<T>> member_g(kMembers, g), member_forces(kMembers, forces);
  const auto before_many = [&] {
    after_backward();
    for (auto& own : member_g) own = g;
  };
  add(
      "not in a step: forces Jᵀg of 8 members", before_many,
      [&] {
        for (Index i = 0; i < kTile; ++i) {
          const T* from[kMembers];
          T* to[kMembers];
          for (Index m = 0; m < kMembers; ++m) {
            from[m] = member_g[m].data() + i * kAtoms * kLength;
            to[m] = member_forces[m].data() + 3 * kAtoms * i;
            std::fill_n(to[m], 3 * kAtoms, T(0));
          }
          KINML_CALL_KERNEL(aev_transposed_many, tables, kept[i], from, kMembers, kLength, to,
                            nullptr, environments.many_scratch(kept[i]));
        }
      },
      kMembers * (14 * 8 + 4 * 64) * n_triples);
  for (const Row& row : bench_kept<T>(coordinates, n_structures, seconds)) result.push_back(row);
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: bench_force_step COORDINATES [SECONDS]\n");
    return 2;
  }
  std::ifstream file(argv[1], std::ios::binary | std::ios::ate);
  if (!file) {
    std::fprintf(stderr, "%s: cannot be read\n", argv[1]);
    return 2;
  }
  std::vector<double> coordinates(static_cast<std::size_t>(file.tellg()) / sizeof(double));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(coordinates.data()),
            static_cast<std::streamsize>(coordinates.size() * sizeof(double)));
  const double seconds = argc > 2 ? std::atof(argv[2]) : 1.0;
  const char* separator = "[";
  const auto print = [&](const std::vector<Row>& rows, const char* dtype) {
    for (const Row& row : rows) {
      std::printf(
          "%s\n{\"kernel\": \"%s\", \"dtype\": \"%s\", \"threads\": 1, \"seconds\": %.4g, "
          "\"flops\": %.6g, \"bytes\": %.6g}",
          separator, row.kernel, dtype, row.seconds, row.flops, row.bytes);
      separator = ",";
    }
  };
  print(bench<double>(coordinates, seconds), "float64");
  print(bench<float>(coordinates, seconds), "float32");
  std::printf("\n]\n");
}
