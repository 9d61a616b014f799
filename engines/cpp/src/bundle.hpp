// A bundle on disk: where its files lie, and whether they are what the manifest says.
#pragma once
#include <mutex>
#include <set>

#include "manifest.hpp"

namespace cascade_rt::detail {

/// The bytes of a regular file of at most `most` bytes; nothing where there is no such file.
/// Throws Failure where it is no regular file, too large or cannot be read.
std::optional<std::string> read_bounded_or_reason(const std::string& path, std::uint64_t most, std::string& reason);
std::string name_of(const std::string& path);
/// A path that a user typed: ~ is their home.
std::string expanded(const std::string& path);

template <class Failure>
std::optional<std::string> read_bounded(const std::string& path, std::uint64_t most) {
  std::string reason;
  auto made = read_bounded_or_reason(path, most, reason);
  if (!reason.empty()) throw Failure(name_of(path) + " " + reason);
  return made;
}

const char* stage_of(const std::string& engine);
const char* model_of(const std::string& engine);

}  // namespace cascade_rt::detail

namespace cascade_rt {

struct Bundle::Impl {
  std::string path;
  std::string text;  // of cascade.json
  detail::Manifest manifest;

  /// The path of a file, once its size and hash are found right. Throws BundleError.
  std::string file(const std::string& name) const;
  /// The command that makes an engine.
  std::string command(const std::string& engine, const std::string& runtime = "onnx") const;
  /// The error of an engine that the bundle does not have.
  BundleError missing(const std::string& engine, const std::string& runtime,
                      const std::vector<std::string>& features) const;

 private:
  void check(const std::string& name, const std::string& place) const;
  std::string rebuild() const;
  std::string origin(const std::vector<std::string>& loras) const;
  mutable std::mutex guard_;
  mutable std::set<std::string> checked_;
  mutable std::map<std::string, std::unique_ptr<std::mutex>> checking_;
};

}  // namespace cascade_rt
