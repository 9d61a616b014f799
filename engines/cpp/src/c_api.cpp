#include "cascade_rt/cascade_rt.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "bundle.hpp"
#include "request.hpp"
#include "tables.hpp"

using cascade_rt::detail::Json;
using cascade_rt::detail::json_text;

struct cascade_bundle {
  std::shared_ptr<const cascade_rt::Bundle> bundle;
};

struct cascade_pipeline {
  cascade_rt::Pipeline pipeline;
  std::string plan;
};

struct cascade_result {
  cascade_rt::Result result;
  std::string request, timings;
};

namespace {

struct LastError {
  std::string kind, message, field, value, accepted;
};

thread_local LastError last_error;

cascade_status note(cascade_status status, const char* kind, const char* message) {
  last_error = {kind, message, "", "", ""};
  return status;
}

cascade_status note(cascade_status status, const cascade_rt::Error& error) {
  last_error = {error.kind(), error.what(), error.field(), error.value(), error.accepted()};
  return status;
}

/// Run `work`; what it throws becomes a status and the last error. Nothing is thrown to C.
template <class Work>
cascade_status guarded(const Work& work) noexcept {
  try {
    try {
      work();
      return CASCADE_OK;
    } catch (const cascade_rt::RequestError& error) {
      return note(CASCADE_REQUEST_ERROR, error);
    } catch (const cascade_rt::BundleNotFoundError& error) {
      return note(CASCADE_NOT_FOUND, error);
    } catch (const cascade_rt::BundleError& error) {
      return note(CASCADE_BUNDLE_ERROR, error);
    } catch (const cascade_rt::CheckpointError& error) {
      return note(CASCADE_CHECKPOINT_ERROR, error);
    } catch (const cascade_rt::EngineError& error) {
      return note(CASCADE_ENGINE_ERROR, error);
    } catch (const cascade_rt::OutputError& error) {
      return note(CASCADE_OUTPUT_ERROR, error);
    } catch (const cascade_rt::GenerationInterrupted& error) {
      return note(CASCADE_INTERRUPTED, error);
    } catch (const std::bad_alloc&) {
      return note(CASCADE_OUT_OF_MEMORY, "MemoryError",
                  "there is not enough memory for this; use low_memory, or a smaller size");
    } catch (const std::exception& error) {
      return note(CASCADE_FAILED, "Error", error.what());
    }
  } catch (...) {
    return CASCADE_OUT_OF_MEMORY;  // the last error itself could not be stored
  }
}

template <class T>
void need(const T* argument, const char* name) {
  if (argument == nullptr) {
    throw cascade_rt::RequestError(std::string(name) + " NULL is not accepted; it must be a pointer", name, "NULL",
                                   "a pointer");
  }
}

/// The fields that both sides know.
template <class T>
T known_part(const T* given) {
  T made{};
  if (given != nullptr) std::memcpy(&made, given, std::min(given->size, sizeof made));
  return made;
}

template <class T>
void hand_over(const T& made, T* out) {
  const std::size_t size = out->size;
  std::memcpy(out, &made, std::min(size, sizeof made));
  out->size = size;
}

}  // namespace

const char* cascade_version(void) { return cascade_rt::version(); }

void cascade_last_error(cascade_error* error) {
  if (error == nullptr) return;
  const cascade_error made{sizeof made,
                           last_error.kind.c_str(),
                           last_error.message.c_str(),
                           last_error.field.c_str(),
                           last_error.value.c_str(),
                           last_error.accepted.c_str()};
  hand_over(made, error);
}

cascade_status cascade_bundle_open(const char* path, cascade_bundle** bundle) {
  return guarded([&] {
    need(path, "path");
    need(bundle, "bundle");
    *bundle = new cascade_bundle{cascade_rt::Bundle::open(path)};
  });
}

const char* cascade_bundle_manifest(const cascade_bundle* bundle) {
  return bundle == nullptr ? "" : bundle->bundle->manifest().c_str();
}

void cascade_bundle_free(cascade_bundle* bundle) { delete bundle; }

cascade_status cascade_pipeline_open(const cascade_bundle* bundle, const cascade_options* options,
                                     cascade_pipeline** pipeline) {
  return guarded([&] {
    need(bundle, "bundle");
    need(pipeline, "pipeline");
    const cascade_options given = known_part(options);
    cascade_rt::Options own;
    if (given.provider != nullptr) own.provider = given.provider;
    own.low_memory = given.low_memory != 0;
    if (given.threads != 0) own.threads = given.threads;
    own.device_id = given.device_id;
    if (given.onnxruntime_library != nullptr) own.onnxruntime_library = given.onnxruntime_library;
    *pipeline = new cascade_pipeline{cascade_rt::Pipeline(bundle->bundle, own), {}};
  });
}

void cascade_pipeline_free(cascade_pipeline* pipeline) { delete pipeline; }

void cascade_interrupt(cascade_pipeline* pipeline) {
  if (pipeline != nullptr) pipeline->pipeline.interrupt();
}

cascade_status cascade_generate(cascade_pipeline* pipeline, const char* request_json, cascade_step_callback callback,
                                void* user, cascade_result** result) {
  return guarded([&] {
    need(pipeline, "pipeline");
    need(request_json, "request_json");
    need(result, "result");
    const auto request = cascade_rt::Request::from_json(request_json);
    if (request.output_type != "pil") {
      throw cascade_rt::RequestError("output_type '" + request.output_type + "' is not taken by the C functions, which "
                                     "return pictures; leave it out", "output_type", request.output_type, "pil");
    }
    cascade_rt::StepCallback told;
    if (callback != nullptr) {
      told = [&](const cascade_rt::Step& step) -> std::optional<cascade_rt::Tensor> {
        const cascade_step own{sizeof own, step.stage,  step.index,
                               step.steps, step.ratio,  step.latents.shape.data(),
                               step.latents.data.data()};
        if (callback(&own, user) != 0) {
          throw cascade_rt::GenerationInterrupted("interrupted by the callback after step " +
                                                  std::to_string(step.index + 1) + " of " +
                                                  std::to_string(step.steps) + " of " + step.stage);
        }
        return std::nullopt;
      };
    }
    auto made = std::make_unique<cascade_result>();
    made->result = pipeline->pipeline.generate(request, told);
    made->request = made->result.request.to_json();
    made->timings = json_text(Json(made->result.timings));
    *result = made.release();
  });
}

cascade_status cascade_plan(cascade_pipeline* pipeline, const char* request_json, const char** plan_json) {
  return guarded([&] {
    need(pipeline, "pipeline");
    need(request_json, "request_json");
    need(plan_json, "plan_json");
    const auto planned = pipeline->pipeline.plan(cascade_rt::Request::from_json(request_json));
    Json made = Json::object();
    made["request"] = cascade_rt::detail::to_json(planned.request);
    made["pictures"] = planned.pictures;
    made["height"] = planned.height;
    made["width"] = planned.width;
    made["engines"] = planned.engines;
    made["memory"] = planned.memory;
    pipeline->plan = json_text(made);
    *plan_json = pipeline->plan.c_str();
  });
}

size_t cascade_result_count(const cascade_result* result) {
  return result == nullptr ? 0 : result->result.images.size();
}

namespace {

std::uint64_t seed_of(const cascade_rt::Result& result, std::size_t index) {
  return result.seeds[result.seeds.size() == 1 ? 0 : index];
}

const cascade_rt::Image& image_of(const cascade_result* result, std::size_t index) {
  need(result, "result");
  if (index >= result->result.images.size()) {
    throw cascade_rt::RequestError("index " + std::to_string(index) + " is not accepted; it must be below " +
                                       std::to_string(result->result.images.size()),
                                   "index", std::to_string(index));
  }
  return result->result.images[index];
}

}  // namespace

cascade_status cascade_result_image(const cascade_result* result, size_t index, cascade_image* image) {
  return guarded([&] {
    need(image, "image");
    const auto& own = image_of(result, index);
    hand_over(cascade_image{sizeof(cascade_image), own.width, own.height, own.rgb.data(),
                            seed_of(result->result, index)},
              image);
  });
}

const char* cascade_result_request(const cascade_result* result) {
  return result == nullptr ? "" : result->request.c_str();
}

const char* cascade_result_timings(const cascade_result* result) {
  return result == nullptr ? "" : result->timings.c_str();
}

cascade_status cascade_result_save(const cascade_result* result, size_t index, const char* path) {
  return guarded([&] {
    need(path, "path");
    const auto& image = image_of(result, index);
    cascade_rt::write_files({{path, cascade_rt::encode_png(image, {{cascade_rt::tables::kRequestKey,
                                                                     cascade_rt::alone(result->result, index).to_json()}})}});
  });
}

void cascade_result_free(cascade_result* result) { delete result; }
