// Control pictures: what each kind of ControlNet is shown of a picture.
#pragma once
#include "request.hpp"

namespace cascade_rt::detail {

/// Refuse a picture whose edges cannot be found in this build. Throws RequestError.
void check_filter(const ControlPlan& control, bool filtered);

/// What a ControlNet sees of a picture, [1, channels, height, width] in 0..1. Super-resolution sees latents instead.
Tensor control_pixels(const ControlPlan& control, const Image& picture, const std::optional<Mask>& mask, bool filtered);

/// Latents [B, C, h, w] at twice their size, each repeated: what super-resolution is told.
Tensor enlarged(const Tensor& latents);

/// Residuals [B, n, h, w, C] on Stage C's grid: bilinear, corners aligned.
Tensor on_grid(const Tensor& residuals, std::int64_t height, std::int64_t width);

}  // namespace cascade_rt::detail
