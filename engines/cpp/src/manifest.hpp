// What cascade.json says: values without a disk. The fields are those of the Python package's manifest.py.
#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "text.hpp"

namespace cascade_rt::detail {

using Sizes = std::map<std::string, std::int64_t>;  // name of an axis -> its size
using Shape = std::vector<std::int64_t>;

/// The size of an axis as a formula: (sum of times * name + plus) / over.
struct Axis {
  std::vector<std::pair<std::int64_t, std::string>> terms;
  std::int64_t plus = 0;
  std::int64_t over = 1;

  std::int64_t size(const Sizes& sizes) const;  // throws std::invalid_argument: a remainder, or a number too large
  std::optional<std::int64_t> solve(std::int64_t size) const;
};

/// Read a formula. Throws std::invalid_argument with the reason.
Axis axis_of(const std::string& formula);

struct AxisRange {
  std::int64_t min = 1, opt = 1, max = 1, multiple = 1;
  bool accepts(std::int64_t size) const { return min <= size && size <= max && size % multiple == 0; }
  std::optional<std::int64_t> only() const;
  std::string text() const;
};

struct AxisSize {
  std::int64_t number = 0;  // 0: a formula
  std::string formula;
  Axis axis;
};

struct TensorSpec {
  std::string name, dtype;
  std::vector<AxisSize> axes;
  bool constant = false;

  bool on_host() const { return !constant && (dtype == "float32" || dtype == "int64" || dtype == "uint8"); }
  Shape shape(const Sizes& sizes) const;
  std::string axes_text() const;
};

struct Precision {
  std::string name, compute, linear;
};

struct EngineRecord {
  std::string name;
  std::vector<std::string> features;
  Precision precision;
  std::string runtime, file;
  std::vector<std::string> weights;
  std::vector<TensorSpec> inputs, outputs;
  std::map<std::string, AxisRange> ranges;
  std::vector<std::int64_t> sm;

  const TensorSpec& tensor(const std::string& tensor_name) const;
  std::vector<std::string> files() const;
  std::string key_text() const;
};

struct LoopDefaults {
  std::int64_t num_inference_steps = 1;
  double guidance_scale = 1, guidance_rescale = 0, shift = 1, scaler = 1, s = 0.008;
};

struct SamplerDefaults {
  LoopDefaults prior, decoder;
  double latent_scale = 1;
};

/// What a preset changes of a stage's sampling.
struct LoopOverrides {
  std::optional<std::int64_t> num_inference_steps;
  std::optional<double> guidance_scale;
  double guidance_start = 0, guidance_end = 1;
};

struct Preset {
  LoopOverrides prior, decoder;
};

/// Latents to colours by one matrix: RGB in 0..1 is latents . factors + offset.
struct PreviewFactors {
  std::vector<std::array<float, 3>> factors;  // red, green and blue of every latent channel
  std::array<float, 3> offset{};
};

struct ModelFacts {
  std::string name, size, source, default_sampler, default_preset;
  std::int64_t height = 0, width = 0, compression = 4;
  double resolution_multiple = 42.67, latent_dim_scale = 10.67;
};

struct ModelRecord {
  std::optional<std::string> weights, prediction_type;
  std::vector<std::string> loras;
  Json config;  // an object
};

struct TokenizerRecord {
  std::string file;
  std::int64_t max_length = 0, pad_id = 0;
};

struct FileRecord {
  std::string sha256;
  std::uint64_t bytes = 0;
};

struct Manifest {
  ModelFacts model;
  std::vector<std::pair<std::string, SamplerDefaults>> sampling;
  std::vector<std::pair<std::string, Preset>> presets;
  std::map<std::string, PreviewFactors> previews;
  std::optional<TokenizerRecord> tokenizer;
  std::map<std::string, ModelRecord> models;
  std::vector<EngineRecord> engines;
  std::vector<std::pair<std::string, FileRecord>> files;

  const FileRecord* file(const std::string& name) const;
  const SamplerDefaults* defaults(const std::string& sampler) const;
  /// Records of an engine; those of graphs first where no runtime is named.
  std::vector<const EngineRecord*> records(const std::string& name, const std::string& runtime = {},
                                           const std::vector<std::string>& features = {}) const;

  /// Read and check a manifest. Throws BundleError with the key's path.
  static Manifest from_json(const std::string& text, const std::string& where);
};

enum class Schema { manifest, tensors, metadata };

struct SchemaProblem {
  std::string message, field, value, accepted;
};

/// What is wrong with a document, by a schema of the Python package; nothing where it is right.
std::optional<SchemaProblem> schema_problem(const Json& document, Schema schema, const std::string& where);

/// Refuse a document that the manifest's schema does not describe. Throws BundleError.
void check_schema(const Json& document, const std::string& where);

}  // namespace cascade_rt::detail
