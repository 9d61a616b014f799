// Pictures that a request brings along: opened, turned upright, and made into what the encoders take.
#pragma once
#include <array>

#include "manifest.hpp"

namespace cascade_rt::detail {

/// Formats that are read, "PNG" or "PNG, JPEG".
const char* picture_formats();

/// CLIP's image encoder: short side resized (bicubic), middle cut out, normalised; [3, side, side].
std::vector<float> clip_pixels(const Image& picture, std::int64_t side);

/// The other encoders: cut to the aspect around the middle, resized (bilinear) in float32; [1, 3, height, width] in 0..1.
Tensor encoder_pixels(const Image& picture, std::int64_t height, std::int64_t width);

/// A mask on a coarser grid: [1, 1, height, width], 1 for every cell of which more than 0.5 of 255 is drawn anew.
Tensor mask_on_grid(const Mask& mask, std::int64_t height, std::int64_t width);

/// A mask cut and resized as a picture is, to its nearest pixels: [height * width], 1 where something new is drawn.
std::vector<float> mask_pixels(const Mask& mask, std::int64_t height, std::int64_t width);

/// Brightness of a pixel (ITU-R 601), in Pillow's integers.
std::uint8_t brightness(const std::uint8_t* pixel);

/// The largest box (left, top, right, bottom) of an aspect, width over height, around the middle of a picture.
std::array<std::int64_t, 4> middle(std::int64_t width, std::int64_t height, double aspect);

/// The files that a request names, opened; arrays and pictures that are given, checked. Throws RequestError.
Tensors gather(const Request& request, const Tensors& given);

/// A float64 sum in NumPy's order, which adds in pairs of blocks.
double pairwise_sum(const double* numbers, std::size_t count);

}  // namespace cascade_rt::detail
