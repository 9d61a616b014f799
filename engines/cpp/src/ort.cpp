// ONNX Runtime through its C API, loaded when a pipeline is opened: no link to a version of the library.
#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <dlfcn.h>
#endif

#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include <algorithm>
#include <utility>

#include "bundle.hpp"
#include "engine.hpp"
#include "sampling.hpp"
#include "tables.hpp"

namespace cascade_rt::detail {

namespace {

// the oldest API that has everything that is used here; every newer library offers it
constexpr std::uint32_t kApiVersion = 17;

#ifdef _WIN32
constexpr const char* kDefaultLibraries[] = {"onnxruntime.dll"};
#elif defined(__APPLE__)
constexpr const char* kDefaultLibraries[] = {"libonnxruntime.dylib", "libonnxruntime.1.dylib"};
#else
constexpr const char* kDefaultLibraries[] = {"libonnxruntime.so.1", "libonnxruntime.so"};
#endif

void* load_library(const std::string& path, std::string& reason) {
#ifdef _WIN32
  HMODULE made = LoadLibraryW(std::filesystem::u8path(path).c_str());
  if (made == nullptr) reason = "error " + std::to_string(GetLastError());
  return reinterpret_cast<void*>(made);
#else
  void* made = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (made == nullptr) reason = dlerror();
  return made;
#endif
}

void* symbol_of(void* library, const char* name) {
#ifdef _WIN32
  return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(library), name));
#else
  return dlsym(library, name);
#endif
}

/// ONNX Runtime's functions. The library stays loaded until the process ends: it cannot be unloaded safely.
const OrtApi* load_api(const std::string& given) {
  std::vector<std::string> places;
  const char* named = std::getenv("ONNXRUNTIME_LIBRARY");
  if (!given.empty()) {
    places.push_back(given);
  } else if (named != nullptr && *named != '\0') {
    places.emplace_back(named);
  } else {
    places.assign(std::begin(kDefaultLibraries), std::end(kDefaultLibraries));
  }
  std::string reason;
  void* library = nullptr;
  for (const auto& place : places) {
    library = load_library(place, reason);
    if (library != nullptr) break;
  }
  if (library == nullptr) {
    throw EngineError("ONNX Runtime cannot be loaded: " + shortened(plain(reason), 300) +
                      "; give the path of its library in ONNXRUNTIME_LIBRARY");
  }
  using GetBase = const OrtApiBase*(ORT_API_CALL*)();
  const auto base = reinterpret_cast<GetBase>(symbol_of(library, "OrtGetApiBase"));
  const OrtApi* api = base == nullptr ? nullptr : base()->GetApi(kApiVersion);
  if (api == nullptr) {
    throw EngineError(name_of(places.front()) + " is no ONNX Runtime of version 1.17 or newer; give the path of "
                      "one in ONNXRUNTIME_LIBRARY");
  }
  return api;
}

const tables::OrtRow& row_of(const std::string& provider) {
  for (const auto& row : tables::kOrt) {
    if (provider == row.provider) return row;
  }
  throw EngineError("provider " + provider + " has no settings");
}

const char* dtype_word(ONNXTensorElementDataType type) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return "uint8";
    default: return "another type";
  }
}

/// The library with one environment; shared by everything that is made of it.
struct Library {
  const OrtApi* api;
  OrtEnv* env = nullptr;
  OrtMemoryInfo* host = nullptr;
  OrtAllocator* allocator = nullptr;

  explicit Library(const std::string& path) : api(load_api(path)) {
    check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "cascade-rt", &env), "ONNX Runtime cannot be started");
    check(api->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &host), "ONNX Runtime cannot be started");
    check(api->GetAllocatorWithDefaultOptions(&allocator), "ONNX Runtime cannot be started");
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  ~Library() {
    if (host != nullptr) api->ReleaseMemoryInfo(host);
    if (env != nullptr) api->ReleaseEnv(env);
  }

  void check(OrtStatus* status, const std::string& what) const {
    if (status == nullptr) return;
    const std::string message = api->GetErrorMessage(status);
    api->ReleaseStatus(status);
    throw EngineError(what + ": " + reason_of(message));
  }
};

using Shared = std::shared_ptr<const Library>;

struct Value {
  Shared library;
  OrtValue* value = nullptr;

  Value(Shared own, OrtValue* made) : library(std::move(own)), value(made) {}
  Value(Value&& other) noexcept : library(std::move(other.library)), value(std::exchange(other.value, nullptr)) {}
  Value(const Value&) = delete;
  Value& operator=(const Value&) = delete;
  Value& operator=(Value&&) = delete;
  ~Value() {
    if (value != nullptr) library->api->ReleaseValue(value);
  }

  std::pair<Shape, ONNXTensorElementDataType> info() const {
    OrtTensorTypeAndShapeInfo* told = nullptr;
    library->check(library->api->GetTensorTypeAndShape(value, &told), "a tensor has no shape");
    std::size_t rank = 0;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    library->api->ReleaseStatus(library->api->GetDimensionsCount(told, &rank));
    Shape shape(rank);
    library->api->ReleaseStatus(library->api->GetDimensions(told, shape.data(), rank));
    library->api->ReleaseStatus(library->api->GetTensorElementType(told, &type));
    library->api->ReleaseTensorTypeAndShapeInfo(told);
    return {shape, type};
  }

  void* data() const {
    void* made = nullptr;
    library->check(library->api->GetTensorMutableData(value, &made), "a tensor has no memory");
    return made;
  }
};

std::size_t item_size(ONNXTensorElementDataType type) {
  for (const auto& row : tables::kItemSizes) {
    if (std::strcmp(row.dtype, dtype_word(type)) == 0) return static_cast<std::size_t>(row.bytes);
  }
  throw EngineError("an engine made a tensor of another type than the manifest knows");
}

class OrtTensor : public DeviceTensor {
 public:
  explicit OrtTensor(Value value) : value_(std::move(value)) {
    auto told = value_.info();
    shape_ = std::move(told.first);
    type_ = told.second;
  }
  Shape shape() const override { return shape_; }
  std::string dtype() const override { return dtype_word(type_); }
  OrtValue* get() const { return value_.value; }

  std::shared_ptr<const DeviceTensor> rows(const std::vector<std::size_t>& chosen) const override {
    Shape shape = shape_;
    shape[0] = static_cast<std::int64_t>(chosen.size());
    const Shared& library = value_.library;
    OrtValue* made = nullptr;
    library->check(library->api->CreateTensorAsOrtValue(library->allocator, shape.data(), shape.size(), type_, &made),
                   "some rows of a tensor have no memory");
    Value own(library, made);
    const std::size_t size = count_of(shape_) / static_cast<std::size_t>(shape_[0]) * item_size(type_);
    auto* target = static_cast<char*>(own.data());
    const auto* source = static_cast<const char*>(value_.data());
    for (std::size_t i = 0; i < chosen.size(); ++i) std::memcpy(target + i * size, source + chosen[i] * size, size);
    return std::make_shared<OrtTensor>(std::move(own));
  }

 private:
  Value value_;
  Shape shape_;
  ONNXTensorElementDataType type_;
};

class OrtEngine : public Engine {
 public:
  OrtEngine(Shared library, OrtSession* session, const EngineRecord& record)
      : Engine(record), library_(std::move(library)), session_(session) {}
  OrtEngine(const OrtEngine&) = delete;
  OrtEngine& operator=(const OrtEngine&) = delete;
  ~OrtEngine() override { library_->api->ReleaseSession(session_); }

 protected:
  Outputs call(const Feeds& feeds, const Context& constants) const override {
    const OrtApi* api = library_->api;
    std::vector<Value> owned;
    owned.reserve(feeds.size());
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> inputs;
    for (const auto& tensor : record_.inputs) {
      input_names.push_back(tensor.name.c_str());
      const auto constant = constants.find(tensor.name);
      if (constant != constants.end()) {
        const auto* own = dynamic_cast<const OrtTensor*>(constant->second.get());
        if (own == nullptr) {
          throw EngineError(record_.name + ": " + tensor.name + " comes from another runtime than ONNX Runtime");
        }
        inputs.push_back(own->get());
        continue;
      }
      const Feed& feed = feeds.at(tensor.name);
      const auto type =
          feed.dtype == "int64" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      OrtValue* made = nullptr;
      // ONNX Runtime only reads inputs, although the type of the argument does not say so
      library_->check(api->CreateTensorWithDataAsOrtValue(library_->host, const_cast<void*>(feed.data),
                                                          count_of(feed.shape) * item_size(type), feed.shape.data(),
                                                          feed.shape.size(), type, &made),
                      record_.name + ": " + tensor.name);
      owned.emplace_back(library_, made);
      inputs.push_back(made);
    }
    for (const auto& tensor : record_.outputs) output_names.push_back(tensor.name.c_str());
    std::vector<OrtValue*> outputs(output_names.size(), nullptr);
    OrtStatus* status = api->Run(session_, nullptr, input_names.data(), inputs.data(), inputs.size(),
                                 output_names.data(), output_names.size(), outputs.data());
    std::vector<Value> results;
    results.reserve(outputs.size());
    for (OrtValue* one : outputs) results.emplace_back(library_, one);
    library_->check(status, record_.name + " failed in ONNX Runtime");
    Outputs made;
    for (std::size_t i = 0; i < results.size(); ++i) {
      const TensorSpec& tensor = record_.outputs[i];
      if (!tensor.on_host()) {
        made.device[tensor.name] = std::make_shared<OrtTensor>(std::move(results[i]));
        continue;
      }
      auto told = results[i].info();
      if (told.second != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        throw EngineError(record_.name + " returned " + tensor.name + " as " + dtype_word(told.second) +
                          "; it must be float32");
      }
      const auto* data = static_cast<const float*>(results[i].data());
      Tensor own{told.first, std::vector<float>(data, data + count_of(told.first))};
      made.host[tensor.name] = std::move(own);
    }
    return made;
  }

 private:
  Shared library_;
  OrtSession* session_;
};

/// Whether this is an x86 processor that is not known to have VNNI; Linux says what it has.
bool lacks_vnni() {
#if defined(__x86_64__) || defined(_M_X64)
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);) {
    if (line.compare(0, 5, "flags") == 0) return line.find("_vnni") == std::string::npos;
  }
  return true;
#else
  return false;
#endif
}

struct OptionsHandle {
  const OrtApi* api;
  OrtSessionOptions* options = nullptr;
  ~OptionsHandle() {
    if (options != nullptr) api->ReleaseSessionOptions(options);
  }
};

class OrtRuntime : public Runtime {
 public:
  explicit OrtRuntime(const EngineOptions& options)
      : options_(options), library_(std::make_shared<Library>(options.library)), provider_(options.provider) {
    const auto there = available();
    const auto has = [&](const std::string& provider) {
      return std::find(there.begin(), there.end(), row_of(provider).ep) != there.end();
    };
    if (provider_ == "auto") provider_ = has("cuda") && opens_cuda() ? "cuda" : "cpu";
    if (!has(provider_)) {
      std::vector<std::string> at_hand;
      for (const auto& row : tables::kOrt) {
        if (has(row.provider)) at_hand.emplace_back(row.provider);
      }
      throw EngineError("provider " + provider_ + " is not available here; available: " + joined(at_hand) +
                        ". Give the path of an ONNX Runtime that has it in ONNXRUNTIME_LIBRARY");
    }
    const auto& row = row_of(provider_);
    for (const auto& item : options_.provider_options) {
      const bool setting = item.first.find('.') != std::string::npos;
      bool known = !setting && std::string(row.device) != "cpu";
      std::vector<std::string> names;
      for (const char* const* name = tables::kConfiguration; *name != nullptr; ++name) {
        names.emplace_back(*name);
        known = known || (setting && item.first == *name);
      }
      if (!known) {
        throw EngineError("provider " + provider_ + " has no option " + shortened(plain(item.first)) + "; accepted: " +
                          joined(names) +
                          (provider_ == "cpu" ? "" : ", and those of ONNX Runtime's documentation of the provider"));
      }
    }
  }

  const std::string& provider() const override { return provider_; }

  std::vector<std::string> computes() const override {
    for (const auto& row : tables::kProviders) {
      if (provider_ != row.name) continue;
      std::vector<std::string> made;
      for (const char* dtype : row.computes) {
        if (dtype != nullptr) made.emplace_back(dtype);
      }
      return made;
    }
    return {};
  }

  std::unique_ptr<Engine> open(const EngineRecord& record, const std::string& path) const override {
    const OrtApi* api = library_->api;
    const auto& row = row_of(provider_);
    const std::string file = std::filesystem::u8path(path).filename().u8string();
    const std::string what = file + " cannot be loaded by provider " + provider_;
    OptionsHandle told{api};
    library_->check(api->CreateSessionOptions(&told.options), what);
    library_->check(api->SetSessionLogSeverityLevel(told.options, 3), what);
    if (!row.plans_memory) library_->check(api->DisableMemPattern(told.options), what);
    if (options_.threads) {
      library_->check(api->SetIntraOpNumThreads(told.options, static_cast<int>(*options_.threads)), what);
    }
    std::map<std::string, std::string> entries, own;
    for (const tables::Pair* pair = row.session; pair->key != nullptr; ++pair) entries[pair->key] = pair->value;
    if ((record.precision.linear == "int8" || record.precision.linear == "int8-static") && lacks_vnni()) {
      for (const tables::Pair* pair = tables::kExactInt8; pair->key != nullptr; ++pair) entries[pair->key] = pair->value;
    }
    if (record.precision.linear == "w8") {
      for (const tables::Pair* pair = tables::kWideInputs; pair->key != nullptr; ++pair) entries[pair->key] = pair->value;
    }
    for (const tables::Pair* pair = row.options; pair->key != nullptr; ++pair) own[pair->key] = pair->value;
    if (std::string(row.device) == "cuda") own["device_id"] = std::to_string(options_.device_id);
    for (const auto& item : options_.provider_options) {
      (item.first.find('.') != std::string::npos ? entries : own)[item.first] = item.second;
    }
    for (const auto& item : entries) {
      library_->check(api->AddSessionConfigEntry(told.options, item.first.c_str(), item.second.c_str()), what);
    }
    for (const auto& item : record.ranges) {  // an axis with one size is no axis that is free
      if (const auto size = item.second.only()) {
        library_->check(api->AddFreeDimensionOverrideByName(told.options, item.first.c_str(), *size), what);
      }
    }
    append(told, own, what);
    OrtSession* session = nullptr;
#ifdef _WIN32
    const std::wstring name = std::filesystem::u8path(path).wstring();
#else
    const std::string& name = path;
#endif
    const std::string bf16 =
        record.precision.compute == "bfloat16" && *row.bf16 != '\0' ? std::string(" (") + row.bf16 + ")" : "";
    OrtStatus* status = api->CreateSession(library_->env, name.c_str(), told.options, &session);
    if (status != nullptr) {
      const std::string message = api->GetErrorMessage(status);
      api->ReleaseStatus(status);
      throw EngineError(what + ": " + reason_of(message) + bf16);
    }
    return std::make_unique<OrtEngine>(library_, session, record);
  }

 private:
  std::vector<std::string> available() const {
    char** names = nullptr;
    int count = 0;
    library_->check(library_->api->GetAvailableProviders(&names, &count), "ONNX Runtime lists no providers");
    std::vector<std::string> made(names, names + count);
    library_->api->ReleaseStatus(library_->api->ReleaseAvailableProviders(names, count));
    return made;
  }

  bool opens_cuda() const {
    OptionsHandle told{library_->api};
    library_->check(library_->api->CreateSessionOptions(&told.options), "ONNX Runtime");
    try {
      append_cuda(told, {{"device_id", std::to_string(options_.device_id)}}, "cuda");
      return true;
    } catch (const EngineError&) {
      return false;  // its libraries do not load, or there is no GPU: "auto" is the CPU then
    }
  }

  void append(const OptionsHandle& told, const std::map<std::string, std::string>& own, const std::string& what) const {
    if (provider_ == "cuda") append_cuda(told, own, what);
    if (provider_ == "ort-tensorrt") append_tensorrt(told, own, what);
  }

  template <class Options>
  static std::pair<std::vector<const char*>, std::vector<const char*>> split(const Options& own) {
    std::pair<std::vector<const char*>, std::vector<const char*>> made;
    for (const auto& item : own) {
      made.first.push_back(item.first.c_str());
      made.second.push_back(item.second.c_str());
    }
    return made;
  }

  void append_cuda(const OptionsHandle& told, const std::map<std::string, std::string>& own,
                   const std::string& what) const {
    const OrtApi* api = library_->api;
    OrtCUDAProviderOptionsV2* made = nullptr;
    library_->check(api->CreateCUDAProviderOptions(&made), what);
    const std::unique_ptr<OrtCUDAProviderOptionsV2, decltype(api->ReleaseCUDAProviderOptions)> hold(
        made, api->ReleaseCUDAProviderOptions);
    const auto words = split(own);
    library_->check(api->UpdateCUDAProviderOptions(made, words.first.data(), words.second.data(), own.size()), what);
    library_->check(api->SessionOptionsAppendExecutionProvider_CUDA_V2(told.options, made), what);
  }

  void append_tensorrt(const OptionsHandle& told, const std::map<std::string, std::string>& own,
                       const std::string& what) const {
    const OrtApi* api = library_->api;
    OrtTensorRTProviderOptionsV2* made = nullptr;
    library_->check(api->CreateTensorRTProviderOptions(&made), what);
    const std::unique_ptr<OrtTensorRTProviderOptionsV2, decltype(api->ReleaseTensorRTProviderOptions)> hold(
        made, api->ReleaseTensorRTProviderOptions);
    const auto words = split(own);
    library_->check(api->UpdateTensorRTProviderOptions(made, words.first.data(), words.second.data(), own.size()), what);
    library_->check(api->SessionOptionsAppendExecutionProvider_TensorRT_V2(told.options, made), what);
  }

  EngineOptions options_;
  Shared library_;
  std::string provider_;
};

}  // namespace

std::unique_ptr<Runtime> open_onnxruntime(const EngineOptions& options) {
  return std::make_unique<OrtRuntime>(options);
}

}  // namespace cascade_rt::detail
