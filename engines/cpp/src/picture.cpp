// PNG files with text chunks, and files that get their name when everything is in them.
#include <png.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <random>

#ifndef _WIN32
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

#include "bundle.hpp"
#include "tables.hpp"

namespace fs = std::filesystem;

namespace cascade_rt {

using namespace detail;

namespace {

[[noreturn]] void fail(png_structp, png_const_charp message) { throw OutputError(std::string("PNG: ") + message); }
[[noreturn]] void refuse(png_structp, png_const_charp message) { throw RequestError(message); }
void ignore(png_structp, png_const_charp) {}

struct Source {
  const std::string& bytes;
  std::size_t at = 0;
};

void read_some(png_structp png, png_bytep out, png_size_t count) {
  auto* source = static_cast<Source*>(png_get_io_ptr(png));
  if (count > source->bytes.size() - source->at) png_error(png, "the file ends too early");
  std::memcpy(out, source->bytes.data() + source->at, count);
  source->at += count;
}

std::string said(int code) { return std::strerror(code); }

}  // namespace

std::vector<std::uint8_t> encode_png(const Image& image, const std::vector<std::pair<std::string, std::string>>& texts) {
  if (image.width <= 0 || image.height <= 0 ||
      image.rgb.size() != static_cast<std::size_t>(image.width * image.height) * 3) {
    throw OutputError("a picture of " + std::to_string(image.width) + " x " + std::to_string(image.height) +
                      " pixels has " + std::to_string(image.rgb.size()) + " bytes");
  }
  std::vector<std::uint8_t> made;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, fail, ignore);
  png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
  struct Done {
    png_structp* png;
    png_infop* info;
    ~Done() { png_destroy_write_struct(png, info); }
  } done{&png, &info};
  if (info == nullptr) throw OutputError("libpng cannot be started");
  png_set_write_fn(
      png, &made,
      [](png_structp own, png_bytep data, png_size_t count) {
        auto* out = static_cast<std::vector<std::uint8_t>*>(png_get_io_ptr(own));
        out->insert(out->end(), data, data + count);
      },
      nullptr);
  png_set_IHDR(png, info, static_cast<png_uint_32>(image.width), static_cast<png_uint_32>(image.height), 8,
               PNG_COLOR_TYPE_RGB, PNG_INTERLACE_NONE, PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
  std::vector<std::pair<std::string, std::string>> kept = texts;  // libpng takes pointers to characters that change
  std::vector<png_text> chunks;
  std::string empty;
  for (auto& text : kept) {
    png_text chunk{};
    chunk.compression = PNG_ITXT_COMPRESSION_NONE;
    chunk.key = text.first.data();
    chunk.text = text.second.data();
    chunk.itxt_length = text.second.size();
    chunk.lang = empty.data();
    chunk.lang_key = empty.data();
    chunks.push_back(chunk);
  }
  if (!chunks.empty()) png_set_text(png, info, chunks.data(), static_cast<int>(chunks.size()));
  png_write_info(png, info);
  for (std::int64_t y = 0; y < image.height; ++y) {
    png_write_row(png, image.rgb.data() + static_cast<std::size_t>(y * image.width) * 3);
  }
  png_write_end(png, info);
  return made;
}

std::string read_request(const std::string& path) {
  const auto bytes = read_bounded<RequestError>(path, static_cast<std::uint64_t>(tables::kMaxPictureBytes));
  if (!bytes) throw RequestError("there is no picture " + name_of(path), "from");
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, refuse, ignore);
  png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
  struct Done {
    png_structp* png;
    png_infop* info;
    ~Done() { png_destroy_read_struct(png, info, nullptr); }
  } done{&png, &info};
  if (info == nullptr) throw RequestError("libpng cannot be started");
  Source source{*bytes};
  png_set_read_fn(png, &source, read_some);
  try {
    if (bytes->size() < 8 || png_sig_cmp(reinterpret_cast<png_const_bytep>(bytes->data()), 0, 8) != 0) {
      throw RequestError("it is no PNG");
    }
    png_read_info(png, info);
    png_textp chunks = nullptr;
    const int count = png_get_text(png, info, &chunks, nullptr);
    for (int i = 0; i < count; ++i) {
      if (std::strcmp(chunks[i].key, tables::kRequestKey) == 0 && chunks[i].text != nullptr) return chunks[i].text;
    }
  } catch (const RequestError& error) {
    throw RequestError(name_of(path) + " cannot be read as a picture: " + shortened(plain(error.what())));
  }
  throw RequestError(name_of(path) + " carries no request of cascade-rt; name a picture that cascade-run made");
}

void write_files(const std::vector<std::pair<std::string, std::vector<std::uint8_t>>>& files) {
  struct Temporary {
    fs::path place, final;
    bool renamed = false;
    ~Temporary() {
      std::error_code ignored;
      if (!renamed && !place.empty()) fs::remove(place, ignored);
    }
  };
  std::vector<std::unique_ptr<Temporary>> ready;
  for (const auto& item : files) {
    auto own = std::make_unique<Temporary>();
    own->final = fs::u8path(item.first);
    const std::string refused = name_of(item.first) + " cannot be written: ";
    const fs::path folder = own->final.has_parent_path() ? own->final.parent_path() : fs::path(".");
#ifdef _WIN32
    std::random_device device;
    own->place = folder / (".cascade-" + std::to_string(device()) + ".partial");
    std::FILE* file = _wfopen(own->place.c_str(), L"wbx");
    if (file == nullptr) throw OutputError(refused + said(errno));
    const bool whole = std::fwrite(item.second.data(), 1, item.second.size(), file) == item.second.size();
    const int code = errno;
    if (std::fclose(file) != 0 || !whole) throw OutputError(refused + said(code));
#else
    std::string name = (folder / ".cascade-XXXXXX.partial").string();
    const int handle = mkstemps(name.data(), 8);  // made exclusively: no link that lies there is followed
    if (handle < 0) throw OutputError(refused + said(errno));
    own->place = name;
    const mode_t mask = umask(0077);
    umask(mask);
    bool fine = fchmod(handle, 0666 & ~mask) == 0;
    for (std::size_t at = 0; fine && at < item.second.size();) {
      const auto count = ::write(handle, item.second.data() + at, item.second.size() - at);
      fine = count > 0 || (count < 0 && errno == EINTR);
      if (count > 0) at += static_cast<std::size_t>(count);
    }
    fine = fine && fsync(handle) == 0;
    const int code = errno;
    if (::close(handle) != 0 || !fine) throw OutputError(refused + said(code));
#endif
    ready.push_back(std::move(own));
  }
  for (const auto& own : ready) {
    std::error_code error;
    fs::rename(own->place, own->final, error);
    if (error) throw OutputError(name_of(own->final.u8string()) + " cannot be written: " + error.message());
    own->renamed = true;
  }
}

}  // namespace cascade_rt
