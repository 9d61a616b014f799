#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

constexpr double kPi = 3.14159265358979323846;

double clipped(double value, double least, double most) { return std::min(std::max(value, least), most); }

double alpha_bar_at(double t, double s) {
  const double first = std::cos(s / (1 + s) * kPi / 2);
  const double cosine = std::cos((t + s) / (1 + s) * kPi / 2);
  return clipped(cosine * cosine / (first * first), tables::kAlphaRange[0], tables::kAlphaRange[1]);
}

/// `alpha_bar` [T + 1] into the tables: ancestral sampling, i.e. DDIM with eta = 1.
Schedule tables_of(std::vector<float> ratios, std::vector<double> alpha_bar, const std::vector<double>& noise,
                   const std::string& prediction_type, bool returns_x0, bool anew) {
  Schedule made;
  for (std::size_t i = 0; i < ratios.size(); ++i) {
    const double a = std::sqrt(alpha_bar[i]), b = std::sqrt(1 - alpha_bar[i]);
    const double a_next = std::sqrt(alpha_bar[i + 1]), b_next = std::sqrt(1 - alpha_bar[i + 1]);
    const double share = a / a_next;
    const double sigma = anew ? b_next : b_next / b * std::sqrt(std::max(1 - share * share, 0.0));
    const double direction = std::sqrt(std::max(b_next * b_next - sigma * sigma, 0.0));
    std::array<double, 2> x0{}, eps{};
    if (prediction_type == "epsilon") {
      x0 = {1 / a, -b / a};
      eps = {0, 1};
    } else if (prediction_type == "v_prediction") {
      x0 = {a, -b};
      eps = {b, a};
    } else {
      x0 = {0, 1};
      eps = {1 / b, -a / b};
    }
    made.x0.push_back(x0);
    made.update.push_back({a_next * x0[0] + direction * eps[0], a_next * x0[1] + direction * eps[1], sigma * noise[i]});
  }
  made.ratios = std::move(ratios);
  made.alpha_bar = std::move(alpha_bar);
  made.returns_x0 = returns_x0;
  return made;
}

Schedule original(std::int64_t steps, const std::string& prediction_type, double shift, double s, double start,
                  bool anew) {
  const double low = std::log(tables::kAlphaRange[0] / (1 - tables::kAlphaRange[0]));
  const double high = std::log(tables::kAlphaRange[1] / (1 - tables::kAlphaRange[1]));
  const double first = std::cos(s / (1 + s) * kPi / 2);
  const double smallest = first * first;
  const double moved = 2 * std::log(1 / shift);
  const double step = (0.0 - start) / static_cast<double>(steps);
  std::vector<double> alpha_bar;
  std::vector<float> ratios;
  for (std::int64_t i = 0; i <= steps; ++i) {
    const double t = i == steps ? 0.0 : static_cast<double>(i) * step + start;
    const double plain_alpha = alpha_bar_at(t, s);
    const double log_snr = clipped(std::log(plain_alpha / (1 - plain_alpha)) + moved, low, high);
    const double alpha = 1 / (1 + std::exp(-log_snr));
    alpha_bar.push_back(alpha);
    if (i < steps) {
      const double ratio = std::acos(std::sqrt(alpha * smallest)) / (kPi / 2) * (1 + s) - s;
      ratios.push_back(static_cast<float>(clipped(ratio, 0, 1)));
    }
  }
  const std::vector<double> noise(static_cast<std::size_t>(steps), 1.0);
  return tables_of(std::move(ratios), std::move(alpha_bar), noise, prediction_type, true, anew);
}

Schedule diffusers(std::int64_t steps, const std::string& prediction_type, double scaler, double s, double start) {
  const std::int64_t count = steps + 1;
  const float step = static_cast<float>(-start) / static_cast<float>(count - 1);
  std::vector<double> alpha_bar, noise;
  std::vector<float> ratios;
  for (std::int64_t i = 0; i < count; ++i) {
    // torch.linspace(start, 0, count): float32, counted from both ends inwards
    const auto index = static_cast<float>(i);
    const float ratio = i < count / 2 ? static_cast<float>(start) + index * step
                                      : -(static_cast<float>(count - 1) - index) * step;
    double warped = ratio;
    if (scaler > 1) {
      warped = 1 - std::pow(1 - warped, scaler);
    } else if (scaler < 1) {
      warped = std::pow(warped, scaler);
    }
    alpha_bar.push_back(alpha_bar_at(warped, s));
    if (i > 0) noise.push_back(ratio != 0 ? 1.0 : 0.0);
    if (i < steps) ratios.push_back(ratio);
  }
  return tables_of(std::move(ratios), std::move(alpha_bar), noise, prediction_type, false, false);
}

/// A function of a float32 number, computed in float64 and rounded once.
template <double (*function)(double)>
float rounded(float x) {
  return static_cast<float>(function(static_cast<double>(x)));
}

/// numpy.random.MT19937 seeded as torch seeds (init_genrand).
class Mersenne {
 public:
  explicit Mersenne(std::uint32_t seed) {
    state_[0] = seed;
    for (std::uint32_t i = 1; i < kSize; ++i) {
      state_[i] = 1812433253U * (state_[i - 1] ^ (state_[i - 1] >> 30U)) + i;
    }
  }

  std::uint32_t next() {
    if (at_ == kSize) refill();
    std::uint32_t y = state_[at_++];
    y ^= y >> 11U;
    y ^= (y << 7U) & 0x9d2c5680U;
    y ^= (y << 15U) & 0xefc60000U;
    return y ^ (y >> 18U);
  }

 private:
  static constexpr std::uint32_t kSize = 624, kMiddle = 397;

  void refill() {
    for (std::uint32_t i = 0; i < kSize; ++i) {
      const std::uint32_t y = (state_[i] & 0x80000000U) | (state_[(i + 1) % kSize] & 0x7fffffffU);
      state_[i] = state_[(i + kMiddle) % kSize] ^ (y >> 1U) ^ ((y & 1U) != 0 ? 0x9908b0dfU : 0U);
    }
    at_ = 0;
  }

  std::array<std::uint32_t, kSize> state_{};
  std::uint32_t at_ = kSize;
};

/// torch.randn with torch.Generator("cpu").
class TorchCpu : public Noise {
 public:
  explicit TorchCpu(std::uint64_t seed) : bits_(static_cast<std::uint32_t>(seed)) {}

  void normal(float* out, std::size_t count) override {
    if (count < 16) {
      for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<float>(scalar());
      return;
    }
    // all uniforms of a call are drawn before the sixteen that torch draws anew for a tail
    std::vector<float> uniforms(count);
    for (float& one : uniforms) one = uniform();
    const std::size_t whole = count - count % 16;
    for (std::size_t i = 0; i < whole; i += 16) sixteen(uniforms.data() + i, out + i);
    if (whole != count) {
      float tail[16];
      for (float& one : tail) one = uniform();
      sixteen(tail, out + count - 16);
    }
  }

 private:
  float uniform() { return static_cast<float>(bits_.next() & 0xFFFFFFU) * 0x1p-24F; }

  double uniform53() {
    const std::uint64_t high = bits_.next(), low = bits_.next();
    return static_cast<double>(((high << 32U) | low) & ((std::uint64_t{1} << 53U) - 1)) * 0x1p-53;
  }

  double scalar() {
    if (has_spare_) {
      has_spare_ = false;
      return spare_;
    }
    const double angle = uniform53(), radius = uniform53();
    const double length = std::sqrt(-2.0 * std::log1p(-radius));
    spare_ = length * std::sin(2.0 * kPi * angle);
    has_spare_ = true;
    return length * std::cos(2.0 * kPi * angle);
  }

  /// Box-Muller: the first eight give the radius, the last eight the angle.
  static void sixteen(const float* uniforms, float* out) {
    for (int i = 0; i < 8; ++i) {
      const float radius = std::sqrt(-2.0F * rounded<std::log>(1.0F - uniforms[i]));
      const float angle = static_cast<float>(2.0 * kPi) * uniforms[i + 8];
      out[i] = radius * rounded<std::cos>(angle);
      out[i + 8] = radius * rounded<std::sin>(angle);
    }
  }

  Mersenne bits_;
  double spare_ = 0;
  bool has_spare_ = false;
};

/// torch.randn with torch.Generator("cuda"): Philox4x32-10, one stream a thread of the launch.
class TorchCuda : public Noise {
 public:
  explicit TorchCuda(std::uint64_t seed) : key_(seed) {}

  void normal(float* out, std::size_t count) override {
    constexpr std::size_t kThreads = 132U * 2048U;  // of an H100 or H200
    const std::size_t threads = std::max<std::size_t>(256, std::min((count + 255) / 256 * 256, kThreads));
    const std::size_t rounds = std::max<std::size_t>(1, (count + threads * 4 - 1) / (threads * 4));
    for (std::size_t round = 0; round < rounds; ++round) {
      const std::size_t begin = round * threads * 4;
      for (std::size_t thread = 0; thread < threads && begin + thread < count; ++thread) {
        float four[4];
        normal4(philox(offset_ + round, static_cast<std::uint32_t>(thread)), four);
        for (std::size_t i = 0; i < 4; ++i) {
          const std::size_t at = begin + i * threads + thread;
          if (at < count) out[at] = four[i];
        }
      }
    }
    offset_ += rounds;
  }

 private:
  std::array<std::uint32_t, 4> philox(std::uint64_t counter, std::uint32_t thread) const {
    std::array<std::uint32_t, 4> x{static_cast<std::uint32_t>(counter), static_cast<std::uint32_t>(counter >> 32U),
                                   thread, 0};
    auto k0 = static_cast<std::uint32_t>(key_), k1 = static_cast<std::uint32_t>(key_ >> 32U);
    for (int i = 0; i < 10; ++i) {
      const std::uint64_t p0 = std::uint64_t{x[0]} * 0xD2511F53U, p1 = std::uint64_t{x[2]} * 0xCD9E8D57U;
      x = {static_cast<std::uint32_t>(p1 >> 32U) ^ x[1] ^ k0, static_cast<std::uint32_t>(p1),
           static_cast<std::uint32_t>(p0 >> 32U) ^ x[3] ^ k1, static_cast<std::uint32_t>(p0)};
      k0 += 0x9E3779B9U;
      k1 += 0xBB67AE85U;
    }
    return x;
  }

  /// cuRAND's Box-Muller: sine, cosine, sine, cosine.
  static void normal4(const std::array<std::uint32_t, 4>& bits, float* out) {
    constexpr auto kInverse = static_cast<float>(0x1p-32);
    constexpr auto kInverse2Pi = static_cast<float>(0x1p-32 * 2.0 * kPi);
    for (std::size_t i = 0; i < 2; ++i) {
      const float u = static_cast<float>(bits[2 * i]) * kInverse + kInverse / 2.0F;
      const float v = static_cast<float>(bits[2 * i + 1]) * kInverse2Pi + kInverse2Pi / 2.0F;
      const float radius = std::sqrt(-2.0F * rounded<std::log>(u));
      out[2 * i] = radius * rounded<std::sin>(v);
      out[2 * i + 1] = radius * rounded<std::cos>(v);
    }
  }

  std::uint64_t key_;
  std::uint64_t offset_ = 0;
};

double spread(const float* values, std::size_t count) {
  double sum = 0;
  for (std::size_t i = 0; i < count; ++i) sum += values[i];
  const double mean = sum / static_cast<double>(count);
  double squares = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double away = values[i] - mean;
    squares += away * away;
  }
  return std::sqrt(squares / static_cast<double>(count));
}

/// For every position of a result: the index below, the index above, the share of the latter.
struct Neighbours {
  std::vector<std::size_t> low, high;
  std::vector<float> share;
};

Neighbours neighbours(std::int64_t source, std::int64_t target, bool corners) {
  Neighbours made;
  const double scale = static_cast<double>(source) / static_cast<double>(target);
  const double step = static_cast<double>(source - 1) / static_cast<double>(std::max<std::int64_t>(target - 1, 1));
  for (std::int64_t i = 0; i < target; ++i) {
    double position = static_cast<double>(i) * step;
    if (!corners) {
      position = (static_cast<double>(i) + 0.5) * scale - 0.5;
      position = std::min(std::max(position, 0.0), static_cast<double>(source - 1));
    }
    const auto low = std::min(static_cast<std::int64_t>(position), std::max<std::int64_t>(source - 2, 0));
    made.low.push_back(static_cast<std::size_t>(low));
    made.high.push_back(static_cast<std::size_t>(std::min(low + 1, source - 1)));
    made.share.push_back(static_cast<float>(position - static_cast<double>(low)));
  }
  return made;
}

}  // namespace

double cosine_alpha_bar(double t) {
  constexpr double kOffset = 0.008;
  return alpha_bar_at(t, kOffset);
}

std::size_t count_of(const Shape& shape) {
  std::size_t count = 1;
  for (const auto size : shape) count *= static_cast<std::size_t>(size);
  return count;
}

Schedule make_schedule(const std::string& sampler, std::int64_t steps, const std::string& prediction_type, double shift,
                       double scaler, double s, double start) {
  if (sampler == "original" || sampler == "lcm") {
    return original(steps, prediction_type, shift, s, start, sampler == "lcm");
  }
  return diffusers(steps, prediction_type, scaler, s, start);
}

Tensor timestep_embedding(const std::vector<float>& ratios, std::int64_t dim) {
  const std::int64_t half = dim / 2;
  Tensor made{{static_cast<std::int64_t>(ratios.size()), dim}, std::vector<float>(ratios.size() * std::size_t(dim))};
  const auto scale = static_cast<float>(-std::log(10000.0) / static_cast<double>(half - 1));
  for (std::size_t row = 0; row < ratios.size(); ++row) {
    float* out = made.data.data() + row * static_cast<std::size_t>(dim);
    for (std::int64_t i = 0; i < half; ++i) {
      const float frequency = rounded<std::exp>(static_cast<float>(i) * scale);
      const float angle = ratios[row] * 10000.0F * frequency;
      out[i] = rounded<std::sin>(angle);
      out[half + i] = rounded<std::cos>(angle);
    }
  }
  return made;
}

void guide(const float* conditional, const float* unconditional, float scale, double rescale, std::size_t count,
           float* out) {
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = unconditional[i] + scale * (conditional[i] - unconditional[i]);
  }
  if (rescale == 0) return;
  const double wanted = spread(conditional, count), actual = spread(out, count);
  const double ratio = actual > 0 ? wanted / actual : 1.0;
  const auto factor = static_cast<float>(rescale * ratio + (1 - rescale));
  for (std::size_t i = 0; i < count; ++i) out[i] *= factor;
}

Tensor resize_bilinear(const Tensor& x, std::int64_t height, std::int64_t width, bool corners) {
  const auto rows = static_cast<std::size_t>(x.shape[0] * x.shape[1]);
  const auto h = static_cast<std::size_t>(x.shape[2]), w = static_cast<std::size_t>(x.shape[3]);
  const auto out_h = static_cast<std::size_t>(height), out_w = static_cast<std::size_t>(width);
  const Neighbours across = neighbours(x.shape[3], width, corners), down = neighbours(x.shape[2], height, corners);
  std::vector<float> wide(rows * h * out_w);
  for (std::size_t row = 0; row < rows * h; ++row) {
    const float* in = x.data.data() + row * w;
    for (std::size_t i = 0; i < out_w; ++i) {
      const float share = across.share[i];
      wide[row * out_w + i] = in[across.low[i]] * (1.0F - share) + in[across.high[i]] * share;
    }
  }
  Tensor made{{x.shape[0], x.shape[1], height, width}, std::vector<float>(rows * out_h * out_w)};
  for (std::size_t row = 0; row < rows; ++row) {
    for (std::size_t j = 0; j < out_h; ++j) {
      const float share = down.share[j];
      const float* low = wide.data() + (row * h + down.low[j]) * out_w;
      const float* high = wide.data() + (row * h + down.high[j]) * out_w;
      float* out = made.data.data() + (row * out_h + j) * out_w;
      for (std::size_t i = 0; i < out_w; ++i) out[i] = low[i] * (1.0F - share) + high[i] * share;
    }
  }
  return made;
}

Tensor colours_of(const Tensor& latents, const PreviewFactors& preview) {
  const auto channels = static_cast<std::size_t>(latents.shape[1]);
  const auto plane = static_cast<std::size_t>(latents.shape[2] * latents.shape[3]);
  Tensor made{{latents.shape[0], latents.shape[2], latents.shape[3], 3}, {}};
  for (std::size_t b = 0; b < static_cast<std::size_t>(latents.shape[0]); ++b) {
    for (std::size_t i = 0; i < plane; ++i) {
      for (std::size_t c = 0; c < 3; ++c) {
        double sum = 0;  // holds every product exactly; rounded once
        for (std::size_t k = 0; k < channels; ++k) {
          sum += static_cast<double>(latents.data[(b * channels + k) * plane + i]) *
                 static_cast<double>(preview.factors[k][c]);
        }
        made.data.push_back(static_cast<float>(sum) + preview.offset[c]);
      }
    }
  }
  return made;
}

std::unique_ptr<Noise> torch_cpu(std::uint64_t seed) { return std::make_unique<TorchCpu>(seed); }
std::unique_ptr<Noise> torch_cuda(std::uint64_t seed) { return std::make_unique<TorchCuda>(seed); }

PictureNoise::PictureNoise(const std::string& kind, const std::vector<std::uint64_t>& seeds) {
  for (const auto seed : seeds) {
    first_.push_back(kind == "torch-cuda" ? torch_cuda(seed) : torch_cpu(seed));
    // "notebook": first latents from the CPU's generator, the noise of every step from CUDA's
    steps_.push_back(kind == "notebook" ? std::shared_ptr<Noise>(torch_cuda(seed)) : first_.back());
  }
}

namespace {

Tensor drawn(const std::vector<std::shared_ptr<Noise>>& sources, const Shape& shape) {
  Tensor made{shape, std::vector<float>(count_of(shape))};
  const std::size_t each = made.data.size() / sources.size();
  for (std::size_t i = 0; i < sources.size(); ++i) sources[i]->normal(made.data.data() + i * each, each);
  return made;
}

}  // namespace

Tensor PictureNoise::initial(const Shape& shape) { return drawn(first_, shape); }
Tensor PictureNoise::normal(const Shape& shape) { return drawn(steps_, shape); }

}  // namespace cascade_rt::detail
