#include "prepared_weights.h"

#include <cstring>

#include "dispatch.h"

namespace kinml::cpu {

namespace {

using Index = std::int64_t;

constexpr char kMagic[8] = {'k', 'i', 'n', 'm', 'l', 'p', 'w', '1'};  // 1: version of the layout
constexpr Index kSamples = 16;

struct alignas(64) Header {
  char magic[8];
  Index isa;
  Index number;  // bytes of one
  Index n_members;
  std::uint64_t shapes;
  Index bytes;
  double samples[kSamples];  // of the weights, in their own type
};

// FNV-1a of the description of the networks.
std::uint64_t hash_of(const NetworkChain& chain) {
  std::uint64_t hash = 14695981039346656037u;
  const auto add = [&](Index number) {
    hash = (hash ^ static_cast<std::uint64_t>(number)) * 1099511628211u;
  };
  add(chain.n_levels());
  for (const NetworkShape& shape : chain.shapes) {
    add(shape.n_species);
    add(shape.n_layers);
    add(shape.biases);
    for (Index i = 0; i < shape.n_species * (shape.n_layers + 1); ++i) add(shape.sizes[i]);
  }
  return hash;
}

template <class T>
Index member_numbers(const NetworkChain& chain) {
  Index numbers = 0;
  for (const NetworkShape& shape : chain.shapes)
    numbers += PackedNetworks<T>::packed_numbers(shape);
  return numbers;
}

template <class T>
void write_samples(const Model<T>& model, double* samples) {
  const Index n = model.n_members * model.networks.parameters();
  std::memset(samples, 0, kSamples * sizeof(double));
  for (Index i = 0; n > 0 && i < kSamples; ++i)
    std::memcpy(samples + i, model.weights + i * (n - 1) / (kSamples - 1), sizeof(T));
}

const char* name_of(Index number) {
  return number == sizeof(double) ? "float64" : "float32";
}

}  // namespace

template <class T>
Index prepared_bytes(const Model<T>& model) {
  return static_cast<Index>(sizeof(Header) +
                            model.n_members * member_numbers<T>(model.networks) * sizeof(T));
}

template <class T>
void prepare_weights(const Model<T>& model, std::byte* prepared, int n_threads) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.isa = static_cast<Index>(isa());
  header.number = sizeof(T);
  header.n_members = model.n_members;
  header.shapes = hash_of(model.networks);
  header.bytes = prepared_bytes(model);
  write_samples(model, header.samples);
  std::memcpy(prepared, &header, sizeof(header));
  T* packed = reinterpret_cast<T*>(prepared + sizeof(header));
  const T* weights = model.weights;
  for (Index m = 0; m < model.n_members; ++m)
    for (Index k = 0; k < model.networks.n_levels(); ++k) {
      const NetworkShape& shape = model.networks.shapes[k];
      PackedNetworks<T>::pack(shape, weights, packed, n_threads);
      weights += model.networks.parameters_of(k);
      packed += PackedNetworks<T>::packed_numbers(shape);
    }
}

template <class T>
std::string misfit(const Model<T>& model, const std::byte* prepared, Index bytes) {
  Header header;
  if (bytes < static_cast<Index>(sizeof(header)) ||
      (std::memcpy(&header, prepared, sizeof(header)),
       std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0))
    return "they are not what this version of kinml_fast prepares";
  if (header.isa != static_cast<Index>(isa()))
    return std::string("they are for another instruction set than ") + isa_name();
  if (header.number != sizeof(T))
    return std::string("they are ") + name_of(header.number) + ", the parameters " +
           name_of(sizeof(T));
  if (header.shapes != hash_of(model.networks)) return "they are of networks of other shapes";
  if (header.n_members != model.n_members)
    return "they are of " + std::to_string(header.n_members) + " members, the parameters of " +
           std::to_string(model.n_members);
  if (header.bytes != bytes)
    return "they are " + std::to_string(bytes) + " bytes of " + std::to_string(header.bytes);
  double samples[kSamples];
  write_samples(model, samples);
  if (std::memcmp(samples, header.samples, sizeof(samples)) != 0)
    return "the parameters have changed since";
  return {};
}

template <class T>
std::vector<PackedChain<T>> prepared_members(const Model<T>& model, const std::byte* prepared) {
  const T* packed = reinterpret_cast<const T*>(prepared + sizeof(Header));
  const Index numbers = member_numbers<T>(model.networks);
  std::vector<PackedChain<T>> members;
  members.reserve(model.n_members);
  for (Index m = 0; m < model.n_members; ++m)
    members.emplace_back(model.networks, packed + m * numbers);
  return members;
}

#define KINML_INSTANTIATE(T)                                                \
  template Index prepared_bytes<T>(const Model<T>&);                        \
  template void prepare_weights<T>(const Model<T>&, std::byte*, int);       \
  template std::string misfit<T>(const Model<T>&, const std::byte*, Index); \
  template std::vector<PackedChain<T>> prepared_members<T>(const Model<T>&, const std::byte*);
KINML_INSTANTIATE(double)
KINML_INSTANTIATE(float)
#undef KINML_INSTANTIATE

}  // namespace kinml::cpu
