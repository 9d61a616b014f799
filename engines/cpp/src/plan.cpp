#include <algorithm>
#include <cmath>
#include <random>
#include <set>
#include <stdexcept>

#include "request.hpp"
#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

std::int64_t round_up(std::int64_t size, std::int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

std::vector<double> scales_of(const Numbers& numbers) {
  if (const auto* one = std::get_if<double>(&numbers)) return {*one};
  if (const auto* several = std::get_if<std::vector<double>>(&numbers)) return *several;
  return {};
}

bool has(const Numbers& numbers) { return !std::holds_alternative<std::monostate>(numbers); }

const EngineRecord& need(const Records& records, const std::string& name, const Features& features = {}) {
  const EngineRecord* found = record_of(records, name, features);
  if (found == nullptr) {
    std::string wanted = name, flags = std::string("--stage ") + stage_of(name);
    for (const auto& feature : features) {
      wanted += " with " + feature;
      flags += " --" + feature;
    }
    throw BundleError("the bundle has no engine " + wanted + "; add it with: cascade-export " + flags, name);
  }
  return *found;
}

/// The record of an engine among those of a request, each of which is there with one set of features.
const EngineRecord* named(const Records& running, const std::string& name) {
  for (const auto* record : running) {
    if (record->name == name) return record;
  }
  return nullptr;
}

const AxisRange& range_of(const EngineRecord& record, const std::string& name) {
  const auto found = record.ranges.find(name);
  if (found == record.ranges.end()) {
    throw BundleError("the manifest has no range of " + name + " for " + record.name +
                      "; build the bundle again with cascade-export");
  }
  return found->second;
}

std::int64_t grid_of(const Records& records, const char* name) {
  const EngineRecord* record = record_of(records, name);
  return record == nullptr ? 1 : range_of(*record, "height").multiple;
}

struct AxisPlan {
  std::int64_t prior, decoder, picture;
};

AxisPlan plan_axis(const ModelFacts& facts, std::int64_t grid_c, std::int64_t grid_b, const std::string& sampler,
                   std::int64_t pixels) {
  const auto prior = round_up(
      static_cast<std::int64_t>(std::ceil(static_cast<double>(pixels) / facts.resolution_multiple)), grid_c);
  auto decoder = static_cast<std::int64_t>(static_cast<double>(prior) * facts.latent_dim_scale);
  const double compression = static_cast<double>(facts.compression);
  const bool agree = std::fabs(facts.latent_dim_scale * compression / facts.resolution_multiple - 1) < 0.02;
  if (!agree) return {prior, round_up(decoder, grid_b), decoder * facts.compression};
  if (sampler != "diffusers" || decoder % grid_b != 0) {
    decoder = round_up(static_cast<std::int64_t>(std::ceil(static_cast<double>(pixels) / compression)), grid_b);
  }
  return {prior, decoder, std::min(pixels, decoder * facts.compression)};
}

void check_size(const char* name, std::int64_t size) {
  if (size < tables::kMinPixels || size > tables::kMaxPixels) {
    throw refused(name, Json(size),
                  "an integer from " + std::to_string(tables::kMinPixels) + " to " + std::to_string(tables::kMaxPixels));
  }
}

LoopSettings overridden(const LoopSettings& own, const LoopOverrides& preset) {
  LoopSettings made = own;
  if (!made.guidance_per_step && !has(made.guidance_scale) && preset.guidance_scale) {
    made.guidance_scale = *preset.guidance_scale;
  }
  if (!made.num_inference_steps) made.num_inference_steps = preset.num_inference_steps;
  if (!made.guidance_start) made.guidance_start = preset.guidance_start;
  if (!made.guidance_end) made.guidance_end = preset.guidance_end;
  return made;
}

Request with_preset(const Request& request, const Manifest& manifest) {
  Request made = request;
  made.preset = request.preset.value_or(manifest.model.default_preset);
  const Preset* found = nullptr;
  std::vector<std::string> known{"quality"};
  for (const auto& item : manifest.presets) {
    if (item.first == *made.preset) found = &item.second;
    if (item.first != "quality") known.push_back(item.first);
  }
  if (found == nullptr && *made.preset != "quality") {
    throw RequestError("preset " + repr(*made.preset) + " is not in this bundle; accepted: " + joined(known), "preset",
                       Json(*made.preset).dump(), joined(known));
  }
  const Preset preset = found == nullptr ? Preset{} : *found;
  made.prior = overridden(request.prior, preset.prior);
  made.decoder = overridden(request.decoder, preset.decoder);
  return made;
}

std::vector<double> wanted_scales(const LoopSettings& own, const LoopDefaults& defaults) {
  if (own.guidance_per_step) return *own.guidance_per_step;
  if (has(own.guidance_scale)) return scales_of(own.guidance_scale);
  return {defaults.guidance_scale};
}

std::vector<std::vector<double>> scale_table(const std::string& field, const LoopSettings& own,
                                             const LoopDefaults& defaults, std::size_t steps, std::size_t pictures,
                                             std::size_t prompts) {
  std::vector<std::vector<double>> table(steps, std::vector<double>(pictures, 1.0));
  if (own.guidance_per_step) {
    const auto& listed = *own.guidance_per_step;
    if (listed.size() != 2 && listed.size() != steps) {
      throw RequestError(field + ".guidance_per_step has " + std::to_string(listed.size()) + " numbers for " +
                             std::to_string(steps) + " steps; give " + std::to_string(steps) + ", or 2",
                         field + ".guidance_per_step");
    }
    for (std::size_t i = 0; i < steps; ++i) {
      double scale = listed[i < listed.size() ? i : 1];
      if (listed.size() != steps) {  // numpy.linspace
        const double step = (listed[1] - listed[0]) / static_cast<double>(std::max<std::size_t>(steps - 1, 1));
        scale = i + 1 == steps && steps > 1 ? listed[1] : static_cast<double>(i) * step + listed[0];
      }
      table[i].assign(pictures, scale);
    }
  } else {
    auto scale = scales_of(own.guidance_scale);
    const bool several = std::holds_alternative<std::vector<double>>(own.guidance_scale);
    if (!several) {
      scale.assign(pictures, scale.empty() ? defaults.guidance_scale : scale[0]);
    } else if (scale.size() != pictures) {
      if (scale.size() != prompts) {
        const std::string each = prompts != 1 && prompts != pictures
                                     ? "1, " + std::to_string(prompts) + " or " + std::to_string(pictures)
                                     : "1 or " + std::to_string(pictures);
        throw RequestError(field + ".guidance_scale has " + std::to_string(scale.size()) + " numbers for " +
                               std::to_string(pictures) + " pictures; give " + each,
                           field + ".guidance_scale");
      }
      std::vector<double> spread;
      for (const double one : scale) spread.insert(spread.end(), pictures / prompts, one);
      scale = spread;
    }
    std::fill(table.begin(), table.end(), scale);
  }
  const double first = own.guidance_start.value_or(0.0) * static_cast<double>(steps);
  const double end = own.guidance_end.value_or(1.0) * static_cast<double>(steps);
  for (std::size_t i = 0; i < steps; ++i) {
    const auto step = static_cast<double>(i);
    if (!(first <= step && step < end)) table[i].assign(pictures, 1.0);
  }
  return table;
}

LoopSettings full(const LoopSettings& own, const LoopDefaults& defaults) {
  LoopSettings made = own;
  if (!has(made.guidance_scale) && !made.guidance_per_step) made.guidance_scale = defaults.guidance_scale;
  if (!made.num_inference_steps) made.num_inference_steps = defaults.num_inference_steps;
  return made;
}

void check_loop(const LoopPlan& loop, const EngineRecord& spec) {
  const auto pictures = static_cast<std::size_t>(loop.latents[0]);
  std::size_t rows = pictures;
  for (std::size_t step = 0; step < loop.scales.size(); ++step) {
    rows = std::max(rows, pictures + loop.guided(step).size());
  }
  const AxisRange& batch = range_of(spec, "batch");
  if (!batch.accepts(static_cast<std::int64_t>(rows))) {
    const bool guided = !loop.ever_guided().empty();
    const std::string twice = guided ? ", " + std::to_string(rows) + " rows with guidance," : "";
    throw RequestError(std::to_string(pictures) + " pictures at once" + twice +
                           " are not accepted; these engines take up to " + std::to_string(batch.max) + " rows",
                       "num_images_per_prompt", std::to_string(pictures),
                       "up to " + std::to_string(batch.max) + " rows");
  }
  for (std::size_t i = 0; i < 2; ++i) {
    const std::string name = i == 0 ? "height" : "width";
    const AxisRange& range = range_of(spec, name);
    const std::int64_t side = loop.latents[2 + i];
    if (!range.accepts(side)) {
      throw RequestError("this " + name + " needs " + spec.name + " at " + name + " " + std::to_string(side) +
                             ", and this engine takes " + range.text() +
                             "; ask for another size, or export it with other --shapes",
                         name, std::to_string(side), range.text());
    }
  }
  const AxisRange& steps = range_of(spec, "steps");
  if (!steps.accepts(loop.schedule.size())) {
    throw RequestError(std::to_string(loop.schedule.size()) + " steps are not accepted; " + spec.name + " takes " +
                           steps.text(),
                       std::string(loop.stage == "stage_c" ? "prior" : "decoder") + ".num_inference_steps");
  }
}

void check_embeds(const Records& records, const char* engine, const char* tensor, const char* name,
                  const std::optional<Tensor>& value, std::int64_t count, bool any_size) {
  const EngineRecord* record = named(records, engine);
  if (record == nullptr || !value) return;
  const auto& axes = record->tensor(tensor).axes;
  bool fits = value->shape.size() == axes.size() && value->shape[0] == count;
  std::string wanted = std::to_string(count);
  for (std::size_t i = 1; i < axes.size(); ++i) {
    wanted += ", " + (axes[i].number != 0 ? std::to_string(axes[i].number) : std::string("any"));
    fits = fits && (axes[i].number == 0 || value->shape[i] == axes[i].number);
  }
  if (!fits) {
    throw RequestError(std::string(name) + " has shape " + shape_text(value->shape) + "; it must be (" + wanted + ")",
                       name);
  }
  for (std::size_t i = 1; i < axes.size() && !any_size; ++i) {
    if (axes[i].number != 0) continue;
    const AxisRange& range = range_of(*record, axes[i].formula);
    if (!range.accepts(value->shape[i])) {
      throw RequestError(std::string(name) + " has " + axes[i].formula + " " + std::to_string(value->shape[i]) +
                             "; this engine takes " + range.text(),
                         name);
    }
  }
}

std::uint64_t memory_of(const Manifest& manifest, const Records& running, const Planned& planned) {
  std::set<std::string> files;
  for (const auto* record : running) {
    for (const auto& file : record->files()) files.insert(file);
  }
  std::uint64_t total = 0;
  for (const auto& file : files) {
    if (const FileRecord* record = manifest.file(file)) total += record->bytes;
  }
  for (const auto* loop : {&planned.prior, &planned.decoder}) {
    if (!*loop) continue;
    const EngineRecord* spec = named(running, (*loop)->stage + ".step");
    Sizes sizes;
    for (const auto& item : spec->ranges) sizes[item.first] = item.second.opt;
    sizes["batch"] = (*loop)->latents[0] + static_cast<std::int64_t>((*loop)->ever_guided().size());
    sizes["steps"] = (*loop)->schedule.size();
    sizes["height"] = (*loop)->latents[2];
    sizes["width"] = (*loop)->latents[3];
    for (const auto& tensor : spec->inputs) {
      if (!tensor.constant) continue;
      std::uint64_t bytes = 4;
      for (const auto& row : tables::kItemSizes) {
        if (tensor.dtype == row.dtype) bytes = static_cast<std::uint64_t>(row.bytes);
      }
      for (const auto size : shape_of(*spec, tensor.name, sizes)) bytes *= static_cast<std::uint64_t>(size);
      total += bytes;
    }
  }
  return total;
}

// kinds of ControlNets that see something else than a picture; the others are in tables::kControlKinds
constexpr const char *kInpainting = "inpainting", *kSuperResolution = "super_resolution";

/// Time at which Stage C begins from a picture. Throws RequestError: a strength or a mask without one.
double strength_of(const Request& request, const Tensors& given, const std::string& kind) {
  if (!given.init_image) {
    for (const auto& [name, there] : {std::pair<const char*, bool>{"strength", request.strength.has_value()},
                                      {"mask_image", given.mask.has_value() && kind != kInpainting}}) {
      if (there) throw RequestError(std::string(name) + " is given without init_image, to which it belongs", name);
    }
  }
  return request.strength.value_or(given.mask ? 1.0 : tables::kInitStrength);
}

std::string as_word(const Json& value) { return value.is_string() ? value.get<std::string>() : repr(value); }

/// Refuse a ControlNet for other blocks of Stage C than those whose residuals the engines take.
void check_blocks(const std::string& kind, const Manifest& manifest, const Records& records) {
  const auto model = manifest.models.find("controlnet_" + kind), stage_c = manifest.models.find("stage_c");
  const bool known = model != manifest.models.end() && stage_c != manifest.models.end();
  if (!known || record_of(records, "stage_c.step", {tables::kControl}) == nullptr) return;
  const Json wanted = model->second.config.value("proj_blocks", Json());
  const Json taken = stage_c->second.config.value("control_blocks", Json());
  if (wanted == taken && wanted.is_array()) return;
  std::string blocks = wanted.is_array() ? "" : "...";
  if (wanted.is_array()) {
    for (const Json& one : wanted) blocks += (blocks.empty() ? "" : ",") + as_word(one);
  }
  throw BundleError("the bundle's ControlNet " + kind + " is for the blocks " + shown(wanted) +
                    " of Stage C, whose engines take residuals at " + shown(taken) +
                    "; make them anew with: cascade-export --stage c --control --overwrite --control-blocks " + blocks);
}

/// Which ControlNet a request is for; empty: none, as for the decoder, which does not run Stage C.
std::string control_kind(const Request& request, const Manifest& manifest, const Records& records, const Tensors& given,
                         Part part) {
  if (part == Part::decoder) return {};
  if (!given.control) {
    if (request.control_kind) {
      throw RequestError("control_kind is given without control_image, to which it belongs", "control_kind");
    }
    return {};
  }
  std::vector<std::string> there;
  for (const char* const* kind = tables::kControlKinds; *kind != nullptr; ++kind) {
    if (record_of(records, std::string("controlnet.") + *kind) != nullptr) there.emplace_back(*kind);
  }
  if (!request.control_kind && there.size() > 1) {
    throw RequestError("the bundle has " + std::to_string(there.size()) + " ControlNets; say which with control_kind: " +
                           joined(there),
                       "control_kind", "", joined(there));
  }
  const std::string kind = request.control_kind.value_or(there.empty() ? tables::kControlKinds[0] : there[0]);
  if (kind == kInpainting && !given.mask) {
    throw RequestError("control_kind inpainting needs mask_image, which says what is filled", "mask_image");
  }
  if (given.init_image && strength_of(request, given, kind) == 0) {
    throw RequestError("control_image has no effect at strength 0, where Stage C does not run", "strength");
  }
  check_blocks(kind, manifest, records);
  return kind;
}

/// Pixels of a control picture that a latent of Stage C stands for.
double control_ratio(const std::string& kind, const Manifest& manifest) {
  const auto model = manifest.models.find("controlnet_" + kind);
  const Json usual = tables::kEncoderStride;
  const Json ratio = model == manifest.models.end() ? usual : model->second.config.value("pixels_per_latent", usual);
  const double made = ratio.is_number() ? ratio.get<double>() : 0;
  if (!(1 <= made && made <= 1024)) {
    const std::string where = "models['controlnet_" + kind + "'].config.pixels_per_latent";
    throw BundleError("the manifest's " + where + " is " + shown(ratio) + "; a number from 1 to 1024 is needed", where);
  }
  return made;
}

/// How the control picture is encoded, for the sizes that are planned.
ControlPlan plan_control(const std::string& kind, const Manifest& manifest, const Records& running,
                         const Planned& planned) {
  ControlPlan made;
  made.kind = kind;
  made.engine = "controlnet." + kind;
  const EngineRecord* record = named(running, made.engine);
  const AxisSize& channels = record->tensor("control").axes.at(1);
  if (channels.number == 0) {
    throw BundleError("the manifest leaves the channels of " + record->name + " open: " + channels.formula);
  }
  made.channels = channels.number;
  if (kind == kSuperResolution) {  // the encoder sees half of the picture's size
    record = named(running, "effnet_encoder");
    for (std::size_t i = 0; i < 2; ++i) made.pixels[i] = (planned.prior_size[i] + 1) / 2 * tables::kEncoderStride;
  } else {
    const std::int64_t multiple = range_of(*record, "height").multiple;
    const double ratio = control_ratio(kind, manifest);
    for (std::size_t i = 0; i < 2; ++i) {
      const double side = static_cast<double>(planned.prior_size[i]) * ratio;
      made.pixels[i] = round_up(static_cast<std::int64_t>(side), multiple);
    }
  }
  for (std::size_t i = 0; i < 2; ++i) {
    const std::string name = i == 0 ? "height" : "width";
    const AxisRange& range = range_of(*record, name);
    if (range.accepts(made.pixels[i])) continue;
    throw RequestError("control_image would be encoded at " + name + " " + std::to_string(made.pixels[i]) + "; " +
                           record->name + " takes " + range.text() + "; give another height and width",
                       "control_image");
  }
  return made;
}

std::vector<std::string> engines_of(const Request& request, const Tensors& given, Part part, const std::string& kind,
                                    bool text) {
  std::vector<std::string> made;
  if (text) made.emplace_back("text_encoder");
  if (part != Part::decoder) {
    if (!given.images.empty()) made.emplace_back("image_encoder");
    if (given.init_image || kind == kSuperResolution) made.emplace_back("effnet_encoder");
    if (!kind.empty()) made.push_back("controlnet." + kind);
    if (!given.init_image || strength_of(request, given, kind) > 0) {
      made.insert(made.end(), {"stage_c.context", "stage_c.step"});
    }
  }
  if (part != Part::prior) {
    if (given.mask && given.init_image) made.emplace_back("stage_a.encode");
    made.insert(made.end(), {"stage_b.context", "stage_b.step"});
    if (request.output_type != "latent") made.emplace_back("stage_a.decode");
  }
  return made;
}

std::int64_t prompt_count(const Request& request, const Tensors& given, Part part) {
  const auto prompts = texts_of(request.prompt);
  const bool embedded = given.prompt_embeds || given.prompt_embeds_pooled;
  if (prompts.empty() && !embedded && (!given.images.empty() || given.init_image || given.control)) {
    return 1;  // the empty prompt
  }
  if (prompts.empty() != embedded) {
    throw RequestError(std::string("give either prompt or prompt_embeds with prompt_embeds_pooled, ") +
                           (embedded ? "and not both" : "to say what to draw"),
                       "prompt");
  }
  if (!prompts.empty()) return static_cast<std::int64_t>(prompts.size());
  if (part != Part::decoder && !given.prompt_embeds) {
    throw RequestError("the prior needs prompt_embeds beside prompt_embeds_pooled", "prompt_embeds");
  }
  const std::int64_t pooled = given.prompt_embeds_pooled->shape[0];
  if (given.prompt_embeds && given.prompt_embeds->shape[0] != pooled) {
    throw refused_text("prompt_embeds", shape_text(given.prompt_embeds->shape),
                       "of " + std::to_string(pooled) + " prompts, as prompt_embeds_pooled is");
  }
  return pooled;
}

std::int64_t picture_count(const Request& request, const Tensors& given, std::int64_t prompts, Part part) {
  const auto seeds = static_cast<std::int64_t>(request.seeds ? request.seeds->size() : 0);
  std::int64_t pictures = 0;
  if (part == Part::decoder) {
    if (!given.image_embeddings) {
      throw refused_text("image_embeddings", "None", "an array [N, 16, h, w], as the prior gives it");
    }
    const std::int64_t several = given.image_embeddings->shape[0];
    if (several % prompts != 0) {
      throw RequestError(std::to_string(several) + " image embeddings cannot be shared out to " +
                             std::to_string(prompts) + " prompts",
                         "image_embeddings");
    }
    pictures = several * request.num_images_per_prompt.value_or(1);
  } else if (!request.num_images_per_prompt) {
    pictures = std::max(prompts, seeds);
    if (pictures % prompts != 0) {
      throw RequestError(std::to_string(seeds) + " seeds cannot be shared out to " + std::to_string(prompts) + " prompts",
                         "seeds");
    }
  } else {
    pictures = prompts * *request.num_images_per_prompt;
  }
  if (seeds > 1 && seeds != pictures) {
    throw RequestError("there are " + std::to_string(seeds) + " seeds for " + std::to_string(pictures) +
                           " pictures; give 1 or " + std::to_string(pictures),
                       "seeds");
  }
  return pictures;
}

/// (height, width) of a picture with a short side and the aspect of another, in multiples.
std::array<std::int64_t, 2> size_like(const Image& image, std::int64_t shorter, std::int64_t multiple) {
  const std::int64_t least = std::min(image.width, image.height);
  return {shorter * image.height / least / multiple * multiple, shorter * image.width / least / multiple * multiple};
}

/// How a picture that is begun from is encoded, for the sizes that are planned; Stage C's becomes that of its latents.
InitPlan plan_init(const Request& request, const Tensors& given, const ModelFacts& facts, const EngineRecord& encoder,
                   double strength, Planned& made) {
  InitPlan init;
  init.strength = strength;
  init.pixels = {made.prior_size[0] * tables::kEncoderStride, made.prior_size[1] * tables::kEncoderStride};
  if (!request.height && !request.width) {
    const double steps = static_cast<double>(std::min(facts.height, facts.width)) / facts.resolution_multiple;
    const auto shorter = tables::kEncoderStride * static_cast<std::int64_t>(std::ceil(steps));
    init.pixels = size_like(*given.init_image, shorter, range_of(encoder, "height").multiple);
  }
  for (std::size_t i = 0; i < 2; ++i) {
    const std::string name = i == 0 ? "height" : "width";
    const AxisRange& range = range_of(encoder, name);
    if (range.accepts(init.pixels[i])) continue;
    throw RequestError("init_image would be encoded at " + name + " " + std::to_string(init.pixels[i]) + "; " +
                           encoder.name + " takes " + range.text() + "; give another height and width",
                       "init_image");
  }
  const Shape grid =
      shape_of(encoder, "latents", {{"batch", 1}, {"height", init.pixels[0]}, {"width", init.pixels[1]}});
  made.prior_size = {grid.at(2), grid.at(3)};
  if (given.mask) {
    init.decoder_pixels = {made.decoder_size[0] * facts.compression, made.decoder_size[1] * facts.compression};
  }
  return init;
}

void plan_sizes(const Request& request, const Tensors& given, const Manifest& manifest, const Records& records,
                const std::string& sampler, double strength, Planned& made) {
  const ModelFacts& facts = manifest.model;
  const std::int64_t grid_c = grid_of(records, "stage_c.step"), grid_b = grid_of(records, "stage_b.step");
  const bool open = !request.height && !request.width;
  if (made.part == Part::decoder && open) {
    for (std::size_t i = 0; i < 2; ++i) {
      made.prior_size[i] = given.image_embeddings->shape[2 + i];
      const auto side = static_cast<double>(made.prior_size[i]) * facts.latent_dim_scale;
      made.decoder_size[i] = round_up(static_cast<std::int64_t>(side), grid_b);
      made.picture_size[i] = made.decoder_size[i] * facts.compression;
    }
    return;
  }
  std::array<std::int64_t, 2> size{request.height.value_or(facts.height), request.width.value_or(facts.width)};
  const auto& picture = given.init_image ? given.init_image : given.control;
  if (picture && open) size = size_like(*picture, std::min(facts.height, facts.width), 1);
  check_size("height", size[0]);
  check_size("width", size[1]);
  const AxisPlan down = plan_axis(facts, grid_c, grid_b, sampler, size[0]);
  const AxisPlan across = plan_axis(facts, grid_c, grid_b, sampler, size[1]);
  made.prior_size = {down.prior, across.prior};
  made.decoder_size = {down.decoder, across.decoder};
  made.picture_size = {down.picture, across.picture};
  if (made.part == Part::decoder) {
    made.prior_size = {given.image_embeddings->shape[2], given.image_embeddings->shape[3]};
  } else if (given.init_image) {
    made.init = plan_init(request, given, facts, need(records, "effnet_encoder"), strength, made);
  }
}

/// Refuse more pictures to vary than Stage C's context takes.
void check_images(const Tensors& given, const Records& running) {
  if (given.images.empty()) return;
  if (given.image_embeds) throw RequestError("give either images or image_embeds, and not both", "images");
  const EngineRecord* context = named(running, "stage_c.context");
  if (context == nullptr) return;
  const AxisRange& range = range_of(*context, "images");
  if (!range.accepts(static_cast<std::int64_t>(given.images.size()))) {
    throw RequestError(std::to_string(given.images.size()) + " images are not accepted; this engine takes " + range.text(),
                       "images");
  }
}

void check_latents(const std::optional<Tensor>& latents, const LoopPlan& loop) {
  if (latents && latents->shape != loop.latents) {
    throw RequestError("latents has shape " + shape_text(latents->shape) + "; it must be " + shape_text(loop.latents),
                       "latents", shape_text(latents->shape));
  }
}

}  // namespace

std::vector<std::size_t> LoopPlan::guided(std::size_t step) const {
  std::vector<std::size_t> made;
  for (std::size_t i = 0; i < scales[step].size(); ++i) {
    if (scales[step][i] > 1) made.push_back(i);
  }
  return made;
}

std::vector<std::size_t> LoopPlan::ever_guided() const {
  std::vector<std::size_t> made;
  for (std::size_t i = 0; i < static_cast<std::size_t>(latents[0]); ++i) {
    if (std::any_of(scales.begin(), scales.end(), [i](const std::vector<double>& row) { return row[i] > 1; })) {
      made.push_back(i);
    }
  }
  return made;
}

std::int64_t number_axis(const EngineRecord& record, const std::string& tensor, std::size_t axis) {
  const auto& axes = record.tensor(tensor).axes;
  if (axis >= axes.size() || axes[axis].number == 0) {
    throw BundleError("the manifest leaves the size of " + tensor + " of " + record.name + " open");
  }
  return axes[axis].number;
}

Shape shape_of(const EngineRecord& record, const std::string& tensor, const Sizes& sizes) {
  const TensorSpec& spec = record.tensor(tensor);
  try {
    return spec.shape(sizes);
  } catch (const std::invalid_argument&) {
    std::vector<std::string> told;
    for (const auto& item : sizes) told.push_back(item.first + " " + std::to_string(item.second));
    throw BundleError("the manifest's engine " + record.name + " has " + tensor + " with the axes " + spec.axes_text() +
                      ", which have no size for " + joined(told) + "; build the bundle again with cascade-export");
  }
}

bool Planned::needs_negative() const {
  return (prior && !prior->ever_guided().empty()) || (decoder && !decoder->ever_guided().empty());
}

std::vector<EngineKey> Planned::engine_keys() const {
  std::vector<EngineKey> made;
  for (const auto& name : engines) {
    Features features;
    for (const auto* loop : {&prior, &decoder}) {
      if (*loop && name.rfind((*loop)->stage + ".", 0) == 0) features = (*loop)->features;
    }
    made.emplace_back(name, features);
  }
  return made;
}

const EngineRecord* record_of(const Records& records, const std::string& name, const Features& features) {
  for (const auto* record : records) {
    if (record->name == name && record->features == features) return record;
  }
  return nullptr;
}

Planned plan(const Request& asked, const Manifest& manifest, const Records& records, const Tensors& given, Part part) {
  check(asked);
  const std::string kind = control_kind(asked, manifest, records, given, part);
  Request wanted = asked;
  if (kind == kSuperResolution) {  // without guidance, as the authors do
    LoopOverrides none;
    none.guidance_scale = 1.0;
    wanted.prior = overridden(asked.prior, none);
  }
  const Request request = with_preset(wanted, manifest);
  Planned made;
  made.part = part;
  const std::string sampler = request.sampler.value_or(manifest.model.default_sampler);
  const SamplerDefaults* defaults = manifest.defaults(sampler);

  const auto need_defaults = [&] {
    if (defaults != nullptr) return;
    std::vector<std::string> known;
    for (const auto& item : manifest.sampling) known.push_back(item.first);
    throw RequestError("sampler " + repr(sampler) + " has no settings in this bundle; accepted: " + joined(known),
                       "sampler", "", joined(known));
  };
  bool text = !given.prompt_embeds_pooled.has_value();
  if (!text) {
    need_defaults();
    bool guided = false;
    for (const bool prior : {true, false}) {
      if (prior ? part == Part::decoder : part == Part::prior) continue;
      for (const double one : wanted_scales(prior ? request.prior : request.decoder,
                                            prior ? defaults->prior : defaults->decoder)) {
        guided = guided || one > 1;
      }
    }
    text = guided && !given.negative_prompt_embeds_pooled;
  }
  made.engines = engines_of(request, given, part, kind, text);
  const Features features = kind.empty() ? Features{} : Features{tables::kControl};
  Records running;
  for (const auto& name : made.engines) {
    running.push_back(&need(records, name, stage_of(name) == std::string("c") ? features : Features{}));
  }
  need_defaults();

  made.prompts = prompt_count(request, given, part);
  made.pictures = picture_count(request, given, made.prompts, part);
  if (request.seeds) {
    made.seeds = *request.seeds;
  } else {
    std::random_device device;
    for (std::int64_t i = 0; i < made.pictures; ++i) made.seeds.push_back(device());
  }

  const double strength = strength_of(request, given, kind);
  plan_sizes(request, given, manifest, records, sampler, strength, made);

  for (const bool prior : {true, false}) {
    const std::string stage = prior ? "stage_c" : "stage_b";
    const EngineRecord* spec = named(running, stage + ".step");
    if (spec == nullptr) continue;
    const LoopSettings& own = prior ? request.prior : request.decoder;
    const LoopDefaults& usual = prior ? defaults->prior : defaults->decoder;
    const auto model = manifest.models.find(stage);
    if (model == manifest.models.end() || !model->second.prediction_type) {
      throw BundleError("the bundle does not say what " + stage + " predicts; export it again",
                        "models['" + stage + "'].prediction_type");
    }
    LoopPlan loop;
    loop.stage = stage;
    if (prior) loop.features = features;
    const double start = prior && made.init ? made.init->strength : 1.0;
    const std::int64_t all = own.num_inference_steps.value_or(usual.num_inference_steps);
    const std::int64_t steps =
        start == 1 ? all : std::max<std::int64_t>(1, static_cast<std::int64_t>(static_cast<double>(all) * start));
    loop.schedule = make_schedule(sampler, steps, *model->second.prediction_type, usual.shift, usual.scaler, usual.s, start);
    loop.scales = scale_table(prior ? "prior" : "decoder", own, usual,
                              static_cast<std::size_t>(loop.schedule.size()), static_cast<std::size_t>(made.pictures),
                              static_cast<std::size_t>(made.prompts));
    loop.rescale = usual.guidance_rescale;
    const auto& size = prior ? made.prior_size : made.decoder_size;
    loop.latents = {made.pictures, number_axis(*spec, "latents", 1), size[0], size[1]};
    check_loop(loop, *spec);
    check_latents(prior ? given.latents : given.decoder_latents, loop);
    (prior ? made.prior : made.decoder) = std::move(loop);
  }
  const std::int64_t n = made.prompts;
  check_embeds(running, "stage_c.context", "clip_text", "prompt_embeds", given.prompt_embeds, n, false);
  check_embeds(running, "stage_c.context", "clip_text", "negative_prompt_embeds", given.negative_prompt_embeds, n,
               false);
  for (const char* engine : {"stage_c.context", "stage_b.context"}) {
    check_embeds(running, engine, "clip_text_pooled", "prompt_embeds_pooled", given.prompt_embeds_pooled, n, false);
    check_embeds(running, engine, "clip_text_pooled", "negative_prompt_embeds_pooled",
                 given.negative_prompt_embeds_pooled, n, false);
  }
  check_embeds(running, "stage_c.context", "clip_img", "image_embeds", given.image_embeds, 1, false);
  check_embeds(running, "stage_b.context", "effnet", "image_embeddings", given.image_embeddings,
               given.image_embeddings ? given.image_embeddings->shape[0] : 0, true);
  if (given.prompt_embeds && given.negative_prompt_embeds &&
      given.prompt_embeds->shape != given.negative_prompt_embeds->shape) {
    throw RequestError("prompt and negative prompt embeddings differ in shape: " +
                           shape_text(given.prompt_embeds->shape) + " and " +
                           shape_text(given.negative_prompt_embeds->shape),
                       "negative_prompt_embeds");
  }
  check_images(given, running);
  const auto negatives = static_cast<std::int64_t>(texts_of(request.negative_prompt).size());
  if (negatives != 0) {
    if (given.negative_prompt_embeds) {
      throw RequestError("give either negative_prompt or negative_prompt_embeds, and not both", "negative_prompt");
    }
    if (negatives != 1 && negatives != n) {
      throw RequestError("there are " + std::to_string(negatives) + " negative prompts for " + std::to_string(n) +
                             " prompts; give one, or one for every prompt",
                         "negative_prompt");
    }
  }

  made.request = request;
  // a size that follows from a picture or from latents is left open: filled in, it would be another one
  const bool of_a_picture = given.init_image || given.control;
  if (part != Part::decoder && (!of_a_picture || request.height || request.width)) {
    made.request.height = request.height.value_or(manifest.model.height);
    made.request.width = request.width.value_or(manifest.model.width);
  }
  made.request.strength = made.init ? std::optional<double>(strength) : std::nullopt;
  made.request.num_images_per_prompt = made.pictures / n;
  made.request.control_kind = kind.empty() ? std::nullopt : std::optional<std::string>(kind);
  made.request.seeds = made.seeds;
  made.request.sampler = sampler;
  made.request.prior = full(request.prior, defaults->prior);
  made.request.decoder = full(request.decoder, defaults->decoder);
  made.latent_scale = defaults->latent_scale;
  if (!kind.empty()) made.control = plan_control(kind, manifest, running, made);
  made.memory = memory_of(manifest, running, made);
  return made;
}

}  // namespace cascade_rt::detail
