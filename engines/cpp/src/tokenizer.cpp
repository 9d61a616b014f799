#include "tokenizer.hpp"

#include <utf8proc.h>

#include <algorithm>
#include <array>
#include <queue>

namespace cascade_rt::detail {

namespace {

using Letters = std::u32string;

/// Letters, and for each the place in the prompt that it comes from.
struct Text {
  Letters letters;
  std::vector<std::size_t> origin;

  void push(char32_t letter, std::size_t from) {
    letters.push_back(letter);
    origin.push_back(from);
  }
  Text part(std::size_t begin, std::size_t end) const {
    return {letters.substr(begin, end - begin), {origin.begin() + std::ptrdiff_t(begin), origin.begin() + std::ptrdiff_t(end)}};
  }
};

struct Token {
  std::int64_t id;
  std::size_t origin;
};

utf8proc_category_t category(char32_t letter) { return utf8proc_category(static_cast<utf8proc_int32_t>(letter)); }

bool is_space(char32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
         c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

bool is_letter(char32_t c) {
  const auto kind = category(c);
  return kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_LO;
}

bool is_number(char32_t c) {
  const auto kind = category(c);
  return kind >= UTF8PROC_CATEGORY_ND && kind <= UTF8PROC_CATEGORY_NO;
}

/// \w of Unicode's regular expressions: alphabetic, marks, decimal digits, connectors, joiners.
bool is_word(char32_t c) {
  const auto kind = category(c);
  if ((kind >= UTF8PROC_CATEGORY_LU && kind <= UTF8PROC_CATEGORY_NL) || kind == UTF8PROC_CATEGORY_PC) return true;
  return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
         (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
}

/// Unicode normalization of the letters between ASCII ones, which never combine with what stands before them.
Text normalized(const Text& text, int options) {
  Text made;
  for (std::size_t begin = 0; begin < text.letters.size();) {
    std::size_t end = begin + 1;
    while (end < text.letters.size() && text.letters[end] >= 0x80) ++end;
    const Letters chunk = text.letters.substr(begin, end - begin);
    if (chunk.size() == 1 && chunk[0] < 0x80) {
      made.push(chunk[0], text.origin[begin]);
    } else {
      std::vector<utf8proc_int32_t> buffer(chunk.size() * 20 + 32);
      std::string bytes = encode_utf8(chunk);
      auto size = utf8proc_decompose(reinterpret_cast<const utf8proc_uint8_t*>(bytes.data()),
                                     static_cast<utf8proc_ssize_t>(bytes.size()), buffer.data(),
                                     static_cast<utf8proc_ssize_t>(buffer.size()),
                                     static_cast<utf8proc_option_t>(options));
      if (size > 0 && static_cast<std::size_t>(size) <= buffer.size()) {
        size = utf8proc_normalize_utf32(buffer.data(), size, static_cast<utf8proc_option_t>(options));
      }
      if (size < 0 || static_cast<std::size_t>(size) > buffer.size()) {
        for (std::size_t i = begin; i < end; ++i) made.push(text.letters[i], text.origin[i]);
      } else {
        for (utf8proc_ssize_t i = 0; i < size; ++i) {
          const std::size_t from = std::min(begin + static_cast<std::size_t>(i), end - 1);
          made.push(static_cast<char32_t>(buffer[static_cast<std::size_t>(i)]), text.origin[from]);
        }
      }
    }
    begin = end;
  }
  return made;
}

Text lowercase(const Text& text) {
  Text made;
  for (std::size_t i = 0; i < text.letters.size(); ++i) {
    if (text.letters[i] == 0x130) {  // the one letter whose lowercase is two
      made.push(U'i', text.origin[i]);
      made.push(0x307, text.origin[i]);
    } else {
      made.push(static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(text.letters[i]))), text.origin[i]);
    }
  }
  return made;
}

Text single_spaces(const Text& text) {
  Text made;
  for (std::size_t i = 0; i < text.letters.size(); ++i) {
    if (!is_space(text.letters[i])) {
      made.push(text.letters[i], text.origin[i]);
    } else if (i == 0 || !is_space(text.letters[i - 1])) {
      made.push(U' ', text.origin[i]);
    }
  }
  return made;
}

enum class Normalizer { nfc, nfkc, lowercase, single_spaces };

Text normalize(Text text, const std::vector<Normalizer>& steps) {
  for (const auto step : steps) {
    switch (step) {
      case Normalizer::nfc: text = normalized(text, UTF8PROC_STABLE | UTF8PROC_COMPOSE); break;
      case Normalizer::nfkc: text = normalized(text, UTF8PROC_STABLE | UTF8PROC_COMPOSE | UTF8PROC_COMPAT); break;
      case Normalizer::lowercase: text = lowercase(text); break;
      case Normalizer::single_spaces: text = single_spaces(text); break;
    }
  }
  return text;
}

constexpr const char* kClipPatterns[] = {
    R"('s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)",
    R"(<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)",
};
constexpr const char32_t* kSpecials[] = {U"<|startoftext|>", U"<|endoftext|>"};
constexpr const char32_t* kContractions[] = {U"'s", U"'t", U"'re", U"'ve", U"'m", U"'ll", U"'d"};

bool starts_with(const Letters& text, std::size_t at, const Letters& word) {
  return text.compare(at, word.size(), word) == 0;
}

/// The pieces of CLIP's pattern.
std::vector<Text> clip_pieces(const Text& text, bool specials) {
  std::vector<Text> pieces;
  const Letters& all = text.letters;
  for (std::size_t at = 0; at < all.size();) {
    std::size_t end = at;
    if (specials) {
      for (const auto* word : kSpecials) {
        if (end == at && starts_with(all, at, word)) end = at + Letters(word).size();
      }
    }
    for (const auto* word : kContractions) {
      if (end == at && starts_with(all, at, word)) end = at + Letters(word).size();
    }
    if (end == at) {
      if (is_letter(all[at])) {
        while (end < all.size() && is_letter(all[end])) ++end;
      } else if (is_number(all[at])) {
        ++end;
      } else if (!is_space(all[at])) {
        while (end < all.size() && !is_space(all[end]) && !is_letter(all[end]) && !is_number(all[end])) ++end;
      }
    }
    if (end == at) {
      ++at;  // a space
    } else {
      pieces.push_back(text.part(at, end));
      at = end;
    }
  }
  return pieces;
}

/// \w+|[^\w\s]+
std::vector<Text> word_pieces(const Text& text) {
  std::vector<Text> pieces;
  const auto kind = [](char32_t c) { return is_word(c) ? 1 : is_space(c) ? 0 : 2; };
  for (std::size_t at = 0; at < text.letters.size();) {
    std::size_t end = at + 1;
    const int first = kind(text.letters[at]);
    while (end < text.letters.size() && kind(text.letters[end]) == first) ++end;
    if (first != 0) pieces.push_back(text.part(at, end));
    at = end;
  }
  return pieces;
}

/// GPT-2's printable letter for every byte.
const std::array<char32_t, 256>& byte_letters() {
  static const std::array<char32_t, 256> made = [] {
    std::array<char32_t, 256> letters{};
    char32_t next = 256;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool own = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      letters[byte] = own ? byte : next++;
    }
    return letters;
  }();
  return made;
}

struct AddedToken {
  Letters content;
  std::int64_t id = 0;
  bool normalized = false;
};

[[noreturn]] void unknown(const std::string& where, const std::string& what) {
  throw BundleError(where + " is a tokenizer.json of a kind that is not read here: " + shortened(plain(what), 200) +
                    ". CLIP's byte-level BPE and whole words are");
}

std::string text_at(const Json& value, const char* key) {
  return value.is_object() && value.contains(key) && value.at(key).is_string() ? value.at(key).get<std::string>() : "";
}

bool truthy(const Json& value, const char* key) {
  return value.contains(key) && !value.at(key).is_null() && value.at(key) != false && value.at(key) != "";
}

std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
  return static_cast<std::uint64_t>(left) << 32U | static_cast<std::uint64_t>(right);
}

}  // namespace

struct Tokenizer::Impl {
  TokenizerRecord record;
  std::vector<Normalizer> normalizers;
  bool bpe = false, specials_in_pattern = false;
  std::unordered_map<std::string, std::int64_t> vocabulary;
  std::unordered_map<std::uint64_t, std::pair<std::int64_t, std::int64_t>> merges;  // pair -> (rank, id)
  std::string suffix;
  std::optional<std::int64_t> unknown_id;
  std::vector<std::int64_t> before, after;
  std::vector<AddedToken> added;

  void read(const Json& document, const std::string& where);
  void read_normalizer(const Json& value, const std::string& where);
  void read_pre_tokenizer(const Json& value, const std::string& where);
  void read_model(const Json& value, const std::string& where);
  void read_post_processor(const Json& value, const std::string& where);
  void read_added(const Json& value, const std::string& where);

  std::int64_t id_of(const std::string& token, const std::string& where) const {
    const auto found = vocabulary.find(token);
    if (found != vocabulary.end()) return found->second;
    for (const auto& one : added) {
      if (encode_utf8(one.content) == token) return one.id;
    }
    throw BundleError(where + " is not a readable tokenizer.json: " + shown(token) + " is not in its vocabulary");
  }

  std::vector<Token> tokens(const std::string& prompt) const;
  void plain_part(const Text& raw, std::vector<Token>& out) const;
  void whole_word(const Text& piece, std::vector<Token>& out) const;
  void byte_pairs(const Text& piece, std::vector<Token>& out) const;
  /// Call `other` for the parts between the added tokens of a kind, which are put into `out`.
  template <class Other>
  void between(const Text& text, bool of_normalized, std::vector<Token>& out, const Other& other) const;
};

void Tokenizer::Impl::read_normalizer(const Json& value, const std::string& where) {
  if (value.is_null()) return;
  const std::string type = text_at(value, "type");
  if (type == "Sequence") {
    for (const Json& one : value.at("normalizers")) read_normalizer(one, where);
  } else if (type == "NFC") {
    normalizers.push_back(Normalizer::nfc);
  } else if (type == "NFKC") {
    normalizers.push_back(Normalizer::nfkc);
  } else if (type == "Lowercase") {
    normalizers.push_back(Normalizer::lowercase);
  } else if (type == "Replace" && text_at(value.at("pattern"), "Regex") == "\\s+" && text_at(value, "content") == " ") {
    normalizers.push_back(Normalizer::single_spaces);
  } else {
    unknown(where, "normalizer " + type);
  }
}

void Tokenizer::Impl::read_pre_tokenizer(const Json& value, const std::string& where) {
  const std::string type = text_at(value, "type");
  if (!bpe) {
    if (type != "Whitespace") unknown(where, "WordLevel with pre_tokenizer " + type);
    return;
  }
  const Json& steps = type == "Sequence" ? value.at("pretokenizers") : Json();
  if (steps.size() != 2 || text_at(steps[0], "type") != "Split" || text_at(steps[1], "type") != "ByteLevel") {
    unknown(where, "BPE with pre_tokenizer " + type);
  }
  const std::string pattern = text_at(steps[0].at("pattern"), "Regex");
  specials_in_pattern = pattern == kClipPatterns[1];
  const bool known = specials_in_pattern || pattern == kClipPatterns[0];
  if (!known || lower_ascii(text_at(steps[0], "behavior")) != "removed" || !truthy(steps[0], "invert") ||
      truthy(steps[1], "add_prefix_space")) {
    unknown(where, "BPE with another pattern than CLIP's: " + pattern);
  }
}

void Tokenizer::Impl::read_model(const Json& value, const std::string& where) {
  const std::string type = text_at(value, "type");
  bpe = type == "BPE" || (type.empty() && value.contains("merges"));
  if (!bpe && type != "WordLevel") unknown(where, "model " + type);
  for (const auto& item : value.at("vocab").items()) {
    const auto id = item.value().get<std::int64_t>();
    if (id < 0 || id > 0x7FFFFFFF) throw BundleError(where + " is not a readable tokenizer.json: a token's id is " + std::to_string(id));
    vocabulary[item.key()] = id;
  }
  const std::string unk = text_at(value, "unk_token");
  if (vocabulary.count(unk) != 0) unknown_id = vocabulary.at(unk);
  if (!bpe) return;
  for (const char* setting : {"dropout", "continuing_subword_prefix", "fuse_unk", "byte_fallback", "ignore_merges"}) {
    if (truthy(value, setting)) unknown(where, std::string("BPE with ") + setting);
  }
  suffix = text_at(value, "end_of_word_suffix");
  std::int64_t rank = 0;
  for (const Json& one : value.at("merges")) {
    std::string left, right;
    if (one.is_string()) {
      const auto& both = one.get_ref<const std::string&>();
      const auto space = both.find(' ');
      if (space == std::string::npos) throw BundleError(where + " is not a readable tokenizer.json: merge " + shown(both));
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else {
      left = one.at(0).get<std::string>();
      right = one.at(1).get<std::string>();
    }
    merges[pair_key(id_of(left, where), id_of(right, where))] = {rank++, id_of(left + right, where)};
  }
}

void Tokenizer::Impl::read_post_processor(const Json& value, const std::string& where) {
  if (value.is_null()) return;
  const std::string type = text_at(value, "type");
  if (type == "RobertaProcessing" || type == "BertProcessing") {
    before = {value.at("cls").at(1).get<std::int64_t>()};
    after = {value.at("sep").at(1).get<std::int64_t>()};
    return;
  }
  if (type != "TemplateProcessing") unknown(where, "post_processor " + type);
  bool seen = false;
  for (const Json& piece : value.at("single")) {
    if (piece.contains("Sequence")) {
      if (seen) unknown(where, "a template with two texts");
      seen = true;
      continue;
    }
    const std::string name = text_at(piece.at("SpecialToken"), "id");
    for (const Json& id : value.at("special_tokens").at(name).at("ids")) {
      (seen ? after : before).push_back(id.get<std::int64_t>());
    }
  }
}

void Tokenizer::Impl::read_added(const Json& value, const std::string& where) {
  if (value.is_null()) return;
  for (const Json& one : value) {
    for (const char* setting : {"single_word", "lstrip", "rstrip"}) {
      if (truthy(one, setting)) unknown(where, std::string("an added token with ") + setting);
    }
    AddedToken token;
    token.content = decode_utf8(one.at("content").get<std::string>());
    token.id = one.at("id").get<std::int64_t>();
    token.normalized = truthy(one, "normalized");
    if (token.content.empty()) continue;
    if (token.normalized) {
      Text content;
      for (const char32_t letter : token.content) content.push(letter, 0);
      token.content = normalize(content, normalizers).letters;
    }
    added.push_back(token);
  }
}

void Tokenizer::Impl::read(const Json& document, const std::string& where) {
  const auto part = [&](const char* key) { return document.contains(key) ? document.at(key) : Json(); };
  read_model(document.at("model"), where);
  read_normalizer(part("normalizer"), where);
  read_pre_tokenizer(part("pre_tokenizer"), where);
  read_added(part("added_tokens"), where);
  read_post_processor(part("post_processor"), where);
}

template <class Other>
void Tokenizer::Impl::between(const Text& text, bool of_normalized, std::vector<Token>& out, const Other& other) const {
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.letters.size();) {
    const AddedToken* found = nullptr;  // the longest that starts here
    for (const auto& one : added) {
      if (one.normalized == of_normalized && !one.content.empty() && starts_with(text.letters, at, one.content) &&
          (found == nullptr || one.content.size() > found->content.size())) {
        found = &one;
      }
    }
    if (found == nullptr) {
      ++at;
      continue;
    }
    if (at > begin) other(text.part(begin, at));
    out.push_back({found->id, text.origin[at]});
    at += found->content.size();
    begin = at;
  }
  if (begin < text.letters.size()) other(text.part(begin, text.letters.size()));
}

void Tokenizer::Impl::whole_word(const Text& piece, std::vector<Token>& out) const {
  const auto found = vocabulary.find(encode_utf8(piece.letters));
  if (found != vocabulary.end()) {
    out.push_back({found->second, piece.origin[0]});
  } else if (unknown_id) {
    out.push_back({*unknown_id, piece.origin[0]});
  } else {
    throw EngineError("the tokenizer does not know a word of the prompt, and has no token for unknown words");
  }
}

void Tokenizer::Impl::byte_pairs(const Text& piece, std::vector<Token>& out) const {
  struct Symbol {
    std::int64_t id;
    std::size_t origin;
    std::ptrdiff_t previous, next;
    bool alive;
  };
  std::vector<Symbol> symbols;
  std::vector<std::pair<unsigned char, std::size_t>> bytes;
  for (std::size_t i = 0; i < piece.letters.size(); ++i) {
    std::string letter;
    append_utf8(letter, piece.letters[i]);
    for (const char byte : letter) bytes.emplace_back(static_cast<unsigned char>(byte), piece.origin[i]);
  }
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    std::string token;
    append_utf8(token, byte_letters()[bytes[i].first]);
    if (i + 1 == bytes.size()) token += suffix;
    const auto found = vocabulary.find(token);
    std::int64_t id = 0;
    if (found != vocabulary.end()) {
      id = found->second;
    } else if (unknown_id) {
      id = *unknown_id;
    } else {
      continue;
    }
    symbols.push_back({id, bytes[i].second, static_cast<std::ptrdiff_t>(symbols.size()) - 1,
                       static_cast<std::ptrdiff_t>(symbols.size()) + 1, true});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;
  struct Merge {
    std::int64_t rank;
    std::size_t at;
    std::int64_t left, right, made;
    bool operator<(const Merge& other) const { return rank != other.rank ? rank > other.rank : at > other.at; }
  };
  std::priority_queue<Merge> queue;
  const auto offer = [&](std::ptrdiff_t at) {
    if (at < 0 || symbols[static_cast<std::size_t>(at)].next < 0) return;
    const Symbol& left = symbols[static_cast<std::size_t>(at)];
    const Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    const auto found = merges.find(pair_key(left.id, right.id));
    if (found != merges.end()) {
      queue.push({found->second.first, static_cast<std::size_t>(at), left.id, right.id, found->second.second});
    }
  };
  for (std::size_t i = 0; i + 1 < symbols.size(); ++i) offer(static_cast<std::ptrdiff_t>(i));
  while (!queue.empty()) {
    const Merge merge = queue.top();
    queue.pop();
    Symbol& left = symbols[merge.at];
    if (!left.alive || left.next < 0 || left.id != merge.left) continue;
    Symbol& right = symbols[static_cast<std::size_t>(left.next)];
    if (right.id != merge.right) continue;
    left.id = merge.made;
    right.alive = false;
    left.next = right.next;
    if (left.next >= 0) symbols[static_cast<std::size_t>(left.next)].previous = static_cast<std::ptrdiff_t>(merge.at);
    offer(left.previous);
    offer(static_cast<std::ptrdiff_t>(merge.at));
  }
  for (const auto& symbol : symbols) {
    if (symbol.alive) out.push_back({symbol.id, symbol.origin});
  }
}

void Tokenizer::Impl::plain_part(const Text& raw, std::vector<Token>& out) const {
  const Text text = normalize(raw, normalizers);
  between(text, true, out, [&](const Text& part) {
    for (const Text& piece : bpe ? clip_pieces(part, specials_in_pattern) : word_pieces(part)) {
      if (bpe) {
        byte_pairs(piece, out);
      } else {
        whole_word(piece, out);
      }
    }
  });
}

std::vector<Token> Tokenizer::Impl::tokens(const std::string& prompt) const {
  Text raw;
  for (const char32_t letter : decode_utf8(prompt)) raw.push(letter, raw.letters.size());
  std::vector<Token> made;
  for (const auto id : before) made.push_back({id, 0});
  between(raw, false, made, [&](const Text& part) { plain_part(part, made); });
  for (const auto id : after) made.push_back({id, raw.letters.size()});
  return made;
}

Tokenizer::Tokenizer(const std::string& text, const std::string& where, const TokenizerRecord& record) {
  auto impl = std::make_unique<Impl>();
  impl->record = record;
  std::string reason;
  const Json document = parse_json_or_reason(text, reason);
  if (reason.empty()) {
    try {
      impl->read(document, where);
    } catch (const Json::exception& error) {
      reason = error.what();
    }
  }
  if (!reason.empty()) {
    throw BundleError(where + " is not a readable tokenizer.json: " + shortened(plain(reason), 200));
  }
  const auto ends = static_cast<std::int64_t>(impl->before.size() + impl->after.size());
  if (ends < 2 || ends > record.max_length) {
    throw BundleError(where + " gives an empty prompt " + std::to_string(ends) +
                      " tokens; it must be 2 (a start and an end) to " + std::to_string(record.max_length));
  }
  impl_ = std::move(impl);
}

Tokenizer::~Tokenizer() = default;

Tokenizer::Ids Tokenizer::operator()(const std::string& prompt) const {
  const auto length = static_cast<std::size_t>(impl_->record.max_length);
  std::vector<Token> tokens = impl_->tokens(prompt);
  Ids made{std::vector<std::int64_t>(length, impl_->record.pad_id), std::vector<std::int64_t>(length, 0), {}};
  if (tokens.size() > length) {
    // the prompt's own words from the first lost token on; the last token is the end token
    Letters lost = decode_utf8(prompt).substr(std::min(tokens[length - 1].origin, decode_utf8(prompt).size()));
    while (!lost.empty() && is_space(lost.front())) lost.erase(0, 1);
    while (!lost.empty() && is_space(lost.back())) lost.pop_back();
    made.lost = encode_utf8(lost);
    tokens[length - 1] = tokens.back();
    tokens.resize(length);
  }
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    made.ids[i] = tokens[i].id;
    made.mask[i] = 1;
  }
  return made;
}

}  // namespace cascade_rt::detail
