// cascade_rt: Stable Cascade pictures from an engine bundle, without Python.
//
// A `Request` says what to make, a `Pipeline` makes it. The names, defaults, JSON and error texts are those of the
// Python package cascade-rt, and the same bundle, request and provider give the same bytes.
//
// Threads: a `Bundle` may be shared by any number of threads and pipelines. Calls of one `Pipeline` from several
// threads wait for each other; `Pipeline::interrupt` may be called from any thread. There is no global state.
#ifndef CASCADE_RT_CASCADE_RT_HPP
#define CASCADE_RT_CASCADE_RT_HPP

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace cascade_rt {

/// Version of the library, "0.1.0".
const char* version() noexcept;

/// Base of every error of this library. The classes and the fields are those of the Python package.
class Error : public std::runtime_error {
 public:
  /// @param kind Name of the class in Python, "RequestError".
  /// @param message One line: what was given, what is accepted, what to type next.
  /// @param field What was wrong, in the words of `Request` or of the manifest; empty where it is not about one value.
  /// @param value What was given, as JSON; empty where there is none.
  /// @param accepted What would have been taken; empty where there is nothing to name.
  Error(std::string kind, const std::string& message, std::string field = {}, std::string value = {},
        std::string accepted = {})
      : std::runtime_error(message),
        kind_(std::move(kind)),
        field_(std::move(field)),
        value_(std::move(value)),
        accepted_(std::move(accepted)) {}

  const std::string& kind() const noexcept { return kind_; }
  const std::string& field() const noexcept { return field_; }
  const std::string& value() const noexcept { return value_; }
  const std::string& accepted() const noexcept { return accepted_; }

 private:
  std::string kind_, field_, value_, accepted_;
};

/// The request was wrong: a size, a scale, a name or a type that is not accepted.
class RequestError : public Error {
 public:
  explicit RequestError(const std::string& message, std::string field = {}, std::string value = {},
                        std::string accepted = {})
      : Error("RequestError", message, std::move(field), std::move(value), std::move(accepted)) {}
};

/// A bundle is damaged, of another format, or lacks an engine.
class BundleError : public Error {
 public:
  explicit BundleError(const std::string& message, std::string field = {}, std::string value = {},
                       std::string accepted = {})
      : Error("BundleError", message, std::move(field), std::move(value), std::move(accepted)) {}

 protected:
  struct Kind {
    const char* name;
  };
  BundleError(Kind kind, const std::string& message) : Error(kind.name, message) {}
};

/// There is no bundle at the given place.
class BundleNotFoundError : public BundleError {
 public:
  explicit BundleNotFoundError(const std::string& message) : BundleError(Kind{"BundleNotFoundError"}, message) {}
};

/// A LoRA file is missing or damaged, of another architecture, or of a kind that is not read.
class CheckpointError : public Error {
 public:
  explicit CheckpointError(const std::string& message) : Error("CheckpointError", message) {}

 protected:
  struct Kind {
    const char* name;
  };
  CheckpointError(Kind kind, const std::string& message) : Error(kind.name, message) {}
};

/// A LoRA file is of a kind that is never read.
class MissingCheckpointError : public CheckpointError {
 public:
  explicit MissingCheckpointError(const std::string& message)
      : CheckpointError(Kind{"MissingCheckpointError"}, message) {}
};

/// An engine could not be loaded or run, or was called with tensors that it does not take.
class EngineError : public Error {
 public:
  explicit EngineError(const std::string& message) : Error("EngineError", message) {}
};

/// A result could not be written.
class OutputError : public Error {
 public:
  explicit OutputError(const std::string& message) : Error("OutputError", message) {}
};

/// `Pipeline::interrupt` was called.
class GenerationInterrupted : public Error {
 public:
  explicit GenerationInterrupted(const std::string& message) : Error("GenerationInterrupted", message) {}
};

/// One text or several; empty stands for None.
using Texts = std::variant<std::monostate, std::string, std::vector<std::string>>;
/// One number or one for every picture; empty stands for "as the bundle says".
using Numbers = std::variant<std::monostate, double, std::vector<double>>;

/// How one stage is sampled. Empty fields: as the bundle says.
struct LoopSettings {
  std::optional<std::int64_t> num_inference_steps;  ///< network calls, 1..1000
  Numbers guidance_scale;                           ///< up to 1 is no guidance
  std::optional<double> guidance_start;             ///< share of the steps, 0..1, before which there is no guidance
  std::optional<double> guidance_end;               ///< share of the steps from which on there is none
  std::optional<std::vector<double>> guidance_per_step;  ///< instead of guidance_scale: one for every step, or two
};

/// A picture whose content is drawn anew.
struct ImagePrompt {
  std::string image;    ///< path of a file, or a data:image/...;base64, URI
  double weight = 1.0;  ///< factor of its CLIP embedding
};

/// A LoRA file that is applied while a request runs.
struct LoraFile {
  std::string file;    ///< path of a .safetensors file
  double scale = 1.0;  ///< factor of everything that it adds
};

/// Everything that one call asks for: plain data. Empty fields stand for the bundle's values.
struct Request {
  Texts prompt;                                         ///< what to draw
  Texts negative_prompt;                                ///< what to draw away from where guidance is on
  std::optional<std::int64_t> height;                   ///< pixels, 64..4096
  std::optional<std::int64_t> width;                    ///< pixels, 64..4096
  std::optional<std::int64_t> num_images_per_prompt;    ///< 1..1024; empty: as many as there are seeds, or 1
  std::optional<std::vector<std::uint64_t>> seeds;      ///< one for every picture, or one stream for all; empty: new ones
  std::string noise = "torch-cpu";                      ///< "torch-cpu", "torch-cuda" or "notebook"
  std::optional<std::string> sampler;                   ///< "original", "diffusers" or "lcm"
  std::optional<std::string> preset;                    ///< "quality", "balanced" or "fast"
  LoopSettings prior;                                   ///< Stage C
  LoopSettings decoder;                                 ///< Stage B
  std::vector<ImagePrompt> images;                      ///< pictures to vary, up to 8
  std::optional<std::string> init_image;                ///< picture to begin from, a path or a data: URI
  std::optional<double> strength;                       ///< how much of init_image is drawn anew, 0..1; 0 only decodes it
  /// White where init_image is drawn anew, or what the inpainting ControlNet fills; black is kept.
  std::optional<std::string> mask_image;
  std::optional<std::string> control_image;             ///< picture that a ControlNet follows, a path or a data: URI
  double control_scale = 1.0;                           ///< factor of what the ControlNet adds to Stage C, -10..10
  /// "canny", "inpainting", "super_resolution" or "picture"; empty: the bundle's only one.
  std::optional<std::string> control_kind;
  /// control_image shows already what the kind's filter would find in it, white on black.
  bool control_filtered = false;
  std::vector<LoraFile> loras;                          ///< applied to this request, up to 16
  std::string output_type = "pil";                      ///< "pil" (RGB8), "np" (float) or "latent"

  /// As JSON text, the same as Python's `Request.to_json`.
  std::string to_json() const;
  /// From JSON text; absent fields have their defaults.
  /// @throws RequestError for an unknown field or a value that is not accepted.
  static Request from_json(const std::string& text);
};

/// A C-contiguous float32 array.
struct Tensor {
  std::vector<std::int64_t> shape;
  std::vector<float> data;
};

/// A picture: 8-bit RGB, rows from the top, no padding.
struct Image {
  std::int64_t width = 0;
  std::int64_t height = 0;
  std::vector<std::uint8_t> rgb;  ///< height * width * 3 bytes
};

/// Where a picture is drawn anew.
struct Mask {
  std::int64_t width = 0;
  std::int64_t height = 0;
  std::vector<std::uint8_t> free;  ///< height * width bytes, rows from the top: 1 is drawn anew, 0 is kept
};

/// A picture to vary, opened.
struct WeightedImage {
  Image image;
  double weight = 1.0;  ///< factor of its CLIP embedding
};

/// Arrays and pictures in the place of what the cascade would compute or open.
struct Tensors {
  std::optional<Tensor> prompt_embeds;                  ///< [N, L, E], with prompt_embeds_pooled, instead of prompts
  std::optional<Tensor> prompt_embeds_pooled;           ///< [N, 1, P]
  std::optional<Tensor> negative_prompt_embeds;         ///< [N, L, E], with its pooled partner
  std::optional<Tensor> negative_prompt_embeds_pooled;  ///< [N, 1, P]
  std::optional<Tensor> image_embeds;                   ///< [1, n, I], CLIP image embeddings to vary
  std::vector<WeightedImage> images;                    ///< instead of `Request::images`
  std::optional<Image> init_image;                      ///< instead of `Request::init_image`
  std::optional<Mask> mask;                             ///< instead of `Request::mask_image`
  std::optional<Image> control;                         ///< instead of `Request::control_image`
  std::optional<Tensor> latents;                        ///< [B, 16, h, w], initial noise of Stage C
  std::optional<Tensor> image_embeddings;               ///< [N, 16, h, w], result of Stage C, for `Pipeline::decode`
  std::optional<Tensor> decoder_latents;                ///< [B, 4, H/4, W/4], initial noise of Stage B
};

/// What a callback is told at the end of a step.
struct Step {
  const char* stage;                 ///< "stage_c" or "stage_b"
  std::int64_t index;                ///< 0 for the first
  std::int64_t steps;                ///< of the loop
  double ratio;                      ///< timestep ratio that the network was given, 0..1
  const Tensor& latents;             ///< [B, C, H, W] after the step; valid during the call
  std::function<Tensor()> x0;        ///< the clean latents that the prediction implies; computed when called
  std::function<std::vector<Image>()> preview;  ///< what x0 looks like, a small picture each; throws BundleError
};

/// Called at the end of every step. Latents of the same shape that it returns replace the loop's.
using StepCallback = std::function<std::optional<Tensor>(const Step&)>;

/// What Stage C made.
struct PriorResult {
  Tensor image_embeddings;                               ///< [B, 16, h, w]
  Tensor prompt_embeds;                                  ///< [B, L, E]
  Tensor prompt_embeds_pooled;                           ///< [B, 1, P]
  std::optional<Tensor> negative_prompt_embeds;          ///< absent without guidance
  std::optional<Tensor> negative_prompt_embeds_pooled;   ///< absent without guidance
  std::vector<std::uint64_t> seeds;
  std::map<std::string, double> timings;                 ///< seconds of each part; "load" is what loading engines took
};

/// What a request made.
struct Result {
  std::vector<Image> images;               ///< output_type "pil"
  std::optional<Tensor> array;             ///< "np": [B, H, W, 3] in 0..1; "latent": [B, 4, H/4, W/4]
  std::vector<std::uint64_t> seeds;        ///< one for all pictures, or one for every picture
  std::map<std::string, double> timings;   ///< seconds of each part; "load" is what loading engines took
  Request request;                         ///< with every default filled in
};

/// A request, planned: what it means to a bundle. No engine is opened for it.
struct Plan {
  Request request;                             ///< with every default filled in
  std::int64_t pictures = 0;
  std::int64_t prior_height = 0, prior_width = 0;      ///< Stage C's latents
  std::int64_t decoder_height = 0, decoder_width = 0;  ///< Stage B's latents
  std::int64_t height = 0, width = 0;                  ///< the picture
  std::vector<std::string> engines;            ///< in the order in which they run
  std::uint64_t memory = 0;                    ///< bytes of weights and context tensors
};

/// An engine bundle on disk. Files are checked against the manifest's hashes before they are opened, once a bundle.
class Bundle {
 public:
  /// @throws BundleNotFoundError there is no bundle. @throws BundleError it is damaged or of another format.
  static std::shared_ptr<const Bundle> open(const std::string& path);
  ~Bundle();
  Bundle(const Bundle&) = delete;
  Bundle& operator=(const Bundle&) = delete;

  const std::string& path() const noexcept;
  const std::string& name() const noexcept;   ///< of the model
  const std::string& manifest() const noexcept;  ///< text of cascade.json
  /// Read every file and compare its hash. @throws BundleError
  void check() const;

  struct Impl;
  const Impl& impl() const noexcept { return *impl_; }

 private:
  explicit Bundle(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

/// How engines are opened.
struct Options {
  std::string provider = "auto";              ///< "auto", "cpu", "cuda", "ort-tensorrt", "openvino"
  bool low_memory = false;                    ///< keep one engine loaded at a time
  std::optional<std::int64_t> threads;        ///< within an operator, on the CPU; empty: the provider's choice
  std::int64_t device_id = 0;                 ///< which GPU
  std::map<std::string, std::string> provider_options;  ///< settings in the provider's own words
  /// Path of ONNX Runtime's library; empty: $ONNXRUNTIME_LIBRARY, else the system's search path.
  std::string onnxruntime_library;
};

/// A cascade. Engines are loaded with the first request that needs them.
class Pipeline {
 public:
  /// @throws RequestError an option that is not accepted. @throws EngineError a provider that is not available.
  explicit Pipeline(std::shared_ptr<const Bundle> bundle, const Options& options = {});
  ~Pipeline();
  Pipeline(Pipeline&&) noexcept;
  Pipeline& operator=(Pipeline&&) noexcept;

  /// What a request means to this bundle and provider. Pictures that it names are opened, engines are not.
  Plan plan(const Request& request) const;
  /// Make pictures. @throws RequestError, BundleError, CheckpointError, EngineError, GenerationInterrupted
  Result generate(const Request& request, const StepCallback& on_step = {}, const Tensors& given = {});
  /// Stage C alone.
  PriorResult prior(const Request& request, const StepCallback& on_step = {}, const Tensors& given = {});
  /// Stages B and A on `given.image_embeddings`.
  Result decode(const Request& request, const Tensors& given, const StepCallback& on_step = {});
  /// The latents of a picture, [1, 16, h, w]: what Stage C would make of it. `decode` makes a picture of them.
  /// @param height Pixels that the latents shall stand for; empty: the bundle's short side and the picture's aspect.
  Tensor encode(const Image& image, std::optional<std::int64_t> height = {}, std::optional<std::int64_t> width = {});
  /// Apply a LoRA file to every request from now on; several add up. The bundle stays as it is.
  /// @throws RequestError a scale that is not accepted. @throws CheckpointError the file is damaged or does not fit.
  void load_lora_weights(const std::string& file, double scale = 1.0);
  /// Take all LoRA files of `load_lora_weights` off again.
  void unload_lora_weights();
  /// Run one engine by hand, for example "stage_a.encode" or "previewer": float32 inputs, float32 host outputs.
  std::map<std::string, Tensor> run_engine(const std::string& name, const std::map<std::string, Tensor>& feeds);
  /// Token ids of prompts, [N, max_length], as the text encoder gets them.
  std::vector<std::vector<std::int64_t>> tokenize(const std::vector<std::string>& prompts) const;

  /// Stop the request that runs now before its next step. From any thread or a callback.
  void interrupt() noexcept;
  /// Give back every engine; a closed pipeline refuses to run. Twice is fine.
  void close();
  const std::string& provider() const noexcept;
  const std::shared_ptr<const Bundle>& bundle() const noexcept;
  /// Told of a part of a prompt that was cut off; empty: nobody.
  void on_warning(std::function<void(const std::string&)> callback);

  struct Impl;

 private:
  std::unique_ptr<Impl> impl_;
};

/// The request that makes one picture of a result alone; where all were drawn from one stream, the one that makes all.
Request alone(const Result& result, std::size_t index);
/// A picture of a file or a data: URI, upright; transparent pixels become white. PNG, and JPEG where it is built in.
/// @throws RequestError it cannot be read; its field is `field`.
Image open_picture(const std::string& source, const std::string& field = "image");
/// A mask: white is drawn anew, black is kept; of a picture with transparency, the transparent pixels are drawn anew.
Mask open_mask(const std::string& source, const std::string& field = "mask_image");
/// PSNR in dB (peak 1) between a picture, cut and resized to what was made of it, and that.
double reconstruction_psnr(const Image& source, const Image& made);
/// The bytes of a PNG with text chunks (key, UTF-8 value).
std::vector<std::uint8_t> encode_png(const Image& image,
                                     const std::vector<std::pair<std::string, std::string>>& texts = {});
/// The request that a PNG of ours carries, as JSON text. @throws RequestError it carries none.
std::string read_request(const std::string& path);
/// Write files so that none has its name before the bytes of all are on the disk. @throws OutputError
void write_files(const std::vector<std::pair<std::string, std::vector<std::uint8_t>>>& files);

}  // namespace cascade_rt

#endif
