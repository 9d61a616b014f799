#include "tensor_file.hpp"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "bundle.hpp"
#include "tables.hpp"

namespace fs = std::filesystem;

namespace cascade_rt::detail {

namespace {

struct Kind {
  const char* dtype;
  std::uint64_t bytes;
  bool weight;   // a float that is read
  bool integer;  // read where a tensor is one number
};

constexpr Kind kKinds[] = {{"F64", 8, true, false},     {"F32", 4, true, false},     {"F16", 2, true, false},
                           {"BF16", 2, true, false},    {"I64", 8, false, true},     {"I32", 4, false, true},
                           {"I16", 2, false, true},     {"I8", 1, false, true},      {"U8", 1, false, true},
                           {"U64", 8, false, false},    {"U32", 4, false, false},    {"U16", 2, false, false},
                           {"BOOL", 1, false, false},   {"F8_E4M3", 1, false, false}, {"F8_E5M2", 1, false, false}};

const Kind* kind_of(const std::string& dtype) {
  const auto* found = std::find_if(std::begin(kKinds), std::end(kKinds), [&](const Kind& one) { return dtype == one.dtype; });
  return found == std::end(kKinds) ? nullptr : found;
}

template <class T>
T at(const std::string& bytes, std::size_t index) {
  T made;
  std::memcpy(&made, bytes.data() + index * sizeof(T), sizeof(T));
  return made;
}

float from_bits(std::uint32_t bits) {
  float made = 0;
  std::memcpy(&made, &bits, sizeof made);
  return made;
}

std::uint32_t bits_of(float value) {
  std::uint32_t made = 0;
  std::memcpy(&made, &value, sizeof made);
  return made;
}

float from_half(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000U) << 16U, exponent = (half >> 10U) & 31U, fraction = half & 0x3FFU;
  if (exponent == 31) return from_bits(sign | 0x7F800000U | (fraction << 13U));
  if (exponent != 0) return from_bits(sign | ((exponent + 112U) << 23U) | (fraction << 13U));
  const float small = std::ldexp(static_cast<float>(fraction), -24);
  return sign != 0 ? -small : small;
}

/// To the nearest half, ties to even.
std::uint16_t to_half(float value) {
  const std::uint32_t bits = bits_of(value), sign = (bits >> 16U) & 0x8000U, rest = bits & 0x7FFFFFFFU;
  if (rest > 0x7F800000U) return static_cast<std::uint16_t>(sign | 0x7E00U);
  if (rest >= 0x477FF000U) return static_cast<std::uint16_t>(sign | 0x7C00U);  // 65520 and above
  if (rest < 0x38800000U) {  // below the smallest normal half: a multiple of 2**-24
    const float steps = std::nearbyint(std::ldexp(from_bits(rest), 24));
    return static_cast<std::uint16_t>(sign | static_cast<std::uint32_t>(steps));
  }
  const std::uint32_t rounded = rest + 0xFFFU + ((rest >> 13U) & 1U);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13U));
}

std::uint16_t to_bfloat(float value) {
  const std::uint32_t bits = bits_of(value);
  return static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16U) & 1U)) >> 16U);
}

float value_at(const std::string& bytes, std::size_t i, const std::string& dtype) {
  if (dtype == "F32") return at<float>(bytes, i);
  if (dtype == "F16") return from_half(at<std::uint16_t>(bytes, i));
  if (dtype == "BF16") return from_bits(static_cast<std::uint32_t>(at<std::uint16_t>(bytes, i)) << 16U);
  if (dtype == "F64") return static_cast<float>(at<double>(bytes, i));
  if (dtype == "I64") return static_cast<float>(at<std::int64_t>(bytes, i));
  if (dtype == "I32") return static_cast<float>(at<std::int32_t>(bytes, i));
  if (dtype == "I16") return static_cast<float>(at<std::int16_t>(bytes, i));
  if (dtype == "I8") return static_cast<float>(at<std::int8_t>(bytes, i));
  return static_cast<float>(at<std::uint8_t>(bytes, i));
}

}  // namespace

std::uint64_t product_of(const Shape& shape, std::size_t from) {
  unsigned __int128 made = 1;
  for (std::size_t i = from; i < shape.size(); ++i) {
    if (shape[i] == 0) return 0;
    made = std::min<unsigned __int128>(made * static_cast<std::uint64_t>(shape[i]), ~std::uint64_t{0});
  }
  return static_cast<std::uint64_t>(made);
}

void read_header(const std::string& text, std::uint64_t base, std::uint64_t size, const std::string& where,
                 std::vector<std::pair<std::string, Place>>& places, std::map<std::string, std::string>& metadata) {
  Json head = parse_json<CheckpointError>(text, where);
  if (!head.is_object()) throw CheckpointError(where + " is no safetensors file: its header is " + shown(head));
  if (head.contains("__metadata__")) {
    const Json facts = head.at("__metadata__");
    head.erase("__metadata__");
    const auto problem = schema_problem(facts, Schema::metadata, where + ", metadata");
    if (problem) throw CheckpointError(problem->message);
    for (const auto& item : facts.items()) metadata[item.key()] = item.value().get<std::string>();
  }
  if (const auto problem = schema_problem(head, Schema::tensors, where)) throw CheckpointError(problem->message);
  for (const auto& item : head.items()) {
    const Json& row = item.value();
    Place made;
    made.dtype = row.at("dtype").get<std::string>();
    made.shape = row.at("shape").get<Shape>();
    made.start = base + row.at("data_offsets")[0].get<std::uint64_t>();
    made.stop = base + row.at("data_offsets")[1].get<std::uint64_t>();
    const Kind* kind = kind_of(made.dtype);
    const auto bytes = static_cast<__int128>(made.stop) - static_cast<__int128>(made.start);
    const bool fits = kind != nullptr && bytes == static_cast<__int128>(product_of(made.shape)) * kind->bytes;
    if (!fits || made.stop > size) {
      throw CheckpointError(where + " is cut, or its header is wrong: tensor " + shown(item.key()) + " is said to be " +
                            shown(made.dtype) + " " + shape_text(made.shape) + " in " +
                            std::to_string(static_cast<std::int64_t>(bytes)) + " bytes");
    }
    places.emplace_back(item.key(), std::move(made));
  }
}

TensorFile::TensorFile(std::string path) : path_(std::move(path)) {
  const std::string where = name_of(path_);
  std::error_code error;
  const auto status = fs::status(fs::u8path(path_), error);
  if (status.type() == fs::file_type::not_found || error == std::errc::not_a_directory) {
    throw CheckpointError("there is no file " + where + "; name a .safetensors file");
  }
  if (error) throw CheckpointError(where + " cannot be read: " + error.message());
  if (status.type() != fs::file_type::regular) {
    throw CheckpointError(where + " is no regular file; name a .safetensors file");
  }
  const auto size = fs::file_size(fs::u8path(path_), error);
  errno = 0;
  std::ifstream file(fs::u8path(path_), std::ios::binary);
  if (!file || error) throw CheckpointError(where + " cannot be read: " + std::strerror(errno));
  unsigned char first[8] = {};
  file.read(reinterpret_cast<char*>(first), sizeof first);
  std::uint64_t length = 0;
  for (std::size_t i = 8; i > 0; --i) length = length * 256 + first[i - 1];
  const auto most = std::min<std::uint64_t>(static_cast<std::uint64_t>(tables::kMostHeaderBytes), size < 8 ? 0 : size - 8);
  if (file.gcount() != 8 || length < 2 || length > most) {
    throw CheckpointError(where + " is cut, or no safetensors file; download it again");
  }
  std::string text(static_cast<std::size_t>(length), '\0');
  file.read(text.data(), static_cast<std::streamsize>(length));
  if (!file) throw CheckpointError(where + " cannot be read: " + std::strerror(errno));
  read_header(text, 8 + length, size, where, places_, metadata_);
  for (std::size_t i = 0; i < places_.size(); ++i) index_[places_[i].first] = i;
}

void TensorFile::check_dtype(const std::string& name) const {
  const Kind* kind = kind_of(place(name).dtype);
  if (kind != nullptr && kind->weight) return;
  throw CheckpointError(name_of(path_) + " has " + shown(name) + " in " + place(name).dtype +
                        ", which is no weight; read are F64, F32, F16, BF16");
}

std::string TensorFile::bytes_of(const Place& place) const {
  errno = 0;
  std::ifstream file(fs::u8path(path_), std::ios::binary);
  std::string made(static_cast<std::size_t>(place.stop - place.start), '\0');
  file.seekg(static_cast<std::streamoff>(place.start));
  file.read(made.data(), static_cast<std::streamsize>(made.size()));
  if (!file) throw CheckpointError(name_of(path_) + " cannot be read: " + std::strerror(errno));
  return made;
}

std::vector<float> TensorFile::read(const std::string& name) const {
  check_dtype(name);
  const Place& own = place(name);
  const std::string bytes = bytes_of(own);
  std::vector<float> made(static_cast<std::size_t>(product_of(own.shape)));
  for (std::size_t i = 0; i < made.size(); ++i) made[i] = value_at(bytes, i, own.dtype);
  return made;
}

double TensorFile::read_number(const std::string& name) const {
  const Place& own = place(name);
  const Kind* kind = kind_of(own.dtype);
  if (product_of(own.shape) != 1 || kind == nullptr || (!kind->weight && !kind->integer)) {
    throw CheckpointError(name_of(path_) + " has " + shown(name) + " of shape " + shape_text(own.shape) + " in " +
                          own.dtype + "; it is one number");
  }
  return static_cast<double>(value_at(bytes_of(own), 0, own.dtype));
}

void put(const std::string& path, const Place& place, const std::vector<float>& values) {
  const std::size_t size = values.empty() ? 0 : static_cast<std::size_t>(place.stop - place.start) / values.size();
  std::string bytes(static_cast<std::size_t>(place.stop - place.start), '\0');
  for (std::size_t i = 0; i < values.size(); ++i) {
    char* out = bytes.data() + i * size;
    if (place.dtype == "F16") {
      const std::uint16_t half = to_half(values[i]);
      if ((half & 0x7C00U) == 0x7C00U) {
        throw CheckpointError("a changed weight is beyond fp16, in which " + name_of(path) + " holds it");
      }
      std::memcpy(out, &half, sizeof half);
    } else if (place.dtype == "BF16") {
      const std::uint16_t own = to_bfloat(values[i]);
      std::memcpy(out, &own, sizeof own);
    } else if (place.dtype == "F64") {
      const double own = values[i];
      std::memcpy(out, &own, sizeof own);
    } else {
      std::memcpy(out, &values[i], sizeof values[i]);
    }
  }
  errno = 0;
  std::fstream file(fs::u8path(path), std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(place.start));
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.flush();
  if (!file) throw std::system_error(errno != 0 ? errno : EIO, std::generic_category());
}

}  // namespace cascade_rt::detail
