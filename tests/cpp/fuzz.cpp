// Mutations of the files that a bundle's readers are given: each is read or refused with an Error, and nothing else
// happens. Run it under AddressSanitizer: cascade_fuzz COUNT [SEED]
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>

#include "decode.hpp"
#include "lora.hpp"
#include "request.hpp"
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

using Dice = std::mt19937_64;

std::string mutated(std::string text, Dice& dice) {
  static const char* const kPieces[] = {"null", "-1",  "0",    "1e999", "18446744073709551616", "\"\"",  "[]",  "{}",
                                        "true", "\"a\"", "[[[[", "}}}}",  "\\ud800",               "\xff\xfe", "2147483648",
                                        "\"height/0\"", "\"99999*99999*batch\"", "\"NFKC\"", "\"type\":\"BPE\"",
                                        "70368744177664", "\"F64\"", ".alpha", ".lora_up.weight", "weights.0.lora_up"};
  const int times = 1 + static_cast<int>(dice() % 4);
  for (int i = 0; i < times && !text.empty(); ++i) {
    const std::size_t at = dice() % text.size(), size = dice() % 12;
    switch (dice() % 6) {
      case 0: text[at] = static_cast<char>(dice()); break;
      case 1: text.erase(at, size); break;
      case 2: text.insert(at, kPieces[dice() % std::size(kPieces)]); break;
      case 3: text.insert(at, text.substr(dice() % text.size(), dice() % 60)); break;
      case 4: {  // a value for another
        const std::size_t colon = text.find(':', at);
        if (colon == std::string::npos) break;
        const std::size_t end = text.find_first_of(",}\n", colon);
        text.replace(colon + 1, (end == std::string::npos ? text.size() : end) - colon - 1,
                     kPieces[dice() % std::size(kPieces)]);
        break;
      }
      default:
        if (dice() % 8 == 0) text.resize(at);
    }
  }
  return text;
}

struct Tally {
  std::size_t taken = 0, refused = 0;
};

template <class Read>
void attempt(Tally& tally, const Read& read) {
  try {
    read();
    ++tally.taken;
  } catch (const Error&) {
    ++tally.refused;
  }
}

std::uint32_t crc_of(const std::string& data) {
  std::uint32_t crc = ~0U;
  for (const char c : data) {
    crc ^= static_cast<unsigned char>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1U) ^ ((crc & 1U) != 0 ? 0xEDB88320U : 0U);
  }
  return ~crc;
}

std::string big_endian(std::uint32_t number) {
  std::string made;
  for (const unsigned shift : {24U, 16U, 8U, 0U}) made += static_cast<char>((number >> shift) & 255U);
  return made;
}

/// A PNG with one chunk's data changed, and its checksums right: libpng would read no further otherwise.
std::string mutated_png(const std::string& png, Dice& dice) {
  std::string made = png.substr(0, 8);
  std::size_t chunks = 0, at = 8;
  const auto size_at = [&](std::size_t place) {
    std::uint32_t size = 0;
    for (std::size_t i = 0; i < 4; ++i) size = size * 256 + static_cast<unsigned char>(png[place + i]);
    return std::size_t{size};
  };
  for (; at + 12 <= png.size(); at += 12 + size_at(at)) ++chunks;
  const std::size_t changed = dice() % chunks;
  std::size_t index = 0;
  for (at = 8; at + 12 <= png.size(); at += 12 + size_at(at)) {
    std::string data = png.substr(at + 4, 4 + size_at(at));
    if (index++ == changed) {
      std::string inside = data.substr(4);
      for (int i = 0; i < 2 && !inside.empty(); ++i) inside[dice() % inside.size()] = static_cast<char>(dice() % 8);
      if (dice() % 8 == 0) inside = mutated(inside, dice);
      data = data.substr(0, 4) + inside;
    }
    made += big_endian(static_cast<std::uint32_t>(data.size() - 4)) + data + big_endian(crc_of(data));
  }
  return made;
}

/// A safetensors file with a LoRA in it, whose header was changed.
void read_lora(const std::string& header, const std::string& path) {
  std::string text;
  for (std::size_t i = 0; i < 8; ++i) text += static_cast<char>((header.size() >> (8 * i)) & 255U);
  std::ofstream(path, std::ios::binary) << text + header + std::string(256, '\x3f');
  Lora(path, 0.5);
}

std::vector<std::string> pngs() {
  std::vector<std::string> made;
  const Json cases = Json::parse(text_of(std::string(CASCADE_TESTS) + "/vectors.json")).at("pictures");
  for (const Json& one : cases) {
    if (!one.contains("rgb")) continue;
    const auto place = one.at("place").get<std::string>();
    const std::string letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::string bytes;
    std::uint32_t bits = 0, count = 0;
    for (std::size_t i = place.find(',') + 1; i < place.size() && place[i] != '='; ++i) {
      bits = bits << 6U | static_cast<std::uint32_t>(letters.find(place[i]));
      count += 6;
      if (count >= 8) {
        count -= 8;
        bytes += static_cast<char>((bits >> count) & 255U);
      }
    }
    made.push_back(bytes);
  }
  return made;
}

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 100000;
  Dice dice(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const std::string here = CASCADE_TESTS;
  const std::string bundle = here + "/../../engines/tiny/cascade_tiny/bundle";
  Json whole = Json::parse(text_of(bundle + "/cascade.json"));
  Json kept = Json::array();  // what Stage C needs: small documents are mutated more often in one place
  for (const Json& engine : whole.at("engines")) {
    const auto name = engine.at("name").get<std::string>();
    if (name == "text_encoder" || name.rfind("stage_c", 0) == 0) kept.push_back(engine);
  }
  whole["engines"] = kept;
  const std::string manifest = whole.dump();
  const std::string words = text_of(bundle + "/tokenizer.json");
  Json bpe = Json::parse(text_of(here + "/clip_tokenizer.json"));
  const std::string clip = bpe.dump();
  const std::string request =
      R"({"prompt": ["a", "b"], "seeds": [1, 2], "height": 128, "width": 96, "sampler": "diffusers", "prior":
          {"guidance_scale": [2, 3], "num_inference_steps": 5, "guidance_end": 0.5}, "decoder": {"guidance_scale": 1.5}})";
  const Manifest own = Manifest::from_json(manifest, "cascade.json");
  const std::string header =
      R"({"__metadata__": {"lora_adapter_metadata": "{\"prior.lora_alpha\": 4}"}, "prior.a.lora_A.weight": {"dtype": "F32",
          "shape": [2, 4], "data_offsets": [0, 32]}, "prior.a.lora_B.weight": {"dtype": "F16", "shape": [4, 2],
          "data_offsets": [32, 48]}, "lora_prior_unet_b.lora_down.weight": {"dtype": "BF16", "shape": [1, 4],
          "data_offsets": [48, 56]}, "lora_prior_unet_b.lora_up.weight": {"dtype": "F64", "shape": [4, 1],
          "data_offsets": [56, 88]}, "lora_prior_unet_b.alpha": {"dtype": "F32", "shape": [], "data_offsets": [88, 92]}})";
  const std::string lora =
      (std::filesystem::temp_directory_path() / ("cascade-fuzz-" + std::to_string(std::random_device{}()))).string();
  const auto pictures_given = pngs();
  Tally manifests, tokenizers, requests, loras, pictures;
  for (long i = 0; i < count; ++i) {
    switch (i % 12) {
      case 8:
      case 9:
        attempt(loras, [&] { read_lora(mutated(header, dice), lora); });
        break;
      case 10:
      case 11:
        attempt(pictures, [&] {
          const std::string png = mutated_png(pictures_given[dice() % pictures_given.size()], dice);
          try {
            if (png.size() > 24 && png.compare(16, 2, std::string(2, '\0')) == 0 &&
                png.compare(20, 2, std::string(2, '\0')) == 0) {  // larger ones only take longer
              decode_png(png);
            }
          } catch (const Unreadable& error) {
            throw RequestError(error.what());
          } catch (const TooManyPixels& error) {
            throw RequestError(error.what());
          }
        });
        break;
      case 0:
        attempt(tokenizers, [&] {
          const Tokenizer made(mutated(clip, dice), "tokenizer.json", {"tokenizer.json", 77, 1});
          made(mutated("a large red circle isn't <|endoftext|> é日本", dice));
        });
        break;
      case 1:
      case 2:
        attempt(tokenizers, [&] {
          const Tokenizer made(mutated(words, dice), "tokenizer.json", {"tokenizer.json", 24, 0});
          made(mutated("a large red circle isn't é日本", dice));
        });
        break;
      case 3:
      case 4:
      case 5:
        attempt(requests, [&] {
          const Request made = Request::from_json(mutated(request, dice));
          Records records;
          for (const auto& record : own.engines) records.push_back(&record);
          plan(made, own, records, {}, Part::prior);
        });
        break;
      default:
        attempt(manifests, [&] {
          const Manifest made = Manifest::from_json(mutated(manifest, dice), "cascade.json");
          Records records;
          for (const auto& record : made.engines) records.push_back(&record);
          plan(Request::from_json(request), made, records, {}, Part::prior);
        });
    }
  }
  std::filesystem::remove(lora);
  bool both = true;
  for (const auto& item : {std::make_pair("manifests", manifests), {"tokenizers", tokenizers}, {"requests", requests},
                           {"LoRA files", loras}, {"pictures", pictures}}) {
    std::printf("%s: %zu read, %zu refused\n", item.first, item.second.taken, item.second.refused);
    both = both && item.second.taken > 0 && item.second.refused > 0;
  }
  return both ? 0 : 1;
}
