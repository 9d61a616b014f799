#include "control.hpp"

#include "pictures.hpp"
#include "sampling.hpp"
#include "tables.hpp"

#ifdef CASCADE_RT_OPENCV
#include <opencv2/imgproc.hpp>
#endif

namespace cascade_rt::detail {

namespace {

bool needs_filter(const ControlPlan& control, bool filtered) { return control.kind == "canny" && !filtered; }

#ifdef CASCADE_RT_OPENCV
/// The edges of a picture [1, 3, H, W] in 0..1, found at 224 x 224 and resized back: [1, 1, H, W].
Tensor canny_edges(const Tensor& pixels) {
  constexpr int kSide = static_cast<int>(tables::kCannySide);
  constexpr std::size_t kPixels = std::size_t{kSide} * kSide;
  const Tensor small = resize_bilinear(pixels, kSide, kSide, false);
  cv::Mat picture(kSide, kSide, CV_8UC3), edges;
  for (std::size_t i = 0; i < kPixels; ++i) {
    for (std::size_t c = 0; c < 3; ++c) {
      picture.data[i * 3 + c] = static_cast<std::uint8_t>(small.data[c * kPixels + i] * 255.0F);
    }
  }
  cv::Canny(picture, edges, tables::kCannyThresholds[0], tables::kCannyThresholds[1]);
  Tensor found{{1, 1, kSide, kSide}, std::vector<float>(kPixels)};
  for (std::size_t i = 0; i < kPixels; ++i) found.data[i] = edges.data[i] > 0 ? 1.0F : 0.0F;
  return resize_bilinear(found, pixels.shape[2], pixels.shape[3], false);
}
#else
Tensor canny_edges(const Tensor&) {
  throw RequestError(
      "the canny filter needs OpenCV, without which this library was built; configure it with -DCASCADE_RT_OPENCV=ON "
      "where OpenCV is installed, or give the edges themselves as control_image, with control_filtered",
      "control_image");
}
#endif

/// The brightness of a picture (ITU-R 601, in Pillow's integers), as grey.
Image grey(Image picture) {
  for (std::size_t i = 0; i < picture.rgb.size(); i += 3) {
    std::uint8_t* pixel = picture.rgb.data() + i;
    pixel[0] = pixel[1] = pixel[2] = brightness(pixel);
  }
  return picture;
}

}  // namespace

void check_filter(const ControlPlan& control, bool filtered) {
#ifndef CASCADE_RT_OPENCV
  if (needs_filter(control, filtered)) canny_edges({});
#else
  static_cast<void>(control), static_cast<void>(filtered);
#endif
}

Tensor control_pixels(const ControlPlan& control, const Image& picture, const std::optional<Mask>& mask,
                      bool filtered) {
  const std::int64_t height = control.pixels[0], width = control.pixels[1];
  const auto plane = static_cast<std::size_t>(height * width);
  if (needs_filter(control, filtered)) return canny_edges(encoder_pixels(picture, height, width));
  if (control.kind == "inpainting") {
    Tensor made = encoder_pixels(picture, height, width);
    const std::vector<float> hidden = mask_pixels(mask.value(), height, width);
    for (std::size_t i = 0; i < made.data.size(); ++i) {
      if (hidden[i % plane] > 0) made.data[i] = 1.0F;
    }
    made.data.insert(made.data.end(), hidden.begin(), hidden.end());
    made.shape[1] = 4;
    return made;
  }
  if (control.channels != 1) return encoder_pixels(picture, height, width);
  Tensor made = encoder_pixels(grey(picture), height, width);
  made.data.resize(plane);
  made.shape[1] = 1;
  return made;
}

Tensor enlarged(const Tensor& latents) {
  Tensor made{{latents.shape[0], latents.shape[1], 2 * latents.shape[2], 2 * latents.shape[3]}, {}};
  const auto width = static_cast<std::size_t>(latents.shape[3]);
  made.data.reserve(4 * latents.data.size());
  for (std::size_t row = 0; row < latents.data.size(); row += width) {
    for (int twice = 0; twice < 2; ++twice) {
      for (std::size_t x = 0; x < 2 * width; ++x) made.data.push_back(latents.data[row + x / 2]);
    }
  }
  return made;
}

Tensor on_grid(const Tensor& residuals, std::int64_t height, std::int64_t width) {
  const auto& shape = residuals.shape;
  if (shape.size() != 5) throw EngineError("a ControlNet returned residuals of shape " + shape_text(shape));
  if (shape[2] == height && shape[3] == width) return residuals;
  const auto moved = [](const Tensor& from, std::size_t outer, std::size_t inner) {  // [n, outer, inner] transposed
    Tensor made{from.shape, std::vector<float>(from.data.size())};
    const std::size_t size = outer * inner;
    for (std::size_t start = 0; start < from.data.size(); start += size) {
      for (std::size_t i = 0; i < outer; ++i) {
        for (std::size_t j = 0; j < inner; ++j) {
          made.data[start + j * outer + i] = from.data[start + i * inner + j];
        }
      }
    }
    return made;
  };
  const auto channels = static_cast<std::size_t>(shape[4]);
  Tensor planes = moved(residuals, static_cast<std::size_t>(shape[2] * shape[3]), channels);
  planes.shape = {shape[0], shape[1] * shape[4], shape[2], shape[3]};
  Tensor made = moved(resize_bilinear(planes, height, width), channels, static_cast<std::size_t>(height * width));
  made.shape = {shape[0], shape[1], height, width, shape[4]};
  return made;
}

}  // namespace cascade_rt::detail
