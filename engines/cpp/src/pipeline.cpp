// A planned request at work: conditions, Stage C, Stage B, Stage A, in this order, through the engines of a bundle.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <deque>
#include <filesystem>
#include <random>
#include <thread>

#include "control.hpp"
#include "engine.hpp"
#include "lora.hpp"
#include "pictures.hpp"
#include "request.hpp"
#include "tables.hpp"
#include "tokenizer.hpp"

namespace cascade_rt {

using namespace detail;

namespace {

constexpr const char* kClosed = "this pipeline was closed; open another one";

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

bool coupled(const std::string& engine) {
  for (const auto& row : tables::kEngines) {
    if (engine == row.name) return row.coupled;
  }
  return false;
}

/// The engines that will run: for every name and set of features the first that can. Engines of a stage that hand
/// tensors to each other have one precision: that which gives most of them.
Records select(const std::vector<EngineRecord>& engines, const Runtime& runtime) {
  Records able;
  for (const auto& record : engines) {
    if (record.runtime == "onnx" && runtime.runs(record.precision)) able.push_back(&record);
  }
  std::map<std::string, std::string> precisions;
  for (const auto* record : able) {
    if (!coupled(record->name)) continue;
    const std::string stage = stage_of(record->name);
    if (precisions.count(stage) != 0) continue;
    std::vector<std::pair<std::string, std::set<std::string>>> found;  // in the manifest's order
    for (const auto* other : able) {
      if (!coupled(other->name) || stage_of(other->name) != stage) continue;
      auto at = std::find_if(found.begin(), found.end(),
                             [&](const auto& item) { return item.first == other->precision.name; });
      if (at == found.end()) at = found.insert(found.end(), {other->precision.name, {}});
      at->second.insert(other->name + " " + joined(other->features));
    }
    const auto most = std::max_element(found.begin(), found.end(), [](const auto& a, const auto& b) {
      return a.second.size() < b.second.size();
    });
    precisions[stage] = most->first;
  }
  Records made;
  std::set<std::string> seen;
  for (const auto* record : able) {
    if (coupled(record->name) && record->precision.name != precisions[stage_of(record->name)]) continue;
    if (seen.insert(record->name + " " + joined(record->features)).second) made.push_back(record);
  }
  return made;
}

/// Whether every engine that there is a graph of is among those that will run.
bool complete(const std::vector<EngineRecord>& engines, const Records& chosen) {
  return std::all_of(engines.begin(), engines.end(), [&](const auto& record) {
    return record.runtime != "onnx" || std::any_of(chosen.begin(), chosen.end(), [&](const auto* other) {
             return other->name == record.name && other->features == record.features;
           });
  });
}

Tensor repeated(const Tensor& rows, std::int64_t times) {
  Tensor made{rows.shape, {}};
  made.shape[0] *= times;
  const std::size_t size = rows.data.size() / static_cast<std::size_t>(rows.shape[0]);
  for (std::size_t row = 0; row < static_cast<std::size_t>(rows.shape[0]); ++row) {
    for (std::int64_t i = 0; i < times; ++i) {
      const auto begin = rows.data.begin() + static_cast<std::ptrdiff_t>(row * size);
      made.data.insert(made.data.end(), begin, begin + static_cast<std::ptrdiff_t>(size));
    }
  }
  return made;
}

Tensor chosen(const Tensor& rows, const std::vector<std::size_t>& which) {
  Tensor made{rows.shape, {}};
  made.shape[0] = static_cast<std::int64_t>(which.size());
  const std::size_t size = rows.data.size() / static_cast<std::size_t>(rows.shape[0]);
  for (const std::size_t row : which) {
    if (row >= static_cast<std::size_t>(rows.shape[0])) {
      throw EngineError("an engine returned a tensor of shape " + shape_text(rows.shape) + ", which has no row " +
                        std::to_string(row));
    }
    const auto begin = rows.data.begin() + static_cast<std::ptrdiff_t>(row * size);
    made.data.insert(made.data.end(), begin, begin + static_cast<std::ptrdiff_t>(size));
  }
  return made;
}

/// Conditions in the order of the context's rows: all pictures, then those that are guided in any step.
Tensor with_negative(const Tensor& conditional, const Tensor* negative, const std::vector<std::size_t>& guided) {
  Tensor made = conditional;
  if (guided.empty()) return made;
  if (negative == nullptr) throw EngineError("a picture is guided, and there is no negative condition");
  const Tensor below = chosen(*negative, guided);
  made.shape[0] += below.shape[0];
  made.data.insert(made.data.end(), below.data.begin(), below.data.end());
  return made;
}

bool all_finite(const std::vector<float>& numbers) {
  return std::all_of(numbers.begin(), numbers.end(), [](float one) { return std::isfinite(one); });
}

/// Clean latents with noise: sqrt(alpha_bar) * latents + sqrt(1 - alpha_bar) * noise. One picture's latents serve all.
Tensor diffused(const Tensor& latents, const Tensor& noise, double alpha_bar) {
  const auto signal = static_cast<float>(std::sqrt(alpha_bar)), rest = static_cast<float>(std::sqrt(1 - alpha_bar));
  Tensor made{noise.shape, std::vector<float>(noise.data.size())};
  const std::size_t count = latents.data.size();
  for (std::size_t i = 0; i < made.data.size(); ++i) made.data[i] = signal * latents.data[i % count] + rest * noise.data[i];
  return made;
}

/// What a loop keeps as it is while the rest is drawn (inpainting).
struct Kept {
  Tensor latents, noise;  // clean; and what they are noised with at every step
  Tensor free;            // [1, 1, H, W]: 1 where the loop may draw

  /// Latents whose kept part is as noisy as `alpha_bar` says.
  void put_back(double alpha_bar, Tensor& drawn) const {
    const std::size_t plane = free.data.size(), count = latents.data.size();
    const Tensor noised = alpha_bar < 1 ? diffused(latents, noise, alpha_bar) : Tensor{};
    for (std::size_t i = 0; i < drawn.data.size(); ++i) {
      if (free.data[i % plane] > 0) continue;
      drawn.data[i] = alpha_bar < 1 ? noised.data[i] : latents.data[i % count];
    }
  }
};

/// One request's loop through one denoiser.
class Denoising {
 public:
  Denoising(const LoopPlan& plan, Tensor latents, PictureNoise& noise, std::optional<Kept> kept)
      : plan_(plan),
        latents_(std::move(latents)),
        noise_(noise),
        kept_(std::move(kept)),
        ever_guided_(plan.ever_guided()) {}

  std::int64_t steps() const { return plan_.schedule.size(); }
  std::size_t step() const { return step_; }
  double ratio() const { return static_cast<double>(plan_.schedule.ratios[step_]); }
  const Tensor& latents() const { return latents_; }
  const std::vector<std::size_t>& ever_guided() const { return ever_guided_; }

  /// Which rows of the context the next call needs.
  std::vector<std::size_t> context_rows() const {
    std::vector<std::size_t> made;
    const auto count = static_cast<std::size_t>(latents_.shape[0]);
    for (std::size_t i = 0; i < count; ++i) made.push_back(i);
    const auto guided = plan_.guided(step_);
    for (std::size_t i = 0; i < ever_guided_.size(); ++i) {
      if (std::find(guided.begin(), guided.end(), ever_guided_[i]) != guided.end()) made.push_back(count + i);
    }
    return made;
  }

  Tensor inputs() const { return with_negative(latents_, &latents_, plan_.guided(step_)); }

  void advance(const Tensor& prediction) {
    if (!all_finite(prediction.data)) {
      throw EngineError(plan_.stage + " made numbers that are not finite in step " + std::to_string(step_ + 1) +
                        " of " + std::to_string(steps()) +
                        "; its precision overflows: export it with --precision bf16 or fp32");
    }
    const auto count = static_cast<std::size_t>(latents_.shape[0]);
    const std::size_t size = latents_.data.size() / count;
    if (prediction.data.size() != (count + plan_.guided(step_).size()) * size) {
      throw EngineError(plan_.stage + ".step returned a prediction of shape " + shape_text(prediction.shape) +
                        " for latents of shape " + shape_text(latents_.shape));
    }
    Tensor guided{latents_.shape, {prediction.data.begin(),
                                   prediction.data.begin() + static_cast<std::ptrdiff_t>(latents_.data.size())}};
    const auto which = plan_.guided(step_);
    for (std::size_t i = 0; i < which.size(); ++i) {
      const float* conditional = prediction.data.data() + which[i] * size;
      const float* unconditional = prediction.data.data() + (count + i) * size;
      guide(conditional, unconditional, static_cast<float>(plan_.scales[step_][which[i]]), plan_.rescale, size,
            guided.data.data() + which[i] * size);
    }
    const Tensor noise = noise_.normal(latents_.shape);
    const auto& row = plan_.schedule.update[step_];
    const auto a = static_cast<float>(row[0]), b = static_cast<float>(row[1]), c = static_cast<float>(row[2]);
    Tensor following{latents_.shape, std::vector<float>(latents_.data.size())};
    for (std::size_t i = 0; i < following.data.size(); ++i) {
      following.data[i] = a * latents_.data[i] + b * guided.data[i] + c * noise.data[i];
    }
    if (kept_) kept_->put_back(plan_.schedule.alpha_bar[step_ + 1], following);
    before_ = std::move(latents_);
    prediction_ = std::move(guided);
    latents_ = std::move(following);
    last_ = step_++;
  }

  /// The clean latents that the last prediction implies.
  Tensor x0() const {
    const auto& row = plan_.schedule.x0[last_];
    const auto a = static_cast<float>(row[0]), b = static_cast<float>(row[1]);
    Tensor made{before_.shape, std::vector<float>(before_.data.size())};
    for (std::size_t i = 0; i < made.data.size(); ++i) made.data[i] = a * before_.data[i] + b * prediction_.data[i];
    if (kept_) kept_->put_back(1.0, made);
    return made;
  }

  void replace_latents(Tensor latents) {
    if (latents.shape != latents_.shape || latents.data.size() != latents_.data.size()) {
      throw RequestError("a callback returned latents of shape " + shape_text(latents.shape) + "; it must be " +
                             shape_text(latents_.shape),
                         "latents");
    }
    latents_ = std::move(latents);
  }

  Tensor result() const { return plan_.schedule.returns_x0 && step_ > 0 ? x0() : latents_; }

 private:
  const LoopPlan& plan_;
  Tensor latents_, before_, prediction_;
  PictureNoise& noise_;
  std::optional<Kept> kept_;
  std::vector<std::size_t> ever_guided_;
  std::size_t step_ = 0, last_ = 0;
};

/// What the encoders made of a request. Texts have one row a picture; the negative ones are absent where no picture is
/// guided.
struct Embeddings {
  std::optional<Tensor> prompt, pooled, negative, negative_pooled;
  std::optional<Tensor> images;                       // [1, n, I], CLIP embeddings of the pictures to vary
  std::optional<Tensor> residuals;                    // [1, n, h, w, C], what a ControlNet adds, on Stage C's grid
  std::optional<Tensor> init, init_free;              // [1, 16, h, w], [1, 1, h, w]: the picture that is begun from
  std::optional<Tensor> decoder_init, decoder_free;   // the same as Stage B's latents, where a mask keeps a part
};

/// A loop at its beginning; initial noise is drawn only where none is given. It begins at pure noise where there is no
/// `start`, the time to which `init` is noised else.
Denoising begun(const LoopPlan& loop, const std::optional<Tensor>& given, PictureNoise& noise,
                const std::optional<Tensor>& init, const std::optional<Tensor>& free, const double* start) {
  Tensor first = given ? *given : noise.initial(loop.latents);
  if (init) {
    const bool fits = init->shape.size() == 4 && std::equal(init->shape.begin() + 1, init->shape.end(), loop.latents.begin() + 1);
    if (!fits) {
      throw EngineError("an encoder made latents of shape " + shape_text(init->shape) + " for a loop of shape " +
                        shape_text(loop.latents));
    }
  }
  Tensor latents = init && start != nullptr ? diffused(*init, first, cosine_alpha_bar(*start)) : first;
  std::optional<Kept> kept;
  if (init && free) kept = Kept{*init, std::move(first), *free};
  return Denoising(loop, std::move(latents), noise, std::move(kept));
}

/// 8-bit RGB of [B, 3, H, W] (`planes`) or [B, H, W, 3], clipped to 0..1.
std::vector<Image> pictures_of(const Tensor& pixels, bool planes) {
  const auto count = static_cast<std::size_t>(pixels.shape[0]);
  const auto height = static_cast<std::size_t>(pixels.shape[planes ? 2 : 1]);
  const auto width = static_cast<std::size_t>(pixels.shape[planes ? 3 : 2]);
  std::vector<Image> made(count);
  for (std::size_t b = 0; b < count; ++b) {
    made[b].width = static_cast<std::int64_t>(width);
    made[b].height = static_cast<std::int64_t>(height);
    made[b].rgb.resize(height * width * 3);
    for (std::size_t i = 0; i < height * width; ++i) {
      for (std::size_t c = 0; c < 3; ++c) {
        const std::size_t at = planes ? (b * 3 + c) * height * width + i : (b * height * width + i) * 3 + c;
        const float value = std::min(std::max(pixels.data[at], 0.0F), 1.0F);
        made[b].rgb[i * 3 + c] = static_cast<std::uint8_t>(std::nearbyint(value * 255.0F));
      }
    }
  }
  return made;
}

}  // namespace

struct Pipeline::Impl {
  std::shared_ptr<const Bundle> bundle;
  Options options;
  std::unique_ptr<Runtime> runtime;
  std::string provider;
  Records records;
  std::unique_ptr<const Tokenizer> tokenizer;
  std::function<void(const std::string&)> warn;

  std::mutex turn;
  std::atomic<std::thread::id> running{};
  std::atomic<bool> interrupted{false};
  std::atomic<bool> closed{false};

  std::mutex keeping;
  std::map<EngineKey, std::shared_ptr<const Engine>> engines;
  std::vector<EngineKey> together;
  double load_seconds = 0;

  std::vector<LoraFile> loras;   // applied to every request, beside its own
  std::string lora_label;        // of those that are applied now
  std::string lora_folder;       // of their changed weights; empty: there are none
  std::set<std::string> replaced;  // names of the weights files in it

  Impl(std::shared_ptr<const Bundle> own, const Options& given) : bundle(std::move(own)), options(given) {
    EngineOptions told;
    told.provider = options.provider;
    told.threads = options.threads;
    told.device_id = options.device_id;
    told.provider_options = options.provider_options;
    told.library = options.onnxruntime_library;
    runtime = open_runtime(told);
    records = select(manifest().engines, *runtime);
    if (options.provider == "auto" && !complete(manifest().engines, records)) look_further(told);
    provider = runtime->provider();
  }

  /// Take another provider if it runs all of the bundle's engines.
  void look_further(EngineOptions told) {
    for (const char* other : {"cpu", "openvino"}) {
      try {
        told.provider = other;
        auto found = open_runtime(told);
        const Records all = select(manifest().engines, *found);
        if (!complete(manifest().engines, all)) continue;
        runtime = std::move(found);
        records = all;
        return;
      } catch (const EngineError&) {  // not at hand
      }
    }
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;
  ~Impl() {
    engines.clear();  // they map files of the folder
    remove(lora_folder);
  }

  const Manifest& manifest() const { return bundle->impl().manifest; }

  // --- engines ------------------------------------------------------------------------------------------------------

  const EngineRecord& record(const std::string& name, const Features& features = {}) const {
    if (const auto* found = record_of(records, name, features)) return *found;
    const auto there = manifest().records(name, "onnx", features);
    if (there.empty()) throw bundle->impl().missing(name, "onnx", features);
    std::vector<std::string> precisions;
    for (const auto* one : there) precisions.push_back(one->precision.name);
    throw EngineError("the bundle " + name_of(bundle->path()) + " has " + name + " in " + joined(precisions) +
                      ", which provider " + provider + " does not compute here; it computes " +
                      joined(runtime->computes()) + ". Export with --precision fp32: " +
                      bundle->impl().command(name) + " --precision fp32");
  }

  std::shared_ptr<const Engine> open(const EngineKey& key) const {
    const EngineRecord& own = record(key.first, key.second);
    for (const auto& weights : own.weights) bundle->impl().file(weights);
    std::string path = bundle->impl().file(own.file);
    if (changed(own, replaced)) path = lora_folder + "/" + own.file;
    return runtime->open(own, path);
  }

  static bool changed(const EngineRecord& own, const std::set<std::string>& files) {
    return std::any_of(own.weights.begin(), own.weights.end(),
                       [&](const std::string& file) { return files.count(file) != 0; });
  }

  static void remove(const std::string& folder) {
    std::error_code ignored;
    if (!folder.empty()) std::filesystem::remove_all(std::filesystem::u8path(folder), ignored);
  }

  /// An empty folder that nobody else has.
  static std::string new_folder() {
    std::random_device device;
    for (int tries = 0; tries < 100; ++tries) {
      std::error_code error;
      const auto made = std::filesystem::temp_directory_path(error) /
                        ("cascade-lora-" + std::to_string(device()) + std::to_string(device()));
      if (error || !std::filesystem::create_directory(made, error)) {
        if (error) throw OutputError("a folder for changed weights cannot be made: " + error.message());
        continue;
      }
      std::filesystem::permissions(made, std::filesystem::perms::owner_all, error);
      return made.u8string();
    }
    throw OutputError("a folder for changed weights cannot be made: every name is taken");
  }

  /// Have the engines run with these LoRA files, and with no others.
  void apply_loras(const std::vector<LoraFile>& wanted) {
    std::vector<Lora> files;
    for (const auto& one : wanted) {
      if (one.scale != 0) files.emplace_back(one.file, one.scale);
    }
    const std::string label = label_of(files);
    if (label == lora_label) return;
    const std::string folder = files.empty() ? std::string() : new_folder();
    std::set<std::string> written;
    try {
      if (!files.empty()) written = write_overlay(*bundle, records, files, folder);
    } catch (...) {
      remove(folder);
      throw;
    }
    std::vector<std::shared_ptr<const Engine>> last;  // closed when nothing is locked
    {
      const std::lock_guard<std::mutex> lock(keeping);
      for (auto at = engines.begin(); at != engines.end();) {
        const EngineRecord& own = at->second->record();
        const bool stale = changed(own, replaced) || changed(own, written);
        if (stale) last.push_back(at->second);
        at = stale ? engines.erase(at) : std::next(at);
      }
    }
    last.clear();
    remove(lora_folder);
    lora_folder = folder;
    replaced = std::move(written);
    lora_label = label;
  }

  void load_loras(const Request& request, std::map<std::string, double>& timings) {
    const double started = now();
    std::vector<LoraFile> all = loras;
    all.insert(all.end(), request.loras.begin(), request.loras.end());
    apply_loras(all);
    timings["load"] = now() - started;
  }

  /// An engine, loaded if it is not, with those of the same request beside it, two at a time.
  std::shared_ptr<const Engine> engine(const EngineKey& key) {
    {
      const std::lock_guard<std::mutex> lock(keeping);
      if (closed) throw EngineError(kClosed);
      const auto found = engines.find(key);
      if (found != engines.end()) return found->second;
    }
    const double started = now();
    std::deque<EngineKey> waiting{key};
    if (!options.low_memory && (provider == "cpu" || provider == "openvino")) {
      const std::lock_guard<std::mutex> lock(keeping);  // `close` may come from another thread
      for (const auto& other : together) {
        if (other != key && engines.count(other) == 0) waiting.push_back(other);
      }
    }
    load(waiting);
    load_seconds += now() - started;
    const std::lock_guard<std::mutex> lock(keeping);
    const auto found = engines.find(key);
    if (found == engines.end()) throw EngineError(kClosed);
    return found->second;
  }

  void load(std::deque<EngineKey>& waiting) {
    std::mutex guard;
    std::exception_ptr failure;
    const auto work = [&] {
      for (;;) {
        EngineKey key;
        {
          const std::lock_guard<std::mutex> lock(guard);
          if (waiting.empty()) return;
          key = waiting.front();
          waiting.pop_front();
        }
        try {
          auto made = open(key);
          const std::lock_guard<std::mutex> lock(keeping);
          if (closed) throw EngineError(kClosed);
          engines[key] = std::move(made);
        } catch (...) {
          const std::lock_guard<std::mutex> lock(guard);
          waiting.clear();
          if (!failure) failure = std::current_exception();
        }
      }
    };
    if (waiting.size() > 1) {
      std::thread helper(work);
      work();
      helper.join();
    } else {
      work();
    }
    if (failure) std::rethrow_exception(failure);
  }

  /// Within the life of what this returns, the first engine that must be loaded brings all of `keys` with it.
  struct Together {
    Impl& own;
    Together(Impl& impl, std::vector<EngineKey> keys) : own(impl) { own.together = std::move(keys); }
    Together(const Together&) = delete;
    Together& operator=(const Together&) = delete;
    ~Together() { own.together.clear(); }
  };

  void done_with(const EngineKey& key) {
    if (!options.low_memory) return;
    std::shared_ptr<const Engine> last;
    const std::lock_guard<std::mutex> lock(keeping);
    const auto found = engines.find(key);
    if (found != engines.end()) {
      last = std::move(found->second);
      engines.erase(found);
    }
  }

  /// An engine while it is used; with low memory it is closed afterwards.
  struct Used {
    Impl& own;
    EngineKey key;
    std::shared_ptr<const Engine> engine;
    Used(Impl& impl, EngineKey name) : own(impl), key(std::move(name)), engine(impl.engine(key)) {}
    Used(const Used&) = delete;
    Used& operator=(const Used&) = delete;
    ~Used() { own.done_with(key); }
  };

  Outputs call(const std::string& name, const Feeds& feeds, const Features& features = {}) {
    const Used used(*this, {name, features});
    return used.engine->run(feeds, {});
  }

  // --- one request at a time -----------------------------------------------------------------------------------------

  struct Turn {
    Impl& own;
    std::unique_lock<std::mutex> lock;
    explicit Turn(Impl& impl) : own(impl) {
      if (own.running.load() == std::this_thread::get_id()) {
        throw RequestError("a pipeline cannot be called from its own callback; use a second pipeline there");
      }
      lock = std::unique_lock<std::mutex>(own.turn);
      own.running = std::this_thread::get_id();
      own.interrupted = false;
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { own.running = std::thread::id(); }
  };

  struct Timed {
    Impl& own;
    std::map<std::string, double>& timings;
    const char* name;
    double started, loaded;
    Timed(Impl& impl, std::map<std::string, double>& all, const char* part)
        : own(impl), timings(all), name(part), started(now()), loaded(impl.load_seconds) {}
    Timed(const Timed&) = delete;
    Timed& operator=(const Timed&) = delete;
    ~Timed() {
      const double loading = own.load_seconds - loaded;
      timings[name] += now() - started - loading;
      timings["load"] += loading;
    }
  };

  Planned plan(const Request& request, const Tensors& given, Part part) const {
    try {
      Planned made = detail::plan(request, manifest(), records, given, part);
      if (made.control) check_filter(*made.control, request.control_filtered);
      return made;
    } catch (const BundleError& error) {
      for (const auto& row : tables::kEngines) {
        if (error.field() != row.name) continue;
        const bool controlled = given.control && part != Part::decoder && stage_of(error.field()) == std::string("c");
        // says what the bundle has, and what adds the engine
        record(error.field(), controlled ? Features{tables::kControl} : Features{});
      }
      throw;
    }
  }

  const Tokenizer& read_tokenizer() {
    if (tokenizer) return *tokenizer;
    const auto& own = manifest().tokenizer;
    if (!own) {
      throw BundleError("the bundle " + name_of(bundle->path()) + " has no tokenizer; add it with: " +
                        bundle->impl().command("text_encoder") + " --overwrite");
    }
    const std::string path = bundle->impl().file(own->file);
    const auto text = read_bounded<BundleError>(path, static_cast<std::uint64_t>(tables::kMaxTokenizerBytes));
    if (!text) throw BundleError("there is no tokenizer at " + name_of(path));
    tokenizer = std::make_unique<const Tokenizer>(*text, name_of(path), *own);
    return *tokenizer;
  }

  /// Hidden states [N, L, E] and pooled [N, 1, P] of texts; equal texts are encoded once.
  std::pair<Tensor, Tensor> encode(const std::vector<std::string>& texts) {
    const Tokenizer& own = read_tokenizer();
    std::vector<std::string> unique;
    std::vector<std::size_t> rows;
    for (const auto& text : texts) {
      const auto at = std::find(unique.begin(), unique.end(), text);
      rows.push_back(static_cast<std::size_t>(at - unique.begin()));
      if (at == unique.end()) unique.push_back(text);
    }
    std::vector<std::int64_t> ids, mask;
    for (const auto& text : unique) {
      const auto made = own(text);
      if (!made.lost.empty() && warn) {
        warn("the text encoder takes " + std::to_string(made.ids.size()) +
             " tokens; this part of the prompt was cut off: " + shown(made.lost) + " (" +
             std::to_string(decode_utf8(made.lost).size()) + " characters)");
      }
      ids.insert(ids.end(), made.ids.begin(), made.ids.end());
      mask.insert(mask.end(), made.mask.begin(), made.mask.end());
    }
    const Shape shape{static_cast<std::int64_t>(unique.size()), manifest().tokenizer->max_length};
    Outputs out = call("text_encoder", {{"input_ids", Feed::of(ids, shape)}, {"attention_mask", Feed::of(mask, shape)}});
    return {chosen(host(out, "hidden_states"), rows), chosen(host(out, "pooled"), rows)};
  }

  static Tensor host(Outputs& outputs, const std::string& name) {
    const auto found = outputs.host.find(name);
    if (found == outputs.host.end()) throw EngineError(name + " stayed on the device");
    return std::move(found->second);
  }

  /// What the encoders make of a planned request: its texts, and the pictures that it brings along.
  Embeddings embed(const Planned& planned, const Tensors& given, std::map<std::string, double>& timings) {
    Embeddings made;
    {
      const Timed timed(*this, timings, "text_encoder");
      made = embed_texts(planned, given);
    }
    made.images = given.image_embeds;
    if (given.images.empty() && !planned.init && !planned.control) return made;
    const Timed timed(*this, timings, "encoders");
    if (!given.images.empty()) made.images = encode_images(given);
    if (planned.init) encode_init(planned, given, made);
    if (planned.control) made.residuals = encode_control(planned, *planned.control, given);
    return made;
  }

  /// What a ControlNet adds to Stage C, on its grid, times the control scale: [1, n, h, w, C].
  Tensor encode_control(const Planned& planned, const ControlPlan& control, const Tensors& given) {
    Tensor shown_to;
    if (control.kind == "super_resolution") {
      const Tensor pixels = encoder_pixels(given.control.value(), control.pixels[0], control.pixels[1]);
      Outputs out = call("effnet_encoder", {{"pixels", Feed::of(pixels)}});
      shown_to = enlarged(host(out, "latents"));
    } else {
      shown_to = control_pixels(control, given.control.value(), given.mask, planned.request.control_filtered);
    }
    Outputs out = call(control.engine, {{"control", Feed::of(shown_to)}});
    Tensor made = on_grid(host(out, "residuals"), planned.prior_size[0], planned.prior_size[1]);
    const auto scale = static_cast<float>(planned.request.control_scale);
    for (float& one : made.data) one *= scale;
    return made;
  }

  /// CLIP embeddings [1, n, I] of the pictures to vary, times their weights.
  Tensor encode_images(const Tensors& given) {
    const std::int64_t side = number_axis(record("image_encoder"), "pixel_values", 2);
    const auto count = static_cast<std::int64_t>(given.images.size());
    Tensor pixels{{count, 3, side, side}, {}};
    for (const auto& one : given.images) {
      const auto own = clip_pixels(one.image, side);
      pixels.data.insert(pixels.data.end(), own.begin(), own.end());
    }
    Outputs out = call("image_encoder", {{"pixel_values", Feed::of(pixels)}});
    Tensor found = host(out, "image_embeds");
    const std::size_t size = found.data.size() / given.images.size();
    for (std::size_t i = 0; i < given.images.size(); ++i) {
      const auto weight = static_cast<float>(given.images[i].weight);
      for (std::size_t j = 0; j < size; ++j) found.data[i * size + j] *= weight;
    }
    found.shape = {1, count, static_cast<std::int64_t>(size)};
    return found;
  }

  /// The picture that is begun from, as latents of both stages, and its mask on their grids.
  void encode_init(const Planned& planned, const Tensors& given, Embeddings& made) {
    const InitPlan& init = *planned.init;
    const Tensor pixels = encoder_pixels(*given.init_image, init.pixels[0], init.pixels[1]);
    Outputs out = call("effnet_encoder", {{"pixels", Feed::of(pixels)}});
    made.init = host(out, "latents");
    if (!given.mask) return;
    made.init_free = mask_on_grid(*given.mask, made.init->shape.at(2), made.init->shape.at(3));
    if (!init.decoder_pixels || !planned.decoder) return;
    const Tensor large = encoder_pixels(*given.init_image, (*init.decoder_pixels)[0], (*init.decoder_pixels)[1]);
    Outputs encoded = call("stage_a.encode", {{"pixels", Feed::of(large)}});
    Tensor latents = host(encoded, "latents");
    const auto scale = static_cast<float>(planned.latent_scale);
    for (float& one : latents.data) one /= scale;
    made.decoder_free = mask_on_grid(*given.mask, latents.shape.at(2), latents.shape.at(3));
    made.decoder_init = std::move(latents);
  }

  Embeddings embed_texts(const Planned& planned, const Tensors& given) {
    auto prompts = texts_of(planned.request.prompt);
    if (prompts.empty() && !given.prompt_embeds_pooled) prompts.emplace_back();  // beside pictures
    const auto count = static_cast<std::size_t>(planned.prompts);
    std::vector<std::string> texts = prompts;
    if (planned.needs_negative() && !given.negative_prompt_embeds) {
      auto unwanted = texts_of(planned.request.negative_prompt);
      if (unwanted.empty()) unwanted.emplace_back();
      if (unwanted.size() == 1) unwanted.resize(count, unwanted[0]);
      texts.insert(texts.end(), unwanted.begin(), unwanted.end());
    }
    Embeddings made;
    made.prompt = given.prompt_embeds;
    made.pooled = given.prompt_embeds_pooled;
    made.negative = given.negative_prompt_embeds;
    made.negative_pooled = given.negative_prompt_embeds_pooled;
    if (!planned.needs_negative()) made.negative = made.negative_pooled = std::nullopt;
    if (!texts.empty()) {
      const auto encoded = encode(texts);
      std::vector<std::size_t> first, rest;
      for (std::size_t i = 0; i < texts.size(); ++i) (i < prompts.size() ? first : rest).push_back(i);
      if (!first.empty()) {
        made.prompt = chosen(encoded.first, first);
        made.pooled = chosen(encoded.second, first);
      }
      if (!rest.empty()) {
        made.negative = chosen(encoded.first, rest);
        made.negative_pooled = chosen(encoded.second, rest);
      }
    }
    const std::int64_t times = planned.pictures / planned.prompts;
    for (auto* one : {&made.prompt, &made.pooled, &made.negative, &made.negative_pooled}) {
      if (*one && times > 1) *one = repeated(**one, times);
    }
    return made;
  }

  Tensor denoise(const LoopPlan& loop, Denoising& denoising, std::map<std::string, Tensor> conditions,
                 const StepCallback& on_step) {
    const std::string step_name = loop.stage + ".step", context_name = loop.stage + ".context";
    const std::int64_t dim = number_axis(record(context_name, loop.features), "timestep_embedding", 1);
    conditions["timestep_embedding"] = timestep_embedding(loop.schedule.ratios, dim);
    Feeds feeds;
    for (const auto& item : conditions) feeds.emplace(item.first, Feed::of(item.second));
    const Context context = call(context_name, feeds, loop.features).device;
    const Used used(*this, {step_name, loop.features});
    const Engine& own = *used.engine;
    std::vector<std::size_t> rows_now;
    Context bound;
    for (std::int64_t step = 0; step < loop.schedule.size(); ++step) {
      if (interrupted) {
        throw GenerationInterrupted("interrupted before step " + std::to_string(step + 1) + " of " +
                                    std::to_string(loop.schedule.size()) + " of " + loop.stage);
      }
      if (closed) throw EngineError(kClosed);
      const auto rows = denoising.context_rows();
      if (rows != rows_now) {
        bound = rows_of(context, own, rows);
        rows_now = rows;
      }
      const double ratio = denoising.ratio();
      const Tensor latents = denoising.inputs();
      const std::vector<std::int64_t> steps(rows.size(), step);
      Outputs out = own.run({{"latents", Feed::of(latents)},
                             {"step", Feed::of(steps, {static_cast<std::int64_t>(rows.size())})}},
                            bound);
      denoising.advance(host(out, "prediction"));
      if (on_step) {
        const Step told{loop.stage.c_str(), step, loop.schedule.size(), ratio, denoising.latents(),
                        [&denoising] { return denoising.x0(); },
                        [this, &denoising, &loop] { return preview(loop.stage, denoising.x0()); }};
        if (auto changed = on_step(told)) denoising.replace_latents(std::move(*changed));
      }
    }
    return denoising.result();
  }

  /// What a loop's predicted clean latents look like, one small picture each: Stage C's by the previewer engine where
  /// the bundle has one, else by the bundle's preview factors.
  std::vector<Image> preview(const std::string& stage, const Tensor& x0) {
    if (stage == "stage_c" && record_of(records, "previewer") != nullptr) {
      Outputs out = call("previewer", {{"latents", Feed::of(x0)}});
      return pictures_of(host(out, "pixels"), true);
    }
    const auto factors = manifest().previews.find(stage == "stage_c" ? "prior" : "decoder");
    const auto channels = static_cast<std::size_t>(x0.shape[1]);
    if (factors == manifest().previews.end() || factors->second.factors.size() != channels) {
      throw BundleError("the bundle " + name_of(bundle->path()) + " has no preview of " + stage +
                        "'s latents; for Stage C add one with: " + bundle->impl().command("previewer"));
    }
    return pictures_of(colours_of(x0, factors->second), false);
  }

  static Context rows_of(const Context& context, const Engine& own, const std::vector<std::size_t>& rows) {
    Context made;
    for (const auto& tensor : own.record().inputs) {
      if (!tensor.constant) continue;
      const auto found = context.find(tensor.name);
      if (found == context.end()) throw EngineError(own.record().name + " was called without " + tensor.name);
      const auto& axis = tensor.axes.front();
      const bool all = static_cast<std::int64_t>(rows.size()) == found->second->shape().front();
      made[tensor.name] = axis.formula == "batch" && !all ? found->second->rows(rows) : found->second;
    }
    return made;
  }

  Tensor run_prior(const Planned& planned, const Tensors& given, const Embeddings& texts, PictureNoise& noise,
                   const StepCallback& on_step, std::map<std::string, double>& timings) {
    if (!planned.prior) return repeated(texts.init.value(), planned.pictures);  // what was encoded is decoded
    const Timed timed(*this, timings, "stage_c");
    const LoopPlan& loop = *planned.prior;
    const double* start = planned.init ? &planned.init->strength : nullptr;
    Denoising denoising = begun(loop, given.latents, noise, texts.init, texts.init_free, start);
    const std::int64_t image_dim = number_axis(record("stage_c.context", loop.features), "clip_img", 2);
    Tensor image{{1, 1, image_dim}, std::vector<float>(static_cast<std::size_t>(image_dim))};
    if (texts.images) image = *texts.images;
    const Tensor images = repeated(image, planned.pictures);
    const Tensor none{images.shape, std::vector<float>(images.data.size())};
    const auto& guided = denoising.ever_guided();
    std::map<std::string, Tensor> conditions;
    conditions["clip_text"] = with_negative(*texts.prompt, texts.negative ? &*texts.negative : nullptr, guided);
    conditions["clip_text_pooled"] =
        with_negative(*texts.pooled, texts.negative_pooled ? &*texts.negative_pooled : nullptr, guided);
    conditions["clip_img"] = with_negative(images, &none, guided);
    if (texts.residuals) {  // the authors steer with them in both halves of the guidance
      const Tensor residuals = repeated(*texts.residuals, planned.pictures);
      conditions["residuals"] = with_negative(residuals, &residuals, guided);
    }
    return denoise(loop, denoising, std::move(conditions), on_step);
  }

  Result run_decoder(const Planned& planned, const Tensors& given, const Tensor& embeddings, const Embeddings& texts,
                     PictureNoise& noise, const StepCallback& on_step, std::map<std::string, double> timings) {
    Result made;
    made.request = planned.request;
    made.seeds = planned.seeds;
    const LoopPlan& loop = *planned.decoder;
    Tensor latents;
    {
      const Timed timed(*this, timings, "stage_b");
      Denoising denoising =
          begun(loop, given.decoder_latents, noise, texts.decoder_init, texts.decoder_free, nullptr);
      const Shape grid = shape_of(record("stage_b.context"), "effnet",
                                  {{"batch", planned.pictures}, {"height", loop.latents[2]}, {"width", loop.latents[3]}});
      if (grid.size() != 4) throw BundleError("the manifest gives effnet the shape " + shape_text(grid));
      const Tensor effnet = resize_bilinear(embeddings, grid[2], grid[3]);
      const Tensor none{effnet.shape, std::vector<float>(effnet.data.size())};
      const auto& guided = denoising.ever_guided();
      std::map<std::string, Tensor> conditions;
      conditions["clip_text_pooled"] =
          with_negative(*texts.pooled, texts.negative_pooled ? &*texts.negative_pooled : nullptr, guided);
      conditions["effnet"] = with_negative(effnet, &none, guided);
      latents = denoise(loop, denoising, std::move(conditions), on_step);
    }
    if (planned.request.output_type == "latent") {
      made.array = std::move(latents);
      made.timings = std::move(timings);
      return made;
    }
    {
      const Timed timed(*this, timings, "stage_a");
      const auto scale = static_cast<float>(planned.latent_scale);
      for (float& one : latents.data) one *= scale;
      Outputs out = call("stage_a.decode", {{"latents", Feed::of(latents)}});
      pixels(host(out, "pixels"), planned, made);
    }
    made.timings = std::move(timings);
    return made;
  }

  /// [B, 3, H, W] -> pictures or [B, H, W, 3], clipped to 0..1 and cropped to the middle.
  static void pixels(const Tensor& decoded, const Planned& planned, Result& made) {
    if (!all_finite(decoded.data)) {
      throw EngineError("stage_a.decode made numbers that are not finite; export it with --precision fp32");
    }
    if (decoded.shape.size() != 4 || decoded.shape[1] != 3) {
      throw EngineError("stage_a.decode returned pixels of shape " + shape_text(decoded.shape));
    }
    const auto count = static_cast<std::size_t>(decoded.shape[0]);
    const auto rows = static_cast<std::size_t>(decoded.shape[2]), columns = static_cast<std::size_t>(decoded.shape[3]);
    const auto height = std::min<std::size_t>(static_cast<std::size_t>(planned.picture_size[0]), rows);
    const auto width = std::min<std::size_t>(static_cast<std::size_t>(planned.picture_size[1]), columns);
    const std::size_t top = (rows - height) / 2, left = (columns - width) / 2;
    Tensor cut{{decoded.shape[0], static_cast<std::int64_t>(height), static_cast<std::int64_t>(width), 3},
               std::vector<float>(count * height * width * 3)};
    for (std::size_t b = 0; b < count; ++b) {
      for (std::size_t y = 0; y < height; ++y) {
        for (std::size_t x = 0; x < width; ++x) {
          for (std::size_t c = 0; c < 3; ++c) {
            const float value = decoded.data[((b * 3 + c) * rows + top + y) * columns + left + x];
            cut.data[((b * height + y) * width + x) * 3 + c] = std::min(std::max(value, 0.0F), 1.0F);
          }
        }
      }
    }
    if (planned.request.output_type == "np") {
      made.array = std::move(cut);
    } else {
      made.images = pictures_of(cut, false);
    }
  }
};

Pipeline::Pipeline(std::shared_ptr<const Bundle> bundle, const Options& options) {
  if (!bundle) throw RequestError("there is no bundle; open one with Bundle::open", "bundle");
  impl_ = std::make_unique<Impl>(std::move(bundle), options);
}

Pipeline::~Pipeline() = default;
Pipeline::Pipeline(Pipeline&&) noexcept = default;
Pipeline& Pipeline::operator=(Pipeline&&) noexcept = default;

Plan Pipeline::plan(const Request& request) const {
  const Planned planned = impl_->plan(request, gather(request, {}), Part::picture);
  Plan made;
  made.request = planned.request;
  made.pictures = planned.pictures;
  made.prior_height = planned.prior_size[0];
  made.prior_width = planned.prior_size[1];
  made.decoder_height = planned.decoder_size[0];
  made.decoder_width = planned.decoder_size[1];
  made.height = planned.picture_size[0];
  made.width = planned.picture_size[1];
  made.engines = planned.engines;
  made.memory = planned.memory;
  return made;
}

Result Pipeline::generate(const Request& request, const StepCallback& on_step, const Tensors& asked) {
  const Tensors given = gather(request, asked);
  const Planned planned = impl_->plan(request, given, Part::picture);
  const Impl::Turn turn(*impl_);
  std::map<std::string, double> timings;
  impl_->load_loras(planned.request, timings);
  const Impl::Together together(*impl_, planned.engine_keys());
  PictureNoise noise(planned.request.noise, planned.seeds);
  const Embeddings texts = impl_->embed(planned, given, timings);
  const Tensor embeddings = impl_->run_prior(planned, given, texts, noise, on_step, timings);
  return impl_->run_decoder(planned, given, embeddings, texts, noise, on_step, timings);
}

PriorResult Pipeline::prior(const Request& request, const StepCallback& on_step, const Tensors& asked) {
  const Tensors given = gather(request, asked);
  const Planned planned = impl_->plan(request, given, Part::prior);
  const Impl::Turn turn(*impl_);
  PriorResult made;
  impl_->load_loras(planned.request, made.timings);
  const Impl::Together together(*impl_, planned.engine_keys());
  PictureNoise noise(planned.request.noise, planned.seeds);
  const Embeddings texts = impl_->embed(planned, given, made.timings);
  made.image_embeddings = impl_->run_prior(planned, given, texts, noise, on_step, made.timings);
  made.prompt_embeds = texts.prompt.value();
  made.prompt_embeds_pooled = texts.pooled.value();
  made.negative_prompt_embeds = texts.negative;
  made.negative_prompt_embeds_pooled = texts.negative_pooled;
  made.seeds = planned.seeds;
  return made;
}

Result Pipeline::decode(const Request& request, const Tensors& asked, const StepCallback& on_step) {
  Request own = request;
  if (texts_of(own.prompt).empty() && !asked.prompt_embeds && !asked.prompt_embeds_pooled) own.prompt = std::string();
  const Tensors given = gather(own, asked);
  const Planned planned = impl_->plan(own, given, Part::decoder);
  const Impl::Turn turn(*impl_);
  std::map<std::string, double> timings;
  impl_->load_loras(planned.request, timings);
  const Impl::Together together(*impl_, planned.engine_keys());
  PictureNoise noise(planned.request.noise, planned.seeds);
  const Tensor embeddings = repeated(*given.image_embeddings, planned.pictures / given.image_embeddings->shape[0]);
  const Embeddings texts = impl_->embed(planned, given, timings);
  return impl_->run_decoder(planned, given, embeddings, texts, noise, on_step, timings);
}

Tensor Pipeline::encode(const Image& image, std::optional<std::int64_t> height, std::optional<std::int64_t> width) {
  Request request;
  request.prompt = std::string();
  request.height = height;
  request.width = width;
  request.strength = 0.0;
  Tensors given;
  given.init_image = image;
  return prior(request, {}, given).image_embeddings;
}

void Pipeline::load_lora_weights(const std::string& file, double scale) {
  Request added;
  added.prompt = std::string();
  added.loras = {{file, scale}};
  check(added);
  const Impl::Turn turn(*impl_);
  std::vector<LoraFile> all = impl_->loras;
  all.push_back({file, scale});
  impl_->apply_loras(all);
  impl_->loras = std::move(all);
}

void Pipeline::unload_lora_weights() {
  const Impl::Turn turn(*impl_);
  impl_->loras.clear();
  impl_->apply_loras({});
}

std::map<std::string, Tensor> Pipeline::run_engine(const std::string& name,
                                                   const std::map<std::string, Tensor>& feeds) {
  const Impl::Turn turn(*impl_);
  Feeds told;
  for (const auto& item : feeds) {
    if (count_of(item.second.shape) != item.second.data.size()) {
      throw EngineError(name + ": " + item.first + " has shape " + shape_text(item.second.shape) + " and " +
                        std::to_string(item.second.data.size()) + " numbers");
    }
    told.emplace(item.first, Feed::of(item.second));
  }
  return impl_->call(name, told).host;
}

std::vector<std::vector<std::int64_t>> Pipeline::tokenize(const std::vector<std::string>& prompts) const {
  const Impl::Turn turn(*impl_);
  std::vector<std::vector<std::int64_t>> made;
  for (const auto& prompt : prompts) made.push_back(impl_->read_tokenizer()(prompt).ids);
  return made;
}

void Pipeline::interrupt() noexcept { impl_->interrupted = true; }

void Pipeline::close() {
  impl_->closed = true;
  std::map<EngineKey, std::shared_ptr<const Engine>> last;
  const std::lock_guard<std::mutex> lock(impl_->keeping);
  last.swap(impl_->engines);
}

const std::string& Pipeline::provider() const noexcept { return impl_->provider; }
const std::shared_ptr<const Bundle>& Pipeline::bundle() const noexcept { return impl_->bundle; }
void Pipeline::on_warning(std::function<void(const std::string&)> callback) { impl_->warn = std::move(callback); }

Request alone(const Result& result, std::size_t index) {
  Request made = result.request;
  if (result.seeds.size() != 1 || result.images.size() == 1) {
    made.seeds = std::vector<std::uint64_t>{result.seeds.at(result.seeds.size() == 1 ? 0 : index)};
    made.num_images_per_prompt = 1;
    const auto prompts = texts_of(made.prompt);
    if (prompts.size() > 1) made.prompt = prompts[index / (result.seeds.size() / prompts.size())];
    const auto negatives = texts_of(made.negative_prompt);
    if (negatives.size() > 1) made.negative_prompt = negatives[index / (result.seeds.size() / negatives.size())];
    for (LoopSettings* loop : {&made.prior, &made.decoder}) {
      const auto* several = std::get_if<std::vector<double>>(&loop->guidance_scale);
      if (several != nullptr && several->size() > 1) {
        loop->guidance_scale = several->at(index * several->size() / result.seeds.size());
      }
    }
  }
  return made;
}

}  // namespace cascade_rt
