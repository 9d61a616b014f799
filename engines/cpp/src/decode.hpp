// Files of pictures as 8-bit pixels, as Pillow gives them.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace cascade_rt::detail {

/// What a file holds, as it lies there: not turned.
struct Decoded {
  std::size_t width = 0, height = 0;
  std::vector<std::uint8_t> rgba;  ///< rows from the top
  bool transparency = false;       ///< the file has a channel of transparency, or a transparent colour
  int orientation = 1;             ///< EXIF's: how to turn it
};

/// A file that cannot be read; the reason in words.
class Unreadable : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// More pixels than are accepted.
class TooManyPixels : public std::runtime_error {
 public:
  TooManyPixels(std::size_t wide, std::size_t high)
      : std::runtime_error("too many pixels"), width(wide), height(high) {}
  std::size_t width, height;
};

bool is_png(const std::string& bytes);
Decoded decode_png(const std::string& bytes);  // throws Unreadable, TooManyPixels

bool is_jpeg(const std::string& bytes);
#ifdef CASCADE_RT_JPEG
Decoded decode_jpeg(const std::string& bytes);  // throws Unreadable, TooManyPixels
#endif

/// Orientation of EXIF data; 0 where it says none. Throws Unreadable.
int exif_orientation(const std::string& data);
/// Orientation in an XMP packet; 0 where it says none.
int xmp_orientation(const std::string& text);
void check_pixel_count(std::size_t width, std::size_t height);

}  // namespace cascade_rt::detail
