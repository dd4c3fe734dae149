// What is behind kinml.h: a model from its file, in the precision that is asked for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "kinml.h"
#include "plain_model.h"

namespace kinml::md {

class Potential {
 public:
  // Throws ModelFileError.
  explicit Potential(const std::string& path, kinml_precision precision = KINML_AS_TRAINED);
  ~Potential();
  Potential(const Potential&) = delete;
  Potential& operator=(const Potential&) = delete;

  const PlainModel& model() const;
  // Place of an element in the model's list, -1: it has none.
  std::int64_t species(const std::string& element) const;
  bool single() const;  // whether it computes in float

  // See kinml_compute. Throws std::bad_alloc, and std::invalid_argument (one sentence) for positions
  // that are no numbers, a cell without volume, and indices out of range.
  void compute(const kinml_atoms& atoms, const kinml_results& results, int n_threads);

 private:
  struct Engine;
  template <class T>
  struct EngineOf;
  std::unique_ptr<Engine> engine_;
};

}  // namespace kinml::md
