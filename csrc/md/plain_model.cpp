#include "plain_model.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string_view>

#include "json.h"

namespace kinml::md {

static_assert(std::endian::native == std::endian::little, "model files are little-endian");

namespace {

constexpr std::string_view kFormat = "kinml_fast.plain", kVersions[] = {"1", "2", "3"};
constexpr std::int64_t kMost = std::int64_t(1) << 24;  // widths, elements, members beyond are none
// In the order of their codes: core/network_shape.h.
constexpr std::array<std::string_view, 7> kActivations = {"identity", "gaussian", "tanh", "relu",
                                                          "silu",     "celu",     "gelu"};

// That of zlib and of Python's zlib.crc32.
std::uint32_t crc32(std::string_view bytes) {
  std::array<std::uint32_t, 256> table;
  for (std::uint32_t i = 0; i < 256; ++i) {
    table[i] = i;
    for (int bit = 0; bit < 8; ++bit) table[i] = table[i] >> 1 ^ (table[i] & 1 ? 0xedb88320u : 0u);
  }
  std::uint32_t crc = ~0u;
  for (const char c : bytes) crc = crc >> 8 ^ table[(crc ^ static_cast<unsigned char>(c)) & 0xff];
  return ~crc;
}

struct File {
  const std::string& path;
  std::string bytes;
  Json header;
  std::string_view numbers;  // of the tensors

  [[noreturn]] void fail(const std::string& what, const char* remedy) const {
    throw ModelFileError(path + ": " + what + ": " + remedy);
  }
};

constexpr const char *kAgain = "copy it again", *kExport =
                                                    "give a file that `kinml-fast export --format "
                                                    "plain` has written";

// The header, and where the numbers are.
void open(File& file) {
  std::ifstream stream(file.path, std::ios::binary);
  if (!stream) file.fail(std::string("cannot be read (") + std::strerror(errno) + ")", kExport);
  file.bytes.assign(std::istreambuf_iterator<char>(stream), {});
  if (stream.bad()) file.fail("cannot be read to its end", kAgain);
  std::uint64_t length = 0;
  if (file.bytes.size() < sizeof length + 2 || file.bytes[sizeof length] != '{')
    file.fail("is no plain model file", kExport);
  std::memcpy(&length, file.bytes.data(), sizeof length);
  if (length > file.bytes.size() - sizeof length) file.fail("is cut off", kAgain);
  const std::string_view all = file.bytes;
  file.header = Json::parse(all.substr(sizeof length, length));
  file.numbers = all.substr(sizeof length + length);
}

// Numbers of a tensor of so many dimensions, in double.
std::vector<double> tensor(const File& file, const char* name, std::size_t dimensions,
                           std::vector<std::int64_t>& shape) {
  const Json& entry = file.header[name];
  const std::string& type = entry["dtype"].text();
  const std::vector<std::int64_t> place = entry["data_offsets"].integers();
  shape = entry["shape"].integers();
  if (type != "F64" && type != "F32") throw JsonError(name + (" are of type " + type));
  std::int64_t count = 1;
  for (const std::int64_t n : shape) {
    if (n < 0 || n > kMost || count > kMost * 1024)
      throw JsonError(name + std::string(" are too many"));
    count *= n;
  }
  const std::int64_t bytes = count * (type == "F64" ? 8 : 4);
  if (shape.size() != dimensions || place.size() != 2 || place[1] - place[0] != bytes)
    throw JsonError(name + std::string(" have another shape than their place"));
  if (place[0] < 0 || place[1] > static_cast<std::int64_t>(file.numbers.size()))
    file.fail("is cut off", kAgain);
  std::vector<double> result(count);
  const char* const from = file.numbers.data() + place[0];
  if (type == "F64") {
    std::memcpy(result.data(), from, bytes);
  } else {
    std::vector<float> single(count);
    std::memcpy(single.data(), from, bytes);
    std::copy(single.begin(), single.end(), result.begin());
  }
  for (const double x : result)
    if (!std::isfinite(x)) throw JsonError(name + std::string(" hold what is no number"));
  return result;
}

void repel(const Json& r, PlainModel& result) {
  if (r["kind"].text() != "zbl")
    throw JsonError("the repulsion is of the unknown kind '" + r["kind"].text() + "'");
  Repulsion& repulsion = result.aev.repulsion;
  repulsion = {r["charges"].numbers(), r["radii"].numbers(), r["inner"].number(),
               r["outer"].number()};
  const auto positive = [](double x) { return x > 0; };
  const bool fits = static_cast<std::int64_t>(repulsion.charges.size()) == result.n_species() &&
                    repulsion.radii.size() == repulsion.charges.size();
  if (!fits || !std::all_of(repulsion.charges.begin(), repulsion.charges.end(), positive) ||
      !std::all_of(repulsion.radii.begin(), repulsion.radii.end(), positive) ||
      !(repulsion.inner >= 0 && repulsion.inner < repulsion.outer) ||
      !(repulsion.cutoff() <= result.cutoff()))
    throw JsonError("the repulsion does not fit the elements or the descriptor");
}

void describe(const Json& model, PlainModel& result) {
  result.elements = model["elements"].texts();
  const Json& d = model["descriptor"];
  result.aev = {.n_species = result.n_species(),
                .radial_shifts = d["radial_shifts"].numbers(),
                .radial_eta = d["radial_eta"].number(),
                .radial_cutoff = d["radial_cutoff"].number(),
                .radial_factor = d["radial_factor"].number(),
                .angular_shifts = d["angular_shifts"].numbers(),
                .angular_eta = d["angular_eta"].number(),
                .angular_cutoff = d["angular_cutoff"].number(),
                .angular_factor = d["angular_factor"].number(),
                .sections = d["sections"].numbers(),
                .zeta = d["zeta"].number(),
                .beta = d["beta"].number()};
  if (model.has("repulsion")) repel(model["repulsion"], result);
  result.fidelities = model["fidelities"].integers();
  if (!model["baseline"].is_null()) result.baseline = model["baseline"].integer();
  result.biases = model["biases"].boolean();
  result.single = model["dtype"].text() == "float32";
  for (const std::string& name : model["activations"].texts()) {
    const auto found = std::find(kActivations.begin(), kActivations.end(), name);
    if (found == kActivations.end()) throw JsonError("the activation '" + name + "' is unknown");
    result.activations.push_back(found - kActivations.begin());
  }
  const Json::List& layers = model["layers"].list();
  if (result.elements.empty() || result.fidelities.empty() || result.activations.empty() ||
      layers.size() != result.elements.size())
    throw JsonError("elements, fidelities, activations and layers do not fit together");
  for (std::int64_t k = 0; k < result.n_levels(); ++k)
    for (const Json& of_species : layers) {
      const std::vector<std::int64_t> widths = of_species.integers();
      result.sizes.push_back(result.aev.length() + (k > 0 ? 1 : 0));
      for (const std::int64_t width : widths) {
        if (width < 1 || width > kMost) throw JsonError("the layers have impossible widths");
        result.sizes.push_back(width);
      }
      if (widths.size() != result.activations.size() || widths.back() != 1)
        throw JsonError("the layers do not fit the activations, or end in more than one number");
    }
  if (model.has("calibration")) {
    const Json& factors = model["calibration"];
    const std::vector<double> energies = factors["energies"].numbers();
    const Json::List& forces = factors["forces"].list();
    if (energies.size() != result.fidelities.size() || forces.size() != energies.size())
      throw JsonError("the factors of deviations do not fit the levels");
    result.energy_factor = energies.back();
    result.forces_factors = forces.back().numbers();
    if (result.forces_factors.size() != result.elements.size() || !(result.energy_factor > 0))
      throw JsonError("the factors of deviations do not fit the elements");
  }
  if (!(result.aev.radial_cutoff > 0 && result.aev.angular_cutoff > 0 && result.aev.length() > 0))
    throw JsonError("the descriptor has no positive cutoffs or no numbers");
}

}  // namespace

NetworkChain PlainModel::chain() const {
  const std::int64_t n_layers = static_cast<std::int64_t>(activations.size());
  NetworkChain chain;
  for (std::int64_t k = 0; k < n_levels(); ++k)
    chain.shapes.push_back({n_species(), n_layers, sizes.data() + k * n_species() * (n_layers + 1),
                            activations.data(), biases});
  return chain;
}

std::vector<double> PlainModel::highest_sae() const {
  std::vector<double> result;
  for (std::int64_t m = 1; m <= n_members; ++m) {
    const auto end = sae.begin() + m * n_levels() * n_species();
    result.insert(result.end(), end - n_species(), end);
  }
  return result;
}

double PlainModel::cutoff() const {
  return std::max(aev.radial_cutoff, aev.angular_cutoff);
}

PlainModel read_plain_model(const std::string& path) {
  File file{path, {}, {}, {}};
  PlainModel result;
  result.path = path;
  try {
    open(file);
    const Json& about = file.header["__metadata__"];
    if (!about.has("format") || about["format"].text() != kFormat)
      file.fail("is no plain model file", kExport);
    const std::string& version = about["format_version"].text();
    if (std::find(std::begin(kVersions), std::end(kVersions), version) == std::end(kVersions))
      file.fail("is a plain model file of version " + version +
                    ", this program reads versions up to " + std::string(std::end(kVersions)[-1]),
                "export the model with the kinml_fast that this program was built from");
    describe(Json::parse(about["model"].text()), result);
    std::vector<std::int64_t> shape;
    result.weights = tensor(file, "weights", 2, shape);
    result.n_members = shape[0];
    if (shape[0] < 1 || shape[1] != result.chain().parameters())
      throw JsonError("the weights are not as many as the layers say");
    result.sae = tensor(file, "sae", 3, shape);
    if (shape != std::vector{result.n_members, result.n_levels(), result.n_species()})
      throw JsonError("the single-atom energies do not fit members, levels and elements");
    if (file.header.has("grade")) {
      result.grade = tensor(file, "grade", 3, shape);
      if (shape != std::vector{result.n_species(), result.aev.length(), result.aev.length()})
        throw JsonError("the matrices of extrapolation grades do not fit elements and descriptor");
    }
    char crc[9];
    std::snprintf(crc, sizeof crc, "%08x", static_cast<unsigned>(crc32(file.numbers)));
    if (about["crc32"].text() != crc) file.fail("is damaged (its checksum is another one)", kAgain);
  } catch (const JsonError& error) {
    file.fail(std::string("is damaged (") + error.what() + ")", kAgain);
  }
  return result;
}

}  // namespace kinml::md
