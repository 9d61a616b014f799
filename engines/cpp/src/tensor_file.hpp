// Safetensors files: what is in one, its tensors in float32, and tensors put back in place.
#pragma once
#include "manifest.hpp"

namespace cascade_rt::detail {

/// A product of sizes; as large as can be where it does not fit.
std::uint64_t product_of(const Shape& shape, std::size_t from = 0);

/// Where a tensor lies in a file: bytes from `start` to before `stop`.
struct Place {
  std::string dtype;
  Shape shape;
  std::uint64_t start = 0, stop = 0;
};

class TensorFile {
 public:
  /// Read the header. Throws CheckpointError.
  explicit TensorFile(std::string path);

  const std::string& path() const { return path_; }
  /// Name and place of every tensor, in the file's order.
  const std::vector<std::pair<std::string, Place>>& places() const { return places_; }
  const Place& place(const std::string& name) const { return places_[index_.at(name)].second; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

  void check_dtype(const std::string& name) const;         // throws CheckpointError: it is no weight
  std::vector<float> read(const std::string& name) const;  // throws CheckpointError
  double read_number(const std::string& name) const;       // throws CheckpointError

 private:
  std::string bytes_of(const Place& place) const;
  std::string path_;
  std::vector<std::pair<std::string, Place>> places_;
  std::map<std::string, std::size_t> index_;
  std::map<std::string, std::string> metadata_;
};

/// The header of a safetensors file: places and metadata. Throws CheckpointError.
void read_header(const std::string& text, std::uint64_t base, std::uint64_t size, const std::string& where,
                 std::vector<std::pair<std::string, Place>>& places, std::map<std::string, std::string>& metadata);

/// Write a tensor over the one that lies at a place of a file. Throws CheckpointError, or std::system_error.
void put(const std::string& path, const Place& place, const std::vector<float>& values);

}  // namespace cascade_rt::detail
