/* Snake, x + sin²(αx)/α, alone and after a depthwise convolution of 7 taps, in one pass each.

   Arrays are (rows, streams, channels), channels innermost. Every element is computed by the same operations wherever
   it stands, so that results do not depend on how many rows come at once or on the number of threads. */
#include <math.h>
#include <stddef.h>

#define TAPS 7

/* sin²(y) has period π. The multiple of π is subtracted in three parts (Cody & Waite), so that the rest is exact to
   float32 for |y| up to some 10⁴; the rest, within ±π/2, goes through sine's odd Taylor polynomial with its last
   coefficients fitted. The error of the sine is below 1.2e-7. */
static inline float sine_squared(float y) {
    float turns = rintf(y * 0.318309886183790672f);
    float r = fmaf(turns, -3.140625f, y);
    r = fmaf(turns, -9.67502593994140625e-4f, r);
    r = fmaf(turns, -1.509957990978376432e-7f, r);
    float s = r * r;
    float p = -2.3889859e-8f;
    p = fmaf(p, s, 2.7525562e-6f);
    p = fmaf(p, s, -1.9840874e-4f);
    p = fmaf(p, s, 8.3333310e-3f);
    p = fmaf(p, s, -1.6666667e-1f);
    float sine = fmaf(s * r, p, r);
    return sine * sine;
}

void snake(const float *restrict x, const float *restrict alpha, const float *restrict inverse, float *restrict out,
           ptrdiff_t rows, ptrdiff_t channels) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t i = 0; i < rows; i++) {
#pragma omp simd
        for (ptrdiff_t c = 0; c < channels; c++) {
            float v = x[i * channels + c];
            out[i * channels + c] = fmaf(inverse[c], sine_squared(alpha[c] * v), v);
        }
    }
}

/* `step` is the number of rows between two taps: dilation × streams. */
void depthwise_snake(const float *restrict x, const float *restrict kernel, const float *restrict bias,
                     const float *restrict alpha, const float *restrict inverse, float *restrict out, ptrdiff_t rows,
                     ptrdiff_t channels, ptrdiff_t step) {
#pragma omp parallel for schedule(static)
    for (ptrdiff_t i = 0; i < rows; i++) {
#pragma omp simd
        for (ptrdiff_t c = 0; c < channels; c++) {
            float v = bias[c];
            for (int tap = 0; tap < TAPS; tap++)
                v = fmaf(x[(i + tap * step) * channels + c], kernel[tap * channels + c], v);
            out[i * channels + c] = fmaf(inverse[c], sine_squared(alpha[c] * v), v);
        }
    }
}
