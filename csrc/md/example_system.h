// What the examples of molecular dynamics share: an XYZ file, velocities, and velocity Verlet.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <istream>
#include <map>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace example {

// CODATA 2018: eV and angstrom, with masses in u, make this unit of time, in femtoseconds.
inline constexpr double kTimeUnit = 10.180505710774743;
inline constexpr double kBoltzmann = 8.617333262e-5;  // eV / K

struct Options {
  long steps = 100;
  double femtoseconds = 0.5, kelvin = 300;
  int threads = static_cast<int>(std::thread::hardware_concurrency());

  Options(int n_arguments, char** arguments, int first) {
    const auto number = [&](int i, double usual) {
      if (i >= n_arguments) return usual;
      char* end = nullptr;
      const double value = std::strtod(arguments[i], &end);
      if (end == arguments[i] || *end != 0 || !(value >= 0))
        throw std::invalid_argument(std::string(arguments[i]) + " is no number from 0 on");
      return value;
    };
    steps = static_cast<long>(number(first, 100));
    femtoseconds = number(first + 1, 0.5);
    kelvin = number(first + 2, 300);
  }
};

struct System {
  std::vector<std::string> elements;
  std::vector<double> positions;  // [n, 3] angstrom
  std::vector<double> cell;       // [3, 3] angstrom, or empty: a molecule
  std::vector<std::int64_t> periodic = {0, 0, 0};

  std::int64_t n() const { return static_cast<std::int64_t>(elements.size()); }
  const double* periodic_cell() const { return cell.empty() ? nullptr : cell.data(); }
};

// Relative atomic masses of the elements that ANI models know.
inline double mass_of(const std::string& element) {
  static const std::map<std::string, double> masses = {
      {"H", 1.008},  {"C", 12.011},   {"N", 14.007}, {"O", 15.999},  {"F", 18.9984}, {"S", 32.06},
      {"Cl", 35.45}, {"P", 30.97376}, {"B", 10.81},  {"Si", 28.085}, {"Br", 79.904}};
  const auto found = masses.find(element);
  if (found == masses.end())
    throw std::invalid_argument("the mass of " + element + " is not known");
  return found->second;
}

inline System read_xyz(std::istream& stream) {
  System system;
  std::string line, comment;
  std::int64_t n = 0;
  if (!std::getline(stream, line) || !(std::istringstream(line) >> n) || n < 1)
    throw std::invalid_argument("no XYZ file: its first line is the number of atoms");
  std::getline(stream, comment);
  const std::string key = "Lattice=\"";
  if (const std::size_t at = comment.find(key); at != comment.npos) {
    std::istringstream numbers(comment.substr(at + key.size()));
    system.cell.resize(9);
    for (double& x : system.cell)
      if (!(numbers >> x)) throw std::invalid_argument("the Lattice has not nine numbers");
    system.periodic = {1, 1, 1};
  }
  for (std::int64_t i = 0; i < n; ++i) {
    std::string element;
    double x, y, z;
    if (!std::getline(stream, line) || !(std::istringstream(line) >> element >> x >> y >> z))
      throw std::invalid_argument("atom " + std::to_string(i + 1) +
                                  " has no element and three coordinates");
    system.elements.push_back(element);
    system.positions.insert(system.positions.end(), {x, y, z});
  }
  return system;
}

// Velocity Verlet; energy_and_forces(positions, forces) returns eV and writes eV/angstrom.
template <class Function>
void run_nve(System& system, const Options& options, const Function& energy_and_forces) {
  const std::int64_t n = system.n();
  std::vector<double> mass, velocity(3 * n), forces(3 * n), momentum(3);
  double total_mass = 0;
  std::mt19937_64 generator(1);
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < n; ++i) {
    mass.push_back(mass_of(system.elements[i]));
    total_mass += mass[i];
    for (int d = 0; d < 3; ++d) {
      velocity[3 * i + d] = std::sqrt(kBoltzmann * options.kelvin / mass[i]) * normal(generator);
      momentum[d] += mass[i] * velocity[3 * i + d];
    }
  }
  for (std::int64_t i = 0; i < 3 * n; ++i) velocity[i] -= momentum[i % 3] / total_mass;

  const double dt = options.femtoseconds / kTimeUnit;
  const auto kinetic = [&] {
    double energy = 0;
    for (std::int64_t i = 0; i < 3 * n; ++i)
      energy += 0.5 * mass[i / 3] * velocity[i] * velocity[i];
    return energy;
  };
  const auto kick = [&] {
    for (std::int64_t i = 0; i < 3 * n; ++i) velocity[i] += 0.5 * dt * forces[i] / mass[i / 3];
  };
  double potential = energy_and_forces(system.positions, forces);
  std::printf("# fs, potential, kinetic and total energy in eV\n");
  const long often = options.steps > 10 ? options.steps / 10 : 1;
  for (long step = 0;; ++step) {
    if (step % often == 0 || step == options.steps)
      std::printf("%.2f %.10f %.10f %.10f\n", step * options.femtoseconds, potential, kinetic(),
                  potential + kinetic());
    if (step == options.steps) return;
    kick();
    for (std::int64_t i = 0; i < 3 * n; ++i) system.positions[i] += dt * velocity[i];
    potential = energy_and_forces(system.positions, forces);
    kick();
  }
}

}  // namespace example
