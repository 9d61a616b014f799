#include "decode.hpp"

#include <png.h>

#include <algorithm>
#include <cstring>

#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

[[noreturn]] void fail(png_structp, png_const_charp message) { throw Unreadable(message); }
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

std::string text_of(png_structp png, png_infop info, const char* key) {
  png_textp chunks = nullptr;
  const int count = png_get_text(png, info, &chunks, nullptr);
  std::string found;
  for (int i = 0; i < count; ++i) {  // the last of several counts
    if (std::strcmp(chunks[i].key, key) == 0 && chunks[i].text != nullptr) found = chunks[i].text;
  }
  return found;
}

/// ImageMagick's way to keep EXIF: three lines, then hexadecimal digits.
std::string profile_bytes(const std::string& text) {
  std::size_t at = 0;
  for (int lines = 0; lines < 3; ++lines) {
    at = text.find('\n', at);
    if (at == std::string::npos) return "";
    ++at;
  }
  std::string digits, made;
  for (; at < text.size(); ++at) {
    if (std::strchr(" \t\r\n\f\v", text[at]) == nullptr) digits += text[at];
  }
  const auto value = [](char c) -> int {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  for (std::size_t i = 0; i + 1 < digits.size() + digits.size() % 2; i += 2) {
    const int high = value(digits[i]), low = i + 1 < digits.size() ? value(digits[i + 1]) : -1;
    if (high < 0 || low < 0) throw Unreadable("its EXIF profile is no hexadecimal text");
    made += static_cast<char>(high * 16 + low);
  }
  return made;
}

int orientation_of(png_structp png, png_infop info) {
  std::string exif;
  png_bytep data = nullptr;
  png_uint_32 size = 0;
  if (png_get_eXIf_1(png, info, &size, &data) != 0 && data != nullptr) {
    exif.assign(reinterpret_cast<const char*>(data), size);
  } else {
    exif = profile_bytes(text_of(png, info, "Raw profile type exif"));
  }
  int made = exif_orientation(exif);
  if (made == 0) made = xmp_orientation(text_of(png, info, "XML:com.adobe.xmp"));
  return made;
}

/// The pixels of rows as libpng gives them: one byte a sample up to 8 bits, two above.
struct Rows {
  std::vector<std::uint8_t> bytes;
  std::size_t size = 0;  // of a row
  int depth = 8, colour = 0;
  std::vector<png_color> palette;
  std::vector<std::uint8_t> alphas;           // of the palette
  bool transparency = false;
  png_color_16 clear{};                       // the transparent colour of a picture without a palette

  /// Red, green, blue and alpha of a pixel.
  void pixel(std::size_t x, std::size_t y, std::uint8_t* out) const {
    const std::uint8_t* row = bytes.data() + y * size;
    const std::size_t wide = depth == 16 ? 2 : 1;  // the upper byte comes first
    const auto sample = [&](std::size_t channel, std::size_t channels) { return row[(x * channels + channel) * wide]; };
    out[3] = 255;
    switch (colour) {
      case PNG_COLOR_TYPE_GRAY: grey(x, row, out); break;
      case PNG_COLOR_TYPE_PALETTE: {
        const std::size_t index = row[x];
        const png_color own = index < palette.size() ? palette[index] : png_color{};
        out[0] = own.red;
        out[1] = own.green;
        out[2] = own.blue;
        if (index < alphas.size()) out[3] = alphas[index];
        break;
      }
      case PNG_COLOR_TYPE_GRAY_ALPHA:
        out[0] = out[1] = out[2] = sample(0, 2);
        out[3] = sample(1, 2);
        break;
      case PNG_COLOR_TYPE_RGB: {
        for (std::size_t i = 0; i < 3; ++i) out[i] = sample(i, 3);
        // as Pillow compares: the lower byte of the transparent colour with 8-bit pixels
        const bool same = out[0] == (clear.red & 255U) && out[1] == (clear.green & 255U) && out[2] == (clear.blue & 255U);
        if (transparency && same) out[3] = 0;
        break;
      }
      default:
        for (std::size_t i = 0; i < 4; ++i) out[i] = sample(i, 4);
    }
  }

 private:
  void grey(std::size_t x, const std::uint8_t* row, std::uint8_t* out) const {
    bool same = false;
    if (depth == 16) {
      out[0] = row[2 * x];
      same = (row[2 * x] * 256U + row[2 * x + 1]) == clear.gray;
    } else {
      constexpr unsigned kScales[] = {0, 255, 85, 0, 17, 0, 0, 0, 1};
      out[0] = static_cast<std::uint8_t>(row[x] * kScales[depth]);
      // as Pillow compares: widened pixels with a colour that is not widened, but where there are two colours only
      same = out[0] == (depth == 1 ? (clear.gray != 0 ? 255U : 0U) : (clear.gray & 255U));
    }
    out[1] = out[2] = out[0];
    if (transparency && same) out[3] = 0;
  }
};

Rows rows_of(png_structp png, png_infop info, std::size_t height) {
  Rows made;
  made.depth = png_get_bit_depth(png, info);
  made.colour = png_get_color_type(png, info);
  if (made.depth < 8) png_set_packing(png);
  const int passes = png_set_interlace_handling(png);
  png_read_update_info(png, info);
  made.size = png_get_rowbytes(png, info);
  made.bytes.resize(made.size * height);
  for (int pass = 0; pass < passes; ++pass) {
    for (std::size_t y = 0; y < height; ++y) png_read_row(png, made.bytes.data() + y * made.size, nullptr);
  }
  png_read_end(png, info);
  png_colorp colours = nullptr;
  int count = 0;
  if (made.colour == PNG_COLOR_TYPE_PALETTE && png_get_PLTE(png, info, &colours, &count) != 0) {
    made.palette.assign(colours, colours + count);
  }
  png_bytep alphas = nullptr;
  png_color_16p clear = nullptr;
  count = 0;
  if (png_get_tRNS(png, info, &alphas, &count, &clear) != 0) {
    made.transparency = true;
    if (made.colour == PNG_COLOR_TYPE_PALETTE && alphas != nullptr) made.alphas.assign(alphas, alphas + count);
    if (made.colour != PNG_COLOR_TYPE_PALETTE && clear != nullptr) made.clear = *clear;
  }
  made.transparency = made.transparency || (made.colour & PNG_COLOR_MASK_ALPHA) != 0;
  return made;
}

}  // namespace

bool is_png(const std::string& bytes) {
  return bytes.size() >= 8 && png_sig_cmp(reinterpret_cast<png_const_bytep>(bytes.data()), 0, 8) == 0;
}

bool is_jpeg(const std::string& bytes) { return bytes.rfind("\xff\xd8\xff", 0) == 0; }

void check_pixel_count(std::size_t width, std::size_t height) {
  if (width > static_cast<std::size_t>(tables::kMaxInputPixels) / std::max<std::size_t>(height, 1)) {
    throw TooManyPixels(width, height);
  }
}

Decoded decode_png(const std::string& bytes) {
  png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, fail, ignore);
  png_infop info = png == nullptr ? nullptr : png_create_info_struct(png);
  struct Done {
    png_structp* png;
    png_infop* info;
    ~Done() { png_destroy_read_struct(png, info, nullptr); }
  } done{&png, &info};
  if (info == nullptr) throw Unreadable("libpng cannot be started");
  Source source{bytes};
  png_set_read_fn(png, &source, read_some);
  png_set_user_limits(png, 0x7fffffff, 0x7fffffff);
  png_read_info(png, info);
  Decoded made;
  made.width = png_get_image_width(png, info);
  made.height = png_get_image_height(png, info);
  check_pixel_count(made.width, made.height);
  const Rows rows = rows_of(png, info, made.height);
  made.transparency = rows.transparency;
  made.rgba.resize(made.width * made.height * 4);
  for (std::size_t y = 0; y < made.height; ++y) {
    for (std::size_t x = 0; x < made.width; ++x) rows.pixel(x, y, made.rgba.data() + (y * made.width + x) * 4);
  }
  made.orientation = orientation_of(png, info);
  return made;
}

int exif_orientation(const std::string& given) {
  const std::string lead("Exif\0\0", 6);
  const std::string data = given.rfind(lead, 0) == 0 ? given.substr(lead.size()) : given;
  if (data.empty()) return 0;
  const bool little = data.rfind(std::string("II*\0", 4), 0) == 0;
  if (data.size() < 8 || (!little && data.rfind(std::string("MM\0*", 4), 0) != 0)) {
    throw Unreadable("its EXIF data is not readable");
  }
  const auto number = [&](std::size_t at, std::size_t size) {
    std::uint64_t made = 0;
    for (std::size_t i = 0; i < size; ++i) {
      const auto byte = static_cast<unsigned char>(data[at + (little ? size - 1 - i : i)]);
      made = made * 256 + byte;
    }
    return made;
  };
  const std::uint64_t folder = number(4, 4);
  if (folder + 2 > data.size()) return 0;
  const std::uint64_t count = number(folder, 2);
  for (std::uint64_t i = 0; i < count; ++i) {
    const std::uint64_t at = folder + 2 + i * 12;
    if (at + 12 > data.size()) return 0;
    constexpr std::uint64_t kTag = 0x0112, kShort = 3, kLong = 4;
    if (number(at, 2) != kTag) continue;
    const std::uint64_t type = number(at + 2, 2);
    if (number(at + 4, 4) != 1 || (type != kShort && type != kLong)) return 1;
    const std::uint64_t found = number(at + 8, type == kShort ? 2 : 4);
    return found >= 1 && found <= 8 ? static_cast<int>(found) : 1;
  }
  return 0;
}

int xmp_orientation(const std::string& text) {
  const std::string tag = "tiff:Orientation";
  for (std::size_t at = text.find(tag); at != std::string::npos; at = text.find(tag, at + 1)) {
    std::size_t behind = at + tag.size();
    if (text.compare(behind, 2, "=\"") == 0) {
      behind += 2;
    } else if (text.compare(behind, 1, ">") == 0) {
      behind += 1;
    } else {
      continue;
    }
    if (behind < text.size() && text[behind] >= '0' && text[behind] <= '9') return text[behind] - '0';
  }
  return 0;
}

}  // namespace cascade_rt::detail
