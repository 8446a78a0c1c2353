/* Scores one raw image by an ONNX file of padim_jax, against OpenVINO's C API.
 *
 *   ./score_openvino part.onnx HEIGHT WIDTH < pixels.rgb
 *
 * HEIGHT and WIDTH are the size of the file's input; pixels are uint8, RGB, row by row. */
#include <openvino/c/openvino.h>
#include <stdio.h>
#include <stdlib.h>

#define CHECK(call) \
    if ((call) != OK) { fprintf(stderr, "%s: %s\n", #call, ov_get_last_err_msg()); return 1; }

int main(int count, char **arguments) {
    if (count != 4) { fprintf(stderr, "expected FILE HEIGHT WIDTH\n"); return 2; }
    int64_t sides[] = {1, atoll(arguments[2]), atoll(arguments[3]), 3};
    size_t bytes = (size_t)(sides[1] * sides[2] * 3);
    unsigned char *pixels = malloc(bytes);
    if (!pixels || fread(pixels, 1, bytes, stdin) != bytes) { fprintf(stderr, "too few pixels\n"); return 2; }

    ov_core_t *core;
    ov_compiled_model_t *compiled;
    ov_infer_request_t *request;
    ov_shape_t shape;
    ov_tensor_t *images, *score;
    void *value;
    CHECK(ov_core_create(&core));
    /* Without this line OpenVINO computes in bfloat16 on processors that can. */
    CHECK(ov_core_compile_model_from_file(core, arguments[1], "CPU", 2, &compiled,
                                          "INFERENCE_PRECISION_HINT", "f32"));
    CHECK(ov_compiled_model_create_infer_request(compiled, &request));
    CHECK(ov_shape_create(4, sides, &shape));
    CHECK(ov_tensor_create_from_host_ptr(U8, shape, pixels, &images));
    CHECK(ov_infer_request_set_tensor(request, "images", images));
    CHECK(ov_infer_request_infer(request));
    CHECK(ov_infer_request_get_tensor(request, "score", &score));
    CHECK(ov_tensor_data(score, &value));
    printf("%.9g\n", *(float *)value);
    return 0;
}
