// Values and texts as Python prints them: the messages of both sides are the same.
#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cascade_rt/cascade_rt.hpp"

namespace cascade_rt::detail {

using Json = nlohmann::ordered_json;

std::u32string decode_utf8(const std::string& text);  // bytes that are no UTF-8 become U+DC80..U+DCFF, as in Python
std::string encode_utf8(const std::u32string& text);  // U+DC80..U+DCFF become bytes again
void append_utf8(std::string& out, char32_t letter);
bool is_printable(char32_t letter);

std::string plain(const std::string& text);  // control characters as escapes
std::string shortened(const std::string& text, std::size_t limit = 80);
std::string repr(const Json& value);
std::string repr(const std::string& text);
std::string repr(double number);
std::string general(double number);  // Python's {:g}
std::string shown(const Json& value);
std::string shape_text(const std::vector<std::int64_t>& shape);  // a tuple
std::string json_text(const Json& value);                        // json.dumps(ensure_ascii=False)
std::string joined(const std::vector<std::string>& words, const char* between = ", ");
std::string lower_ascii(std::string text);
std::string shell_quoted(const std::string& text);  // shlex.quote

/// JSON, refused with `Failure` where it is none.
template <class Failure>
Json parse_json(const std::string& text, const std::string& where);
Json parse_json_or_reason(const std::string& text, std::string& reason);

template <class Failure>
Json parse_json(const std::string& text, const std::string& where) {
  std::string reason;
  Json made = parse_json_or_reason(text, reason);
  if (!reason.empty()) throw Failure(plain(where) + " is not readable JSON: " + plain(reason));
  return made;
}

/// The error of a value that is not accepted.
RequestError refused(const std::string& field, const Json& value, const std::string& accepted);
RequestError refused_text(const std::string& field, const std::string& shown_value, const std::string& accepted);

}  // namespace cascade_rt::detail
