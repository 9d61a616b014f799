// What runs engines: one file a runtime behind this interface.
#pragma once
#include <map>
#include <memory>
#include <variant>

#include "manifest.hpp"

namespace cascade_rt::detail {

/// A tensor that lives where the engine runs, in the engine's dtype. It is passed on, never looked into.
class DeviceTensor {
 public:
  virtual ~DeviceTensor() = default;
  virtual Shape shape() const = 0;
  virtual std::string dtype() const = 0;
  /// Some of its rows (first axis), in this order.
  virtual std::shared_ptr<const DeviceTensor> rows(const std::vector<std::size_t>& chosen) const = 0;
};

using Context = std::map<std::string, std::shared_ptr<const DeviceTensor>>;

/// A host array that a caller owns.
struct Feed {
  const void* data;
  std::string dtype;  // "float32" or "int64"
  Shape shape;
  static Feed of(const Tensor& tensor) { return {tensor.data.data(), "float32", tensor.shape}; }
  static Feed of(const std::vector<std::int64_t>& numbers, const Shape& shape) {
    return {numbers.data(), "int64", shape};
  }
};

using Feeds = std::map<std::string, Feed>;

struct Outputs {
  std::map<std::string, Tensor> host;
  Context device;
};

/// A loaded engine.
class Engine {
 public:
  explicit Engine(const EngineRecord& record) : record_(record) {}
  virtual ~Engine() = default;
  /// Run. Names, dtypes and shapes are exactly those of the record. Throws EngineError.
  Outputs run(const Feeds& feeds, const Context& constants) const;
  const EngineRecord& record() const { return record_; }

 protected:
  virtual Outputs call(const Feeds& feeds, const Context& constants) const = 0;
  const EngineRecord record_;
};

struct EngineOptions {
  std::string provider;
  std::optional<std::int64_t> threads;
  std::int64_t device_id = 0;
  std::map<std::string, std::string> provider_options;
  std::string library;
};

/// A runtime at hand, loaded once for a pipeline.
class Runtime {
 public:
  virtual ~Runtime() = default;
  virtual std::unique_ptr<Engine> open(const EngineRecord& record, const std::string& path) const = 0;
  virtual const std::string& provider() const = 0;
  virtual std::vector<std::string> computes() const = 0;
  /// Whether it runs engines of a precision here.
  bool runs(const Precision& precision) const;
};

/// The runtime of a provider, "auto" included. Throws RequestError or EngineError.
std::unique_ptr<Runtime> open_runtime(const EngineOptions& options);
std::unique_ptr<Runtime> open_onnxruntime(const EngineOptions& options);
#ifdef CASCADE_RT_OPENVINO
std::unique_ptr<Runtime> open_openvino(const EngineOptions& options);
#endif

std::string reason_of(const std::string& message);
Sizes check_feeds(const EngineRecord& record, const Feeds& feeds, const Context& constants);
void check_outputs(const EngineRecord& record, const Sizes& sizes, const Outputs& outputs);

}  // namespace cascade_rt::detail
