// The C++ side of vectors.json, which the Python package has written.
#include <gtest/gtest.h>
#include <openssl/evp.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "control.hpp"
#include "pictures.hpp"
#include "request.hpp"
#include "sampling.hpp"
#include "tokenizer.hpp"

using namespace cascade_rt;
using namespace cascade_rt::detail;

namespace {

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream made;
  made << file.rdbuf();
  return made.str();
}

const Json& vectors() {
  static const Json made = Json::parse(text_of(std::string(CASCADE_TESTS) + "/vectors.json"));
  return made;
}

std::string tiny() {
  const char* place = std::getenv("CASCADE_RT_BUNDLE");
  return place != nullptr ? place : std::string(CASCADE_TESTS) + "/../../engines/tiny/cascade_tiny/bundle";
}

std::string sha256(const void* data, std::size_t size) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned count = 0;
  EVP_Digest(data, size, digest, &count, EVP_sha256(), nullptr);
  std::string made;
  for (unsigned i = 0; i < count; ++i) {
    char hex[3];
    std::snprintf(hex, sizeof hex, "%02x", digest[i]);
    made += hex;
  }
  return made;
}

template <class T>
void expect_told(const std::vector<T>& found, const Json& told, const std::string& what) {
  ASSERT_EQ(found.size(), told.at("count").get<std::size_t>()) << what;
  for (std::size_t i = 0; i < told.at("first").size(); ++i) {
    EXPECT_EQ(static_cast<double>(found[i]), told.at("first")[i].get<double>()) << what << " at " << i;
  }
  EXPECT_EQ(sha256(found.data(), found.size() * sizeof(T)), told.at("sha256").get<std::string>()) << what;
}

Tensor drawn(std::uint64_t seed, const Shape& shape) { return PictureNoise("torch-cpu", {seed}).normal(shape); }

void expect_error(const Error& error, const Json& wanted, const std::string& what) {
  EXPECT_EQ(error.kind(), wanted.at("kind").get<std::string>()) << what;
  EXPECT_EQ(std::string(error.what()), wanted.at("message").get<std::string>()) << what;
  EXPECT_EQ(error.field(), wanted.at("field").get<std::string>()) << what;
  EXPECT_EQ(error.accepted(), wanted.at("accepted").get<std::string>()) << what;
}

}  // namespace

TEST(Vectors, Noise) {
  ASSERT_GT(vectors().at("noise").size(), 20U);
  for (const Json& one : vectors().at("noise")) {
    PictureNoise noise(one.at("kind").get<std::string>(), one.at("seeds").get<std::vector<std::uint64_t>>());
    bool first = true;
    for (std::size_t i = 0; i < one.at("shapes").size(); ++i) {
      const Shape shape = one.at("shapes")[i].get<Shape>();
      expect_told((first ? noise.initial(shape) : noise.normal(shape)).data, one.at("made")[i], one.dump());
      first = false;
    }
  }
}

TEST(Vectors, Schedules) {
  ASSERT_GT(vectors().at("schedules").size(), 100U);
  for (const Json& one : vectors().at("schedules")) {
    const Schedule made = make_schedule(one.at("sampler").get<std::string>(), one.at("steps").get<std::int64_t>(),
                                        one.at("prediction_type").get<std::string>(), one.at("shift").get<double>(),
                                        one.at("scaler").get<double>(), 0.008, one.at("start").get<double>());
    std::vector<float> all = made.ratios;
    for (const auto& row : made.x0) all.insert(all.end(), {static_cast<float>(row[0]), static_cast<float>(row[1])});
    for (const auto& row : made.update) {
      for (const double x : row) all.push_back(static_cast<float>(x));
    }
    expect_told(all, one.at("made"), one.dump());
    expect_told(timestep_embedding(made.ratios, 64).data, one.at("embedding"), one.dump());
    EXPECT_EQ(made.returns_x0, one.at("returns_x0").get<bool>());
  }
}

TEST(Vectors, Resizes) {
  for (const Json& one : vectors().at("resizes")) {
    const Tensor x = drawn(one.at("seed").get<std::uint64_t>(), one.at("shape").get<Shape>());
    const Tensor made = resize_bilinear(x, one.at("size")[0].get<std::int64_t>(), one.at("size")[1].get<std::int64_t>(),
                                        one.at("corners").get<bool>());
    expect_told(made.data, one.at("made"), one.dump());
  }
}

TEST(Vectors, ResidualsOnStageCsGrid) {
  for (const Json& one : vectors().at("grids")) {
    const Tensor x = drawn(one.at("seed").get<std::uint64_t>(), one.at("shape").get<Shape>());
    const Shape size = one.at("size").get<Shape>();
    const Tensor made = on_grid(x, size[0], size[1]);
    EXPECT_EQ(made.shape, (Shape{x.shape[0], x.shape[1], size[0], size[1], x.shape[4]}));
    expect_told(made.data, one.at("made"), one.dump());
  }
  for (const Json& one : vectors().at("enlarged")) {
    const Tensor made = enlarged(drawn(one.at("seed").get<std::uint64_t>(), one.at("shape").get<Shape>()));
    EXPECT_EQ(made.shape, (Shape{2, 16, 6, 10}));
    expect_told(made.data, one.at("made"), one.dump());
  }
}

TEST(Vectors, Guidance) {
  for (const Json& one : vectors().at("guides")) {
    const auto seed = one.at("seed").get<std::uint64_t>();
    const Shape shape = one.at("shape").get<Shape>();
    const Tensor with = drawn(seed, shape), without = drawn(seed + 1, shape);
    std::vector<float> made(with.data.size());
    const std::size_t size = made.size() / 2;
    for (std::size_t i = 0; i < 2; ++i) {
      guide(with.data.data() + i * size, without.data.data() + i * size,
            one.at("scale").get<float>() + static_cast<float>(i), one.at("rescale").get<double>(), size,
            made.data() + i * size);
    }
    expect_told(made, one.at("made"), one.dump());
  }
}

TEST(Vectors, Shown) {
  for (const Json& one : vectors().at("shown")) EXPECT_EQ(shown(one.at("value")), one.at("shown").get<std::string>());
}

TEST(Vectors, Tokens) {
  const Json& all = vectors().at("tokens");
  const auto bundle = Bundle::open(tiny());
  const auto& record = *bundle->impl().manifest.tokenizer;
  const Tokenizer words(text_of(bundle->impl().file(record.file)), "tiny", record);
  const Tokenizer clip(text_of(std::string(CASCADE_TESTS) + "/clip_tokenizer.json"), "clip", {"", 77, 1});
  const auto texts = all.at("texts").get<std::vector<std::string>>();
  ASSERT_GT(texts.size(), 1000U);
  for (const auto& kind : {std::make_pair("tiny", &words), std::make_pair("clip", &clip)}) {
    for (std::size_t i = 0; i < texts.size(); ++i) {
      auto made = (*kind.second)(texts[i]);
      const auto count = std::count(made.mask.begin(), made.mask.end(), 1);
      made.ids.resize(static_cast<std::size_t>(count));
      EXPECT_EQ(made.ids, all.at("ids").at(kind.first)[i].get<std::vector<std::int64_t>>())
          << kind.first << ": " << repr(texts[i]);
    }
  }
}

namespace {

Records all_of(const Manifest& manifest) {
  Records made;
  for (const auto& record : manifest.engines) made.push_back(&record);
  return made;
}

/// The place in a document that a path of keys and indices leads to.
Json& at_path(Json& document, const Json& path) {
  Json* made = &document;
  for (const Json& key : path) {
    made = key.is_number() ? &(*made)[key.get<std::size_t>()] : &(*made)[key.get<std::string>()];
  }
  return *made;
}

void expect_plan(const Planned& made, const Json& wanted, const std::string& what) {
  EXPECT_EQ(made.pictures, wanted.at("pictures").get<std::int64_t>()) << what;
  const Shape sizes{made.prior_size[0],   made.prior_size[1],   made.decoder_size[0],
                    made.decoder_size[1], made.picture_size[0], made.picture_size[1]};
  EXPECT_EQ(sizes, wanted.at("sizes").get<Shape>()) << what;
  EXPECT_EQ(made.engine_keys(), wanted.at("engines").get<std::vector<EngineKey>>()) << what;
  EXPECT_EQ(made.memory, wanted.at("memory").get<std::uint64_t>()) << what;
  Json full = to_json(made.request);
  if (!wanted.at("request").contains("seeds")) full.erase("seeds");
  EXPECT_EQ(full.dump(), wanted.at("request").dump()) << what;
  std::size_t index = 0;
  for (const auto* loop : {&made.prior, &made.decoder}) {
    if (!*loop) continue;
    std::vector<double> scales;
    for (const auto& row : (*loop)->scales) scales.insert(scales.end(), row.begin(), row.end());
    expect_told(scales, wanted.at("scales")[index++], what);
  }
  ASSERT_EQ(made.control.has_value(), wanted.contains("control")) << what;
  if (!made.control) return;
  const Json control{made.control->engine, made.control->pixels[0], made.control->pixels[1], made.control->channels};
  EXPECT_EQ(control, wanted.at("control")) << what;
}

}  // namespace

TEST(Vectors, Requests) {
  const auto bundle = Bundle::open(tiny());
  const Manifest& manifest = bundle->impl().manifest;
  for (const Json& one : vectors().at("requests")) {
    const std::string what = one.at("request").dump().substr(0, 200);
    try {
      const Request request = request_from(one.at("request"));
      ASSERT_TRUE(one.contains("json")) << what;
      EXPECT_EQ(request.to_json(), one.at("json").get<std::string>());
      EXPECT_EQ(Request::from_json(request.to_json()).to_json(), request.to_json());
      const Planned made = plan(request, manifest, all_of(manifest), gather(request, {}), Part::picture);
      ASSERT_TRUE(one.contains("plan")) << what;
      expect_plan(made, one.at("plan"), what);
    } catch (const Error& error) {
      ASSERT_TRUE(one.contains("error")) << what << ": " << error.what();
      expect_error(error, one.at("error"), what);
    }
  }
}

TEST(Vectors, ControlNetsOfEveryKind) {
  const Json& all = vectors().at("controls");
  std::size_t refused = 0;
  for (const Json& one : all.at("cases")) {
    Json document = all.at("manifest");
    if (one.contains("path")) at_path(document, one.at("path")) = one.at("value");
    const std::string what = one.dump().substr(0, 300);
    try {
      const Request request = request_from(one.at("request"));
      const Manifest manifest = Manifest::from_json(document.dump(), "tiny");
      const Planned made = plan(request, manifest, all_of(manifest), gather(request, {}), Part::picture);
      ASSERT_TRUE(one.contains("plan")) << what;
      ASSERT_TRUE(made.control.has_value()) << what;
      expect_plan(made, one.at("plan"), what);
    } catch (const Error& error) {
      ASSERT_TRUE(one.contains("error")) << what << ": " << error.what();
      ++refused;
      expect_error(error, one.at("error"), what);
    }
  }
  EXPECT_GT(refused, 5U);
  EXPECT_GT(all.at("cases").size() - refused, 5U);
}

TEST(Vectors, Pictures) {
  ASSERT_GT(vectors().at("pictures").size(), 50U);
  for (const Json& one : vectors().at("pictures")) {
    const auto what = one.at("what").get<std::string>(), place = one.at("place").get<std::string>();
    try {
      const Image picture = open_picture(place);
      ASSERT_TRUE(one.contains("rgb")) << what;
      EXPECT_EQ(picture.width, one.at("size")[0].get<std::int64_t>()) << what;
      EXPECT_EQ(picture.height, one.at("size")[1].get<std::int64_t>()) << what;
      expect_told(picture.rgb, one.at("rgb"), what);
      const Mask mask = open_mask(place);
      expect_told(mask.free, one.at("mask"), what + ": mask");
      expect_told(clip_pixels(picture, 16), one.at("clip"), what + ": clip");
      expect_told(encoder_pixels(picture, 24, 40).data, one.at("pixels"), what + ": pixels");
      expect_told(encoder_pixels(picture, 70, 35).data, one.at("large"), what + ": large");
      expect_told(mask_on_grid(mask, 3, 5).data, one.at("grid"), what + ": grid");
      std::size_t index = 0;
      for (const auto& kind : {std::make_pair("canny", 1), {"picture", 1}, {"picture", 3}, {"inpainting", 4}}) {
        for (const auto& size : {std::array<std::int64_t, 2>{24, 40}, {70, 35}}) {
          const Tensor made = control_pixels({kind.first, "", size, kind.second}, picture, mask, true);
          EXPECT_EQ(made.shape, (Shape{1, kind.second, size[0], size[1]}));
          expect_told(made.data, one.at("control")[index++], what + ": shown to " + kind.first);
        }
      }
    } catch (const Error& error) {
      ASSERT_TRUE(one.contains("error")) << what << ": " << error.what();
      expect_error(error, one.at("error"), what);
    }
  }
}

TEST(Vectors, DamagedManifests) {
  const Json& cases = vectors().at("manifests");
  const Json& whole = cases.front().at("value");
  ASSERT_GT(cases.size(), 300U);
  std::size_t refused = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    const Json& one = cases[i];
    Json changed = whole;
    const Json& path = one.at("path");
    Json above = path;
    if (!above.empty()) above.erase(above.size() - 1);
    Json* owner = &at_path(changed, above);
    if (i > 0 && path.back().is_number()) {
      if (one.at("remove").get<bool>()) {
        owner->erase(path.back().get<std::size_t>());
      } else {
        (*owner)[path.back().get<std::size_t>()] = one.at("value");
      }
    } else if (i > 0) {
      if (one.at("remove").get<bool>()) {
        owner->erase(path.back().get<std::string>());
      } else {
        (*owner)[path.back().get<std::string>()] = one.at("value");
      }
    }
    const std::string what = one.dump().substr(0, 300);
    try {
      Manifest::from_json(changed.dump(), "bundle/cascade.json");
      EXPECT_FALSE(one.contains("error")) << what;
    } catch (const Error& error) {
      ASSERT_TRUE(one.contains("error")) << what << ": " << error.what();
      ++refused;
      expect_error(error, one.at("error"), what);
    }
  }
  EXPECT_GT(refused, 100U);
}
