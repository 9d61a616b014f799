// Documents against their JSON Schemas, which generate.py takes from the Python package, in the words of schema.py.
// The subset that the schemas use is: $ref, type, enum, properties, required, additionalProperties, propertyNames, items,
// prefixItems, minItems, maxItems, anyOf, pattern, minLength, maxLength, minimum, maximum, exclusiveMinimum.
#include <algorithm>
#include <regex>

#include "manifest.hpp"
#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

struct Problem {
  std::string path;
  const Json* value;  // null where the key is missing
  std::string accepted;
  std::string told;
};

Json parsed(const char* const* pieces) {
  std::string text;
  for (; *pieces != nullptr; ++pieces) text += *pieces;
  return Json::parse(text);
}

bool matches(const std::string& text, const std::string& pattern) {
  if (text.size() > 1000) return false;  // every pattern of the schema is bounded, and std::regex recurses
  return std::regex_search(text, std::regex(pattern, std::regex::ECMAScript));
}

const Json& resolved(const Json& rule, const Json& schema) {
  const Json* made = &rule;
  while (made->contains("$ref")) {
    const std::string name = made->at("$ref").get<std::string>();  // "#/$defs/NAME"
    made = &schema.at("$defs").at(name.substr(name.rfind('/') + 1));
  }
  return *made;
}

std::string number_text(const Json& bound) {
  return bound.is_number_float() ? general(bound.get<double>()) : repr(bound);
}

/// " from 1 to 9", " above 0 and up to 9", or less where a bound is missing.
std::string bounds(const Json& rule) {
  const bool from = rule.contains("minimum"), above = rule.contains("exclusiveMinimum"), to = rule.contains("maximum");
  const std::string high = to ? number_text(rule.at("maximum")) : "";
  if (!from && !above) return to ? " of at most " + high : "";
  if (from) return " from " + general(rule.at("minimum").get<double>()) + (to ? " to " + high : "");
  return " above " + general(rule.at("exclusiveMinimum").get<double>()) + (to ? " and up to " + high : "");
}

/// " of 1 to 9 characters", or less where a bound is missing.
std::string lengths(const Json& rule, const char* least_key, const char* most_key, const char* one, const char* many) {
  const bool least = rule.contains(least_key), most = rule.contains(most_key);
  if (!least && !most) return "";
  const std::string low = least ? repr(rule.at(least_key)) : "", high = most ? repr(rule.at(most_key)) : "";
  if (!most) return " of at least " + low + " " + (low == "1" ? one : many);
  return !least || low == "0" ? " of up to " + high + " " + many : " of " + low + " to " + high + " " + many;
}

/// What a rule accepts, in words.
std::string accepted_by(const Json& given, const Json& schema) {
  const Json& rule = resolved(given, schema);
  if (rule.contains("anyOf")) {
    std::vector<std::string> words;
    for (const Json& one : rule.at("anyOf")) words.push_back(accepted_by(one, schema));
    return joined(words, " or ");
  }
  if (rule.contains("enum")) {
    std::vector<std::string> words;
    for (const Json& one : rule.at("enum")) words.push_back(one.is_string() ? one.get<std::string>() : repr(one));
    std::sort(words.begin(), words.end());
    return words.size() > 1 ? "one of " + joined(words) : words.front();
  }
  const std::string type = rule.value("type", std::string());
  if (type == "integer") return "an integer" + bounds(rule);
  if (type == "number") return "a number" + bounds(rule);
  if (type == "boolean") return "true or false";
  if (type == "null") return "null";
  if (type == "array") {
    if (rule.contains("prefixItems")) return "a list of " + std::to_string(rule.at("prefixItems").size()) + " entries";
    return "a list" + lengths(rule, "minItems", "maxItems", "entry", "entries");
  }
  if (type == "object" || rule.contains("properties")) return "an object";
  if (rule.contains("pattern")) return "a text of the form " + rule.at("pattern").get<std::string>();
  return "a text" + lengths(rule, "minLength", "maxLength", "character", "characters");
}

std::string quoted(const Json& value) { return value.is_object() ? "an object" : shown(value); }

bool has_type(const Json& value, const std::string& type) {
  if (type == "integer") return value.is_number_integer();
  if (type == "number") return value.is_number();
  if (type == "string") return value.is_string();
  if (type == "boolean") return value.is_boolean();
  if (type == "array") return value.is_array();
  if (type == "object") return value.is_object();
  return value.is_null();
}

/// Exact comparison of a number with a bound: -1, 0 or 1.
int compare(const Json& value, double bound) {
  if (value.is_number_unsigned()) {
    const auto number = value.get<std::uint64_t>();
    if (bound < 0) return 1;
    if (bound >= 18446744073709551616.0) return -1;
    const auto limit = static_cast<std::uint64_t>(bound);
    if (number != limit) return number < limit ? -1 : 1;
    return bound > static_cast<double>(limit) ? -1 : 0;
  }
  const double number = value.is_number_integer() ? static_cast<double>(value.get<std::int64_t>()) : value.get<double>();
  return number < bound ? -1 : number > bound ? 1 : 0;
}

/// Whether a value that has the rule's type breaks one of its bounds.
bool out_of_bounds(const Json& value, const Json& rule) {
  const auto below = [&](const char* key, std::size_t size) {
    return rule.contains(key) && size < rule.at(key).get<std::size_t>();
  };
  const auto over = [&](const char* key, std::size_t size) {
    return rule.contains(key) && size > rule.at(key).get<std::size_t>();
  };
  if (value.is_number()) {
    return (rule.contains("minimum") && compare(value, rule.at("minimum").get<double>()) < 0) ||
           (rule.contains("exclusiveMinimum") && compare(value, rule.at("exclusiveMinimum").get<double>()) <= 0) ||
           (rule.contains("maximum") && compare(value, rule.at("maximum").get<double>()) > 0);
  }
  if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const std::size_t letters = decode_utf8(text).size();
    return below("minLength", letters) || over("maxLength", letters) ||
           (rule.contains("pattern") && !matches(text, rule.at("pattern").get_ref<const std::string&>()));
  }
  return value.is_array() && (below("minItems", value.size()) || over("maxItems", value.size()));
}

bool listed(const Json& value, const Json& words) {
  return std::any_of(words.begin(), words.end(), [&](const Json& one) {
    return (one.is_string() == value.is_string()) && (one.is_number_integer() == value.is_number_integer()) && one == value;
  });
}

std::optional<Problem> check(const Json& value, const Json& rule_given, const std::string& path, const Json& schema);

std::optional<Problem> check_object(const Json& value, const Json& rule, const std::string& path, const Json& schema) {
  static const Json none = Json::object();
  const bool record = rule.contains("properties");
  const Json& properties = record ? rule.at("properties") : none;
  for (const auto& item : value.items()) {
    const std::string below = record ? path + "." + shortened(plain(item.key()))
                                     : path + "['" + shortened(plain(item.key())) + "']";
    if (rule.contains("propertyNames")) {
      const Json key = item.key();
      if (check(key, rule.at("propertyNames"), below, schema)) {
        const std::string accepted = accepted_by(rule.at("propertyNames"), schema);
        return Problem{path, nullptr, accepted,
                       "the key " + shown(key) + " is not accepted; a key must be " + accepted};
      }
    }
    if (properties.contains(item.key())) {
      if (auto found = check(item.value(), properties.at(item.key()), below, schema)) return found;
    } else if (rule.contains("additionalProperties")) {
      const Json& other = rule.at("additionalProperties");
      if (other.is_object()) {
        if (auto found = check(item.value(), other, below, schema)) return found;
      } else if (!other.get<bool>()) {
        std::vector<std::string> names;
        for (const auto& property : properties.items()) names.push_back(property.key());
        const std::string accepted = "known are " + joined(names);
        return Problem{below, &item.value(), accepted, "the key is not known; " + accepted};
      }
    }
  }
  if (!rule.contains("required")) return std::nullopt;
  for (const Json& name : rule.at("required")) {
    const auto& missing = name.get_ref<const std::string&>();
    if (value.contains(missing)) continue;
    const std::string accepted = accepted_by(properties.at(missing), schema);
    return Problem{path + "." + missing, nullptr, accepted, "the key is missing; it must be " + accepted};
  }
  return std::nullopt;
}

std::optional<Problem> check(const Json& value, const Json& rule_given, const std::string& path, const Json& schema) {
  const Json& rule = resolved(rule_given, schema);
  const auto refusal = [&] {
    const std::string accepted = accepted_by(rule, schema);
    return Problem{path, &value, accepted, quoted(value) + " is not accepted; it must be " + accepted};
  };
  if (rule.contains("anyOf")) {
    std::optional<Problem> deeper;
    for (const Json& one : rule.at("anyOf")) {
      auto found = check(value, one, path, schema);
      if (!found) return std::nullopt;
      if (found->path != path) deeper = std::move(found);  // it is of this kind, and something in it is wrong
    }
    return deeper ? deeper : refusal();
  }
  if (rule.contains("enum")) {
    return listed(value, rule.at("enum")) ? std::nullopt : std::optional<Problem>(refusal());
  }
  if (rule.contains("type") && !has_type(value, rule.at("type").get_ref<const std::string&>())) return refusal();
  if (out_of_bounds(value, rule)) return refusal();
  if (value.is_array()) {
    for (std::size_t i = 0; i < value.size(); ++i) {
      const bool prefixed = rule.contains("prefixItems") && i < rule.at("prefixItems").size();
      if (!prefixed && !(rule.contains("items") && rule.at("items").is_object())) continue;
      const Json& own = prefixed ? rule.at("prefixItems")[i] : rule.at("items");
      if (auto found = check(value[i], own, path + "[" + std::to_string(i) + "]", schema)) return found;
    }
  }
  return value.is_object() ? check_object(value, rule, path, schema) : std::nullopt;
}

}  // namespace

std::optional<SchemaProblem> schema_problem(const Json& document, Schema schema, const std::string& where) {
  static const Json schemas[] = {parsed(tables::kSchema), parsed(tables::kTensorSchema), parsed(tables::kMetadataSchema)};
  const Json& own = schemas[static_cast<std::size_t>(schema)];
  const auto found = check(document, own, "$", own);
  if (!found) return std::nullopt;
  std::string path = found->path.substr(1);
  if (path.rfind('.', 0) == 0) path.erase(0, 1);
  return SchemaProblem{plain(where) + ": " + (path.empty() ? "the document" : path) + ": " + found->told,
                       path.empty() ? "$" : path, found->value == nullptr ? "" : quoted(*found->value), found->accepted};
}

void check_schema(const Json& document, const std::string& where) {
  if (const auto found = schema_problem(document, Schema::manifest, where)) {
    throw BundleError(found->message, found->field, found->value, found->accepted);
  }
}

}  // namespace cascade_rt::detail
