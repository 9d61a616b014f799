// A picture from a prompt: example_cpp BUNDLE "a red circle" picture.png
// ONNX Runtime's library is named by the environment variable ONNXRUNTIME_LIBRARY.
#include <cascade_rt/cascade_rt.hpp>
#include <cstdio>

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: %s BUNDLE PROMPT FILE.png\n", argv[0]);
    return 2;
  }
  try {
    cascade_rt::Pipeline pipeline(cascade_rt::Bundle::open(argv[1]));
    cascade_rt::Request request;
    request.prompt = argv[2];
    request.seeds = std::vector<std::uint64_t>{7};
    const auto progress = [](const cascade_rt::Step& step) -> std::optional<cascade_rt::Tensor> {
      std::fprintf(stderr, "%s %lld/%lld\n", step.stage, static_cast<long long>(step.index + 1),
                   static_cast<long long>(step.steps));
      return std::nullopt;
    };
    const cascade_rt::Result result = pipeline.generate(request, progress);
    cascade_rt::write_files({{argv[3], cascade_rt::encode_png(result.images.at(0))}});
    std::printf("%s: %lld x %lld\n", argv[3], static_cast<long long>(result.images[0].width),
                static_cast<long long>(result.images[0].height));
    return 0;
  } catch (const cascade_rt::Error& error) {
    std::fprintf(stderr, "%s: %s\n", error.kind().c_str(), error.what());
    return 1;
  }
}
