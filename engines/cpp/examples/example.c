/* A picture from a request: example_c BUNDLE '{"prompt": "a red circle", "seeds": [7]}' picture.png */
#include <cascade_rt/cascade_rt.h>
#include <stdio.h>

static int failed(const char* what) {
  cascade_error error = {sizeof error, NULL, NULL, NULL, NULL, NULL};
  cascade_last_error(&error);
  fprintf(stderr, "%s: %s: %s\n", what, error.kind, error.message);
  return 1;
}

static int32_t progress(const cascade_step* step, void* user) {
  (void)user;
  fprintf(stderr, "%s %d/%d\n", step->stage, (int)step->index + 1, (int)step->steps);
  return 0;
}

int main(int argc, char** argv) {
  cascade_bundle* bundle = NULL;
  cascade_pipeline* pipeline = NULL;
  cascade_result* result = NULL;
  int code = 0;
  if (argc != 4) {
    fprintf(stderr, "usage: %s BUNDLE REQUEST.json FILE.png\n", argv[0]);
    return 2;
  }
  if (cascade_bundle_open(argv[1], &bundle) != CASCADE_OK || cascade_pipeline_open(bundle, NULL, &pipeline) != CASCADE_OK)
    code = failed("opening");
  else if (cascade_generate(pipeline, argv[2], progress, NULL, &result) != CASCADE_OK)
    code = failed("generating");
  else if (cascade_result_save(result, 0, argv[3]) != CASCADE_OK)
    code = failed("writing");
  else
    printf("%s: %s\n", argv[3], cascade_result_timings(result));
  cascade_result_free(result);
  cascade_pipeline_free(pipeline);
  cascade_bundle_free(bundle);
  return code;
}
