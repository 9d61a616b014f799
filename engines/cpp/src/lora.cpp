#include "lora.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <system_error>

#include "pictures.hpp"
#include "tables.hpp"

namespace fs = std::filesystem;

namespace cascade_rt::detail {

namespace {

struct Name {
  const char* told;
  const char* meant;
};

// what a file calls the networks that it changes
constexpr Name kKohya[] = {{"lora_prior_unet", "stage_c"}, {"lora_decoder_unet", "stage_b"}, {"lora_prior_te", "text_encoder"}};
constexpr Name kPeft[] = {{"prior", "stage_c"}, {"decoder", "stage_b"}, {"text_encoder", "text_encoder"}};
constexpr Name kKinds[] = {{"lora_down.weight", "down"},          {"lora_A.weight", "down"},
                           {"lora_up.weight", "up"},              {"lora_B.weight", "up"},
                           {"alpha", "alpha"},                    {"dora_scale", "magnitude"},
                           {"lora_magnitude_vector", "magnitude"}, {"lora_magnitude_vector.weight", "magnitude"}};
const std::string kNumbered = "weights.";

bool begins(const std::string& text, const std::string& head) { return text.rfind(head, 0) == 0; }

bool ends(const std::string& text, const std::string& tail) {
  return text.size() >= tail.size() && text.compare(text.size() - tail.size(), tail.size(), tail) == 0;
}

std::string without_end(const std::string& text, const std::string& tail) {
  return text.substr(0, text.size() - tail.size());
}

std::string replaced(std::string text, const std::string& old, const std::string& other) {
  for (std::size_t at = text.find(old); at != std::string::npos; at = text.find(old, at + other.size())) {
    text.replace(at, old.size(), other);
  }
  return text;
}

/// Vectors of words that were taught beside the weights.
bool is_words(const std::string& key) {
  static const std::set<std::string> known{"embeddings.embeddings", "embeddings.indices", "clip_g", "clip_l", "emb_params"};
  const std::string bundled = "bundle_emb.";
  return known.count(key) != 0 || (begins(key, bundled) && key.size() > bundled.size());
}

/// A tensor's name as a message may quote it.
std::string key_named(const std::string& key) { return shortened(plain(key)); }

std::string kind_of(const std::string& ending) {
  const std::string told = replaced(ending, ".default.", ".");
  for (const auto& row : kKinds) {
    if (told == row.told) return row.meant;
  }
  return "";
}

/// weights.12.lora_down -> weights.12 and down
bool numbered_key(const std::string& key, std::string& target, std::string& kind) {
  if (!begins(key, kNumbered)) return false;
  const std::size_t end = key.find_first_not_of("0123456789", kNumbered.size());
  if (end == kNumbered.size() || end == std::string::npos) return false;
  const std::string rest = key.substr(end);
  if (rest != ".lora_down" && rest != ".lora_up") return false;
  target = key.substr(0, end);
  kind = rest == ".lora_down" ? "down" : "up";
  return true;
}

/// lora_prior_unet_{module}.{ending}
bool kohya_key(const std::string& key, std::string& component, std::string& target, std::string& kind) {
  for (const auto& row : kKohya) {
    const std::string head = std::string(row.told) + "_";
    const std::size_t point = key.find('.');
    if (!begins(key, head) || point == std::string::npos || point <= head.size() || point + 1 == key.size()) continue;
    component = row.meant;
    target = key.substr(head.size(), point - head.size());
    kind = kind_of(key.substr(point + 1));
    return !kind.empty();
  }
  return false;
}

/// prior.{module}.{ending}, the shortest module after which the ending begins as one does
bool peft_key(const std::string& key, std::string& component, std::string& target, std::string& kind) {
  for (const auto& row : kPeft) {
    const std::string head = std::string(row.told) + ".";
    if (!begins(key, head)) continue;
    for (std::size_t at = key.find('.', head.size() + 1); at != std::string::npos; at = key.find('.', at + 1)) {
      const std::string rest = key.substr(at + 1, 5);
      if (!begins(rest, "lora_") && !begins(rest, "alpha") && !begins(rest, "dora_")) continue;
      component = row.meant;
      target = key.substr(head.size(), at - head.size());
      kind = kind_of(key.substr(at + 1));
      return !kind.empty();
    }
  }
  return false;
}

/// A weight that a module of a file changes, and which part of the file's rows it takes.
struct Part {
  std::string weight;
  std::size_t index, count;
};
using Targets = std::map<std::string, std::vector<Part>>;

/// A module's name here, and the others that it has had.
std::vector<std::string> names_of(const std::string& component, const std::string& module) {
  std::vector<std::string> made{module};
  if (component == "stage_b" && module == "clip_txt_pooled_mapper") made.emplace_back("clip_mapper");
  for (const char* const last : {"to_q", "to_k", "to_v", "to_out.0"}) {
    const std::string tail = std::string(".attention.") + last;
    if (!ends(module, tail) || module.size() == tail.size()) continue;
    const std::string attention = without_end(module, std::string(".") + last);
    made.push_back(attention + ".attn." + last);
    if (std::string(last) != "to_out.0") continue;
    for (const char* const other : {"to_out", "out_proj", "attn.to_out", "attn.out_proj"}) {
      made.push_back(attention + "." + other);
    }
  }
  return made;
}

/// Order of the forward pass: all on the way down, then all on the way up.
std::pair<bool, std::vector<std::uint64_t>> place_in_network(const std::string& attention) {
  std::vector<std::uint64_t> numbers;
  bool inside = false;
  for (const char c : attention) {
    const bool digit = c >= '0' && c <= '9';
    if (digit && !inside) numbers.push_back(0);
    if (digit) numbers.back() = numbers.back() * 10 + static_cast<std::uint64_t>(c - '0');
    inside = digit;
  }
  return {begins(attention, "up_blocks"), numbers};
}

/// Every name that a file may use for a module -> our weights.
Targets targets_of(const std::string& component, const TensorFile& weights) {
  Targets made;
  const auto add = [&](const std::string& name, const std::vector<Part>& parts) {
    made[name] = parts;
    made[replaced(name, ".", "_")] = parts;
  };
  std::vector<std::string> attentions;
  const std::string ending = ".weight", query = "attention.to_q";
  for (const auto& item : weights.places()) {
    if (!ends(item.first, ending) || item.second.shape.size() < 2) continue;
    const std::string module = without_end(item.first, ending);
    for (const auto& name : names_of(component, module)) add(name, {{item.first, 0, 1}});
    if (component != "text_encoder" && ends(module, query)) attentions.push_back(without_end(module, ".to_q"));
  }
  std::stable_sort(attentions.begin(), attentions.end(), [](const std::string& a, const std::string& b) {
    return place_in_network(a) < place_in_network(b);
  });
  for (std::size_t i = 0; i < attentions.size(); ++i) {
    std::vector<Part> fused;
    for (const char* const one : {"to_q", "to_k", "to_v"}) {
      fused.push_back({attentions[i] + "." + one + ending, fused.size(), 3});
    }
    add(attentions[i] + ".attn.in_proj", fused);
    made[kNumbered + std::to_string(2 * i)] = {{attentions[i] + ".to_out.0" + ending, 0, 1}};
    made[kNumbered + std::to_string(2 * i + 1)] = fused;
  }
  return made;
}

std::string path_of(const std::string& given) {
  if (given.find('\0') != std::string::npos) {
    throw CheckpointError(name_of(given) + ": embedded null byte; a .safetensors file is needed");
  }
  return expanded(given);
}

const std::string& checked_kind(const std::string& path) {
  for (const char* const ending : {".bin", ".pt", ".pth", ".ckpt", ".pkl"}) {
    if (fs::u8path(path).extension() != ending) continue;
    throw MissingCheckpointError(name_of(fs::u8path(path).filename().u8string()) +
                                 " is a pickle, which can run code when it is read; only .safetensors is");
  }
  return path;
}

}  // namespace

Lora::Lora(const std::string& path, double scale) : tensors_(checked_kind(path_of(path))), scale_(scale) { read_pairs(); }

CheckpointError Lora::error(const std::string& what) const {
  return CheckpointError(name_of(fs::u8path(path()).filename().u8string()) + " " + what);
}

std::vector<std::string> Lora::components() const {
  std::vector<std::string> made;
  for (const auto& pair : pairs_) {
    if (std::find(made.begin(), made.end(), pair.component) == made.end()) made.push_back(pair.component);
  }
  return made;
}

bool Lora::changes(const std::string& component) const {
  return std::any_of(pairs_.begin(), pairs_.end(), [&](const LoraPair& one) { return one.component == component; });
}

void Lora::place(const std::string& key, std::string& component, std::string& target, std::string& kind) const {
  if (numbered_key(key, target, kind)) {
    component = "stage_c";
    return;
  }
  if (kohya_key(key, component, target, kind) || peft_key(key, component, target, kind)) return;
  throw error("has " + key_named(key) +
              ", which is no LoRA weight of Stable Cascade; read are weights.0.lora_down, "
              "lora_prior_unet_....lora_down.weight and prior.....lora_A.weight");
}

void Lora::read_pairs() {
  using Halves = std::map<std::string, std::string>;  // which half -> key
  std::vector<std::pair<std::pair<std::string, std::string>, Halves>> found;
  std::map<std::pair<std::string, std::string>, std::size_t> index;
  std::size_t words = 0;
  for (const auto& item : tensors_.places()) {
    const std::string& key = item.first;
    if (is_words(key)) {
      ++words;
      continue;
    }
    std::string component, target, kind;
    place(key, component, target, kind);
    const auto known = index.emplace(std::make_pair(component, target), found.size());
    if (known.second) found.push_back({{component, target}, {}});
    const auto added = found[known.first->second].second.emplace(kind, key);
    if (!added.second) {
      throw error("has both " + key_named(added.first->second) + " and " + key_named(key) + "; one of them is too many");
    }
  }
  if (found.empty()) throw error(std::string("holds no LoRA weights") + (words > 0 ? ": only words" : ""));
  const auto defaults = peft_alphas();
  for (const auto& item : found) {
    const Halves& keys = item.second;
    for (const char* const half : {"down", "up"}) {
      if (keys.count(half) != 0) continue;
      std::string there;  // the first in the file
      for (const auto& one : tensors_.places()) {
        for (const auto& key : keys) {
          if (there.empty() && key.second == one.first) there = one.first;
        }
      }
      throw error("has " + key_named(there) + ", but no " + half + " half of it; it is cut");
    }
    LoraPair made;
    made.component = item.first.first;
    made.target = item.first.second;
    made.down = keys.at("down");
    made.up = keys.at("up");
    if (keys.count("magnitude") != 0) made.magnitude = keys.at("magnitude");
    tensors_.check_dtype(made.down);
    tensors_.check_dtype(made.up);
    if (made.magnitude) tensors_.check_dtype(*made.magnitude);
    if (keys.count("alpha") != 0) {
      made.alpha = tensors_.read_number(keys.at("alpha"));
      if (!std::isfinite(*made.alpha)) {
        throw error("has an alpha of " + repr(*made.alpha) + " in " + key_named(keys.at("alpha")) + "; it is damaged");
      }
    } else if (const auto own = defaults.find(made.component); own != defaults.end()) {
      made.alpha = own->second;
    }
    if (begins(made.target, kNumbered)) made.alpha = 1.0;  // the authors' default, which their files do not record
    check_rank(made);
    pairs_.push_back(std::move(made));
  }
}

void Lora::check_rank(const LoraPair& pair) const {
  const Shape& shape = tensors_.place(pair.down).shape;
  if (!shape.empty() && shape[0] > 0 && shape[0] <= tables::kMostRank) return;
  throw error("has " + key_named(pair.down) + " of shape " + shape_text(shape) + "; its first axis is the rank, from 1 to " +
              std::to_string(tables::kMostRank) + ", so it does not fit");
}

std::map<std::string, double> Lora::peft_alphas() const {
  const auto text = tensors_.metadata().find("lora_adapter_metadata");
  if (text == tensors_.metadata().end()) return {};
  const std::string where = name_of(fs::u8path(path()).filename().u8string()) + ", metadata lora_adapter_metadata";
  const Json facts = parse_json<CheckpointError>(text->second, where);
  if (!facts.is_object()) throw CheckpointError(where + " is " + shown(facts) + "; a JSON object is needed");
  const auto truth = [](const Json& value) {  // as Python sees it
    if (value.is_boolean()) return value.get<bool>();
    if (value.is_number()) return value.get<double>() != 0;
    return value.is_string() ? !value.get_ref<const std::string&>().empty() : !value.empty();
  };
  for (const auto& item : facts.items()) {
    if (truth(item.value()) && (ends(item.key(), "alpha_pattern") || ends(item.key(), "use_rslora"))) {
      throw error("sets " + key_named(item.key()) + ", which is not supported; it would be scaled wrongly");
    }
  }
  std::map<std::string, double> made;
  for (const auto& row : kPeft) {
    const std::string key = std::string(row.told) + ".lora_alpha";
    if (!facts.contains(key)) continue;
    const Json& value = facts.at(key);
    if (!value.is_number() || std::fabs(value.get<double>()) > 1e30) {
      throw error("has an alpha of " + shown(value) + " in " + key + "; a number is needed");
    }
    made[row.meant] = value.get<double>();
  }
  return made;
}

LoraUpdates Lora::updates(const std::string& component, const TensorFile& weights) const {
  const Targets known = targets_of(component, weights);
  std::set<std::string> numbered, places;
  for (const auto& pair : pairs_) {
    if (pair.component == component && begins(pair.target, kNumbered)) numbered.insert(pair.target);
  }
  for (const auto& item : known) {
    if (begins(item.first, kNumbered)) places.insert(item.first);
  }
  if (!numbered.empty() && numbered != places) {
    throw error("numbers " + std::to_string(numbered.size()) + " weights and names none; of this " + component +
                " the authors' training numbers " + std::to_string(places.size()) +
                ". It is for another size, or was trained with module_filters of its own");
  }
  LoraUpdates made;
  for (const auto& pair : pairs_) {
    if (pair.component != component) continue;
    const auto found = known.find(pair.target);
    if (found == known.end()) {
      throw error("changes " + key_named(pair.target) + ", which this " + component + " does not have");
    }
    for (const auto& part : found->second) {
      check(pair, part.weight, weights.place(part.weight).shape, part.count);
      auto at = std::find_if(made.begin(), made.end(), [&](const auto& item) { return item.first == part.weight; });
      if (at == made.end()) at = made.insert(made.end(), {part.weight, {}});
      at->second.push_back({&pair, part.index, part.count});
    }
  }
  return made;
}

void Lora::check(const LoraPair& pair, const std::string& name, const Shape& shape, std::size_t parts) const {
  const Shape& down = tensors_.place(pair.down).shape;
  const Shape& up = tensors_.place(pair.up).shape;
  const auto rows = static_cast<std::uint64_t>(shape[0]) * parts;
  const bool fits = down.size() > 1 && up.size() > 1 && down[0] > 0 &&
                    product_of(up, 1) == static_cast<std::uint64_t>(down[0]) &&
                    static_cast<std::uint64_t>(up[0]) == rows && product_of(down, 1) == product_of(shape, 1);
  if (!fits) {
    std::vector<std::string> sizes;
    for (const auto size : shape) sizes.push_back(std::to_string(size));
    throw error("has " + key_named(pair.down) + " of shape " + shape_text(down) + " and " + key_named(pair.up) + " of shape " +
                shape_text(up) + "; their product does not fit " + name + ", which is " + joined(sizes, " x "));
  }
  if (!pair.magnitude) return;
  const Shape& lengths = tensors_.place(*pair.magnitude).shape;
  if (product_of(lengths) == rows) return;
  throw error("has " + key_named(*pair.magnitude) + " of shape " + shape_text(lengths) + "; " + name + " has " +
              std::to_string(rows) + " output rows, and a DoRA has a number for each");
}

std::vector<float> Lora::applied(const LoraUpdate& update, std::vector<float> weight, const Shape& shape) const {
  const LoraPair& pair = *update.pair;
  const std::vector<float> down = tensors_.read(pair.down), up = tensors_.read(pair.up);
  const auto rank = static_cast<std::size_t>(tensors_.place(pair.down).shape[0]);
  const auto rows = static_cast<std::size_t>(shape[0]), columns = down.size() / rank;
  const std::size_t first = update.index * rows;
  const auto factor = static_cast<float>(pair.alpha ? *pair.alpha / static_cast<double>(rank) : 1.0);
  const auto scale = static_cast<float>(scale_);
  std::vector<float> lengths;
  if (pair.magnitude) lengths = tensors_.read(*pair.magnitude);
  std::vector<double> sums(columns), squares(pair.magnitude ? columns : 0);
  std::vector<float> product(columns);
  bool finite = true;
  for (std::size_t row = 0; row < rows; ++row) {
    // float64 holds every product of two numbers exactly; the sum is rounded once
    std::fill(sums.begin(), sums.end(), 0.0);
    for (std::size_t k = 0; k < rank; ++k) {
      const double left = up[(first + row) * rank + k];
      const float* right = down.data() + k * columns;
      for (std::size_t i = 0; i < columns; ++i) sums[i] += left * static_cast<double>(right[i]);
    }
    for (std::size_t i = 0; i < columns; ++i) product[i] = factor * static_cast<float>(sums[i]);
    float* own = weight.data() + row * columns;
    if (!pair.magnitude) {
      for (std::size_t i = 0; i < columns; ++i) own[i] = own[i] + scale * product[i];
    } else {
      for (std::size_t i = 0; i < columns; ++i) {
        product[i] = own[i] + product[i];  // the direction
        squares[i] = static_cast<double>(product[i]) * static_cast<double>(product[i]);
      }
      const auto length = static_cast<float>(std::sqrt(pairwise_sum(squares.data(), columns)));
      const float stretch = lengths[first + row] / std::max(length, 1e-12F);
      for (std::size_t i = 0; i < columns; ++i) own[i] = own[i] + scale * (product[i] * stretch - own[i]);
    }
    for (std::size_t i = 0; i < columns; ++i) finite = finite && std::isfinite(own[i]);
  }
  if (!finite) {
    throw error("times " + general(scale_) + " gives NaN or infinity with " + key_named(pair.down) + " and " +
                key_named(pair.up) + "; it is damaged, or the scale too large");
  }
  return weight;
}

std::string label_of(const std::vector<Lora>& loras) {
  std::string made;
  for (const auto& lora : loras) {
    const auto place = fs::u8path(lora.path());
    const auto time = fs::last_write_time(place).time_since_epoch().count();
    made += fs::canonical(place).u8string() + ":" + repr(lora.scale()) + ":" + std::to_string(time) + ";";
  }
  return made;
}

namespace {

/// A copy of a weights file with LoRA files applied.
void write_weights(const std::string& source, const std::string& target, const std::string& model,
                   const std::vector<const Lora*>& loras) {
  const TensorFile held(source);
  Json divided = Json::object();  // tensor name -> the power of two that it is stored divided by
  if (const auto text = held.metadata().find("divided"); text != held.metadata().end()) {
    divided = parse_json<CheckpointError>(text->second, name_of(source) + ", metadata divided");
  }
  if (held.metadata().count("quantised") != 0) {
    throw EngineError(name_of(source) + " holds layers in 8 bits, which the C++ library does not change; fold the LoRA " +
                      "in when the bundle is made: cascade-export --lora FILE:SCALE, or use the Python package");
  }
  std::vector<std::pair<const Lora*, LoraUpdates>> updates;
  std::vector<std::string> names;
  for (const Lora* lora : loras) {
    updates.emplace_back(lora, lora->updates(model, held));
    for (const auto& item : updates.back().second) {
      if (std::find(names.begin(), names.end(), item.first) == names.end()) names.push_back(item.first);
    }
  }
  fs::copy_file(fs::u8path(source), fs::u8path(target));
  fs::permissions(fs::u8path(target), fs::perms::owner_read | fs::perms::owner_write, fs::perm_options::add);
  for (const auto& name : names) {
    const auto factor = static_cast<float>(divided.is_object() ? divided.value(name, 1.0) : 1.0);
    std::vector<float> values = held.read(name);
    for (float& one : values) one *= factor;
    for (const auto& item : updates) {
      for (const auto& own : item.second) {
        if (own.first != name) continue;
        for (const auto& update : own.second) {
          values = item.first->applied(update, std::move(values), held.place(name).shape);
        }
      }
    }
    for (float& one : values) one /= factor;
    put(target, held.place(name), values);
  }
}

}  // namespace

std::set<std::string> write_overlay(const Bundle& bundle, const Records& engines, const std::vector<Lora>& loras,
                                    const std::string& folder) {
  const auto changed = [&](const EngineRecord& record) {
    return std::any_of(loras.begin(), loras.end(), [&](const Lora& one) { return one.changes(model_of(record.name)); });
  };
  Records records;
  std::copy_if(engines.begin(), engines.end(), std::back_inserter(records),
               [&](const EngineRecord* record) { return changed(*record); });
  for (const auto& lora : loras) {
    const bool any = std::any_of(records.begin(), records.end(),
                                 [&](const EngineRecord* record) { return lora.changes(model_of(record->name)); });
    if (any) continue;
    throw CheckpointError(name_of(fs::u8path(lora.path()).filename().u8string()) + " changes " +
                          joined(lora.components(), " and ") + ", which the bundle " + name_of(bundle.path()) +
                          " does not have");
  }
  std::map<std::string, std::string> files;
  for (const auto* record : records) {
    for (const auto& file : record->weights) files[file] = model_of(record->name);
  }
  const auto inside = [&](const std::string& file) { return (fs::u8path(folder) / fs::u8path(file)).u8string(); };
  std::set<std::string> made;
  try {
    for (const auto& item : files) {
      std::vector<const Lora*> own;
      for (const auto& lora : loras) {
        if (lora.changes(item.second)) own.push_back(&lora);
      }
      write_weights(bundle.impl().file(item.first), inside(item.first), item.second, own);
      made.insert(item.first);
    }
    for (const auto* record : records) {
      fs::copy_file(fs::u8path(bundle.impl().file(record->file)), fs::u8path(inside(record->file)),
                    fs::copy_options::overwrite_existing);
    }
  } catch (const std::system_error& failure) {  // also std::filesystem::filesystem_error
    throw OutputError("changed weights cannot be written to " + name_of(folder) + ": " +
                      failure.code().message());
  }
  return made;
}

}  // namespace cascade_rt::detail
