#include "bundle.hpp"

#include <openssl/evp.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "tables.hpp"

namespace fs = std::filesystem;

namespace cascade_rt::detail {

namespace {

std::string out_words(const std::string& path) {
  const std::string text = plain(path);
  return (text.rfind('-', 0) == 0 ? "--out=" : "--out ") + shell_quoted(text);
}

std::string sha256_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::system_error(errno, std::generic_category());
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  std::vector<char> block(1U << 20U);
  if (!context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) throw EngineError("SHA-256 failed");
  while (file) {
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    EVP_DigestUpdate(context.get(), block.data(), static_cast<std::size_t>(file.gcount()));
  }
  if (file.bad()) throw std::system_error(errno, std::generic_category());
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned size = 0;
  EVP_DigestFinal_ex(context.get(), digest.data(), &size);
  std::string text;
  for (unsigned i = 0; i < size; ++i) {
    constexpr char kHex[] = "0123456789abcdef";
    text += kHex[digest[i] >> 4U];
    text += kHex[digest[i] & 15U];
  }
  return text;
}

}  // namespace

std::string name_of(const std::string& path) {
  const std::string text = shortened(plain(path), 120);
  const auto blank = [](char c) { return c == ' '; };  // `plain` leaves no other
  return text.empty() || blank(text.front()) || blank(text.back()) ? "'" + text + "'" : text;
}

std::string expanded(const std::string& path) {
  if (path.empty() || path[0] != '~' || (path.size() > 1 && path[1] != '/')) return path;
  const char* home = std::getenv("HOME");
  return home == nullptr || *home == '\0' ? path : home + path.substr(1);
}

std::optional<std::string> read_bounded_or_reason(const std::string& path, std::uint64_t most, std::string& reason) {
  std::error_code error;
  if (path.find('\0') != std::string::npos) {
    reason = "cannot be read: embedded null byte";
    return std::nullopt;
  }
  const auto status = fs::status(fs::u8path(path), error);
  if (status.type() == fs::file_type::not_found) return std::nullopt;
  if (error) {
    if (error == std::errc::not_a_directory || error == std::errc::no_such_file_or_directory) return std::nullopt;
    reason = "cannot be read: " + error.message();
    return std::nullopt;
  }
  if (status.type() != fs::file_type::regular) {
    reason = "is no regular file; put the file itself there";
    return std::nullopt;
  }
  const auto size = fs::file_size(fs::u8path(path), error);
  if (!error && size > most) {
    reason = "has " + std::to_string(size) + " bytes; such a file has at most " + std::to_string(most);
    return std::nullopt;
  }
  errno = 0;
  std::ifstream file(fs::u8path(path), std::ios::binary);
  std::string data(error ? 0 : static_cast<std::size_t>(size), '\0');
  if (file && !data.empty()) file.read(data.data(), static_cast<std::streamsize>(data.size()));
  if (!file || error) {
    reason = std::string("cannot be read: ") + std::strerror(errno);
    return std::nullopt;
  }
  return data;
}

const char* stage_of(const std::string& engine) {
  for (const auto& row : tables::kEngines) {
    if (engine == row.name) return row.stage;
  }
  return "all";
}

const char* model_of(const std::string& engine) {
  for (const auto& row : tables::kEngines) {
    if (engine == row.name) return row.model;
  }
  return "";
}

}  // namespace cascade_rt::detail

namespace cascade_rt {

using namespace detail;

const char* version() noexcept { return tables::kVersion; }

std::shared_ptr<const Bundle> Bundle::open(const std::string& path) {
  auto impl = std::make_unique<Impl>();
  impl->path = path.size() > 1 && path.back() == '/' ? path.substr(0, path.find_last_not_of('/') + 1) : path;
  const std::string manifest = impl->path + "/" + tables::kManifest;
  auto text = read_bounded<BundleError>(manifest, static_cast<std::uint64_t>(tables::kMaxManifestBytes));
  if (!text) {
    throw BundleNotFoundError("there is no bundle at " + name_of(impl->path) + " (no " + tables::kManifest +
                              "); make one with: cascade-export --stage all --size tiny " + out_words(impl->path));
  }
  impl->text = std::move(*text);
  impl->manifest = Manifest::from_json(impl->text, name_of(manifest));
  return std::shared_ptr<const Bundle>(new Bundle(std::move(impl)));
}

Bundle::Bundle(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Bundle::~Bundle() = default;
const std::string& Bundle::path() const noexcept { return impl_->path; }
const std::string& Bundle::name() const noexcept { return impl_->manifest.model.name; }
const std::string& Bundle::manifest() const noexcept { return impl_->text; }

void Bundle::check() const {
  for (const auto& item : impl_->manifest.files) impl_->file(item.first);
}

std::string Bundle::Impl::file(const std::string& name) const {
  const std::string place = path + "/" + name;
  std::mutex* own = nullptr;
  {
    const std::lock_guard<std::mutex> lock(guard_);
    auto& made = checking_[name];
    if (!made) made = std::make_unique<std::mutex>();
    own = made.get();
  }
  const std::lock_guard<std::mutex> lock(*own);  // two threads that want the same file read it once
  {
    const std::lock_guard<std::mutex> inner(guard_);
    if (checked_.count(name) != 0) return place;
  }
  check(name, place);
  const std::lock_guard<std::mutex> inner(guard_);
  checked_.insert(name);
  return place;
}

namespace {
bool lies_in(const fs::path& folder, const fs::path& file) {
  const auto relative = file.lexically_relative(folder);
  return !relative.empty() && *relative.begin() != "..";
}

// Where the hub's cache keeps the files of a snapshot, which is a folder of links; else the folder itself.
fs::path blobs(const fs::path& folder) {
  const auto above = folder.parent_path();
  return above.filename() == "snapshots" ? above.parent_path() / "blobs" : folder;
}
}  // namespace

void Bundle::Impl::check(const std::string& name, const std::string& place) const {
  const FileRecord* record = manifest.file(name);
  if (record == nullptr) throw BundleError("the manifest names no file " + shown(name));
  try {
    const auto real = fs::canonical(fs::u8path(place)), folder = fs::canonical(fs::u8path(path));
    if (!lies_in(folder, real) && !lies_in(blobs(folder), real)) {
      throw BundleError(name_of(place) + " is a link that leads out of the bundle; put the file itself there");
    }
    if (!fs::is_regular_file(fs::u8path(place))) throw BundleError(name_of(place) + " is no regular file; " + rebuild());
    const auto size = fs::file_size(fs::u8path(place));
    if (size != record->bytes) {
      throw BundleError(name_of(place) + " has " + std::to_string(size) + " bytes, the manifest says " +
                        std::to_string(record->bytes) + "; " + rebuild());
    }
    if (sha256_of(place) != record->sha256) {
      throw BundleError(name_of(place) + " is damaged: its hash is not the manifest's; " + rebuild());
    }
  } catch (const std::system_error& error) {  // also std::filesystem::filesystem_error
    if (error.code() == std::errc::no_such_file_or_directory) {
      throw BundleError(name_of(place) + " is missing from the bundle; " + rebuild());
    }
    throw BundleError(name_of(place) + " cannot be read: " + error.code().message() + "; " + rebuild());
  }
}

std::string Bundle::Impl::origin(const std::vector<std::string>& loras) const {
  const auto& model = manifest.model;
  std::string made =
      model.size != "custom" ? "--size " + model.size : "--checkpoint " + shell_quoted(plain(model.source));
  for (const auto& lora : loras) made += " --lora " + shell_quoted(plain(lora));
  return made;
}

std::string Bundle::Impl::rebuild() const {
  std::vector<std::string> loras;
  for (const auto& item : manifest.models) {
    for (const auto& lora : item.second.loras) {
      if (std::find(loras.begin(), loras.end(), lora) == loras.end()) loras.push_back(lora);
    }
  }
  return "build the bundle again with: cascade-export --stage all " + origin(loras) + " --overwrite " + out_words(path);
}

std::string Bundle::Impl::command(const std::string& engine, const std::string& runtime) const {
  const auto found = manifest.models.find(model_of(engine));
  const bool anew = found != manifest.models.end() && (runtime == "onnx" || !found->second.weights);
  std::string made = std::string("cascade-export --stage ") + stage_of(engine) + " " +
                     origin(anew ? found->second.loras : std::vector<std::string>{});
  if (runtime != "onnx") made += " --target " + runtime;
  return made + " " + out_words(path);
}

BundleError Bundle::Impl::missing(const std::string& engine, const std::string& runtime,
                                  const std::vector<std::string>& features) const {
  std::vector<std::string> having;
  for (const auto& record : manifest.engines) {
    std::string words = record.runtime;
    for (const auto& feature : record.features) words += " with " + feature;
    if (record.name == engine && std::find(having.begin(), having.end(), words) == having.end()) having.push_back(words);
  }
  const std::string kind = having.empty() ? "engine" : runtime + " engine";
  std::string wanted = engine;
  for (const auto& feature : features) wanted += " with " + feature;
  return BundleError("the bundle " + name_of(path) + " has no " + kind + " " + wanted +
                         (having.empty() ? "" : " (it has " + joined(having) + ")") +
                         "; add it with: " + command(engine, runtime),
                     "engines", repr(wanted));
}

}  // namespace cascade_rt
