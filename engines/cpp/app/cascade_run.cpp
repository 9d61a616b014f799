// cascade-run-cpp: the Python command cascade-run without Python.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <new>
#include <random>

#include "cascade_rt/cascade_rt.hpp"
#include "tables.hpp"
#include "text.hpp"

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
    {"--image", "FILE[:WEIGHT]", "picture to vary; not taken by this command"},
    {"--init", "FILE", "picture to begin from; not taken by this command"},
    {"--strength", "X", "see --init"},
    {"--mask", "FILE", "see --init"},
    {"--provider", "NAME", "auto, cpu, cuda, ort-tensorrt, openvino (default: auto)"},
    {"--threads", "N", "threads within an operator (default: the provider's choice)"},
    {"--low-memory", nullptr, "keep one engine loaded at a time"},
    {"--json", nullptr, "print what ran, with the time of each stage, as JSON"},
    {"--quiet", nullptr, "no progress"},
    {"--version", nullptr, "print the version"},
    {"--help", nullptr, "print this"},
};

struct Arguments {
  std::optional<std::string> prompt;
  std::map<std::string, std::string> given;
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
    made.given[word] = value.value_or("");
  }
  return made;
}

/// A number of the command line as JSON, so that the request's own checks see it.
Json number(const char* flag, const std::string& text, bool whole) {
  std::string reason;
  Json made = detail::parse_json_or_reason(text, reason);
  const bool fine = reason.empty() && (whole ? made.is_number_integer() : made.is_number());
  if (!fine) {
    throw RequestError(std::string("argument ") + flag + ": invalid " + (whole ? "int" : "float") + " value: " +
                       shown(text) + "; see cascade-run-cpp --help");
  }
  return made;
}

std::int64_t whole_number(const char* flag, const std::string& text) {
  const Json made = number(flag, text, true);
  if (made.is_number_unsigned() && made.get<std::uint64_t>() > (std::uint64_t{1} << 62U)) return std::int64_t{1} << 62U;
  return made.get<std::int64_t>();
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
  if (!args.prompt && !args.has("--from")) {
    throw RequestError("there is no prompt; write what to draw, for example: cascade-run-cpp 'a red circle'");
  }
  const Request base = args.has("--from") ? Request::from_json(read_request(*args.text("--from"))) : Request{};
  Json values = Json::parse(base.to_json());
  const auto put = [&](const char* flag, const char* field) {
    if (const auto text = args.text(flag)) values[field] = *text;
  };
  if (args.prompt) values["prompt"] = *args.prompt;
  put("--negative", "negative_prompt");
  put("--sampler", "sampler");
  put("--preset", "preset");
  put("--init", "init_image");
  put("--mask", "mask_image");
  if (const auto text = args.text("--image")) values["images"] = Json::array({Json{{"image", *text}}});
  if (const auto text = args.text("--strength")) values["strength"] = number("--strength", *text, false);
  if (const auto text = args.text("--size")) size_from(*text, values);
  if (const auto text = args.text("--steps")) values["prior"]["num_inference_steps"] = number("--steps", *text, true);
  if (const auto text = args.text("--guidance")) values["prior"]["guidance_scale"] = number("--guidance", *text, false);
  if (const auto text = args.text("--decoder-steps")) {
    values["decoder"]["num_inference_steps"] = number("--decoder-steps", *text, true);
  }
  if (const auto text = args.text("--decoder-guidance")) {
    values["decoder"]["guidance_scale"] = number("--decoder-guidance", *text, false);
  }
  values["num_images_per_prompt"] = args.has("--images") ? number("--images", *args.text("--images"), true) : Json(1);
  values["seeds"] = nullptr;
  Request made = Request::from_json(values.dump());  // refuses a wrong number of pictures before their seeds are made
  made.seeds = base.seeds;
  if (args.has("--seed") || args.has("--images") || !base.seeds) {
    std::uint64_t first = 0;
    if (const auto text = args.text("--seed")) {
      values["seeds"] = number("--seed", *text, true);
      first = Request::from_json(values.dump()).seeds->front();
    } else if (base.seeds) {
      first = base.seeds->front();
    } else {
      first = std::random_device{}();
    }
    made.seeds.emplace();
    for (std::int64_t i = 0; i < *made.num_images_per_prompt; ++i) {
      made.seeds->push_back(first + static_cast<std::uint64_t>(i));
    }
  }
  made.num_images_per_prompt = static_cast<std::int64_t>(made.seeds->size());
  return made;
}

void check_output(const std::string& path) {
  const fs::path place = fs::u8path(path);
  const std::string name = detail::shortened(detail::plain(path), 120);
  if (detail::lower_ascii(place.extension().u8string()) != ".png") {
    throw RequestError("-o " + name + " is not accepted; pictures are written as .png");
  }
  std::error_code error;
  if (fs::is_directory(place, error)) throw RequestError(name + " is a folder; name a file in it");
  const fs::path folder = place.has_parent_path() ? place.parent_path() : fs::path(".");
  if (!fs::is_directory(folder, error)) {
    const std::string shown_folder = detail::shortened(detail::plain(folder.u8string()), 120);
    throw OutputError("the folder " + shown_folder + " does not exist; make it with: mkdir -p " + shown_folder);
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

double rounded(double value) { return std::round(value * 10000) / 10000; }

void generate(const Arguments& args) {
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
  if (const auto text = args.text("--threads")) options.threads = whole_number("--threads", *text);
  Pipeline pipeline(Bundle::open(place), options);
  pipeline.on_warning([](const std::string& text) { std::fprintf(stderr, "warning: %s\n", text.c_str()); });
  const bool bar = !args.has("--quiet") && isatty(fileno(stderr)) != 0;
  pipeline.plan(request);
  running = &pipeline;
  struct Over {
    ~Over() { running = nullptr; }
  } over;
  const Result made = pipeline.generate(request, [&](const Step& step) -> std::optional<Tensor> {
    if (stopped) pipeline.interrupt();
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
  for (const char* part : {"text_encoder", "load", "stage_c", "stage_b", "stage_a"}) {
    const auto found = made.timings.find(part);
    if (found != made.timings.end()) seconds[part] = rounded(found->second);
  }
  seconds["total"] =
      rounded(std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count());
  if (args.has("--json")) {
    Json report = told(made.request);
    for (const auto& item : facts) report[item.first] = item.second;
    report["width"] = made.images.front().width;
    report["height"] = made.images.front().height;
    report["files"] = Json::array();
    for (const auto& file : files) report["files"].push_back(file.first);
    report["seconds"] = seconds;
    std::printf("%s\n", detail::json_text(report).c_str());
  } else {
    for (const auto& file : files) std::printf("%s\n", file.first.c_str());
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
      "  cascade-run-cpp --from circle.png --bundle bundle --steps 30 -o finer.png\n");
}

/// The message with the field under the name that the command line has for it.
std::string worded(const Error& error) {
  const std::string message = error.what();
  for (const tables::Pair* pair = tables::kFlags; pair->key != nullptr; ++pair) {
    if (error.field() == pair->key && message.rfind(error.field(), 0) == 0) {
      return pair->value + message.substr(error.field().size());
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
  } catch (const Error& error) {
    return fail(worded(error), kFailed);
  } catch (const std::bad_alloc&) {
    return fail("there is not enough memory for this; use --low-memory, or a smaller --size", kFailed);
  } catch (const std::exception& error) {
    return fail(std::string("the system refused: ") + error.what(), kFailed);
  }
}
