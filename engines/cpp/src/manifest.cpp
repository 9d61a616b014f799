#include "manifest.hpp"

#include <algorithm>
#include <set>
#include <stdexcept>

#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

constexpr std::int64_t kLargest = (std::int64_t{1} << 31) - 1;

bool is_word_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; }

/// A product or sum of sizes; throws std::invalid_argument where it does not fit.
std::int64_t checked(__int128 value) {
  if (value > kLargest || value < -kLargest) throw std::invalid_argument("a size that is too large");
  return static_cast<std::int64_t>(value);
}

std::optional<std::int64_t> number_of(const std::string& word) {
  if (word.empty() || word.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  __int128 value = 0;
  for (const char c : word) value = checked(value * 10 + (c - '0'));
  return static_cast<std::int64_t>(value);
}

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == at) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

BundleError contradiction(const std::string& where, const std::string& path, const std::string& value,
                          const std::string& accepted) {
  return BundleError(plain(where) + ": " + path + ": " + value + " is not accepted; it must be " + accepted, path,
                     value, accepted);
}

/// How many axes the tensor table gives a tensor; nothing where it does not name it.
std::optional<std::size_t> rank_of(const std::string& engine, const std::string& tensor) {
  for (const auto& row : tables::kRanks) {
    if (engine == row.engine && tensor == row.tensor) return static_cast<std::size_t>(row.axes);
  }
  return std::nullopt;
}

/// Python's tuple of axes, numbers and formulas.
std::string axes_repr(const std::vector<AxisSize>& axes) {
  std::vector<std::string> words;
  for (const auto& axis : axes) words.push_back(axis.number != 0 ? std::to_string(axis.number) : repr(axis.formula));
  return shortened(plain("(" + joined(words) + (words.size() == 1 ? ",)" : ")")));
}

bool engine_known(const std::string& name) {
  return std::any_of(std::begin(tables::kEngines), std::end(tables::kEngines),
                     [&](const tables::EngineRow& row) { return name == row.name; });
}

std::string engine_names() {
  std::vector<std::string> names;
  for (const auto& row : tables::kEngines) names.emplace_back(row.name);
  return joined(names);
}

std::string words_repr(const std::vector<std::string>& words, bool tuple) {
  std::vector<std::string> shown_words;
  for (const auto& word : words) shown_words.push_back(repr(word));
  const std::string inside = joined(shown_words) + (tuple && words.size() == 1 ? "," : "");
  return shortened(plain((tuple ? "(" : "[") + inside + (tuple ? ")" : "]")));
}

TensorSpec tensor_from(const Json& value) {
  TensorSpec made;
  made.name = value.at("name").get<std::string>();
  made.dtype = value.at("dtype").get<std::string>();
  made.constant = value.value("constant_over_steps", false);
  for (const Json& axis : value.at("axes")) {
    AxisSize one;
    if (axis.is_string()) {
      one.formula = axis.get<std::string>();
    } else {
      one.number = axis.get<std::int64_t>();
    }
    made.axes.push_back(one);
  }
  return made;
}

EngineRecord record_from(const Json& value) {
  EngineRecord made;
  made.name = value.at("name").get<std::string>();
  made.features = value.value("features", std::vector<std::string>{});
  made.precision = {value.at("precision").at("name").get<std::string>(),
                    value.at("precision").at("compute").get<std::string>(),
                    value.at("precision").value("linear", std::string("plain"))};
  made.runtime = value.at("runtime").get<std::string>();
  made.file = value.at("file").get<std::string>();
  made.weights = value.at("weights").get<std::vector<std::string>>();
  for (const Json& one : value.at("inputs")) made.inputs.push_back(tensor_from(one));
  for (const Json& one : value.at("outputs")) made.outputs.push_back(tensor_from(one));
  for (const auto& item : value.at("ranges").items()) {
    const Json& range = item.value();
    made.ranges[item.key()] = {range.at("min").get<std::int64_t>(), range.at("opt").get<std::int64_t>(),
                               range.at("max").get<std::int64_t>(), range.value("multiple", std::int64_t{1})};
  }
  if (value.contains("target") && !value.at("target").is_null()) {
    made.sm = value.at("target").at("sm").get<std::vector<std::int64_t>>();
  }
  return made;
}

LoopDefaults loop_from(const Json& value) {
  LoopDefaults made;
  made.num_inference_steps = value.at("num_inference_steps").get<std::int64_t>();
  made.guidance_scale = value.at("guidance_scale").get<double>();
  made.guidance_rescale = value.value("guidance_rescale", made.guidance_rescale);
  made.shift = value.value("shift", made.shift);
  made.scaler = value.value("scaler", made.scaler);
  made.s = value.value("s", made.s);
  return made;
}

LoopOverrides overrides_from(const Json& value) {
  LoopOverrides made;
  if (value.is_null()) return made;
  if (value.contains("num_inference_steps") && value.at("num_inference_steps").is_number()) {
    made.num_inference_steps = value.at("num_inference_steps").get<std::int64_t>();
  }
  if (value.contains("guidance_scale") && value.at("guidance_scale").is_number()) {
    made.guidance_scale = value.at("guidance_scale").get<double>();
  }
  made.guidance_start = value.value("guidance_start", made.guidance_start);
  made.guidance_end = value.value("guidance_end", made.guidance_end);
  return made;
}

void check_range(const AxisRange& range, const std::string& path, const std::string& where) {
  const std::string sizes =
      std::to_string(range.min) + ", " + std::to_string(range.opt) + ", " + std::to_string(range.max);
  std::string told;
  if (!(range.min <= range.opt && range.opt <= range.max)) {
    told = "a range needs min <= opt <= max; this one has " + sizes;
  } else if (range.max / range.multiple * range.multiple < range.min) {
    told = "no multiple of " + std::to_string(range.multiple) + " lies in " + std::to_string(range.min) + ".." +
           std::to_string(range.max);
  }
  if (!told.empty()) throw BundleError(plain(where) + ": " + path + ": " + told, path, "", told);
}

void check_inside(const std::string& name, const std::string& where) {
  bool fine = !name.empty() && name[0] != '/' && name.find_first_of("\\:*?\"<>|") == std::string::npos;
  bool any = false;
  for (const auto& part : split(name, '/')) {
    if (part == ".." || part == ".") fine = false;
    if (!part.empty()) any = true;
  }
  for (const char32_t letter : decode_utf8(name)) fine = fine && is_printable(letter);
  if (!fine || !any) throw contradiction(where, "files", shown(name), "a plain relative name inside the bundle");
}

/// Refuse formulas of sizes that no input tells: shapes of outputs are computed from those of inputs.
void check_sizes_are_given(const EngineRecord& record, const std::string& path, const std::string& where) {
  std::set<std::string> given;
  for (const auto& tensor : record.inputs) {
    for (const auto& axis : tensor.axes) {
      if (axis.number == 0 && axis.axis.terms.size() == 1) given.insert(axis.axis.terms[0].second);
    }
  }
  for (const bool inputs : {true, false}) {
    const auto& tensors = inputs ? record.inputs : record.outputs;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      for (const auto& axis : tensors[i].axes) {
        for (const auto& term : axis.axis.terms) {
          if (given.count(term.second) != 0) continue;
          throw contradiction(where, path + (inputs ? ".inputs[" : ".outputs[") + std::to_string(i) + "].axes",
                              shown(axis.formula), "of sizes that inputs give, and none gives " + term.second);
        }
      }
    }
  }
}

void check_engine(EngineRecord& record, bool has_target, const std::string& path, const std::string& where) {
  if (!engine_known(record.name)) {
    throw contradiction(where, path + ".name", shown(record.name), "one of " + engine_names());
  }
  const std::set<std::string> sorted(record.features.begin(), record.features.end());
  if (record.features != std::vector<std::string>(sorted.begin(), sorted.end())) {
    throw contradiction(where, path + ".features", words_repr(record.features, true), "sorted, each once");
  }
  if (!has_target != (record.runtime == "onnx")) {
    throw contradiction(where, path + ".target", "None", "there exactly for TensorRT; this is " + record.runtime);
  }
  for (const auto& item : record.ranges) check_range(item.second, path + ".ranges['" + item.first + "']", where);
  for (const bool inputs : {true, false}) {
    auto& tensors = inputs ? record.inputs : record.outputs;
    const std::string kind = inputs ? "inputs" : "outputs";
    std::set<std::string> seen;
    std::vector<std::string> names;
    for (const auto& tensor : tensors) {
      seen.insert(tensor.name);
      names.push_back(tensor.name);
    }
    if (seen.size() < names.size()) {
      throw contradiction(where, path + "." + kind, words_repr(names, false), "names that differ");
    }
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::string place = path + "." + kind + "[" + std::to_string(i) + "]";
      for (auto& axis : tensors[i].axes) {
        if (axis.number != 0) continue;
        try {
          axis.axis = axis_of(axis.formula);
        } catch (const std::invalid_argument& error) {
          throw contradiction(where, place + ".axes", shown(axis.formula),
                              std::string("a formula (") + error.what() + ")");
        }
        for (const auto& term : axis.axis.terms) {
          if (record.ranges.count(term.second) == 0) {
            throw contradiction(where, place + ".axes", shown(axis.formula),
                                "of names in ranges, which has no " + term.second);
          }
        }
      }
      const std::size_t rank = rank_of(record.name, tensors[i].name).value_or(tensors[i].axes.size());
      if (rank != tensors[i].axes.size()) {
        throw contradiction(where, place + ".axes", axes_repr(tensors[i].axes),
                            "a list of " + std::to_string(rank) + " entries");
      }
      if (tensors[i].dtype == "compute") throw contradiction(where, place + ".dtype", "'compute'", "resolved");
    }
  }
  check_sizes_are_given(record, path, where);
}

std::string other_format(const Json& version, const Json& document, const std::string& where) {
  const std::string has = "has bundle format " + shown(version) + "; this cascade-rt reads 2";
  if (version.is_number_unsigned() && version.get<std::uint64_t>() > std::uint64_t{tables::kFormatVersion}) {
    return has + ". Upgrade with: pip install -U cascade-rt";
  }
  if (!version.is_number_integer() || version != 1) return has;
  std::string size, source = "None";
  if (document.contains("model") && document.at("model").is_object()) {
    const Json& model = document.at("model");
    if (model.contains("size") && model.at("size").is_string()) size = model.at("size").get<std::string>();
    if (model.contains("source") && model.at("source").is_string()) source = model.at("source").get<std::string>();
  }
  const bool named = size == "tiny" || size == "small" || size == "big";
  const std::string checkpoint =
      named ? "--size " + size : "--checkpoint " + encode_utf8(decode_utf8(plain(source)).substr(0, 200));
  std::string out = where;
  const std::string ending = std::string("/") + tables::kManifest;
  if (out.size() >= ending.size() && out.compare(out.size() - ending.size(), ending.size(), ending) == 0) {
    out.resize(out.size() - ending.size());
  }
  return "has bundle format 1, which this cascade-rt does not read; it reads 2. Make it anew with: cascade-export "
         "--stage all " +
         checkpoint + " --overwrite --out " + plain(out);
}

}  // namespace

std::int64_t Axis::size(const Sizes& sizes) const {
  __int128 total = plus;
  for (const auto& term : terms) {
    const auto found = sizes.find(term.second);
    if (found == sizes.end()) throw std::invalid_argument("no size of " + term.second + " is known");
    total += static_cast<__int128>(term.first) * found->second;
  }
  const std::int64_t sum = checked(total);
  if (sum % over != 0 && plus != over - 1) {  // height+31/32 is rounded up
    throw std::invalid_argument(std::to_string(sum) + " is no multiple of " + std::to_string(over));
  }
  return sum / over;
}

std::optional<std::int64_t> Axis::solve(std::int64_t size) const {
  if (terms.size() != 1) return std::nullopt;
  const __int128 total = static_cast<__int128>(size) * over - plus;
  const std::int64_t times = terms[0].first;
  if (total <= 0 || total % times != 0 || total / times > kLargest) return std::nullopt;
  return static_cast<std::int64_t>(total / times);
}

Axis axis_of(const std::string& formula) {
  const auto slash = split(formula, '/');
  bool fine = slash.size() <= 2;
  for (const auto& half : slash) {
    for (const auto& product : split(half, '+')) {
      for (const auto& factor : split(product, '*')) {
        fine = fine && !factor.empty() && std::all_of(factor.begin(), factor.end(), is_word_letter);
      }
    }
  }
  if (slash.size() == 2) fine = fine && slash[1].find_first_of("+*") == std::string::npos;
  if (!fine) throw std::invalid_argument(repr(formula) + " is no formula of an axis");
  Axis made;
  if (slash.size() == 2) {
    made.over = number_of(slash[1]).value_or(0);
    if (made.over == 0) {
      throw std::invalid_argument(repr(formula) + " divides by " + slash[1] + ", which is no number above 0");
    }
  }
  for (const auto& product : split(slash[0], '+')) {
    __int128 times = 1;
    std::vector<std::string> names;
    for (const auto& factor : split(product, '*')) {
      if (const auto number = number_of(factor)) {
        times = checked(times * *number);
      } else {
        names.push_back(factor);
      }
    }
    if (names.size() > 1) {
      throw std::invalid_argument(repr(formula) + " multiplies " + joined(names, " by ") +
                                  "; only numbers multiply a named size");
    }
    if (!names.empty() && times != 0) {
      made.terms.emplace_back(static_cast<std::int64_t>(times), names[0]);
    } else if (names.empty()) {
      made.plus = checked(static_cast<__int128>(made.plus) + times);
    }
  }
  if (made.terms.empty()) throw std::invalid_argument(repr(formula) + " is a number; write it as one");
  return made;
}

std::optional<std::int64_t> AxisRange::only() const {
  const std::int64_t least = (min + multiple - 1) / multiple * multiple;
  return max < least + multiple ? std::optional<std::int64_t>(least) : std::nullopt;
}

std::string AxisRange::text() const {
  return std::to_string(min) + ".." + std::to_string(max) +
         (multiple > 1 ? " in multiples of " + std::to_string(multiple) : "");
}

Shape TensorSpec::shape(const Sizes& sizes) const {
  Shape made;
  for (const auto& axis : axes) made.push_back(axis.number != 0 ? axis.number : axis.axis.size(sizes));
  return made;
}

std::string TensorSpec::axes_text() const {
  std::vector<std::string> words;
  for (const auto& axis : axes) words.push_back(axis.number != 0 ? std::to_string(axis.number) : repr(axis.formula));
  return "[" + joined(words) + "]";
}

const TensorSpec& EngineRecord::tensor(const std::string& tensor_name) const {
  for (const auto* tensors : {&inputs, &outputs}) {
    for (const auto& one : *tensors) {
      if (one.name == tensor_name) return one;
    }
  }
  throw BundleError("the manifest's engine " + name + " has no tensor " + tensor_name +
                    "; build the bundle again with cascade-export");
}

std::vector<std::string> EngineRecord::files() const {
  std::vector<std::string> made{file};
  made.insert(made.end(), weights.begin(), weights.end());
  return made;
}

std::string EngineRecord::key_text() const {
  std::string made = name;
  for (const auto& feature : features) made += " with " + feature;
  made += " " + precision.name + " " + runtime;
  for (const auto number : sm) made += " sm" + std::to_string(number);
  return made;
}

const FileRecord* Manifest::file(const std::string& name) const {
  for (const auto& item : files) {
    if (item.first == name) return &item.second;
  }
  return nullptr;
}

const SamplerDefaults* Manifest::defaults(const std::string& sampler) const {
  for (const auto& item : sampling) {
    if (item.first == sampler) return &item.second;
  }
  return nullptr;
}

std::vector<const EngineRecord*> Manifest::records(const std::string& name, const std::string& runtime,
                                                   const std::vector<std::string>& features) const {
  const std::set<std::string> wanted(features.begin(), features.end());
  std::vector<const EngineRecord*> found;
  for (const auto& record : engines) {
    const bool same = std::set<std::string>(record.features.begin(), record.features.end()) == wanted;
    if (record.name == name && same && (runtime.empty() || record.runtime == runtime)) found.push_back(&record);
  }
  std::stable_sort(found.begin(), found.end(), [](const EngineRecord* a, const EngineRecord* b) {
    return (a->runtime != "onnx") < (b->runtime != "onnx");
  });
  return found;
}

Manifest Manifest::from_json(const std::string& text, const std::string& where) {
  const Json document = parse_json<BundleError>(text, where);
  if (!document.is_object() || !document.contains("format_version")) {
    throw BundleError(plain(where) + " is no bundle manifest: it has no format_version");
  }
  const Json& version = document.at("format_version");
  if (!version.is_number_integer() || version != tables::kFormatVersion) {
    throw BundleError(plain(where) + " " + other_format(version, document, where), "format_version");
  }
  check_schema(document, where);

  Manifest made;
  const Json& model = document.at("model");
  made.model.name = model.at("name").get<std::string>();
  made.model.size = model.at("size").get<std::string>();
  made.model.source = model.at("source").get<std::string>();
  made.model.default_sampler = model.value("default_sampler", std::string("original"));
  made.model.height = model.at("height").get<std::int64_t>();
  made.model.width = model.at("width").get<std::int64_t>();
  made.model.compression = model.value("compression", made.model.compression);
  made.model.resolution_multiple = model.value("resolution_multiple", made.model.resolution_multiple);
  made.model.latent_dim_scale = model.value("latent_dim_scale", made.model.latent_dim_scale);
  for (const auto& item : document.at("sampling").items()) {
    const Json& own = item.value();
    made.sampling.emplace_back(item.key(), SamplerDefaults{loop_from(own.at("prior")), loop_from(own.at("decoder")),
                                                           own.at("latent_scale").get<double>()});
  }
  made.model.default_preset = model.value("default_preset", std::string("quality"));
  bool has_preset = made.model.default_preset == "quality";
  if (document.contains("presets")) {
    for (const auto& item : document.at("presets").items()) {
      const Json& own = item.value();
      made.presets.emplace_back(item.key(), Preset{overrides_from(own.value("prior", Json())),
                                                   overrides_from(own.value("decoder", Json()))});
      has_preset = has_preset || item.key() == made.model.default_preset;
    }
  }
  if (document.contains("previews")) {
    for (const auto& item : document.at("previews").items()) {
      PreviewFactors own;
      for (const Json& row : item.value().at("factors")) own.factors.push_back(row.get<std::array<float, 3>>());
      own.offset = item.value().at("offset").get<std::array<float, 3>>();
      made.previews[item.key()] = std::move(own);
    }
  }
  if (document.contains("tokenizer") && !document.at("tokenizer").is_null()) {
    const Json& own = document.at("tokenizer");
    made.tokenizer = TokenizerRecord{own.at("file").get<std::string>(), own.at("max_length").get<std::int64_t>(),
                                     own.at("pad_id").get<std::int64_t>()};
  }
  const Json none = Json::object();
  for (const auto& item : (document.contains("models") ? document.at("models") : none).items()) {
    ModelRecord record;
    const Json& own = item.value();
    if (own.at("weights").is_string()) record.weights = own.at("weights").get<std::string>();
    if (own.contains("prediction_type") && own.at("prediction_type").is_string()) {
      record.prediction_type = own.at("prediction_type").get<std::string>();
    }
    record.loras = own.value("loras", std::vector<std::string>{});
    record.config = own.at("config");
    made.models[item.key()] = record;
  }
  for (const auto& item : (document.contains("files") ? document.at("files") : none).items()) {
    check_inside(item.key(), where);
    made.files.emplace_back(item.key(), FileRecord{item.value().at("sha256").get<std::string>(),
                                                   item.value().at("bytes").get<std::uint64_t>()});
  }
  if (made.defaults(made.model.default_sampler) == nullptr) {
    throw contradiction(where, "model.default_sampler", shown(made.model.default_sampler), "a key of sampling");
  }
  if (!has_preset) {
    throw contradiction(where, "model.default_preset", shown(made.model.default_preset), "a key of presets");
  }
  std::vector<bool> has_target;
  std::vector<std::pair<std::string, std::string>> named;
  if (document.contains("engines")) {
    for (const Json& own : document.at("engines")) {
      made.engines.push_back(record_from(own));
      has_target.push_back(own.contains("target") && !own.at("target").is_null());
      const std::string path = "engines[" + std::to_string(made.engines.size() - 1) + "].files";
      for (const auto& file : made.engines.back().files()) named.emplace_back(path, file);
    }
  }
  for (const auto& item : made.models) {
    if (item.second.weights) named.emplace_back("models['" + item.first + "'].weights", *item.second.weights);
  }
  if (made.tokenizer) named.emplace_back("tokenizer.file", made.tokenizer->file);
  for (const auto& item : named) {
    if (made.file(item.second) == nullptr) {
      throw contradiction(where, item.first, shown(item.second), "a key of files, which has its hash");
    }
  }
  std::set<std::string> keys;
  for (std::size_t i = 0; i < made.engines.size(); ++i) {
    const std::string path = "engines[" + std::to_string(i) + "]";
    check_engine(made.engines[i], has_target[i], path, where);
    if (!keys.insert(made.engines[i].key_text()).second) {
      throw BundleError(plain(where) + " lists the engine " + made.engines[i].key_text() + " twice", path);
    }
  }
  return made;
}

}  // namespace cascade_rt::detail
