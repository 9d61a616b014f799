// cascade-run-cpp: the Python command cascade-run without Python.
#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <new>
#include <random>

#include "cascade_rt/cascade_rt.hpp"
#include "bundle.hpp"
#include "tables.hpp"

#ifdef _WIN32
#include <io.h>
#define isatty _isatty
#define fileno _fileno
#else
#include <unistd.h>
#endif

namespace fs = std::filesystem;
using namespace cascade_rt;
using detail::Json;
using detail::name_of;
using detail::shown;

namespace {

constexpr int kDone = 0, kFailed = 1, kWrongRequest = 2;

std::atomic<Pipeline*> running{nullptr};
std::atomic<bool> stopped{false};

void stop(int) {
  if (stopped.exchange(true)) std::_Exit(kFailed);  // the second signal does not wait
  if (Pipeline* own = running.load()) own->interrupt();
}

struct Flag {
  const char* name;
  const char* value;  // name of its value in the help; null: it has none
  const char* help;
};

constexpr Flag kFlagTable[] = {
    {"--bundle", "DIR", "engine bundle (default: $CASCADE_RT_BUNDLE)"},
    {"--output", "FILE", "-o FILE: .png (default: out.png)"},
    {"--from", "PICTURE", "make it again; other flags change the request"},
    {"--seed", "N", "0..2**64-1 (default: a new one); further pictures have N+1, N+2, ..."},
    {"--size", "WxH", "pixels, 64..4096 each (default: the bundle's)"},
    {"--steps", "N", "Stage C steps"},
    {"--guidance", "X", "Stage C guidance scale; up to 1 is none"},
    {"--decoder-steps", "N", "Stage B steps"},
    {"--decoder-guidance", "X", "Stage B guidance scale; up to 1 is none"},
    {"--negative", "TEXT", "what to draw away from"},
    {"--images", "N", "how many pictures; -1, -2, ... is added to the name (default: 1)"},
    {"--sampler", "NAME", "original, diffusers, lcm (default: the bundle's)"},
    {"--preset", "NAME", "quality, balanced, fast: quality against time (default: the bundle's)"},
    {"--image", "FILE[:WEIGHT]", "picture to vary; repeatable"},
    {"--init", "FILE", "picture to begin from"},
    {"--strength", "X", "0..1, how much of it is drawn anew (default: 0.8, or 1 with --mask)"},
    {"--mask", "FILE", "white where the picture of --init is drawn anew, or what --control fills"},
    {"--control", "FILE[:SCALE]", "picture that a ControlNet of the bundle follows"},
    {"--control-kind", "NAME", "canny, inpainting, super_resolution, picture (default: the bundle's only one)"},
    {"--control-filtered", nullptr, "--control shows the edges themselves, white on black"},
    {"--lora", "FILE[:SCALE]", "LoRA file to apply; repeatable"},
    {"--reconstruct", "FILE", "encode a picture and decode it again, and print the PSNR"},
    {"--provider", "NAME", "auto, cpu, cuda, ort-tensorrt, openvino (default: auto)"},
    {"--threads", "N", "threads within an operator (default: the provider's choice)"},
    {"--low-memory", nullptr, "keep one engine loaded at a time"},
    {"--preview", "DIR", "write a small picture of every step into a folder"},
    {"--json", nullptr, "print what ran, with the time of each stage, as JSON"},
    {"--quiet", nullptr, "no progress"},
    {"--version", nullptr, "print the version"},
    {"--help", nullptr, "print this"},
};

struct Arguments {
  std::optional<std::string> prompt;
  std::map<std::string, std::string> given;
  std::vector<std::string> images, loras;
  bool has(const char* name) const { return given.count(name) != 0; }
  std::optional<std::string> text(const char* name) const {
    const auto found = given.find(name);
    return found == given.end() ? std::nullopt : std::optional<std::string>(found->second);
  }
};

Arguments parse(const std::vector<std::string>& words) {
  Arguments made;
  bool flags = true;
  for (std::size_t i = 0; i < words.size(); ++i) {
    std::string word = words[i];
    if (flags && word == "--") {
      flags = false;
      continue;
    }
    if (!flags || word.size() < 2 || word[0] != '-') {
      if (made.prompt) throw RequestError("unrecognized arguments: " + word + "; see cascade-run-cpp --help");
      made.prompt = word;
      continue;
    }
    std::optional<std::string> value;
    if (word == "-h") word = "--help";
    if (word[1] != '-' && word[1] == 'o') {
      if (word.size() > 2) value = word.substr(2);
      word = "--output";
    }
    if (const auto equals = word.find('='); equals != std::string::npos) {
      value = word.substr(equals + 1);
      word.resize(equals);
    }
    const auto* flag = std::find_if(std::begin(kFlagTable), std::end(kFlagTable),
                                    [&](const Flag& one) { return word == one.name; });
    if (flag == std::end(kFlagTable)) {
      throw RequestError("unrecognized arguments: " + words[i] + "; see cascade-run-cpp --help");
    }
    if (flag->value == nullptr && value) {
      throw RequestError("argument " + word + ": ignored explicit argument " + shown(*value) +
                         "; see cascade-run-cpp --help");
    }
    if (flag->value != nullptr && !value) {
      if (i + 1 == words.size()) {
        throw RequestError("argument " + word + ": expected one argument; see cascade-run-cpp --help");
      }
      value = words[++i];
    }
    static const std::vector<std::string> places{"--bundle", "--output", "--from", "--image",       "--init",
                                                 "--mask",   "--lora",   "--preview", "--reconstruct", "--control"};
    if (value && value->empty() && std::find(places.begin(), places.end(), word) != places.end()) {
      const std::string name = word == "--output" ? "-o/--output" : word;
      throw RequestError("argument " + name + ": '' is no name of a file or folder; see cascade-run-cpp --help");
    }
    if (word == "--image") made.images.push_back(*value);
    if (word == "--lora") made.loras.push_back(*value);
    made.given[word] = value.value_or("");
  }
  return made;
}

/// A number of the command line as JSON; what is none stays text, for a check that says what is accepted.
Json number(const std::string& text, bool whole) {
  const std::string unsigned_text = !text.empty() && (text[0] == '+' || text[0] == '-') ? text.substr(1) : text;
  const std::string digits = "0123456789";
  const auto all_digits = [&](const std::string& part) { return part.find_first_not_of(digits) == std::string::npos; };
  if (whole) {
    if (unsigned_text.empty() || unsigned_text.size() > 40 || !all_digits(unsigned_text)) return text;
    errno = 0;
    if (text[0] == '-') {
      const long long made = std::strtoll(text.c_str(), nullptr, 10);
      return errno == 0 ? Json(made) : Json(std::strtod(text.c_str(), nullptr));
    }
    const unsigned long long made = std::strtoull(unsigned_text.c_str(), nullptr, 10);
    return errno == 0 ? Json(made) : Json(std::strtod(text.c_str(), nullptr));
  }
  const auto e = unsigned_text.find_first_of("eE");
  std::string mantissa = unsigned_text.substr(0, e);
  if (const auto point = mantissa.find('.'); point != std::string::npos) mantissa.erase(point, 1);
  bool fine = !mantissa.empty() && all_digits(mantissa);
  if (fine && e != std::string::npos) {
    std::string exponent = unsigned_text.substr(e + 1);
    if (!exponent.empty() && (exponent[0] == '+' || exponent[0] == '-')) exponent.erase(0, 1);
    fine = !exponent.empty() && exponent.size() <= 9 && all_digits(exponent);
  }
  const double made = fine ? std::strtod(text.c_str(), nullptr) : 0;
  return fine && std::isfinite(made) ? Json(made) : Json(text);
}

std::int64_t threads_of(const std::string& text) {
  const Json made = number(text, true);
  if (made.is_number_integer() && made >= 1 && made <= tables::kMaxThreads) return made.get<std::int64_t>();
  throw detail::refused("threads", made, "an integer from 1 to " + std::to_string(tables::kMaxThreads) + ", or None");
}

bool is_file(const std::string& path) {
  std::error_code error;
  return fs::is_regular_file(fs::u8path(path), error);
}

/// FILE or FILE:NUMBER; the number is empty where there is none, and text where it is no finite number.
std::pair<std::string, std::optional<Json>> file_and_number(const std::string& text) {
  const auto colon = text.rfind(':');
  if (colon == std::string::npos || is_file(text)) return {text, std::nullopt};
  const std::string tail = text.substr(colon + 1);
  char* end = nullptr;
  const double made = std::strtod(tail.c_str(), &end);
  const bool fine = !tail.empty() && *end == '\0' && std::isfinite(made);
  return {text.substr(0, colon), fine ? Json(made) : Json(tail)};
}

/// FILE or FILE:NUMBER of --image or --control; the number is 1 where there is none.
std::pair<std::string, Json> weighted(const std::string& flag, const std::string& text) {
  const auto [file, number] = file_and_number(text);
  if (number && number->is_string()) {
    const bool control = flag == "--control";
    throw RequestError(flag + " " + shown(text) + ": " + shown(*number) + " is no " + (control ? "scale" : "weight") +
                       "; write FILE or FILE:" + (control ? "SCALE" : "WEIGHT") + ", for example photo.jpg:0.8");
  }
  return {file, number.value_or(1.0)};
}

Json image_from(const std::string& text) {
  const auto [file, weight] = weighted("--image", text);
  return Json{{"image", file}, {"weight", weight}};
}

Json lora_from(const std::string& text) {
  const auto [file, scale] = file_and_number(text);
  if (scale && scale->is_string()) {
    throw RequestError("--lora " + shown(text) + ": " + shown(*scale) +
                           " is no scale; write FILE or FILE:SCALE, for example " + name_of(file) + ":0.8",
                       "--lora", text, "FILE or FILE:SCALE with a finite scale");
  }
  return Json{{"file", file}, {"scale", scale.value_or(1.0)}};
}

void size_from(const std::string& text, Json& values) {
  const auto x = text.find('x');
  const auto side = [&](const std::string& part) -> std::optional<std::int64_t> {
    const std::string digits = part.rfind('-', 0) == 0 ? part.substr(1) : part;
    const bool fine = !digits.empty() && digits.size() <= 9 && digits.find_first_not_of("0123456789") == std::string::npos;
    return fine ? std::optional<std::int64_t>(std::stoll(part)) : std::nullopt;
  };
  const auto width = x == std::string::npos ? std::nullopt : side(text.substr(0, x));
  const auto height = x == std::string::npos ? std::nullopt : side(text.substr(x + 1));
  if (!width || !height) {
    throw RequestError("--size " + shown(text) + " is not accepted; write it as WIDTHxHEIGHT, for example 1024x1024");
  }
  values["width"] = *width;
  values["height"] = *height;
}

Request requested(const Arguments& args) {
  const auto reconstruct = args.text("--reconstruct");
  if (reconstruct && (args.has("--init") || args.has("--from"))) {
    throw RequestError("--reconstruct stands alone; leave --init and --from out");
  }
  const auto init = reconstruct ? reconstruct : args.text("--init");
  if (!args.prompt && !args.has("--from") && !init && args.images.empty() && !args.has("--control")) {
    throw RequestError("there is no prompt; write what to draw, for example: cascade-run-cpp 'a red circle'");
  }
  const Request base = args.has("--from") ? Request::from_json(read_request(*args.text("--from"))) : Request{};
  Json values = Json::parse(base.to_json());
  if (const auto text = args.text("--size")) size_from(*text, values);
  Json count;  // of pictures, refused before their seeds are made
  count["num_images_per_prompt"] = args.has("--images") ? number(*args.text("--images"), true) : Json(1);
  const std::int64_t pictures = *Request::from_json(count.dump()).num_images_per_prompt;
  auto seeds = base.seeds;
  if (args.has("--seed") || args.has("--images") || !seeds) {
    std::uint64_t first = 0;
    if (const auto text = args.text("--seed")) {
      Json own;
      own["seeds"] = Json::array({number(*text, true)});
      first = Request::from_json(own.dump()).seeds->front();
    } else if (base.seeds) {
      first = base.seeds->front();
    } else {
      first = std::random_device{}();
    }
    seeds.emplace();
    for (std::int64_t i = 0; i < pictures; ++i) seeds->push_back(first + static_cast<std::uint64_t>(i));
  }
  const auto put = [&](const char* flag, const char* field) {
    if (const auto text = args.text(flag)) values[field] = *text;
  };
  if (args.prompt) values["prompt"] = *args.prompt;
  put("--negative", "negative_prompt");
  put("--sampler", "sampler");
  put("--preset", "preset");
  put("--mask", "mask_image");
  if (init) values["init_image"] = *init;
  if (const auto text = args.text("--control")) {
    const auto [file, scale] = weighted("--control", *text);
    values["control_image"] = file;
    values["control_scale"] = scale;
    values["control_filtered"] = false;
  }
  put("--control-kind", "control_kind");
  if (args.has("--control-filtered")) values["control_filtered"] = true;
  if (const auto text = args.text("--strength")) values["strength"] = number(*text, false);
  if (reconstruct) values["strength"] = 0.0;
  if (!args.images.empty()) {
    values["images"] = Json::array();
    for (const auto& text : args.images) values["images"].push_back(image_from(text));
  }
  if (!args.loras.empty()) {
    values["loras"] = Json::array();
    for (const auto& text : args.loras) values["loras"].push_back(lora_from(text));
  }
  if (const auto text = args.text("--steps")) values["prior"]["num_inference_steps"] = number(*text, true);
  if (const auto text = args.text("--guidance")) values["prior"]["guidance_scale"] = number(*text, false);
  if (const auto text = args.text("--decoder-steps")) values["decoder"]["num_inference_steps"] = number(*text, true);
  if (const auto text = args.text("--decoder-guidance")) values["decoder"]["guidance_scale"] = number(*text, false);
  values["seeds"] = *seeds;
  values["num_images_per_prompt"] = seeds->size();
  return Request::from_json(values.dump());
}

void check_output(const std::string& path) {
  const fs::path place = fs::u8path(path);
  const std::string name = name_of(path);
  if (detail::lower_ascii(place.extension().u8string()) != ".png") {
    throw RequestError("-o " + name + " is not accepted; pictures are written as .png");
  }
  std::error_code error;
  if (fs::is_directory(place, error)) throw RequestError(name + " is a folder; name a file in it");
  const fs::path folder = place.has_parent_path() ? place.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, error)) {
    const std::string told = name_of(folder.u8string());
    throw OutputError("the folder " + told + " does not exist; make it with: mkdir -p " + told);
  }
}

Json told(const Request& request) {
  const auto first = [](const Texts& texts) -> Json {
    if (const auto* one = std::get_if<std::string>(&texts)) return *one;
    if (const auto* several = std::get_if<std::vector<std::string>>(&texts)) return *several;
    return nullptr;
  };
  Json made = Json::object();
  made["prompt"] = first(request.prompt);
  made["negative_prompt"] = request.negative_prompt.index() == 0 ? Json("") : first(request.negative_prompt);
  made["seed"] = request.seeds->front();
  const Json all = Json::parse(request.to_json());
  made["sampler"] = all.at("sampler");
  made["steps"] = all.at("prior").at("num_inference_steps");
  made["guidance"] = all.at("prior").at("guidance_scale");
  made["decoder_steps"] = all.at("decoder").at("num_inference_steps");
  made["decoder_guidance"] = all.at("decoder").at("guidance_scale");
  return made;
}

/// A folder that previews are written into; where it is made here, it is removed again if nothing came into it.
class PreviewFolder {
 public:
  explicit PreviewFolder(std::optional<std::string> path) : path_(std::move(path)) {
    if (!path_) return;
    std::error_code error;
    made_ = fs::create_directory(fs::u8path(*path_), error);
    if (!error && !fs::is_directory(fs::u8path(*path_), error)) error = std::make_error_code(std::errc::file_exists);
    if (error) throw OutputError("the folder " + name_of(*path_) + " cannot be made: " + error.message());
  }
  PreviewFolder(const PreviewFolder&) = delete;
  PreviewFolder& operator=(const PreviewFolder&) = delete;
  ~PreviewFolder() {
    std::error_code there;  // files, where there are any
    if (made_) fs::remove(fs::u8path(*path_), there);
  }

  /// c-01.png, ... and b-01.png, ...; several pictures stand side by side.
  void write(const Step& step) const {
    if (!path_) return;
    const auto pictures = step.preview();
    Image sheet{pictures.front().width * static_cast<std::int64_t>(pictures.size()), pictures.front().height, {}};
    for (std::int64_t y = 0; y < sheet.height; ++y) {
      for (const auto& one : pictures) {
        const auto row = one.rgb.begin() + y * one.width * 3;
        sheet.rgb.insert(sheet.rgb.end(), row, row + one.width * 3);
      }
    }
    const std::string number = std::to_string(step.index + 1);
    const std::string name = std::string(1, step.stage[6]) + "-" + (number.size() < 2 ? "0" : "") + number + ".png";
    write_files({{(fs::u8path(*path_) / name).u8string(), encode_png(sheet)}});
  }

 private:
  std::optional<std::string> path_;
  bool made_ = false;
};

double rounded(double value) { return std::round(value * 10000) / 10000; }

void generate(const Arguments& args) {
  std::optional<Image> source;
  if (const auto text = args.text("--reconstruct")) source = open_picture(*text, "--reconstruct");
  const Request request = requested(args);
  const std::string output = args.text("--output").value_or("out.png");
  check_output(output);
  const auto started = std::chrono::steady_clock::now();
  const char* known = std::getenv("CASCADE_RT_BUNDLE");
  const std::string place = args.text("--bundle").value_or(known == nullptr ? "" : known);
  if (place.empty()) throw RequestError("there is no bundle; name one with --bundle DIR or CASCADE_RT_BUNDLE", "bundle");
  Options options;
  options.provider = args.text("--provider").value_or("auto");
  options.low_memory = args.has("--low-memory");
  if (const auto text = args.text("--threads")) options.threads = threads_of(*text);
  Pipeline pipeline(Bundle::open(place), options);
  pipeline.on_warning([](const std::string& text) { std::fprintf(stderr, "warning: %s\n", text.c_str()); });
  const PreviewFolder previews(args.text("--preview"));
  const bool bar = !args.has("--quiet") && isatty(fileno(stderr)) != 0;
  pipeline.plan(request);
  running = &pipeline;
  struct Over {
    ~Over() { running = nullptr; }
  } over;
  const Result made = pipeline.generate(request, [&](const Step& step) -> std::optional<Tensor> {
    if (stopped) pipeline.interrupt();
    previews.write(step);
    if (bar) {
      std::fprintf(stderr, "\r%s %lld/%lld ", step.stage, static_cast<long long>(step.index + 1),
                   static_cast<long long>(step.steps));
      if (step.index + 1 == step.steps) std::fprintf(stderr, "\r                    \r");
    }
    return std::nullopt;
  });
  const std::vector<std::pair<std::string, std::string>> facts = {
      {"bundle", pipeline.bundle()->name()},
      {"provider", pipeline.provider()},
      {"software", std::string("cascade-rt ") + version()}};
  std::vector<std::pair<std::string, std::vector<std::uint8_t>>> files;
  for (std::size_t i = 0; i < made.images.size(); ++i) {
    fs::path name = fs::u8path(output);
    if (made.images.size() > 1) {
      name.replace_filename(fs::u8path(name.stem().u8string() + "-" + std::to_string(i + 1) + name.extension().u8string()));
    }
    const Request one = alone(made, i);
    std::vector<std::pair<std::string, std::string>> texts{{tables::kRequestKey, one.to_json()}};
    const Json words = told(one);
    for (const auto& item : words.items()) {
      texts.emplace_back(item.key(), item.value().is_string() ? item.value().get<std::string>()
                                                              : detail::repr(item.value()));
    }
    texts.insert(texts.end(), facts.begin(), facts.end());
    files.emplace_back(name.u8string(), encode_png(made.images[i], texts));
  }
  write_files(files);
  Json seconds = Json::object();
  for (const char* part : {"load", "text_encoder", "encoders", "stage_c", "stage_b", "stage_a"}) {
    const auto found = made.timings.find(part);
    if (found != made.timings.end()) seconds[part] = rounded(found->second);
  }
  seconds["total"] =
      rounded(std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
  const Json psnr = source ? Json(reconstruction_psnr(*source, made.images.front())) : Json();
  if (args.has("--json")) {
    Json report = told(made.request);
    for (const auto& item : facts) report[item.first] = item.second;
    report["width"] = made.images.front().width;
    report["height"] = made.images.front().height;
    report["files"] = Json::array();
    for (const auto& file : files) report["files"].push_back(file.first);
    if (source) report["psnr"] = psnr;
    report["seconds"] = seconds;
    std::printf("%s\n", detail::json_text(report).c_str());
  } else {
    for (const auto& file : files) std::printf("%s\n", file.first.c_str());
    if (source) std::printf("PSNR of the round trip: %.2f dB\n", psnr.get<double>());
    std::string line;
    for (const auto& item : seconds.items()) {
      char text[64];
      std::snprintf(text, sizeof text, "%s%s %.2f s", line.empty() ? "" : "  ", item.key().c_str(),
                    item.value().get<double>());
      line += text;
    }
    std::printf("%s\n", line.c_str());
  }
  if (std::fflush(stdout) != 0) throw OutputError("standard output cannot be written");
}

void help() {
  std::printf("usage: cascade-run-cpp PROMPT [flags]\n\nMake a picture from a prompt, without Python.\n\n");
  for (const Flag& flag : kFlagTable) {
    const std::string name = std::string(flag.name) + (flag.value == nullptr ? "" : std::string(" ") + flag.value);
    std::printf("  %-24s %s\n", name.c_str(), flag.help);
  }
  std::printf(
      "\nexamples:\n  cascade-run-cpp \"a red circle\" --bundle bundle -o circle.png --seed 0\n"
      "  cascade-run-cpp --from circle.png --bundle bundle --steps 30 -o finer.png\n"
      "  cascade-run-cpp --image photo.png:0.8 \"in winter\" --bundle bundle -o winter.png\n"
      "  cascade-run-cpp \"a red star\" --control edges.png --control-filtered --bundle bundle -o red-star.png\n"
      "  cascade-run-cpp \"a green star\" --init circle.png --strength 0.7 --bundle bundle -o star.png\n"
      "  cascade-run-cpp --reconstruct circle.png --bundle bundle -o again.png\n");
}

bool is_letter(char c) {
  return c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
}

std::string flag_of(const std::string& field) {
  for (const tables::Pair* pair = tables::kFlags; pair->key != nullptr; ++pair) {
    if (field == pair->key) return pair->value;
  }
  return field;
}

/// The message with fields under the names that the command line has for them: its own field at the beginning, images[0]
/// as the flag of images, and other fields wherever they stand, but for those that are words of English too.
std::string worded(const Error& error) {
  std::string message = error.what();
  const std::string& field = error.field();
  const auto bracket = field.find('[');
  const std::string name = field.substr(0, bracket);
  if (!field.empty() && message.rfind(name, 0) == 0) {
    std::size_t end = name.size();
    if (bracket != std::string::npos && message.compare(end, 1, "[") == 0) {
      end = message.find(']', end);
      end = end == std::string::npos ? name.size() : end + 1;
      if (end + 1 < message.size() && message[end] == '.' && is_letter(message[end + 1])) {
        ++end;
        while (end < message.size() && is_letter(message[end])) ++end;
      }
    }
    const bool whole = end == message.size() || bracket != std::string::npos || !is_letter(message[end]);
    if (whole && flag_of(name) != name) message.replace(0, end, flag_of(name));
  }
  for (const tables::Pair* pair = tables::kFlags; pair->key != nullptr; ++pair) {
    const std::string other = pair->key;
    if (other.find_first_of("_.") == std::string::npos) continue;
    for (std::size_t at = message.find(other); at != std::string::npos; at = message.find(other, at)) {
      const std::size_t end = at + other.size();
      const bool before = at > 0 && (is_letter(message[at - 1]) || message[at - 1] == '.' || message[at - 1] == '/');
      const bool behind = end < message.size() &&
                          (is_letter(message[end]) || message[end] == '/' ||
                           (message[end] == '.' && end + 1 < message.size() && is_letter(message[end + 1])));
      if (before || behind) {
        ++at;
        continue;
      }
      message.replace(at, other.size(), pair->value);
      at += std::string(pair->value).size();
    }
  }
  return message;
}

int fail(const std::string& message, int code) {
  std::string line;
  for (const char c : message) line += c == '\n' || c == '\r' || c == '\t' ? ' ' : c;
  std::fprintf(stderr, "error: %s\n", detail::plain(line).c_str());
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);
  try {
    const Arguments args = parse(std::vector<std::string>(argv + 1, argv + argc));
    if (args.has("--help")) {
      help();
    } else if (args.has("--version")) {
      std::printf("cascade-rt %s\n", version());
    } else {
      generate(args);
    }
    return kDone;
  } catch (const GenerationInterrupted&) {
    return fail("interrupted; nothing half-written was left behind", kFailed);
  } catch (const RequestError& error) {
    return fail(worded(error), kWrongRequest);
  } catch (const BundleNotFoundError& error) {
    return fail(worded(error), kWrongRequest);
  } catch (const MissingCheckpointError& error) {
    return fail(worded(error), kWrongRequest);
  } catch (const Error& error) {
    return fail(worded(error), kFailed);
  } catch (const std::bad_alloc&) {
    return fail("there is not enough memory for this; use --low-memory, or a smaller --size", kFailed);
  } catch (const std::exception& error) {
    return fail(std::string("the system refused: ") + error.what(), kFailed);
  }
}
