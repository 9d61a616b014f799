/* cascade_rt for C, and for every language that calls C: opaque handles, sized structs, the last error by thread.
 *
 * Promises of the binary interface, within one minor version: functions keep their names and arguments; structs grow at
 * the end only, and `size` says which version a caller was compiled with (set it to sizeof the struct); what a function
 * returns as `const char*` stays valid until the next call on the same handle, or on the same thread for errors.
 * Threads: as in cascade_rt.hpp. Every function may be called with NULL handles: it fails with CASCADE_REQUEST_ERROR.
 */
#ifndef CASCADE_RT_CASCADE_RT_H
#define CASCADE_RT_CASCADE_RT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum cascade_status {
  CASCADE_OK = 0,
  CASCADE_REQUEST_ERROR = 1,   /* the request was wrong */
  CASCADE_BUNDLE_ERROR = 2,    /* a bundle is damaged, of another format, or lacks an engine */
  CASCADE_NOT_FOUND = 3,       /* there is no bundle at the given place */
  CASCADE_ENGINE_ERROR = 4,    /* an engine could not be loaded or run */
  CASCADE_OUTPUT_ERROR = 5,    /* a file could not be written */
  CASCADE_INTERRUPTED = 6,     /* cascade_interrupt was called */
  CASCADE_OUT_OF_MEMORY = 7,
  CASCADE_FAILED = 8,          /* anything else; the message says what */
  CASCADE_CHECKPOINT_ERROR = 9 /* a LoRA file is missing, damaged, or does not fit */
} cascade_status;

typedef struct cascade_bundle cascade_bundle;
typedef struct cascade_pipeline cascade_pipeline;
typedef struct cascade_result cascade_result;

/* The last error of this thread. Texts are empty, never NULL, and valid until the next call on this thread. */
typedef struct cascade_error {
  size_t size;           /* sizeof(cascade_error) */
  const char* kind;      /* the class in Python, "RequestError" */
  const char* message;
  const char* field;     /* what was wrong, in the words of the request */
  const char* value;     /* what was given */
  const char* accepted;  /* what would have been taken */
} cascade_error;

typedef struct cascade_options {
  size_t size;                      /* sizeof(cascade_options) */
  const char* provider;             /* "auto", "cpu", "cuda", "ort-tensorrt", "openvino"; NULL: "auto" */
  int32_t low_memory;               /* 1: keep one engine loaded at a time */
  int32_t threads;                  /* 0: the provider's choice */
  int32_t device_id;                /* which GPU */
  const char* onnxruntime_library;  /* path; NULL: $ONNXRUNTIME_LIBRARY, else the system's search path */
} cascade_options;

/* What a callback is told at the end of a step. */
typedef struct cascade_step {
  size_t size;            /* of the struct that is handed over */
  const char* stage;      /* "stage_c" or "stage_b" */
  int64_t index;          /* 0 for the first */
  int64_t steps;
  double ratio;           /* timestep ratio that the network was given */
  const int64_t* shape;   /* of latents: B, C, H, W */
  const float* latents;   /* after the step; valid during the call */
} cascade_step;

/* A picture of a result: 8-bit RGB, rows from the top, no padding; it belongs to the result. */
typedef struct cascade_image {
  size_t size; /* sizeof(cascade_image) */
  int64_t width;
  int64_t height;
  const uint8_t* rgb;
  uint64_t seed;
} cascade_image;

/* Called at the end of every step; 0 goes on, anything else stops like cascade_interrupt. */
typedef int32_t (*cascade_step_callback)(const cascade_step* step, void* user);

const char* cascade_version(void);
/* Fill in the last error of this thread. */
void cascade_last_error(cascade_error* error);

cascade_status cascade_bundle_open(const char* path, cascade_bundle** bundle);
/* Text of cascade.json. */
const char* cascade_bundle_manifest(const cascade_bundle* bundle);
void cascade_bundle_free(cascade_bundle* bundle);

/* A pipeline holds its bundle: the bundle's handle may be freed at once. options may be NULL. */
cascade_status cascade_pipeline_open(const cascade_bundle* bundle, const cascade_options* options,
                                     cascade_pipeline** pipeline);
void cascade_pipeline_free(cascade_pipeline* pipeline);
/* Stop the request that runs now before its next step; from any thread. */
void cascade_interrupt(cascade_pipeline* pipeline);

/* Make pictures of a request, in the JSON of Python's Request ({"prompt": "a red circle", "seeds": [7]}). */
cascade_status cascade_generate(cascade_pipeline* pipeline, const char* request_json, cascade_step_callback callback,
                                void* user, cascade_result** result);
/* What a request means: JSON with the request, every default filled in, and sizes. Valid until the next call. */
cascade_status cascade_plan(cascade_pipeline* pipeline, const char* request_json, const char** plan_json);

size_t cascade_result_count(const cascade_result* result);
cascade_status cascade_result_image(const cascade_result* result, size_t index, cascade_image* image);
/* The request with every default filled in, as JSON. */
const char* cascade_result_request(const cascade_result* result);
/* Seconds of each part, as JSON. */
const char* cascade_result_timings(const cascade_result* result);
/* Write a picture as PNG; it carries the request that makes it alone. */
cascade_status cascade_result_save(const cascade_result* result, size_t index, const char* path);
void cascade_result_free(cascade_result* result);

#ifdef __cplusplus
}
#endif

#endif
