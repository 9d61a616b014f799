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

const EngineRecord& need(const Records& records, const std::string& name) {
  const EngineRecord* found = record_of(records, name);
  if (found == nullptr) {
    throw BundleError("the bundle has no engine " + name + "; add it with: cascade-export --stage " + stage_of(name),
                      name);
  }
  return *found;
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
  const EngineRecord* record = record_of(records, engine);
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
    const EngineRecord* spec = record_of(running, (*loop)->stage + ".step");
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
  try {
    return record.tensor(tensor).shape(sizes);
  } catch (const std::invalid_argument& error) {
    throw BundleError("the manifest gives no shape of " + tensor + " of " + record.name + ": " + error.what());
  }
}

bool Planned::needs_negative() const {
  return (prior && !prior->ever_guided().empty()) || (decoder && !decoder->ever_guided().empty());
}

const EngineRecord* record_of(const Records& records, const std::string& name) {
  for (const auto* record : records) {
    if (record->name == name && record->features.empty()) return record;
  }
  return nullptr;
}

Planned plan(const Request& asked, const Manifest& manifest, const Records& records, const Tensors& given, Part part) {
  check(asked);
  for (const auto& [name, there] : {std::pair<const char*, bool>{"images", !asked.images.empty()},
                                    {"init_image", asked.init_image.has_value()},
                                    {"mask_image", asked.mask_image.has_value()}}) {
    if (there) throw not_taken(name);
  }
  if (asked.strength) throw RequestError("strength is given without init_image, to which it belongs", "strength");
  const Request request = with_preset(asked, manifest);
  Planned made;
  made.part = part;
  const std::string sampler = request.sampler.value_or(manifest.model.default_sampler);
  const SamplerPreset* preset = manifest.preset(sampler);

  const auto need_preset = [&] {
    if (preset != nullptr) return;
    std::vector<std::string> known;
    for (const auto& item : manifest.sampling) known.push_back(item.first);
    throw RequestError("sampler " + repr(sampler) + " has no settings in this bundle; accepted: " + joined(known),
                       "sampler", "", joined(known));
  };
  bool text = !given.prompt_embeds_pooled.has_value();
  if (!text) {
    need_preset();
    bool guided = false;
    for (const bool prior : {true, false}) {
      if (prior ? part == Part::decoder : part == Part::prior) continue;
      for (const double one : wanted_scales(prior ? request.prior : request.decoder,
                                            prior ? preset->prior : preset->decoder)) {
        guided = guided || one > 1;
      }
    }
    text = guided && !given.negative_prompt_embeds_pooled;
  }
  if (text) made.engines.emplace_back("text_encoder");
  if (part != Part::decoder) made.engines.insert(made.engines.end(), {"stage_c.context", "stage_c.step"});
  if (part != Part::prior) {
    made.engines.insert(made.engines.end(), {"stage_b.context", "stage_b.step"});
    if (request.output_type != "latent") made.engines.emplace_back("stage_a.decode");
  }
  Records running;
  for (const auto& name : made.engines) running.push_back(&need(records, name));
  need_preset();

  const auto prompts = texts_of(request.prompt);
  const bool embedded = given.prompt_embeds || given.prompt_embeds_pooled;
  if (prompts.empty() != embedded) {
    throw RequestError(std::string("give either prompt or prompt_embeds with prompt_embeds_pooled, ") +
                           (embedded ? "and not both" : "to say what to draw"),
                       "prompt");
  }
  made.prompts = static_cast<std::int64_t>(prompts.size());
  if (prompts.empty()) {
    if (part != Part::decoder && !given.prompt_embeds) {
      throw RequestError("the prior needs prompt_embeds beside prompt_embeds_pooled", "prompt_embeds");
    }
    made.prompts = given.prompt_embeds_pooled->shape[0];
    if (given.prompt_embeds && given.prompt_embeds->shape[0] != made.prompts) {
      throw refused_text("prompt_embeds", shape_text(given.prompt_embeds->shape),
                         "of " + std::to_string(made.prompts) + " prompts, as prompt_embeds_pooled is");
    }
  }
  const auto seeds = static_cast<std::int64_t>(request.seeds ? request.seeds->size() : 0);
  if (part == Part::decoder) {
    if (!given.image_embeddings) {
      throw refused_text("image_embeddings", "None", "an array [N, 16, h, w], as the prior gives it");
    }
    const std::int64_t several = given.image_embeddings->shape[0];
    if (several % made.prompts != 0) {
      throw RequestError(std::to_string(several) + " image embeddings cannot be shared out to " +
                             std::to_string(made.prompts) + " prompts",
                         "image_embeddings");
    }
    made.pictures = several * request.num_images_per_prompt.value_or(1);
  } else if (!request.num_images_per_prompt) {
    made.pictures = std::max(made.prompts, seeds);
    if (made.pictures % made.prompts != 0) {
      throw RequestError(std::to_string(seeds) + " seeds cannot be shared out to " + std::to_string(made.prompts) +
                             " prompts",
                         "seeds");
    }
  } else {
    made.pictures = made.prompts * *request.num_images_per_prompt;
  }
  if (seeds > 1 && seeds != made.pictures) {
    throw RequestError("there are " + std::to_string(seeds) + " seeds for " + std::to_string(made.pictures) +
                           " pictures; give 1 or " + std::to_string(made.pictures),
                       "seeds");
  }
  if (request.seeds) {
    made.seeds = *request.seeds;
  } else {
    std::random_device device;
    for (std::int64_t i = 0; i < made.pictures; ++i) made.seeds.push_back(device());
  }

  const ModelFacts& facts = manifest.model;
  const std::int64_t grid_c = grid_of(records, "stage_c.step"), grid_b = grid_of(records, "stage_b.step");
  if (part == Part::decoder && !request.height && !request.width) {
    for (std::size_t i = 0; i < 2; ++i) {
      made.prior_size[i] = given.image_embeddings->shape[2 + i];
      const auto side = static_cast<double>(made.prior_size[i]) * facts.latent_dim_scale;
      made.decoder_size[i] = round_up(static_cast<std::int64_t>(side), grid_b);
      made.picture_size[i] = made.decoder_size[i] * facts.compression;
    }
  } else {
    const std::int64_t height = request.height.value_or(facts.height), width = request.width.value_or(facts.width);
    check_size("height", height);
    check_size("width", width);
    const AxisPlan down = plan_axis(facts, grid_c, grid_b, sampler, height);
    const AxisPlan across = plan_axis(facts, grid_c, grid_b, sampler, width);
    made.prior_size = {down.prior, across.prior};
    made.decoder_size = {down.decoder, across.decoder};
    made.picture_size = {down.picture, across.picture};
    if (part == Part::decoder) made.prior_size = {given.image_embeddings->shape[2], given.image_embeddings->shape[3]};
  }

  for (const bool prior : {true, false}) {
    const std::string stage = prior ? "stage_c" : "stage_b";
    const EngineRecord* spec = record_of(running, stage + ".step");
    if (spec == nullptr) continue;
    const LoopSettings& own = prior ? request.prior : request.decoder;
    const LoopDefaults& defaults = prior ? preset->prior : preset->decoder;
    const auto model = manifest.models.find(stage);
    if (model == manifest.models.end() || !model->second.prediction_type) {
      throw BundleError("the bundle does not say what " + stage + " predicts; export it again",
                        "models['" + stage + "'].prediction_type");
    }
    LoopPlan loop;
    loop.stage = stage;
    loop.schedule = make_schedule(sampler, own.num_inference_steps.value_or(defaults.num_inference_steps),
                                  *model->second.prediction_type, defaults.shift, defaults.scaler, defaults.s);
    loop.scales = scale_table(prior ? "prior" : "decoder", own, defaults,
                              static_cast<std::size_t>(loop.schedule.size()), static_cast<std::size_t>(made.pictures),
                              static_cast<std::size_t>(made.prompts));
    loop.rescale = defaults.guidance_rescale;
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
  if (part != Part::decoder) {
    made.request.height = request.height.value_or(facts.height);
    made.request.width = request.width.value_or(facts.width);
  }
  made.request.num_images_per_prompt = made.pictures / n;
  made.request.seeds = made.seeds;
  made.request.sampler = sampler;
  made.request.prior = full(request.prior, preset->prior);
  made.request.decoder = full(request.decoder, preset->decoder);
  made.latent_scale = preset->latent_scale;
  made.memory = memory_of(manifest, running, made);
  return made;
}

}  // namespace cascade_rt::detail
