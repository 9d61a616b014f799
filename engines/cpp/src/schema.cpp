// The manifest against its JSON Schema, which generate.py takes from the Python package. The subset that the schema uses
// is: $ref, type, enum, properties, required, additionalProperties, propertyNames, items, prefixItems, minItems, maxItems, anyOf,
// pattern, minLength, maxLength, minimum, maximum, exclusiveMinimum. The words are those of msgspec.
#include <regex>

#include "manifest.hpp"
#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

struct Problem {
  std::string what;
  std::string path;
  const Json* value;  // null where the key is missing
};

const Json& schema() {
  static const Json made = [] {
    std::string text;
    for (const char* const* piece = tables::kSchema; *piece != nullptr; ++piece) text += *piece;
    return Json::parse(text);
  }();
  return made;
}

bool matches(const std::string& text, const std::string& pattern) {
  if (text.size() > 1000) return false;  // every pattern of the schema is bounded, and std::regex recurses
  return std::regex_search(text, std::regex(pattern, std::regex::ECMAScript));
}

std::string kind_of(const Json& value) {
  switch (value.type()) {
    case Json::value_t::null: return "null";
    case Json::value_t::boolean: return "bool";
    case Json::value_t::number_integer:
    case Json::value_t::number_unsigned: return "int";
    case Json::value_t::number_float: return "float";
    case Json::value_t::string: return "str";
    case Json::value_t::array: return "array";
    default: return "object";
  }
}

const Json& resolved(const Json& rule) {
  const Json* made = &rule;
  while (made->contains("$ref")) {
    const std::string name = made->at("$ref").get<std::string>();  // "#/$defs/NAME"
    made = &schema().at("$defs").at(name.substr(name.rfind('/') + 1));
  }
  return *made;
}

std::string expected(const Json& rule) {
  const Json& own = resolved(rule);
  if (own.contains("anyOf")) {
    std::vector<std::string> words;
    for (const Json& one : own.at("anyOf")) words.push_back(expected(one));
    return joined(words, " | ");
  }
  if (own.contains("enum")) return own.at("enum").front().is_string() ? "str" : "int";
  const std::string type = own.value("type", std::string("str"));
  if (type == "integer") return "int";
  if (type == "number") return "float";
  if (type == "string") return "str";
  if (type == "boolean") return "bool";
  return type;
}

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

std::optional<Problem> check(const Json& value, const Json& rule_given, const std::string& path) {
  const Json& rule = resolved(rule_given);
  const auto problem = [&](const std::string& what) { return Problem{what, path, &value}; };
  if (rule.contains("anyOf")) {
    std::optional<Problem> deepest;
    for (const Json& one : rule.at("anyOf")) {
      auto found = check(value, one, path);
      if (!found) return std::nullopt;
      // the alternative of the value's own kind says what is wrong with it
      const bool of_kind = found->what.rfind("Expected `" + expected(one) + "`, got", 0) != 0;
      if (of_kind) deepest = found;
    }
    if (deepest) return deepest;
    return problem("Expected `" + expected(rule) + "`, got `" + kind_of(value) + "`");
  }
  if (rule.contains("enum")) {
    for (const Json& one : rule.at("enum")) {
      if (one.type() == value.type() || (one.is_number_integer() && value.is_number_integer())) {
        if (one == value) return std::nullopt;
      }
    }
    if (kind_of(value) != expected(rule)) {
      return problem("Expected `" + expected(rule) + "`, got `" + kind_of(value) + "`");
    }
    return problem("Invalid enum value " + repr(value));
  }
  if (rule.contains("type") && !has_type(value, rule.at("type").get_ref<const std::string&>())) {
    return problem("Expected `" + expected(rule) + "`, got `" + kind_of(value) + "`");
  }
  if (value.is_number()) {
    const std::string kind = expected(rule);
    const auto bound = [&](const char* key) {
      return kind == "float" ? repr(rule.at(key).get<double>()) : repr(rule.at(key));
    };
    if (rule.contains("minimum") && compare(value, rule.at("minimum").get<double>()) < 0) {
      return problem("Expected `" + kind + "` >= " + bound("minimum"));
    }
    if (rule.contains("exclusiveMinimum") && compare(value, rule.at("exclusiveMinimum").get<double>()) <= 0) {
      return problem("Expected `" + kind + "` > " + bound("exclusiveMinimum"));
    }
    if (rule.contains("maximum") && compare(value, rule.at("maximum").get<double>()) > 0) {
      return problem("Expected `" + kind + "` <= " + bound("maximum"));
    }
  } else if (value.is_string()) {
    const auto& text = value.get_ref<const std::string&>();
    const auto letters = decode_utf8(text).size();
    if (rule.contains("minLength") && letters < rule.at("minLength").get<std::size_t>()) {
      return problem("Expected `str` of length >= " + repr(rule.at("minLength")));
    }
    if (rule.contains("maxLength") && letters > rule.at("maxLength").get<std::size_t>()) {
      return problem("Expected `str` of length <= " + repr(rule.at("maxLength")));
    }
    if (rule.contains("pattern") && !matches(text, rule.at("pattern").get_ref<const std::string&>())) {
      return problem("Expected `str` matching regex " + repr(rule.at("pattern")));
    }
  } else if (value.is_array()) {
    if (rule.contains("minItems") && value.size() < rule.at("minItems").get<std::size_t>()) {
      return problem("Expected `array` of length >= " + repr(rule.at("minItems")));
    }
    if (rule.contains("maxItems") && value.size() > rule.at("maxItems").get<std::size_t>()) {
      return problem("Expected `array` of length <= " + repr(rule.at("maxItems")));
    }
    for (std::size_t i = 0; i < value.size(); ++i) {
      const std::string below = path + "[" + std::to_string(i) + "]";
      const bool listed = rule.contains("prefixItems") && i < rule.at("prefixItems").size();
      const bool all = rule.contains("items") && rule.at("items").is_object();
      if (listed || all) {
        if (auto found = check(value[i], listed ? rule.at("prefixItems")[i] : rule.at("items"), below)) return found;
      }
    }
  } else if (value.is_object()) {
    const Json none = Json::object();
    const Json& properties = rule.contains("properties") ? rule.at("properties") : none;
    for (const auto& item : value.items()) {
      const bool known = properties.contains(item.key());
      const std::string below = properties.empty() ? path + "['" + shortened(plain(item.key())) + "']"
                                                   : path + "." + plain(item.key());
      if (rule.contains("propertyNames")) {
        Json key = item.key();
        if (auto found = check(key, rule.at("propertyNames"), below)) {
          return Problem{"a key of this mapping: " + found->what, path, &value};
        }
      }
      if (known) {
        if (auto found = check(item.value(), properties.at(item.key()), below)) return found;
      } else if (rule.contains("additionalProperties")) {
        const Json& other = rule.at("additionalProperties");
        if (other.is_boolean() && !other.get<bool>()) {
          return Problem{"Object contains unknown field `" + plain(item.key()) + "`", below, &item.value()};
        }
        if (other.is_object()) {
          if (auto found = check(item.value(), other, below)) return found;
        }
      }
    }
    if (rule.contains("required")) {
      for (const Json& name : rule.at("required")) {
        if (!value.contains(name.get_ref<const std::string&>())) {
          const std::string missing = name.get<std::string>();
          return Problem{"Object missing required field `" + missing + "`", path + "." + missing, nullptr};
        }
      }
    }
  }
  return std::nullopt;
}

}  // namespace

void check_schema(const Json& document, const std::string& where) {
  const auto found = check(document, schema(), "$");
  if (!found) return;
  std::string path = found->path;
  if (path.rfind("$.", 0) == 0) path = path.substr(2);
  if (path == "$") path = "the document";
  const bool quoted = found->value != nullptr && !found->value->is_object();
  const std::string value = quoted ? shown(*found->value) : "";
  throw BundleError(plain(where) + ": " + path + ": " + shortened(plain(found->what), 200) +
                        (quoted ? "; it is " + value : ""),
                    path, value, found->what);
}

}  // namespace cascade_rt::detail
