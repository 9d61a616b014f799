#include "text.hpp"

#include <utf8proc.h>

#include <charconv>
#include <cmath>
#include <cstdio>

namespace cascade_rt::detail {

namespace {

constexpr int kMaxDepth = 500;

void append_repr(std::string& out, const Json& value, std::size_t limit, int depth) {
  if (out.size() > limit) return;  // a message quotes 80 characters
  switch (value.type()) {
    case Json::value_t::null: out += "None"; return;
    case Json::value_t::boolean: out += value.get<bool>() ? "True" : "False"; return;
    case Json::value_t::number_integer: out += std::to_string(value.get<std::int64_t>()); return;
    case Json::value_t::number_unsigned: out += std::to_string(value.get<std::uint64_t>()); return;
    case Json::value_t::number_float: out += repr(value.get<double>()); return;
    case Json::value_t::string: out += repr(value.get_ref<const std::string&>()); return;
    case Json::value_t::array:
    case Json::value_t::object: break;
    default: return;
  }
  if (depth > kMaxDepth) {
    out += "...";
    return;
  }
  const bool list = value.is_array();
  out += list ? "[" : "{";
  bool first = true;
  for (const auto& item : value.items()) {
    if (!first) out += ", ";
    first = false;
    if (!list) out += repr(item.key()) + ": ";
    append_repr(out, item.value(), limit, depth + 1);
  }
  out += list ? "]" : "}";
}

void append_escape(std::string& out, char32_t letter) {
  char text[16];
  if (letter == U'\n') {
    out += "\\n";
  } else if (letter == U'\r') {
    out += "\\r";
  } else if (letter == U'\t') {
    out += "\\t";
  } else {
    const char* form = letter < 0x100 ? "\\x%02x" : letter < 0x10000 ? "\\u%04x" : "\\U%08x";
    std::snprintf(text, sizeof text, form, static_cast<unsigned>(letter));
    out += text;
  }
}

void append_json(std::string& out, const Json& value) {
  if (value.is_array() || value.is_object()) {
    const bool list = value.is_array();
    out += list ? '[' : '{';
    bool first = true;
    for (const auto& item : value.items()) {
      if (!first) out += ", ";
      first = false;
      if (!list) out += Json(item.key()).dump() + ": ";
      append_json(out, item.value());
    }
    out += list ? ']' : '}';
  } else if (value.is_number_float()) {
    out += repr(value.get<double>());
  } else {
    out += value.dump(-1, ' ', false, Json::error_handler_t::replace);
  }
}

}  // namespace

std::u32string decode_utf8(const std::string& text) {
  std::u32string made;
  made.reserve(text.size());
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  const auto size = static_cast<utf8proc_ssize_t>(text.size());
  for (utf8proc_ssize_t at = 0; at < size;) {
    utf8proc_int32_t letter = -1;
    const auto used = utf8proc_iterate(bytes + at, size - at, &letter);
    if (used > 0 && letter >= 0) {
      made.push_back(static_cast<char32_t>(letter));
      at += used;
    } else {
      made.push_back(0xDC00U + bytes[at]);
      ++at;
    }
  }
  return made;
}

void append_utf8(std::string& out, char32_t letter) {
  if (letter >= 0xDC80 && letter <= 0xDCFF) {
    out.push_back(static_cast<char>(letter - 0xDC00));
    return;
  }
  utf8proc_uint8_t bytes[4];
  const auto used = utf8proc_encode_char(static_cast<utf8proc_int32_t>(letter), bytes);
  out.append(reinterpret_cast<const char*>(bytes), static_cast<std::size_t>(used));
}

std::string encode_utf8(const std::u32string& text) {
  std::string made;
  made.reserve(text.size());
  for (const char32_t letter : text) append_utf8(made, letter);
  return made;
}

bool is_printable(char32_t letter) {
  if (letter == U' ') return true;
  if (letter >= 0xD800 && letter <= 0xDFFF) return false;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(letter))) {
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS: return false;
    default: return true;
  }
}

std::string plain(const std::string& text) {
  std::string made;
  for (const char32_t letter : decode_utf8(text)) {
    if (is_printable(letter)) {
      append_utf8(made, letter);
    } else {
      append_escape(made, letter);
    }
  }
  return made;
}

std::string shortened(const std::string& text, std::size_t limit) {
  const std::u32string letters = decode_utf8(text);
  if (letters.size() <= limit) return text;
  const std::size_t kept = (limit - 5) / 2;
  return encode_utf8(letters.substr(0, kept)) + " ... " + encode_utf8(letters.substr(letters.size() - kept));
}

std::string repr(const std::string& text) {
  const char quote = text.find('\'') != std::string::npos && text.find('"') == std::string::npos ? '"' : '\'';
  std::string made(1, quote);
  for (const char32_t letter : decode_utf8(text)) {
    if (letter == U'\\' || letter == static_cast<char32_t>(quote)) {
      made += '\\';
      append_utf8(made, letter);
    } else if (is_printable(letter)) {
      append_utf8(made, letter);
    } else {
      append_escape(made, letter);
    }
  }
  return made + quote;
}

std::string repr(double number) {
  if (std::isnan(number)) return "nan";
  if (std::isinf(number)) return number < 0 ? "-inf" : "inf";
  char text[64];
  const auto end = std::to_chars(text, text + sizeof text, number, std::chars_format::scientific).ptr;
  const std::string all(text, end);
  const auto e = all.find('e');
  const int exponent = std::stoi(all.substr(e + 1));
  std::string digits = all.substr(0, e);
  std::string sign;
  if (digits[0] == '-') {
    sign = "-";
    digits.erase(0, 1);
  }
  if (digits.size() > 1) digits.erase(1, 1);  // the point
  if (exponent < -4 || exponent >= 16) {
    std::string made = sign + digits.substr(0, 1) + (digits.size() > 1 ? "." + digits.substr(1) : "");
    const int size = std::abs(exponent);
    return made + (exponent < 0 ? "e-" : "e+") + (size < 10 ? "0" : "") + std::to_string(size);
  }
  if (exponent < 0) return sign + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  const auto whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() <= whole) return sign + digits + std::string(whole - digits.size(), '0') + ".0";
  return sign + digits.substr(0, whole) + "." + digits.substr(whole);
}

std::string general(double number) {
  char text[40];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

std::string repr(const Json& value) {
  std::string made;
  append_repr(made, value, static_cast<std::size_t>(-1), 0);
  return made;
}

std::string shown(const Json& value) {
  std::string made;
  append_repr(made, value, 1U << 20U, 0);
  return shortened(plain(made));
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string made = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) made += (i ? ", " : "") + std::to_string(shape[i]);
  return made + (shape.size() == 1 ? ",)" : ")");
}

std::string json_text(const Json& value) {
  std::string made;
  append_json(made, value);
  return made;
}

std::string joined(const std::vector<std::string>& words, const char* between) {
  std::string made;
  for (std::size_t i = 0; i < words.size(); ++i) made += (i ? between : "") + words[i];
  return made;
}

std::string lower_ascii(std::string text) {
  for (char& c : text) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  return text;
}

std::string shell_quoted(const std::string& text) {
  if (text.empty()) return "''";
  const char* safe = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_@%+=:,./-";
  if (text.find_first_not_of(safe) == std::string::npos) return text;
  std::string made = "'";
  for (const char c : text) made += c == '\'' ? std::string("'\"'\"'") : std::string(1, c);
  return made + "'";
}

Json parse_json_or_reason(const std::string& text, std::string& reason) {
  bool deep = false;
  try {
    const auto check_depth = [&deep](int depth, Json::parse_event_t, Json&) {
      if (depth > kMaxDepth) {
        deep = true;
        throw std::length_error("nested too deeply");
      }
      return true;
    };
    return Json::parse(text, check_depth);
  } catch (const Json::exception& error) {
    reason = error.what();
  } catch (const std::length_error& error) {
    reason = error.what();
  }
  if (reason.empty()) reason = "it cannot be read";
  return {};
}

RequestError refused_text(const std::string& field, const std::string& shown_value, const std::string& accepted) {
  return RequestError(field + " " + shown_value + " is not accepted; it must be " + accepted, field, shown_value,
                      accepted);
}

RequestError refused(const std::string& field, const Json& value, const std::string& accepted) {
  return RequestError(field + " " + shown(value) + " is not accepted; it must be " + accepted, field,
                      value.dump(-1, ' ', false, Json::error_handler_t::replace), accepted);
}

}  // namespace cascade_rt::detail
