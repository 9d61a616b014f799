// Mutations of the files that a bundle's readers are given: each is read or refused with an Error, and nothing else
// happens. Run it under AddressSanitizer: cascade_fuzz COUNT [SEED]
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <random>
#include <sstream>

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
                                        "\"height/0\"", "\"99999*99999*batch\"", "\"NFKC\"", "\"type\":\"BPE\""};
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
  Tally manifests, tokenizers, requests;
  for (long i = 0; i < count; ++i) {
    switch (i % 8) {
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
  std::printf("manifests: %zu read, %zu refused; tokenizers: %zu, %zu; requests: %zu, %zu\n", manifests.taken,
              manifests.refused, tokenizers.taken, tokenizers.refused, requests.taken, requests.refused);
  const bool both = manifests.taken > 0 && tokenizers.taken > 0 && requests.taken > 0 && manifests.refused > 0 &&
                    tokenizers.refused > 0 && requests.refused > 0;
  return both ? 0 : 1;
}
