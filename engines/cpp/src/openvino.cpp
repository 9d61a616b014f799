// OpenVINO's CPU device, with the settings of cascade_rt/backends/openvino.py.
#include <openvino/op/constant.hpp>
#include <openvino/openvino.hpp>

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "bundle.hpp"
#include "engine.hpp"
#include "sampling.hpp"
#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

struct Kind {
  const char* dtype;
  const char* hint;
  const char* capability;
};
constexpr Kind kKinds[] = {{"float32", "f32", "FP32"}, {"float16", "f16", "FP16"}, {"bfloat16", "bf16", "BF16"}};

std::string last_line(const std::string& message) {
  const auto end = message.find_last_not_of(" \t\r\n");
  if (end == std::string::npos) return reason_of(message);
  const auto begin = message.rfind('\n', end);
  return reason_of(message.substr(begin == std::string::npos ? 0 : begin + 1, end - begin));
}

std::string dtype_of(const ov::element::Type& type) {
  if (type == ov::element::f32) return "float32";
  if (type == ov::element::f16) return "float16";
  if (type == ov::element::bf16) return "bfloat16";
  if (type == ov::element::i64) return "int64";
  return type == ov::element::u8 ? "uint8" : type.get_type_name();
}

Shape shape_of(const ov::Tensor& tensor) {
  const ov::Shape own = tensor.get_shape();
  return Shape(own.begin(), own.end());
}

ov::Shape theirs(const Shape& shape) { return ov::Shape(shape.begin(), shape.end()); }

class OpenVinoTensor : public DeviceTensor {
 public:
  explicit OpenVinoTensor(ov::Tensor value) : value_(std::move(value)) {}
  Shape shape() const override { return shape_of(value_); }
  std::string dtype() const override { return dtype_of(value_.get_element_type()); }
  const ov::Tensor& get() const { return value_; }

  std::shared_ptr<const DeviceTensor> rows(const std::vector<std::size_t>& chosen) const override {
    ov::Shape own = value_.get_shape();
    const std::size_t size = value_.get_byte_size() / own[0];
    own[0] = chosen.size();
    ov::Tensor made(value_.get_element_type(), own);
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      std::memcpy(static_cast<char*>(made.data()) + i * size, static_cast<const char*>(value_.data()) + chosen[i] * size,
                  size);
    }
    return std::make_shared<OpenVinoTensor>(std::move(made));
  }

 private:
  ov::Tensor value_;
};

class OpenVinoEngine : public Engine {
 public:
  OpenVinoEngine(const EngineRecord& record, ov::CompiledModel compiled)
      : Engine(record), compiled_(std::move(compiled)) {}

 protected:
  Outputs call(const Feeds& feeds, const Context& constants) const override {
    try {
      ov::InferRequest request = compiled_.create_infer_request();
      for (const auto& item : constants) {
        const auto* own = dynamic_cast<const OpenVinoTensor*>(item.second.get());
        if (own == nullptr) {
          throw EngineError(record_.name + ": " + item.first + " comes from another runtime than OpenVINO");
        }
        request.set_tensor(item.first, own->get());
      }
      for (const auto& item : feeds) {
        const auto type = item.second.dtype == "int64" ? ov::element::i64 : ov::element::f32;
        // OpenVINO only reads inputs, although the type of the argument does not say so
        request.set_tensor(item.first,
                           ov::Tensor(type, theirs(item.second.shape), const_cast<void*>(item.second.data)));
      }
      request.infer();
      Outputs made;
      for (const auto& tensor : record_.outputs) {
        const ov::Tensor value = request.get_tensor(tensor.name);
        if (tensor.on_host()) {
          if (value.get_element_type() != ov::element::f32) {
            throw EngineError(record_.name + " returned " + tensor.name + " as " +
                              dtype_of(value.get_element_type()) + "; it must be float32");
          }
          const auto* data = static_cast<const float*>(value.data());
          made.host[tensor.name] = Tensor{shape_of(value), {data, data + value.get_size()}};
        } else {
          made.device[tensor.name] = std::make_shared<OpenVinoTensor>(value);
        }
      }
      return made;
    } catch (const ov::Exception& error) {
      throw EngineError(record_.name + " failed in OpenVINO: " + last_line(error.what()));
    }
  }

 private:
  mutable ov::CompiledModel compiled_;
};

bool is_one(const ov::op::v0::Constant& constant) {
  if (!constant.get_shape().empty()) return false;
  const auto values = constant.cast_vector<float>();
  return values.size() == 1 && values[0] == 1.0F;
}

/// Take products with the constant 1 out of a graph: OpenVINO would fold them into copies of the weights.
void drop_unit_factors(const std::shared_ptr<ov::Model>& model) {
  for (const auto& node : model->get_ordered_ops()) {
    if (std::strcmp(node->get_type_name(), "Multiply") != 0) continue;
    for (const std::size_t factor : {std::size_t{0}, std::size_t{1}}) {
      const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(node->get_input_node_shared_ptr(factor));
      if (!constant || !is_one(*constant)) continue;
      const auto other = node->input_value(1 - factor);
      if (std::strcmp(other.get_node()->get_type_name(), "Parameter") != 0) node->output(0).replace(other);
      break;
    }
  }
}

class OpenVinoRuntime : public Runtime {
 public:
  explicit OpenVinoRuntime(const EngineOptions& options) : options_(options) {
    const auto there = core_.get_property("CPU", ov::device::capabilities);
    for (const auto& kind : kKinds) {
      if (std::find(there.begin(), there.end(), kind.capability) != there.end()) computes_.emplace_back(kind.dtype);
    }
    std::vector<std::string> known;
    for (const auto& name : core_.get_property("CPU", ov::supported_properties)) {
      if (name.is_mutable()) known.push_back(name);
    }
    for (const auto& item : options_.provider_options) {
      if (std::find(known.begin(), known.end(), item.first) == known.end()) {
        throw EngineError("provider openvino has no option " + shortened(plain(item.first)) +
                          "; accepted: " + joined(known));
      }
    }
  }

  const std::string& provider() const override { return options_.provider; }
  std::vector<std::string> computes() const override { return computes_; }

  std::unique_ptr<Engine> open(const EngineRecord& record, const std::string& path) const override {
    ov::AnyMap told{{"NUM_STREAMS", "1"}, {"PERFORMANCE_HINT", "LATENCY"}};
    std::string dtype = record.precision.compute;
    if (record.precision.linear == "int8") {  // the graph leaves it to the runtime how inputs are quantised
      told["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = std::string(tables::kOpenVinoInt8Group);
    }
    if (record.precision.linear == "w8") {  // its own groups would quantise inputs
      told["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = std::string("0");
    } else if (record.precision.linear != "plain") {  // what is not in 8 bits is bf16 where there is any
      if (std::find(computes_.begin(), computes_.end(), "bfloat16") != computes_.end()) dtype = "bfloat16";
    }
    for (const auto& kind : kKinds) {
      if (dtype == kind.dtype) told["INFERENCE_PRECISION_HINT"] = std::string(kind.hint);
    }
    if (options_.threads) told["INFERENCE_NUM_THREADS"] = std::to_string(*options_.threads);
    for (const auto& item : options_.provider_options) told[item.first] = item.second;
    try {
      const auto model = core_.read_model(path);
      drop_unit_factors(model);
      return std::make_unique<OpenVinoEngine>(record, core_.compile_model(model, "CPU", told));
    } catch (const ov::Exception& error) {
      throw EngineError(std::filesystem::u8path(path).filename().u8string() +
                        " cannot be compiled by OpenVINO: " + last_line(error.what()));
    }
  }

 private:
  EngineOptions options_;
  mutable ov::Core core_;
  std::vector<std::string> computes_;
};

}  // namespace

std::unique_ptr<Runtime> open_openvino(const EngineOptions& options) {
  try {
    return std::make_unique<OpenVinoRuntime>(options);
  } catch (const ov::Exception& error) {
    throw EngineError("OpenVINO cannot be started: " + last_line(error.what()));
  }
}

}  // namespace cascade_rt::detail
