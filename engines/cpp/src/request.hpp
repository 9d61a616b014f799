// The request's checks, and what a request means to a bundle.
#pragma once
#include "bundle.hpp"
#include "sampling.hpp"

namespace cascade_rt::detail {

Json to_json(const Request& request);
Request request_from(const Json& values);  // throws RequestError
void check(const Request& request);        // throws RequestError
std::vector<std::string> texts_of(const Texts& texts);
/// The error of a field of Python's request that this library does not have.
RequestError not_taken(const std::string& field);

enum class Part { picture, prior, decoder };

using Features = std::vector<std::string>;                 // sorted
using EngineKey = std::pair<std::string, Features>;        // name and features of an engine

struct LoopPlan {
  std::string stage;
  Schedule schedule;
  std::vector<std::vector<double>> scales;  // [steps][B]
  double rescale = 0;
  Shape latents;
  Features features;  // of the engines that run it

  std::vector<std::size_t> guided(std::size_t step) const;  // pictures that are guided in a step
  std::vector<std::size_t> ever_guided() const;
};

/// How a picture that is begun from is encoded.
struct InitPlan {
  double strength = 0;                    // time at which Stage C begins; 0: it does not run
  std::array<std::int64_t, 2> pixels{};   // (height, width) that the semantic encoder is given
  std::optional<std::array<std::int64_t, 2>> decoder_pixels;  // that Stage A's encoder is given, where a mask keeps a part
};

/// How a control picture is made into residuals.
struct ControlPlan {
  std::string kind;                      // of the ControlNet
  std::string engine;                    // that makes them
  std::array<std::int64_t, 2> pixels{};  // (height, width) of the control picture; super-resolution: of the encoder's
  std::int64_t channels = 0;             // of the engine's input
};

struct Planned {
  Request request;
  Part part = Part::picture;
  std::int64_t pictures = 0;
  std::int64_t prompts = 0;
  std::vector<std::uint64_t> seeds;
  std::array<std::int64_t, 2> prior_size{}, decoder_size{}, picture_size{};  // (height, width)
  std::optional<InitPlan> init;
  std::optional<ControlPlan> control;
  std::optional<LoopPlan> prior, decoder;
  double latent_scale = 1;
  std::vector<std::string> engines;
  std::uint64_t memory = 0;

  bool needs_negative() const;
  /// The engines with their features, in the order in which they run.
  std::vector<EngineKey> engine_keys() const;
};

/// The engines that will run: for every name and set of features the first that can.
using Records = std::vector<const EngineRecord*>;
const EngineRecord* record_of(const Records& records, const std::string& name, const Features& features = {});

/// The shape of a tensor of an engine. Throws BundleError where the manifest's formulas give none.
Shape shape_of(const EngineRecord& record, const std::string& tensor, const Sizes& sizes);
/// The size of an axis that the manifest must give as a number. Throws BundleError.
std::int64_t number_axis(const EngineRecord& record, const std::string& tensor, std::size_t axis);

/// Plan a request. Throws RequestError, or BundleError whose field is the name of the engine that is missing.
Planned plan(const Request& request, const Manifest& manifest, const Records& records, const Tensors& given, Part part);

/// Refuse arrays that are not finite, or lack their partner. Throws RequestError.
void check_tensors(const Tensors& given);

}  // namespace cascade_rt::detail
