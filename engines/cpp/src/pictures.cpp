#include "pictures.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>

#include "bundle.hpp"
#include "decode.hpp"
#include "sampling.hpp"
#include "request.hpp"
#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

// --- resampling, as Pillow does it (src/libImaging/Resample.c): weights in float64, first across, then down ------------

struct Filter {
  double (*weight)(double);
  double support;
};

double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

double bilinear(double x) {
  x = std::fabs(x);
  return x < 1.0 ? 1.0 - x : 0.0;
}

double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
  if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
  return 0.0;
}

constexpr Filter kBox{box, 0.5}, kBilinear{bilinear, 1.0}, kBicubic{bicubic, 2.0};

/// For every position of the result: the first position of the source that it sees, and the weights from there on.
struct Weights {
  std::vector<std::size_t> first;
  std::vector<std::vector<double>> weights;
};

Weights weights_of(std::size_t source, std::size_t target, const Filter& filter) {
  const double scale = static_cast<double>(source) / static_cast<double>(target);
  const double stretch = std::max(scale, 1.0), support = filter.support * stretch, inverse = 1.0 / stretch;
  Weights made;
  for (std::size_t i = 0; i < target; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    const auto low = std::max(static_cast<std::int64_t>(center - support + 0.5), std::int64_t{0});
    const auto high = std::min(static_cast<std::int64_t>(center + support + 0.5), static_cast<std::int64_t>(source));
    std::vector<double> own;
    double sum = 0.0;
    for (std::int64_t x = low; x < high; ++x) {
      own.push_back(filter.weight((static_cast<double>(x) - center + 0.5) * inverse));
      sum += own.back();
    }
    if (sum != 0.0) {
      for (double& one : own) one /= sum;
    }
    made.first.push_back(static_cast<std::size_t>(low));
    made.weights.push_back(std::move(own));
  }
  return made;
}

struct Plane {
  std::size_t width, height;
  std::vector<float> values;
};

/// A plane of float32, summed in float64.
Plane resized(Plane plane, std::size_t width, std::size_t height, const Filter& filter) {
  if (plane.width != width) {
    const Weights across = weights_of(plane.width, width, filter);
    Plane made{width, plane.height, std::vector<float>(width * plane.height)};
    for (std::size_t y = 0; y < plane.height; ++y) {
      for (std::size_t x = 0; x < width; ++x) {
        const float* in = plane.values.data() + y * plane.width + across.first[x];
        double sum = 0.0;
        for (const double weight : across.weights[x]) sum += static_cast<double>(*in++) * weight;
        made.values[y * width + x] = static_cast<float>(sum);
      }
    }
    plane = std::move(made);
  }
  if (plane.height != height) {
    const Weights down = weights_of(plane.height, height, filter);
    Plane made{width, height, std::vector<float>(width * height)};
    for (std::size_t y = 0; y < height; ++y) {
      for (std::size_t x = 0; x < width; ++x) {
        const float* in = plane.values.data() + down.first[y] * width + x;
        double sum = 0.0;
        for (const double weight : down.weights[y]) {
          sum += static_cast<double>(*in) * weight;
          in += width;
        }
        made.values[y * width + x] = static_cast<float>(sum);
      }
    }
    plane = std::move(made);
  }
  return plane;
}

constexpr int kFixedBits = 32 - 8 - 2;  // of Pillow's integer weights: 8 bits of a pixel, 2 for sums above 1

std::vector<std::int32_t> fixed(const std::vector<double>& weights) {
  std::vector<std::int32_t> made;
  for (const double one : weights) {
    const double large = one * (1 << kFixedBits);
    made.push_back(static_cast<std::int32_t>(one < 0 ? -0.5 + large : 0.5 + large));
  }
  return made;
}

std::uint8_t clipped(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::min(std::max(sum >> kFixedBits, 0), 255));
}

/// One pass of an 8-bit RGB picture along an axis.
Image pass(const Image& picture, std::int64_t size, bool down, const Filter& filter) {
  Image made;
  made.width = down ? picture.width : size;
  made.height = down ? size : picture.height;
  made.rgb.resize(static_cast<std::size_t>(made.width * made.height) * 3);
  const auto source = static_cast<std::size_t>(down ? picture.height : picture.width);
  const Weights weights = weights_of(source, static_cast<std::size_t>(size), filter);
  const auto from = static_cast<std::size_t>(picture.width), to = static_cast<std::size_t>(made.width);
  const std::size_t stride = down ? from * 3 : 3;
  for (std::size_t i = 0; i < static_cast<std::size_t>(size); ++i) {
    const auto own = fixed(weights.weights[i]);
    const std::size_t others = down ? to : static_cast<std::size_t>(made.height);
    for (std::size_t j = 0; j < others; ++j) {
      const std::size_t x = down ? j : weights.first[i], y = down ? weights.first[i] : j;
      const std::uint8_t* in = picture.rgb.data() + (y * from + x) * 3;
      std::int32_t sums[3];
      std::fill(std::begin(sums), std::end(sums), 1 << (kFixedBits - 1));
      for (const std::int32_t weight : own) {
        for (std::size_t c = 0; c < 3; ++c) sums[c] += in[c] * weight;
        in += stride;
      }
      std::uint8_t* out = made.rgb.data() + (down ? i * to + j : j * to + i) * 3;
      for (std::size_t c = 0; c < 3; ++c) out[c] = clipped(sums[c]);
    }
  }
  return made;
}

Image resized(const Image& picture, std::int64_t width, std::int64_t height, const Filter& filter) {
  if (picture.width == width && picture.height == height) return picture;
  Image made = picture.width == width ? picture : pass(picture, width, false, filter);
  return made.height == height ? made : pass(made, height, true, filter);
}

// --- files -------------------------------------------------------------------------------------------------------------

constexpr const char* kData = "data:";

bool is_data(const std::string& source) { return source.rfind(kData, 0) == 0; }

std::string named(const std::string& source) { return is_data(source) ? "given as data" : name_of(source); }

/// Base64 as Python's b64decode(validate=True) takes it; nothing where it does not.
std::optional<std::string> from_base64(const std::string& text) {
  if (text.size() % 4 != 0) return std::nullopt;
  const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const std::size_t padding = text.size() - std::min(text.find_last_not_of('=') + 1, text.size());
  if (padding > 2) return std::nullopt;
  std::string made;
  std::uint32_t bits = 0;
  int count = 0;
  for (std::size_t i = 0; i + padding < text.size(); ++i) {
    const auto value = letters.find(text[i]);
    if (value == std::string::npos) return std::nullopt;
    bits = (bits << 6U) | static_cast<std::uint32_t>(value);
    count += 6;
    if (count >= 8) {
      count -= 8;
      made += static_cast<char>((bits >> static_cast<unsigned>(count)) & 255U);
    }
  }
  return made;
}

std::string data_of(const std::string& field, const std::string& source) {
  if (is_data(source)) {
    const auto comma = source.find(',');
    const std::string head = source.substr(0, comma), ending = ";base64";
    const bool fine = comma != std::string::npos && head.size() >= ending.size() &&
                      head.compare(head.size() - ending.size(), ending.size(), ending) == 0;
    if (!fine) throw RequestError(field + " is no data URI of the form data:image/png;base64,...", field);
    const std::size_t size = source.size() - comma - 1;
    if (size > 2 * static_cast<std::size_t>(tables::kMaxInputBytes)) {
      throw RequestError(field + " has " + std::to_string(size) + " characters of base64; that is too many", field);
    }
    auto made = from_base64(source.substr(comma + 1));
    if (!made) throw RequestError(field + " holds base64 that cannot be decoded", field);
    return std::move(*made);
  }
  auto made = read_bounded<RequestError>(expanded(source), static_cast<std::uint64_t>(tables::kMaxInputBytes));
  if (!made) throw RequestError(field + ": there is no file " + name_of(source), field);
  return std::move(*made);
}

/// Why a file that is no PNG is not read.
std::string reason_of_format(const std::string& bytes) {
  const auto begins = [&](const std::string& head) { return bytes.rfind(head, 0) == 0; };
  const char* name = nullptr;
  if (is_jpeg(bytes)) name = "a JPEG, which this library was built without (configure it with -DCASCADE_RT_JPEG=ON)";
  if (begins("RIFF") && bytes.size() >= 12 && bytes.compare(8, 4, "WEBP") == 0) name = "a WebP";
  if (begins("GIF8")) name = "a GIF";
  if (begins("BM")) name = "a BMP";
  if (begins(std::string("II*\0", 4)) || begins(std::string("MM\0*", 4))) name = "a TIFF";
  return name == nullptr ? "its format is not known" : std::string("it is ") + name;
}

Decoded turned(Decoded picture) {
  if (picture.orientation <= 1) return picture;
  const std::size_t w = picture.width, h = picture.height;
  const bool sides = picture.orientation >= 5;
  Decoded made;
  made.width = sides ? h : w;
  made.height = sides ? w : h;
  made.transparency = picture.transparency;
  made.rgba.resize(picture.rgba.size());
  for (std::size_t y = 0; y < made.height; ++y) {
    for (std::size_t x = 0; x < made.width; ++x) {
      std::size_t from_x = x, from_y = y;
      switch (picture.orientation) {
        case 2: from_x = w - 1 - x; break;
        case 3: from_x = w - 1 - x; from_y = h - 1 - y; break;
        case 4: from_y = h - 1 - y; break;
        case 5: from_x = y; from_y = x; break;
        case 6: from_x = y; from_y = h - 1 - x; break;
        case 7: from_x = w - 1 - y; from_y = h - 1 - x; break;
        default: from_x = w - 1 - y; from_y = x; break;
      }
      std::copy_n(picture.rgba.data() + (from_y * w + from_x) * 4, 4, made.rgba.data() + (y * made.width + x) * 4);
    }
  }
  return made;
}

Decoded opened(const std::string& field, const std::string& source) {
  const std::string bytes = data_of(field, source);
  try {
    if (is_png(bytes)) return turned(decode_png(bytes));
#ifdef CASCADE_RT_JPEG
    if (is_jpeg(bytes)) return turned(decode_jpeg(bytes));
#endif
    throw Unreadable(reason_of_format(bytes));
  } catch (const Unreadable& error) {
    throw RequestError(field + " " + named(source) + " is no picture that can be read (" +
                           shortened(plain(error.what())) + "); accepted: " + picture_formats(),
                       field);
  } catch (const TooManyPixels& error) {
    throw RequestError(field + " has " + std::to_string(error.width) + " x " + std::to_string(error.height) +
                           " pixels; up to " + std::to_string(tables::kMaxInputPixels) + " pixels are accepted",
                       field);
  }
}

/// A pixel over white, in Pillow's integers (src/libImaging/AlphaComposite.c).
void over_white(const std::uint8_t* pixel, std::uint8_t* out) {
  constexpr unsigned kBits = 7, kWhite = 255;
  const unsigned alpha = pixel[3];
  if (alpha == 0) {
    std::fill_n(out, 3, std::uint8_t{255});
    return;
  }
  const unsigned whole = alpha * 255 + 255 * (255 - alpha);
  const unsigned own = alpha * 255 * 255 * (1U << kBits) / whole, rest = 255 * (1U << kBits) - own;
  for (std::size_t c = 0; c < 3; ++c) {
    const unsigned sum = pixel[c] * own + kWhite * rest + (0x80U << kBits);
    out[c] = static_cast<std::uint8_t>((((sum >> 8U) + sum) >> 8U) >> kBits);
  }
}

void check_image(const std::string& field, const Image& image) {
  const bool fine = image.width > 0 && image.height > 0 &&
                    image.width <= tables::kMaxInputPixels / image.height &&
                    image.rgb.size() == static_cast<std::size_t>(image.width * image.height) * 3;
  if (fine) return;
  throw RequestError(field + " of " + std::to_string(image.width) + " x " + std::to_string(image.height) +
                         " pixels has " + std::to_string(image.rgb.size()) + " bytes; it must have three a pixel",
                     field);
}

void check_mask(const Mask& mask) {
  const bool fine = mask.width > 0 && mask.height > 0 && mask.width <= tables::kMaxInputPixels / mask.height &&
                    mask.free.size() == static_cast<std::size_t>(mask.width * mask.height);
  if (fine) return;
  throw RequestError("mask_image of " + std::to_string(mask.width) + " x " + std::to_string(mask.height) +
                         " pixels has " + std::to_string(mask.free.size()) + " bytes; it must have one a pixel",
                     "mask_image");
}

double numpy_sum(const double* numbers, std::size_t count) {
  if (count < 8) {
    double sum = -0.0;
    for (std::size_t i = 0; i < count; ++i) sum += numbers[i];
    return sum;
  }
  if (count <= 128) {
    double parts[8];
    std::copy_n(numbers, 8, parts);
    std::size_t i = 8;
    for (; i + 8 <= count; i += 8) {
      for (std::size_t j = 0; j < 8; ++j) parts[j] += numbers[i + j];
    }
    double sum = ((parts[0] + parts[1]) + (parts[2] + parts[3])) + ((parts[4] + parts[5]) + (parts[6] + parts[7]));
    for (; i < count; ++i) sum += numbers[i];
    return sum;
  }
  std::size_t half = count / 2;
  half -= half % 8;
  return numpy_sum(numbers, half) + numpy_sum(numbers + half, count - half);
}

}  // namespace

double pairwise_sum(const double* numbers, std::size_t count) { return numpy_sum(numbers, count); }

const char* picture_formats() {
#ifdef CASCADE_RT_JPEG
  return "PNG, JPEG";
#else
  return "PNG";
#endif
}

std::array<std::int64_t, 4> middle(std::int64_t width, std::int64_t height, double aspect) {
  const auto rounded = [](double size) { return static_cast<std::int64_t>(std::nearbyint(size)); };
  std::int64_t wide = std::min(width, rounded(static_cast<double>(height) * aspect));
  std::int64_t high = std::min(height, rounded(static_cast<double>(width) / aspect));
  const double off = std::fabs(static_cast<double>(width) / static_cast<double>(height) - aspect);
  if (off * static_cast<double>(std::min(width, height)) <= 1) {  // within a pixel: nothing is cut
    wide = width;
    high = height;
  }
  wide = std::max<std::int64_t>(1, wide);
  high = std::max<std::int64_t>(1, high);
  const std::int64_t left = (width - wide) / 2, top = (height - high) / 2;
  return {left, top, left + wide, top + high};
}

std::vector<float> clip_pixels(const Image& picture, std::int64_t side) {
  const std::int64_t least = std::min(picture.width, picture.height);
  const auto length = [&](std::int64_t own) {
    return own == least ? side : static_cast<std::int64_t>(static_cast<double>(side * own) / static_cast<double>(least));
  };
  const Image small = resized(picture, length(picture.width), length(picture.height), kBicubic);
  const std::int64_t left = (small.width - side) / 2, top = (small.height - side) / 2;
  std::vector<float> made(static_cast<std::size_t>(3 * side * side));
  std::size_t at = 0;
  for (std::size_t c = 0; c < 3; ++c) {
    for (std::int64_t y = top; y < top + side; ++y) {
      for (std::int64_t x = left; x < left + side; ++x) {
        const float value = static_cast<float>(small.rgb[static_cast<std::size_t>(y * small.width + x) * 3 + c]) / 255.0F;
        made[at++] = (value - tables::kClipMean[c]) / tables::kClipStd[c];
      }
    }
  }
  return made;
}

Tensor encoder_pixels(const Image& picture, std::int64_t height, std::int64_t width) {
  const auto cut = middle(picture.width, picture.height, static_cast<double>(width) / static_cast<double>(height));
  Tensor made{{1, 3, height, width}, {}};
  for (std::size_t c = 0; c < 3; ++c) {
    Plane plane{static_cast<std::size_t>(cut[2] - cut[0]), static_cast<std::size_t>(cut[3] - cut[1]), {}};
    for (std::int64_t y = cut[1]; y < cut[3]; ++y) {
      for (std::int64_t x = cut[0]; x < cut[2]; ++x) {
        plane.values.push_back(picture.rgb[static_cast<std::size_t>(y * picture.width + x) * 3 + c]);
      }
    }
    const Plane small =
        resized(std::move(plane), static_cast<std::size_t>(width), static_cast<std::size_t>(height), kBilinear);
    for (const float one : small.values) made.data.push_back(std::min(std::max(one / 255.0F, 0.0F), 1.0F));
  }
  return made;
}

Tensor mask_on_grid(const Mask& mask, std::int64_t height, std::int64_t width) {
  const auto cut = middle(mask.width, mask.height, static_cast<double>(width) / static_cast<double>(height));
  Plane plane{static_cast<std::size_t>(cut[2] - cut[0]), static_cast<std::size_t>(cut[3] - cut[1]), {}};
  for (std::int64_t y = cut[1]; y < cut[3]; ++y) {
    for (std::int64_t x = cut[0]; x < cut[2]; ++x) {
      plane.values.push_back(mask.free[static_cast<std::size_t>(y * mask.width + x)] != 0 ? 255.0F : 0.0F);
    }
  }
  const Plane small = resized(std::move(plane), static_cast<std::size_t>(width), static_cast<std::size_t>(height), kBox);
  Tensor made{{1, 1, height, width}, {}};
  for (const float share : small.values) made.data.push_back(share > 0.5F ? 1.0F : 0.0F);
  return made;
}

std::vector<float> mask_pixels(const Mask& mask, std::int64_t height, std::int64_t width) {
  const auto cut = middle(mask.width, mask.height, static_cast<double>(width) / static_cast<double>(height));
  const auto nearest = [](std::int64_t source, std::int64_t target) {  // Pillow adds the step up (ImagingScaleAffine)
    const double step = static_cast<double>(source) / static_cast<double>(target);
    std::vector<std::int64_t> made;
    double position = step * 0.5;
    for (std::int64_t i = 0; i < target; ++i, position += step) {
      made.push_back(std::min(static_cast<std::int64_t>(position), source - 1));
    }
    return made;
  };
  const auto columns = nearest(cut[2] - cut[0], width), rows = nearest(cut[3] - cut[1], height);
  std::vector<float> made;
  for (const std::int64_t y : rows) {
    for (const std::int64_t x : columns) {
      made.push_back(mask.free[static_cast<std::size_t>((cut[1] + y) * mask.width + cut[0] + x)] != 0 ? 1.0F : 0.0F);
    }
  }
  return made;
}

std::uint8_t brightness(const std::uint8_t* pixel) {
  return static_cast<std::uint8_t>((pixel[0] * 19595U + pixel[1] * 38470U + pixel[2] * 7471U + 0x8000U) >> 16U);
}

Tensors gather(const Request& request, const Tensors& given) {
  check(request);
  Tensors made = given;
  if (!request.images.empty()) {
    made.images.clear();
    for (std::size_t i = 0; i < request.images.size(); ++i) {
      const auto& one = request.images[i];
      made.images.push_back({open_picture(one.image, "images[" + std::to_string(i) + "]"), one.weight});
    }
  }
  if (request.init_image) made.init_image = open_picture(*request.init_image, "init_image");
  if (request.mask_image) made.mask = open_mask(*request.mask_image, "mask_image");
  if (request.control_image) made.control = open_picture(*request.control_image, "control_image");
  check_tensors(made);
  if (made.images.size() > static_cast<std::size_t>(tables::kMaxImages)) {
    throw RequestError("images has " + std::to_string(made.images.size()) + " pictures; up to " +
                           std::to_string(tables::kMaxImages) + " are accepted",
                       "images");
  }
  for (std::size_t i = 0; i < made.images.size(); ++i) {
    const std::string field = "images[" + std::to_string(i) + "]";
    check_image(field, made.images[i].image);
    if (!(std::fabs(made.images[i].weight) <= static_cast<double>(tables::kMaxWeight))) {
      const std::string most = std::to_string(tables::kMaxWeight);
      throw refused(field + ".weight", Json(made.images[i].weight), "a finite number from -" + most + " to " + most);
    }
  }
  if (made.init_image) check_image("init_image", *made.init_image);
  if (made.mask) check_mask(*made.mask);
  if (made.control) check_image("control_image", *made.control);
  const auto& masked = made.init_image ? made.init_image : made.control;
  if (masked && made.mask && (made.mask->width != masked->width || made.mask->height != masked->height)) {
    const std::string field = made.init_image ? "init_image " : "control_image ";
    throw RequestError("mask_image has " + std::to_string(made.mask->width) + " x " + std::to_string(made.mask->height) +
                           " pixels, and " + field + std::to_string(masked->width) + " x " +
                           std::to_string(masked->height) + "; they must have one size",
                       "mask_image");
  }
  return made;
}

}  // namespace cascade_rt::detail

namespace cascade_rt {

using namespace detail;

Image open_picture(const std::string& source, const std::string& field) {
  const Decoded picture = opened(field, source);
  Image made;
  made.width = static_cast<std::int64_t>(picture.width);
  made.height = static_cast<std::int64_t>(picture.height);
  made.rgb.resize(picture.width * picture.height * 3);
  for (std::size_t i = 0; i < picture.width * picture.height; ++i) {
    const std::uint8_t* pixel = picture.rgba.data() + i * 4;
    if (picture.transparency) {
      over_white(pixel, made.rgb.data() + i * 3);
    } else {
      std::copy_n(pixel, 3, made.rgb.data() + i * 3);
    }
  }
  return made;
}

Mask open_mask(const std::string& source, const std::string& field) {
  const Decoded picture = opened(field, source);
  Mask made;
  made.width = static_cast<std::int64_t>(picture.width);
  made.height = static_cast<std::int64_t>(picture.height);
  made.free.resize(picture.width * picture.height);
  for (std::size_t i = 0; i < made.free.size(); ++i) {
    const std::uint8_t* pixel = picture.rgba.data() + i * 4;
    made.free[i] = (picture.transparency ? pixel[3] < 128 : brightness(pixel) >= 128) ? 1 : 0;
  }
  return made;
}

double reconstruction_psnr(const Image& source, const Image& made) {
  const Tensor wanted = encoder_pixels(source, made.height, made.width);
  const auto pixels = static_cast<std::size_t>(made.width * made.height);
  std::vector<double> squares(pixels * 3);
  for (std::size_t i = 0; i < pixels; ++i) {
    for (std::size_t c = 0; c < 3; ++c) {
      const double away = made.rgb[i * 3 + c] / 255.0 - static_cast<double>(wanted.data[c * pixels + i]);
      squares[i * 3 + c] = away * away;
    }
  }
  const double error = pairwise_sum(squares.data(), squares.size()) / static_cast<double>(squares.size());
  return std::nearbyint(-10 * std::log10(std::max(error, 1e-12)) * 1e4) / 1e4;
}

}  // namespace cascade_rt
