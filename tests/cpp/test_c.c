/* The C functions, compiled by a C compiler: a picture, what they refuse, and handles that are not there. */
#include <cascade_rt/cascade_rt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      cascade_error last = {sizeof last, NULL, NULL, NULL, NULL, NULL}; \
      cascade_last_error(&last);                                         \
      fprintf(stderr, "line %d: %s (%s)\n", __LINE__, #condition, last.message); \
      return 1;                                                           \
    }                                                                     \
  } while (0)

static int32_t count_steps(const cascade_step* step, void* user) {
  int* counted = user;
  if (step->shape[0] != 2 || step->latents == NULL) return 1;
  ++*counted;
  return 0;
}

static int32_t stop(const cascade_step* step, void* user) {
  (void)user;
  return step->index == 1;
}

int main(void) {
  const char* place = getenv("CASCADE_RT_BUNDLE");
  const char* request = "{\"prompt\": \"a red circle\", \"seeds\": [3, 4], \"prior\": {\"num_inference_steps\": 4},"
                        " \"decoder\": {\"num_inference_steps\": 2}}";
  const char* pictures = "{\"seeds\": [3], \"strength\": 0, \"height\": 128, \"width\": 128, \"init_image\": \""
                         "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAABAAAAAIAQAAAADYDUI6AAAAI"
                         "ElEQVR4nGNwn8QQzsFwOpehs5rh72SGM8wMh0wYsssAWWkHq9qqbkwAAAAASUVORK5CYII=\"}";
  const char* style = "{\"prompt\": \"a\", \"loras\": [{\"file\": \"/nowhere/x.safetensors\"}]}";
  cascade_bundle* bundle = NULL;
  cascade_pipeline* pipeline = NULL;
  cascade_result* result = NULL;
  cascade_options options;
  cascade_error error;
  cascade_image image;
  const char* plan = NULL;
  int counted = 0;
  memset(&options, 0, sizeof options);
  options.size = sizeof options;
  options.provider = "cpu";
  error.size = sizeof error;
  image.size = sizeof image;
  CHECK(strlen(cascade_version()) > 0);
  CHECK(cascade_bundle_open("/nowhere", &bundle) == CASCADE_NOT_FOUND);
  cascade_last_error(&error);
  CHECK(strcmp(error.kind, "BundleNotFoundError") == 0 && strstr(error.message, "cascade-export") != NULL);
  CHECK(cascade_bundle_open(NULL, &bundle) == CASCADE_REQUEST_ERROR);
  CHECK(cascade_generate(NULL, request, NULL, NULL, &result) == CASCADE_REQUEST_ERROR);
  cascade_result_free(NULL);
  cascade_pipeline_free(NULL);
  cascade_bundle_free(NULL);
  if (place == NULL) {
    printf("CASCADE_RT_BUNDLE is not set: no picture was made\n");
    return 0;
  }
  CHECK(cascade_bundle_open(place, &bundle) == CASCADE_OK);
  CHECK(strstr(cascade_bundle_manifest(bundle), "format_version") != NULL);
  options.provider = "abacus";
  CHECK(cascade_pipeline_open(bundle, &options, &pipeline) == CASCADE_REQUEST_ERROR);
  options.provider = "cpu";
  CHECK(cascade_pipeline_open(bundle, &options, &pipeline) == CASCADE_OK);
  cascade_bundle_free(bundle); /* the pipeline holds it */
  CHECK(cascade_generate(pipeline, "{\"prompt\": \"a\", \"height\": 5}", NULL, NULL, &result) == CASCADE_REQUEST_ERROR);
  cascade_last_error(&error);
  CHECK(strcmp(error.field, "height") == 0 && strcmp(error.value, "5") == 0);
  CHECK(cascade_plan(pipeline, request, &plan) == CASCADE_OK && strstr(plan, "\"pictures\": 2") != NULL);
  CHECK(cascade_generate(pipeline, request, count_steps, &counted, &result) == CASCADE_OK);
  CHECK(counted == 6 && cascade_result_count(result) == 2);
  CHECK(cascade_result_image(result, 1, &image) == CASCADE_OK && image.width == 256 && image.seed == 4);
  CHECK(cascade_result_image(result, 2, &image) == CASCADE_REQUEST_ERROR);
  CHECK(strstr(cascade_result_request(result), "\"seeds\": [3, 4]") != NULL);
  CHECK(strstr(cascade_result_timings(result), "stage_c") != NULL);
  CHECK(cascade_result_save(result, 0, "/nowhere/x.png") == CASCADE_OUTPUT_ERROR);
  cascade_result_free(result);
  result = NULL;
  CHECK(cascade_generate(pipeline, request, stop, NULL, &result) == CASCADE_INTERRUPTED && result == NULL);
  CHECK(cascade_generate(pipeline, pictures, NULL, NULL, &result) == CASCADE_OK);
  CHECK(cascade_result_image(result, 0, &image) == CASCADE_OK && image.width == 128 && image.height == 128);
  cascade_result_free(result);
  result = NULL;
  CHECK(cascade_generate(pipeline, style, NULL, NULL, &result) == CASCADE_CHECKPOINT_ERROR && result == NULL);
  cascade_last_error(&error);
  CHECK(strstr(error.message, "there is no file /nowhere/x.safetensors") != NULL);
  cascade_pipeline_free(pipeline);
  printf("the C functions are as described\n");
  return 0;
}
