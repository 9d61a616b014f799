#include "request.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

std::vector<std::string> words(const char* const* list) {
  std::vector<std::string> made;
  for (; *list != nullptr; ++list) made.emplace_back(*list);
  return made;
}

void check_integer(const std::string& name, const Json& value, std::uint64_t least, std::uint64_t most) {
  bool fine = value.is_number_integer();
  if (fine && !value.is_number_unsigned()) fine = value.get<std::int64_t>() >= 0;
  if (fine) {
    const auto number = value.get<std::uint64_t>();
    fine = least <= number && number <= most;
  }
  if (!fine) {
    const std::string upper = most == ~std::uint64_t{0} ? "2**64 - 1" : std::to_string(most);
    throw refused(name, value, "an integer from " + std::to_string(least) + " to " + upper);
  }
}

double check_number(const std::string& name, const Json& value, double most, const std::string& note = {}) {
  const std::string accepted = "a finite number from -" + general(most) + " to " + general(most) + note;
  if (!value.is_number()) throw refused(name, value, accepted);
  const double number = value.get<double>();
  if (!(-most <= number && number <= most)) throw refused(name, value, accepted);
  return number;
}

double check_scale(const std::string& name, const Json& value) {
  return check_number(name, value, static_cast<double>(tables::kMaxGuidance), " (up to 1 means no guidance)");
}

double check_share(const std::string& name, const Json& value) {
  if (!value.is_number()) throw refused(name, value, "a number from 0 to 1");
  const double number = value.get<double>();
  if (!(0 <= number && number <= 1)) throw refused(name, value, "a number from 0 to 1");
  return number;
}

std::string check_choice(const std::string& name, const Json& value, const char* const* list) {
  const auto accepted = words(list);
  if (value.is_string() && std::find(accepted.begin(), accepted.end(), value) != accepted.end()) {
    return value.get<std::string>();
  }
  throw RequestError(name + " " + shown(value) + " is not known; accepted: " + joined(accepted), name, value.dump(),
                     joined(accepted));
}

void check_unicode(const std::string& name, const std::string& text) {
  const auto letters = decode_utf8(text);
  for (const char32_t letter : letters) {
    if (letter >= 0xD800 && letter <= 0xDFFF) {
      throw RequestError(name + " '" + shortened(plain(text)) + "' is no Unicode text (it has bytes that are not UTF-8)",
                         name);
    }
  }
  if (static_cast<std::int64_t>(letters.size()) > tables::kMaxPromptCharacters) {
    throw RequestError(name + " " + shown(text) + " has " + std::to_string(letters.size()) + " characters; up to " +
                           std::to_string(tables::kMaxPromptCharacters) + " are accepted",
                       name);
  }
}

const char* type_name(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "NoneType";
    case Json::value_t::boolean: return "bool";
    case Json::value_t::number_float: return "float";
    case Json::value_t::array: return "list";
    case Json::value_t::object: return "dict";
    case Json::value_t::string: return "str";
    default: return "int";
  }
}

Texts texts_from(const std::string& name, const Json& value) {
  if (value.is_null()) return {};
  if (value.is_string()) {
    check_unicode(name, value.get_ref<const std::string&>());
    return value.get<std::string>();
  }
  if (!value.is_array() || value.empty() || static_cast<std::int64_t>(value.size()) > tables::kMaxPictures) {
    throw refused(name, value, "a string or a list of 1 to " + std::to_string(tables::kMaxPictures) + " strings");
  }
  std::vector<std::string> made;
  for (const Json& text : value) {
    if (!text.is_string()) {
      throw RequestError(name + " has an entry of type " + type_name(text) + " (" + shown(text) +
                             "); every entry must be a string",
                         name, text.dump());
    }
    check_unicode(name, text.get_ref<const std::string&>());
    made.push_back(text.get<std::string>());
  }
  return made;
}

std::vector<double> scales_from(const std::string& name, const Json& value, std::int64_t most) {
  if (!value.is_array() || value.empty() || static_cast<std::int64_t>(value.size()) > most) {
    throw refused(name, value, "a list of 1 to " + std::to_string(most) + " numbers");
  }
  std::vector<double> made;
  for (const Json& one : value) made.push_back(check_scale(name, one));
  return made;
}

void check_fields(const std::string& what, const std::string& field, const Json& values, const tables::Pair* fields) {
  std::vector<std::string> known;
  for (const tables::Pair* pair = fields; pair->key != nullptr; ++pair) known.emplace_back(pair->key);
  for (const auto& item : values.items()) {
    if (std::find(known.begin(), known.end(), item.key()) == known.end()) {
      std::sort(known.begin(), known.end());
      throw RequestError(what + " has no field " + shown(item.key()) + "; it has " + joined(known),
                         field.empty() ? item.key() : field);
    }
  }
}

const Json& at(const Json& values, const char* key) {
  static const Json none;
  return values.contains(key) ? values.at(key) : none;
}

LoopSettings loop_from(const std::string& name, const Json& value) {
  if (!value.is_object()) {
    throw refused(name, value, "an object with num_inference_steps and guidance_scale");
  }
  check_fields(name, name, value, tables::kLoopFields);
  LoopSettings made;
  const Json& scale = at(value, "guidance_scale");
  if (scale.is_array()) {
    made.guidance_scale = scales_from(name + ".guidance_scale", scale, tables::kMaxPictures);
  } else if (!scale.is_null()) {
    made.guidance_scale = check_scale(name + ".guidance_scale", scale);
  }
  if (const Json& steps = at(value, "num_inference_steps"); !steps.is_null()) {
    check_integer(name + ".num_inference_steps", steps, 1, static_cast<std::uint64_t>(tables::kMaxSteps));
    made.num_inference_steps = steps.get<std::int64_t>();
  }
  if (const Json& per_step = at(value, "guidance_per_step"); !per_step.is_null()) {
    made.guidance_per_step = scales_from(name + ".guidance_per_step", per_step, tables::kMaxSteps);
    if (!scale.is_null()) {
      throw RequestError("give either " + name + ".guidance_scale or " + name + ".guidance_per_step, and not both",
                         name + ".guidance_per_step");
    }
  }
  const Json& start = at(value, "guidance_start");
  const Json& end = at(value, "guidance_end");
  if (!start.is_null()) made.guidance_start = check_share(name + ".guidance_start", start);
  if (!end.is_null()) made.guidance_end = check_share(name + ".guidance_end", end);
  if (made.guidance_start && made.guidance_end && *made.guidance_start > *made.guidance_end) {
    throw refused(name + ".guidance_start", Json(*made.guidance_start),
                  "at most " + name + ".guidance_end, which is " + general(*made.guidance_end));
  }
  return made;
}

bool check_bool(const std::string& name, const Json& value) {
  if (!value.is_boolean()) throw refused(name, value, "True or False");
  return value.get<bool>();
}

std::string path_from(const std::string& name, const Json& value, const char* accepted) {
  if (!value.is_string() || value.get_ref<const std::string&>().empty() ||
      value.get_ref<const std::string&>().find('\0') != std::string::npos) {
    throw refused(name, value, accepted);
  }
  return value.get<std::string>();
}

std::string place_from(const std::string& name, const Json& value) {
  return path_from(name, value, "the path of a picture, or a data:image/...;base64, URI");
}

std::string file_from(const std::string& name, const Json& value) {
  return path_from(name, value, "the path of a file");
}

/// Visits the elements of a list with their names: objects with the field `first`, and with `second` or without.
template <class Visit>
void for_rows(const std::string& name, const Json& value, std::int64_t most, const std::string& described,
              const std::string& first, const std::string& second, const Visit& visit) {
  if (!value.is_array() || static_cast<std::int64_t>(value.size()) > most) {
    throw refused(name, value, "a list of up to " + std::to_string(most) + " " + described);
  }
  for (std::size_t i = 0; i < value.size(); ++i) {
    const std::string place = name + "[" + std::to_string(i) + "]";
    const Json& one = value[i];
    bool fine = one.is_object() && one.contains(first);
    if (fine) {
      for (const auto& item : one.items()) fine = fine && (item.key() == first || item.key() == second);
    }
    if (!fine) throw refused(place, one, "an object with " + first + " and " + second);
    visit(place, one);
  }
}

double number_or_one(const std::string& place, const Json& row, const std::string& field, double most) {
  return row.contains(field) ? check_number(place + "." + field, row.at(field), most) : 1.0;
}

std::vector<ImagePrompt> images_from(const Json& value) {
  std::vector<ImagePrompt> made;
  const auto most = static_cast<double>(tables::kMaxWeight);
  for_rows("images", value, tables::kMaxImages, "images with weights", "image", "weight",
           [&](const std::string& place, const Json& row) {
             std::string image = place_from(place + ".image", row.at("image"));
             made.push_back({std::move(image), number_or_one(place, row, "weight", most)});
           });
  return made;
}

std::vector<LoraFile> loras_from(const Json& value) {
  std::vector<LoraFile> made;
  const auto most = static_cast<double>(tables::kMaxLoraScale);
  for_rows("loras", value, tables::kMaxLoras, "files with scales", "file", "scale",
           [&](const std::string& place, const Json& row) {
             std::string file = file_from(place + ".file", row.at("file"));
             made.push_back({std::move(file), number_or_one(place, row, "scale", most)});
           });
  return made;
}

/// The fields of a request that this library has; of Python's others it takes the defaults only.
constexpr const char* kOwnFields[] = {"prompt", "negative_prompt", "height",  "width",  "num_images_per_prompt",
                                      "seeds",  "noise",           "sampler", "preset", "prior",
                                      "decoder", "images",         "init_image", "strength", "mask_image",
                                      "control_image", "control_scale", "control_kind", "control_filtered",
                                      "loras",   "output_type"};

Json texts_json(const Texts& texts) {
  if (const auto* one = std::get_if<std::string>(&texts)) return *one;
  if (const auto* several = std::get_if<std::vector<std::string>>(&texts)) return *several;
  return nullptr;
}

template <class T>
Json optional_json(const std::optional<T>& value) {
  return value ? Json(*value) : Json(nullptr);
}

Json loop_json(const LoopSettings& loop) {
  Json made = Json::object();
  made["num_inference_steps"] = optional_json(loop.num_inference_steps);
  Json scale = nullptr;
  if (const auto* one = std::get_if<double>(&loop.guidance_scale)) scale = *one;
  if (const auto* several = std::get_if<std::vector<double>>(&loop.guidance_scale)) scale = *several;
  made["guidance_scale"] = scale;
  made["guidance_start"] = optional_json(loop.guidance_start);
  made["guidance_end"] = optional_json(loop.guidance_end);
  made["guidance_per_step"] = optional_json(loop.guidance_per_step);
  return made;
}

}  // namespace

RequestError not_taken(const std::string& field) {
  return RequestError(field + " is not taken by the C++ library; use the Python package for it", field, "", "nothing");
}

std::vector<std::string> texts_of(const Texts& texts) {
  if (const auto* one = std::get_if<std::string>(&texts)) return {*one};
  if (const auto* several = std::get_if<std::vector<std::string>>(&texts)) return *several;
  return {};
}

Json to_json(const Request& request) {
  Json made = Json::object();
  // all fields in Python's order; those that this library does not have keep their defaults
  for (const tables::Pair* pair = tables::kRequestFields; pair->key != nullptr; ++pair) {
    made[pair->key] = Json::parse(pair->value);
  }
  made["prompt"] = texts_json(request.prompt);
  made["negative_prompt"] = texts_json(request.negative_prompt);
  made["height"] = optional_json(request.height);
  made["width"] = optional_json(request.width);
  made["num_images_per_prompt"] = optional_json(request.num_images_per_prompt);
  made["seeds"] = optional_json(request.seeds);
  made["noise"] = request.noise;
  made["sampler"] = optional_json(request.sampler);
  made["preset"] = optional_json(request.preset);
  made["prior"] = loop_json(request.prior);
  made["decoder"] = loop_json(request.decoder);
  made["images"] = Json::array();
  for (const auto& one : request.images) {
    Json image = Json::object();
    image["image"] = one.image;
    image["weight"] = one.weight;
    made["images"].push_back(image);
  }
  made["init_image"] = optional_json(request.init_image);
  made["strength"] = optional_json(request.strength);
  made["mask_image"] = optional_json(request.mask_image);
  made["control_image"] = optional_json(request.control_image);
  made["control_scale"] = request.control_scale;
  made["control_kind"] = optional_json(request.control_kind);
  made["control_filtered"] = request.control_filtered;
  made["loras"] = Json::array();
  for (const auto& one : request.loras) {
    Json lora = Json::object();
    lora["file"] = one.file;
    lora["scale"] = one.scale;
    made["loras"].push_back(lora);
  }
  made["output_type"] = request.output_type;
  return made;
}

Request request_from(const Json& values) {
  if (!values.is_object()) throw refused("the request", values, "an object of fields");
  check_fields("a request", "", values, tables::kRequestFields);
  for (const tables::Pair* pair = tables::kRequestFields; pair->key != nullptr; ++pair) {
    const std::string name = pair->key;
    if (std::find(std::begin(kOwnFields), std::end(kOwnFields), name) != std::end(kOwnFields)) continue;
    if (values.contains(name) && values.at(name) != Json::parse(pair->value)) throw not_taken(name);
  }
  Request made;
  made.prompt = texts_from("prompt", at(values, "prompt"));
  made.negative_prompt = texts_from("negative_prompt", at(values, "negative_prompt"));
  for (const char* name : {"height", "width"}) {
    const Json& value = at(values, name);
    if (value.is_null()) continue;
    check_integer(name, value, static_cast<std::uint64_t>(tables::kMinPixels),
                  static_cast<std::uint64_t>(tables::kMaxPixels));
    (std::string(name) == "height" ? made.height : made.width) = value.get<std::int64_t>();
  }
  if (const Json& value = at(values, "num_images_per_prompt"); !value.is_null()) {
    check_integer("num_images_per_prompt", value, 1, static_cast<std::uint64_t>(tables::kMaxPictures));
    made.num_images_per_prompt = value.get<std::int64_t>();
  }
  if (const Json& value = at(values, "seeds"); !value.is_null()) {
    Json several = value;
    if (value.is_number_integer()) several = Json::array({value});
    if (!several.is_array() || several.empty() || static_cast<std::int64_t>(several.size()) > tables::kMaxPictures) {
      throw refused("seeds", value,
                    "an integer from 0 to 2**64 - 1, or a list of 1 to " + std::to_string(tables::kMaxPictures) +
                        " of them");
    }
    made.seeds.emplace();
    for (const Json& one : several) {
      check_integer("seeds", one, 0, ~std::uint64_t{0});
      made.seeds->push_back(one.get<std::uint64_t>());
    }
  }
  if (values.contains("noise")) made.noise = check_choice("noise", values.at("noise"), tables::kNoiseKinds);
  if (const Json& value = at(values, "sampler"); !value.is_null()) {
    made.sampler = check_choice("sampler", value, tables::kSamplers);
  }
  if (const Json& value = at(values, "preset"); !value.is_null()) {
    made.preset = check_choice("preset", value, tables::kPresets);
  }
  if (values.contains("prior")) made.prior = loop_from("prior", values.at("prior"));
  if (values.contains("decoder")) made.decoder = loop_from("decoder", values.at("decoder"));
  if (values.contains("images")) made.images = images_from(values.at("images"));
  if (const Json& value = at(values, "init_image"); !value.is_null()) made.init_image = place_from("init_image", value);
  if (const Json& value = at(values, "strength"); !value.is_null()) made.strength = check_share("strength", value);
  if (const Json& value = at(values, "mask_image"); !value.is_null()) made.mask_image = place_from("mask_image", value);
  if (const Json& value = at(values, "control_image"); !value.is_null()) {
    made.control_image = place_from("control_image", value);
  }
  if (values.contains("control_scale")) {
    made.control_scale =
        check_number("control_scale", values.at("control_scale"), static_cast<double>(tables::kMaxControlScale));
  }
  if (const Json& value = at(values, "control_kind"); !value.is_null()) {
    made.control_kind = check_choice("control_kind", value, tables::kControlKinds);
  }
  if (values.contains("control_filtered")) {
    made.control_filtered = check_bool("control_filtered", values.at("control_filtered"));
  }
  if (values.contains("loras")) made.loras = loras_from(values.at("loras"));
  if (values.contains("output_type")) {
    made.output_type = check_choice("output_type", values.at("output_type"), tables::kOutputTypes);
  }
  return made;
}

void check(const Request& request) { request_from(to_json(request)); }

void check_tensors(const Tensors& given) {
  const auto partner = [](const std::optional<Tensor>& first, const char* first_name,
                          const std::optional<Tensor>& second, const char* second_name) {
    if (first && !second) {
      throw RequestError(std::string(first_name) + " is given without " + second_name + "; they go together",
                         second_name);
    }
  };
  partner(given.prompt_embeds, "prompt_embeds", given.prompt_embeds_pooled, "prompt_embeds_pooled");
  partner(given.negative_prompt_embeds, "negative_prompt_embeds", given.negative_prompt_embeds_pooled,
          "negative_prompt_embeds_pooled");
  if (given.negative_prompt_embeds_pooled && !given.negative_prompt_embeds) {
    throw RequestError("negative_prompt_embeds and negative_prompt_embeds_pooled go together", "negative_prompt_embeds");
  }
  const auto array = [](const char* name, const std::optional<Tensor>& value, std::size_t rank) {
    if (!value) return;
    bool fits = value->shape.size() == rank;
    for (const auto size : value->shape) fits = fits && size > 0;
    if (!fits) {
      const std::vector<std::string> any(rank, "'any'");
      throw RequestError(std::string(name) + " has shape " + shape_text(value->shape) + "; it must be (" + joined(any) +
                             ")",
                         name, shape_text(value->shape));
    }
    if (count_of(value->shape) != value->data.size()) {
      throw RequestError(std::string(name) + " has shape " + shape_text(value->shape) + " and " +
                             std::to_string(value->data.size()) + " numbers",
                         name);
    }
    float largest = 0;
    for (const float one : value->data) {
      if (!std::isfinite(one)) throw RequestError(std::string(name) + " holds NaN or infinity", name);
      largest = std::max(largest, std::fabs(one));
    }
    if (static_cast<double>(largest) > tables::kMaxTensorValue) {
      throw RequestError(std::string(name) + " holds " + general(largest) + "; values up to " +
                             general(tables::kMaxTensorValue) + " are accepted",
                         name);
    }
  };
  array("prompt_embeds", given.prompt_embeds, 3);
  array("prompt_embeds_pooled", given.prompt_embeds_pooled, 3);
  array("negative_prompt_embeds", given.negative_prompt_embeds, 3);
  array("negative_prompt_embeds_pooled", given.negative_prompt_embeds_pooled, 3);
  array("image_embeds", given.image_embeds, 3);
  array("latents", given.latents, 4);
  array("image_embeddings", given.image_embeddings, 4);
  array("decoder_latents", given.decoder_latents, 4);
}

}  // namespace cascade_rt::detail

namespace cascade_rt {

std::string Request::to_json() const { return detail::json_text(detail::to_json(*this)); }

Request Request::from_json(const std::string& text) {
  return detail::request_from(detail::parse_json<RequestError>(text, "the request"));
}

}  // namespace cascade_rt
