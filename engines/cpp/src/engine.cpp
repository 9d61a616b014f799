#include "engine.hpp"

#include <algorithm>
#include <regex>
#include <set>

#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

void check_shape(const EngineRecord& record, const TensorSpec& tensor, const Shape& shape, const Sizes& sizes) {
  Shape wanted;
  try {
    wanted = tensor.shape(sizes);
  } catch (const std::invalid_argument& error) {
    throw EngineError(record.name + ": " + tensor.name + ": " + error.what());
  }
  if (shape != wanted) {
    throw EngineError(record.name + ": " + tensor.name + " has shape " + shape_text(shape) + "; its axes are " +
                      tensor.axes_text() + ", which is " + shape_text(wanted) + " here");
  }
}

void check_input(const EngineRecord& record, const TensorSpec& tensor, const std::string& dtype, const Shape& shape,
                 Sizes& sizes) {
  const std::string where = record.name + ": " + tensor.name;
  if (dtype != tensor.dtype) throw EngineError(where + " has dtype " + dtype + "; it must be " + tensor.dtype);
  const std::string axes = where + " has shape " + shape_text(shape) + "; its axes are " + tensor.axes_text();
  if (shape.size() != tensor.axes.size()) throw EngineError(axes);
  for (std::size_t i = 0; i < shape.size(); ++i) {
    const AxisSize& axis = tensor.axes[i];
    if (axis.number != 0) {
      if (shape[i] != axis.number) throw EngineError(axes);
      continue;
    }
    if (axis.axis.terms.size() != 1) continue;
    const std::string& name = axis.axis.terms[0].second;
    const AxisRange& range = record.ranges.at(name);
    const auto found = axis.axis.solve(shape[i]);
    if (!found || !range.accepts(*found)) {
      const std::string of =
          axis.formula == name ? "" : ", where " + axis.formula + " is " + std::to_string(shape[i]);
      throw EngineError(where + " has " + name + " " + (found ? std::to_string(*found) : "None") + of +
                        "; this engine takes " + range.text());
    }
    const auto known = sizes.emplace(name, *found).first;
    if (known->second != *found) {
      throw EngineError(where + " has " + name + " " + std::to_string(*found) + ", another input has " +
                        std::to_string(known->second));
    }
  }
}

std::string provider_names() {
  std::vector<std::string> names{"auto"};
  for (const auto& row : tables::kProviders) names.emplace_back(row.name);
  return joined(names);
}

}  // namespace

std::string reason_of(const std::string& message) {
  static const std::regex out_of_memory(
      "bad[_ ]?alloc|out[ _-]of[ _-]memory|memoryallocation|memory allocation|not enough memory|"
      "fail[a-z]* to allocate|can(no|')t allocate|(could not|unable to) allocate",
      std::regex::ECMAScript | std::regex::icase);
  std::string line;
  for (std::size_t begin = 0; begin < message.size() && line.find_first_not_of(" \t\r") == std::string::npos;) {
    const std::size_t end = std::min(message.find('\n', begin), message.size());
    line = message.substr(begin, end - begin);
    begin = end + 1;
  }
  const std::string text = shortened(plain(line), 400);
  if (std::regex_search(message.substr(0, 4000), out_of_memory)) {
    return "there is not enough memory (" + text + "); use --low-memory, or a smaller size or batch";
  }
  return text;
}

Sizes check_feeds(const EngineRecord& record, const Feeds& feeds, const Context& constants) {
  std::vector<std::string> missing, unknown, expected;
  for (const auto& tensor : record.inputs) {
    expected.push_back(tensor.name);
    if (feeds.count(tensor.name) == 0 && constants.count(tensor.name) == 0) missing.push_back(tensor.name);
  }
  std::set<std::string> given;
  for (const auto& item : feeds) given.insert(item.first);
  for (const auto& item : constants) given.insert(item.first);
  for (const auto& name : given) {
    if (std::find(expected.begin(), expected.end(), name) == expected.end()) unknown.push_back(name);
  }
  std::sort(missing.begin(), missing.end());
  if (!missing.empty()) throw EngineError(record.name + " was called without " + joined(missing));
  if (!unknown.empty()) {
    throw EngineError(record.name + " has no input " + joined(unknown) + "; it takes " + joined(expected));
  }
  const auto shape_of = [&](const std::string& name) {
    const auto constant = constants.find(name);
    return constant != constants.end() ? constant->second->shape() : feeds.at(name).shape;
  };
  Sizes sizes;
  for (const auto& tensor : record.inputs) {
    const auto constant = constants.find(tensor.name);
    const std::string dtype = constant != constants.end() ? constant->second->dtype() : feeds.at(tensor.name).dtype;
    check_input(record, tensor, dtype, shape_of(tensor.name), sizes);
  }
  for (const auto& tensor : record.inputs) check_shape(record, tensor, shape_of(tensor.name), sizes);
  return sizes;
}

void check_outputs(const EngineRecord& record, const Sizes& sizes, const Outputs& outputs) {
  for (const auto& tensor : record.outputs) {
    const auto host = outputs.host.find(tensor.name);
    const auto device = outputs.device.find(tensor.name);
    if (host == outputs.host.end() && device == outputs.device.end()) {
      throw EngineError(record.name + " returned no " + tensor.name);
    }
    const std::string dtype = host != outputs.host.end() ? "float32" : device->second->dtype();
    if (dtype != tensor.dtype) {
      throw EngineError(record.name + " returned " + tensor.name + " as " + dtype + "; it must be " + tensor.dtype);
    }
    check_shape(record, tensor, host != outputs.host.end() ? host->second.shape : device->second->shape(), sizes);
  }
}

Outputs Engine::run(const Feeds& feeds, const Context& constants) const {
  const Sizes sizes = check_feeds(record_, feeds, constants);
  Outputs made = call(feeds, constants);
  check_outputs(record_, sizes, made);
  return made;
}

bool Runtime::runs(const Precision& precision) const {
  const auto dtypes = computes();
  if (std::find(dtypes.begin(), dtypes.end(), precision.compute) == dtypes.end()) return false;
  for (const auto& row : tables::kProviders) {
    if (provider() != row.name) continue;
    for (const char* linear : row.linear) {
      if (linear != nullptr && precision.linear == linear) return true;
    }
  }
  return false;
}

std::unique_ptr<Runtime> open_runtime(const EngineOptions& options) {
  const tables::ProviderRow* row = nullptr;
  for (const auto& one : tables::kProviders) {
    if (options.provider == one.name) row = &one;
  }
  if (row == nullptr && options.provider != "auto") {
    throw RequestError("provider " + shown(options.provider) + " is not known; accepted: " + provider_names(),
                       "provider", Json(options.provider).dump(), provider_names());
  }
  if (options.threads && (*options.threads < 1 || *options.threads > tables::kMaxThreads)) {
    throw refused("threads", Json(*options.threads),
                  "an integer from 1 to " + std::to_string(tables::kMaxThreads) + ", or None");
  }
  if (options.device_id < 0) throw refused("device_id", Json(options.device_id), "an integer from 0");
  const bool cpu = row == nullptr || std::string(row->device) == "cpu";
  if (row != nullptr && cpu && options.device_id != 0) {
    throw RequestError("device_id " + std::to_string(options.device_id) + " is not accepted; provider " +
                           options.provider + " runs on the CPU, which is device 0",
                       "device_id", std::to_string(options.device_id), "0");
  }
  if (row != nullptr && std::string(row->runtime) != "onnx") {
    throw EngineError("provider " + options.provider +
                      " is not available in the C++ library, which runs graphs; use --provider cpu, cuda or "
                      "ort-tensorrt, or the Python package");
  }
  if (options.provider == "openvino") {
#ifdef CASCADE_RT_OPENVINO
    return open_openvino(options);
#else
    throw EngineError(
        "provider openvino is not available here: the library was built without it; build it with: cmake "
        "-DCASCADE_RT_OPENVINO=ON");
#endif
  }
  return open_onnxruntime(options);
}

}  // namespace cascade_rt::detail
