// Pipelines in use: threads, interruption, memory, callbacks, the two halves. Needs CASCADE_RT_BUNDLE and ONNX Runtime.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "cascade_rt/cascade_rt.hpp"

using namespace cascade_rt;

namespace {

std::shared_ptr<const Bundle> bundle() {
  const char* place = std::getenv("CASCADE_RT_BUNDLE");
  return Bundle::open(place != nullptr ? place : std::string(CASCADE_TESTS) + "/../../engines/tiny/cascade_tiny/bundle");
}

Options one_thread() {
  Options made;
  made.provider = "cpu";
  made.threads = 1;
  return made;
}

Request request(std::vector<std::uint64_t> seeds, std::int64_t steps = 3) {
  Request made;
  made.prompt = std::string("a red circle");
  made.seeds = std::move(seeds);
  made.height = made.width = 128;
  made.prior.num_inference_steps = steps;
  made.decoder.num_inference_steps = 2;
  return made;
}

double resident_mib() {
  std::ifstream file("/proc/self/statm");
  double pages = 0, resident = 0;
  file >> pages >> resident;
  return resident * 4096 / 1048576;
}

}  // namespace

TEST(Use, APictureIsTheSameTwiceAndInABatch) {
  Pipeline pipeline(bundle(), one_thread());
  const auto alone = pipeline.generate(request({5})).images.at(0).rgb;
  EXPECT_EQ(pipeline.generate(request({5})).images.at(0).rgb, alone);
  const auto several = pipeline.generate(request({4, 5})).images;
  ASSERT_EQ(several.size(), 2U);
  std::size_t far = 0;
  for (std::size_t i = 0; i < alone.size(); ++i) far += std::abs(int{several[1].rgb[i]} - int{alone[i]}) > 1 ? 1U : 0U;
  EXPECT_EQ(far, 0U);
  EXPECT_NE(several[0].rgb, several[1].rgb);
}

TEST(Use, ThePartsGiveTheWhole) {
  Pipeline pipeline(bundle(), one_thread());
  const auto whole = pipeline.generate(request({9}));
  const auto prior = pipeline.prior(request({9}));
  EXPECT_EQ(prior.image_embeddings.shape, (std::vector<std::int64_t>{1, 16, 3, 3}));
  Tensors given;
  given.image_embeddings = prior.image_embeddings;
  const auto decoded = pipeline.decode(request({9}), given);
  EXPECT_EQ(decoded.images.at(0).width, whole.images.at(0).width);
  Request latent = request({9});
  latent.output_type = "latent";
  const auto latents = pipeline.generate(latent);
  ASSERT_TRUE(latents.array.has_value());
  EXPECT_EQ(latents.array->shape, (std::vector<std::int64_t>{1, 4, 32, 32}));
  const auto pixels = pipeline.run_engine("stage_a.decode", {{"latents", *latents.array}});
  EXPECT_EQ(pixels.at("pixels").shape, (std::vector<std::int64_t>{1, 3, 128, 128}));
  Tensor wrong{{1, 4, 32, 31}, std::vector<float>(4 * 32 * 32)};
  EXPECT_THROW(pipeline.run_engine("stage_a.decode", {{"latents", wrong}}), EngineError);
  EXPECT_THROW(pipeline.run_engine("stage_a.decode", {}), EngineError);
}

TEST(Use, AControlledPictureTakesOtherEnginesOfStageC) {
  Image edges;  // a white frame
  edges.width = edges.height = 128;
  for (int y = 0; y < 128; ++y) {
    for (int x = 0; x < 128; ++x) {
      const bool on = (x == 32 || x == 96 || y == 32 || y == 96) && x >= 32 && x <= 96 && y >= 32 && y <= 96;
      edges.rgb.insert(edges.rgb.end(), 3, on ? 255 : 0);
    }
  }
  Request framed = request({3});
  framed.control_filtered = true;
  Tensors given;
  given.control = edges;
  Options options = one_thread();
  options.low_memory = true;
  Pipeline usual(bundle(), one_thread()), small(bundle(), options);
  const auto plain = usual.generate(request({3})).images.at(0).rgb;
  const auto whole = usual.generate(framed, {}, given);
  EXPECT_NE(whole.images.at(0).rgb, plain);
  EXPECT_EQ(small.generate(framed, {}, given).images.at(0).rgb, whole.images.at(0).rgb);
  EXPECT_EQ(usual.generate(request({3})).images.at(0).rgb, plain);
  EXPECT_EQ(whole.request.control_kind, "canny");
  const auto prior = usual.prior(framed, {}, given);
  EXPECT_NE(prior.image_embeddings.data, usual.prior(request({3})).image_embeddings.data);
  given.image_embeddings = prior.image_embeddings;
  EXPECT_EQ(usual.decode(framed, given).images.size(), 1U);
  given.control->rgb.pop_back();
  EXPECT_THROW(usual.generate(framed, {}, given), RequestError);
}

TEST(Use, LowMemoryMakesTheSamePicture) {
  Pipeline usual(bundle(), one_thread());
  Options options = one_thread();
  options.low_memory = true;
  Pipeline small(bundle(), options);
  EXPECT_EQ(usual.generate(request({1, 2})).images.at(1).rgb, small.generate(request({1, 2})).images.at(1).rgb);
}

TEST(Use, CallbacksSeeEveryStepAndMayChangeLatents) {
  Pipeline pipeline(bundle(), one_thread());
  const auto usual = pipeline.generate(request({1})).images.at(0).rgb;
  int steps = 0;
  const auto changed = pipeline.generate(request({1}), [&](const Step& step) -> std::optional<Tensor> {
    ++steps;
    EXPECT_EQ(step.x0().shape, step.latents.shape);
    if (std::string(step.stage) != "stage_c" || step.index != 0) return std::nullopt;
    Tensor other = step.latents;
    for (float& one : other.data) one = -one;
    return other;
  });
  EXPECT_EQ(steps, 5);
  EXPECT_NE(changed.images.at(0).rgb, usual);
  EXPECT_THROW(pipeline.generate(request({1}), [](const Step&) { return Tensor{{1}, {0}}; }), RequestError);
  EXPECT_THROW(pipeline.generate(request({1}), [&](const Step&) -> std::optional<Tensor> {
                 pipeline.generate(request({1}));
                 return std::nullopt;
               }),
               RequestError);
  EXPECT_EQ(pipeline.generate(request({1})).images.at(0).rgb, usual);
}

TEST(Use, AnInterruptStopsBetweenSteps) {
  Pipeline pipeline(bundle(), one_thread());
  int steps = 0;
  EXPECT_THROW(pipeline.generate(request({1}, 50), [&](const Step&) -> std::optional<Tensor> {
                 if (++steps == 2) pipeline.interrupt();
                 return std::nullopt;
               }),
               GenerationInterrupted);
  EXPECT_EQ(steps, 2);
  EXPECT_EQ(pipeline.generate(request({1})).images.size(), 1U);
  pipeline.close();
  pipeline.close();
  EXPECT_THROW(pipeline.generate(request({1})), EngineError);
}

TEST(Use, EightThreadsWithAPipelineEach) {
  const auto shared = bundle();
  const auto wanted = Pipeline(shared, one_thread()).generate(request({7})).images.at(0).rgb;
  std::atomic<int> same{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      Pipeline own(shared, one_thread());
      if (own.generate(request({7})).images.at(0).rgb == wanted) ++same;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(same, 8);
}

TEST(Use, OnePipelineFromSeveralThreads) {
  Pipeline pipeline(bundle(), one_thread());
  const auto wanted = pipeline.generate(request({7})).images.at(0).rgb;
  std::atomic<int> same{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      if (pipeline.generate(request({7})).images.at(0).rgb == wanted) ++same;
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(same, 4);
}

TEST(Use, MemoryDoesNotGrow) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "a sanitizer keeps memory that was given back";
#endif
  const char* given = std::getenv("CASCADE_TEST_PICTURES");
  const int pictures = given == nullptr ? 40 : std::atoi(given);
  Pipeline pipeline(bundle(), one_thread());
  Request own = request({1}, 2);
  own.height = own.width = 64;
  for (int i = 0; i < 10; ++i) pipeline.generate(own);
  const double before = resident_mib();
  for (int i = 0; i < pictures; ++i) pipeline.generate(own);
  std::printf("resident: %.1f MiB, after %d pictures %.1f MiB\n", before, pictures, resident_mib());
  EXPECT_LT(resident_mib() - before, 2.0);
}

TEST(Use, LongPromptsAreToldOf) {
  Pipeline pipeline(bundle(), one_thread());
  std::string told;
  pipeline.on_warning([&](const std::string& text) { told = text; });
  Request own = request({1}, 1);
  std::string longer;
  for (int i = 0; i < 30; ++i) longer += "red ";
  own.prompt = longer + "circle";
  pipeline.generate(own);
  EXPECT_NE(told.find("this part of the prompt was cut off: 'red red"), std::string::npos) << told;
  EXPECT_NE(told.find("circle'"), std::string::npos) << told;
}

namespace {

/// A red square on a slope of blue.
Image scene(std::int64_t width, std::int64_t height) {
  Image made;
  made.width = width;
  made.height = height;
  for (std::int64_t y = 0; y < height; ++y) {
    for (std::int64_t x = 0; x < width; ++x) {
      const bool inside = x > width / 4 && x < width / 2 && y > height / 4 && y < height / 2;
      const auto blue = static_cast<std::uint8_t>(x * 255 / width);
      const std::uint8_t pixel[] = {static_cast<std::uint8_t>(inside ? 230 : 20), 30, inside ? std::uint8_t{20} : blue};
      made.rgb.insert(made.rgb.end(), std::begin(pixel), std::end(pixel));
    }
  }
  return made;
}

/// A LoRA file of rank 1 for one weight of the tiny cascade's Stage C.
std::string lora_file(const std::string& name, std::size_t width = 160) {
  const std::string key = "lora_prior_unet_down_blocks_0_2_attention_to_q.lora_";
  const std::string size = std::to_string(width), bytes = std::to_string(width * 4);
  const std::string header = "{\"" + key + "down.weight\": {\"dtype\": \"F32\", \"shape\": [1, " + size +
                             "], \"data_offsets\": [0, " + bytes + "]}, \"" + key +
                             "up.weight\": {\"dtype\": \"F32\", \"shape\": [" + size + ", 1], \"data_offsets\": [" + bytes +
                             ", " + std::to_string(width * 8) + "]}}";
  const std::string path = testing::TempDir() + name;
  std::ofstream file(path, std::ios::binary);
  for (std::size_t i = 0; i < 8; ++i) file.put(static_cast<char>((header.size() >> (8 * i)) & 255U));
  file << header;
  for (std::size_t i = 0; i < 2 * width; ++i) {
    const float one = i % 3 == 0 ? 0.3F : -0.2F;
    file.write(reinterpret_cast<const char*>(&one), sizeof one);
  }
  return path;
}

}  // namespace

TEST(Use, PicturesComeAsPixels) {
  Pipeline pipeline(bundle(), one_thread());
  Tensors given;
  given.init_image = scene(96, 64);
  Request own = request({3});
  own.height.reset();
  own.width.reset();
  own.strength = 0.7;
  const auto begun = pipeline.generate(own, {}, given);
  EXPECT_EQ(begun.images.at(0).width, 384);
  EXPECT_EQ(begun.images.at(0).height, 256);
  EXPECT_EQ(begun.timings.count("encoders"), 1U);
  given.mask = Mask{96, 64, std::vector<std::uint8_t>(96 * 64)};
  for (std::size_t i = 0; i < given.mask->free.size(); ++i) given.mask->free[i] = i % 96 < 40 ? 1 : 0;
  const auto filled = pipeline.generate(own, {}, given);
  EXPECT_NE(filled.images.at(0).rgb, begun.images.at(0).rgb);
  given.mask->free.pop_back();
  EXPECT_THROW(pipeline.generate(own, {}, given), RequestError);
  given.mask = Mask{64, 96, std::vector<std::uint8_t>(96 * 64)};
  EXPECT_THROW(pipeline.generate(own, {}, given), RequestError);
  given = {};
  given.images = {{scene(32, 32), 1.0}};
  const auto varied = pipeline.generate(request({3}), {}, given).images.at(0).rgb;
  EXPECT_NE(varied, pipeline.generate(request({3})).images.at(0).rgb);
  given.images.front().weight = 11;
  EXPECT_THROW(pipeline.generate(request({3}), {}, given), RequestError);
  given.images.assign(9, {scene(32, 32), 1.0});
  EXPECT_THROW(pipeline.generate(request({3}), {}, given), RequestError);
}

TEST(Use, EncodeAndDecode) {
  Pipeline pipeline(bundle(), one_thread());
  const Image source = scene(128, 128);
  Tensors given;
  given.image_embeddings = pipeline.encode(source);
  EXPECT_EQ(given.image_embeddings->shape, (std::vector<std::int64_t>{1, 16, 6, 6}));
  Request own = request({1});
  own.height.reset();
  own.width.reset();
  const double right = reconstruction_psnr(source, pipeline.decode(own, given).images.at(0));
  for (float& one : given.image_embeddings->data) one = -one;
  const double wrong = reconstruction_psnr(source, pipeline.decode(own, given).images.at(0));
  EXPECT_GT(right, wrong + 2);
  EXPECT_EQ(pipeline.encode(source, 128, 256).shape, (std::vector<std::int64_t>{1, 16, 3, 6}));
  EXPECT_THROW(pipeline.encode(source, 10, 10), RequestError);
}

TEST(Use, LoraFilesOnAndOff) {
  const auto shared = bundle();
  Pipeline pipeline(shared, one_thread());
  const std::string file = lora_file("cascade-style.safetensors"), wide = lora_file("cascade-wide.safetensors", 168);
  const auto plain = pipeline.generate(request({3})).images.at(0).rgb;
  pipeline.load_lora_weights(file, 2.0);
  const auto styled = pipeline.generate(request({3})).images.at(0).rgb;
  EXPECT_NE(styled, plain);
  EXPECT_THROW(pipeline.load_lora_weights(wide), CheckpointError);
  EXPECT_THROW(pipeline.load_lora_weights(file, 1e9), RequestError);
  EXPECT_THROW(pipeline.load_lora_weights(testing::TempDir() + "none.safetensors"), CheckpointError);
  EXPECT_EQ(pipeline.generate(request({3})).images.at(0).rgb, styled);
  EXPECT_EQ(Pipeline(shared, one_thread()).generate(request({3})).images.at(0).rgb, plain);
  pipeline.unload_lora_weights();
  EXPECT_EQ(pipeline.generate(request({3})).images.at(0).rgb, plain);
  Request own = request({3});
  own.loras = {{file, 2.0}};
  EXPECT_EQ(pipeline.generate(own).images.at(0).rgb, styled);
  EXPECT_EQ(pipeline.generate(request({3})).images.at(0).rgb, plain);
}

TEST(Use, PreviewsOfEveryStep) {
  Pipeline pipeline(bundle(), one_thread());
  std::vector<std::int64_t> widths;
  pipeline.generate(request({1, 2}), [&](const Step& step) -> std::optional<Tensor> {
    const auto pictures = step.preview();
    EXPECT_EQ(pictures.size(), 2U);
    widths.push_back(pictures.at(0).width);
    return std::nullopt;
  });
  EXPECT_EQ(widths, (std::vector<std::int64_t>{3, 3, 3, 32, 32}));
}
