// The kernels of the instruction set that this processor has.
#pragma once
#include "api.h"

extern "C" {
const MdplugKernels* mdplug_kernels_baseline();
#ifdef MDPLUG_X86
const MdplugKernels* mdplug_kernels_avx2();
const MdplugKernels* mdplug_kernels_avx512();
#endif
}

namespace mdplug {

inline const MdplugKernels* choose() {
#ifdef MDPLUG_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return mdplug_kernels_avx512();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return mdplug_kernels_avx2();
#endif
  return mdplug_kernels_baseline();
}

inline const MdplugKernels& kernels() {
  static const MdplugKernels* chosen = choose();
  return *chosen;
}

// The functions of one scalar type, by one name.
template <class T>
struct Of;
#define MDPLUG_OF(T, S)                                                                                     \
  template <>                                                                                               \
  struct Of<T> {                                                                                            \
    static auto harmonics() { return kernels().harmonics_##S; }                                              \
    static auto harmonics_backward() { return kernels().harmonics_backward_##S; }                            \
    static auto harmonics_tangent() { return kernels().harmonics_tangent_##S; }                              \
    static auto density() { return kernels().density_##S; }                                                  \
    static auto density_backward() { return kernels().density_backward_##S; }                                \
    static auto convolution() { return kernels().convolution_##S; }                                          \
    static auto convolution_backward() { return kernels().convolution_backward_##S; }                        \
    static auto convolution_second() { return kernels().convolution_second_##S; }                            \
    static auto polynomial() { return kernels().polynomial_##S; }                                            \
    static auto polynomial_backward() { return kernels().polynomial_backward_##S; }                          \
    static auto product() { return kernels().product_##S; }                                                  \
    static auto product_backward() { return kernels().product_backward_##S; }                                \
    static auto linear() { return kernels().linear_##S; }                                                    \
    static auto polynomial_coefficients() { return kernels().polynomial_coefficients_##S; }                  \
    static auto polynomial_second() { return kernels().polynomial_second_##S; }                              \
  };
MDPLUG_OF(float, f32)
MDPLUG_OF(double, f64)
#undef MDPLUG_OF

}  // namespace mdplug
