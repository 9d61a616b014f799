// tokenizer.json: CLIP's byte-level BPE, and whole words (the tiny cascade's).
#pragma once
#include <memory>
#include <unordered_map>

#include "manifest.hpp"

namespace cascade_rt::detail {

class Tokenizer {
 public:
  /// Read a tokenizer.json.
  /// @param text The file's content. @param where Its name, for messages. @param record What the manifest says of it.
  /// @throws BundleError it is damaged, or of a kind that is not read.
  Tokenizer(const std::string& text, const std::string& where, const TokenizerRecord& record);
  ~Tokenizer();

  struct Ids {
    std::vector<std::int64_t> ids, mask;  ///< max_length each
    std::string lost;                     ///< the part of the prompt that did not fit
  };
  /// Start token, words, end token, padding; a prompt that is too long keeps its end token.
  Ids operator()(const std::string& prompt) const;

 private:
  struct Impl;
  std::unique_ptr<const Impl> impl_;
};

}  // namespace cascade_rt::detail
