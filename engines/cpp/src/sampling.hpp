// Schedules, noise and the arithmetic between the engine's calls, in the order in which the Python package computes.
#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"

namespace cascade_rt::detail {

/// One row a step; see cascade_rt/sampling.py.
struct Schedule {
  std::vector<float> ratios;
  std::vector<std::array<double, 2>> x0;
  std::vector<std::array<double, 3>> update;
  std::vector<double> alpha_bar;
  bool returns_x0 = false;
  std::int64_t size() const { return static_cast<std::int64_t>(ratios.size()); }
};

Schedule make_schedule(const std::string& sampler, std::int64_t steps, const std::string& prediction_type, double shift,
                       double scaler, double s, double start = 1.0);

/// The signal's share at a time of 0..1, without a shift.
double cosine_alpha_bar(double t);

/// [T, dim]: sines, cosines, and a zero column where dim is odd.
Tensor timestep_embedding(const std::vector<float>& ratios, std::int64_t dim);

/// Classifier-free guidance of one sample, rescaled to the spread of the conditional prediction.
void guide(const float* conditional, const float* unconditional, float scale, double rescale, std::size_t count,
           float* out);

/// Bilinear resize of [B, C, h, w]: the middles of the corners stay where they are, or (`corners` false) the edges do.
Tensor resize_bilinear(const Tensor& x, std::int64_t height, std::int64_t width, bool corners = true);

/// Latents [B, C, h, w] as colours [B, h, w, 3], not clipped: one matrix, no network.
Tensor colours_of(const Tensor& latents, const PreviewFactors& preview);

/// A source of standard normal numbers; each call goes on where the last one ended.
class Noise {
 public:
  virtual ~Noise() = default;
  virtual void normal(float* out, std::size_t count) = 0;
};

std::unique_ptr<Noise> torch_cpu(std::uint64_t seed);
std::unique_ptr<Noise> torch_cuda(std::uint64_t seed);

/// The noise of several pictures: each from its own seed, or all from one stream.
class PictureNoise {
 public:
  PictureNoise(const std::string& kind, const std::vector<std::uint64_t>& seeds);
  Tensor initial(const Shape& shape);  ///< the latents that a loop begins with
  Tensor normal(const Shape& shape);   ///< the noise of a step

 private:
  std::vector<std::shared_ptr<Noise>> first_, steps_;
};

std::size_t count_of(const Shape& shape);

}  // namespace cascade_rt::detail
