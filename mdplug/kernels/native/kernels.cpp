// All kernels for one instruction set: compiled once for each, with MDPLUG_ISA naming it.
#include "convolution_values.h"
#include "density.h"
#include "harmonics.h"
#include "polynomial_second.h"
#include "product.h"

#define MDPLUG_STRING_(x) #x
#define MDPLUG_STRING(x) MDPLUG_STRING_(x)
#define MDPLUG_JOIN_(a, b) a##b
#define MDPLUG_JOIN(a, b) MDPLUG_JOIN_(a, b)

namespace MDPLUG_ISA {

template <class T>
struct Entry {
  static constexpr int narrow = 64 / sizeof(T), wide = 128 / sizeof(T);

  static void conv(const MdplugConvolution* shape, int64_t n_senders, int64_t begin, int64_t end, const T* sent,
                   const T* harmonics, const MdplugRadial* radial, const int32_t* sender, const int32_t* first, T* out,
                   MdplugParallel parallel) {
    auto f = shape->block == wide ? convolution<T, wide> : convolution<T, narrow>;
    f(*shape, n_senders, begin, end, sent, harmonics, *radial, sender, first, out, parallel);
  }
  static void conv_backward(const MdplugConvolution* shape, int64_t n_senders, int64_t begin, int64_t end,
                            const T* sent, const T* harmonics, const MdplugRadial* radial, const int32_t* sender,
                            const int32_t* first, const T* grad, T* grad_sent, T* grad_harmonics, T* grad_radial,
                            MdplugParallel parallel) {
    auto f = shape->block == wide ? convolution_backward<T, wide> : convolution_backward<T, narrow>;
    if (!radial->table)
      f = shape->block == wide ? convolution_values_backward<T, wide> : convolution_values_backward<T, narrow>;
    f(*shape, n_senders, begin, end, sent, harmonics, *radial, sender, first, grad, grad_sent, grad_harmonics,
      grad_radial, parallel);
  }
  static void conv_second(const MdplugConvolution* shape, int64_t n_senders, int64_t begin, int64_t end, const T* sent,
                          const T* harmonics, const MdplugRadial* radial, const int32_t* sender, const int32_t* first,
                          const T* grad, const T* move_sent, const T* move_harmonics, const T* move_values,
                          T* grad_grad, T* grad_sent, T* grad_values, MdplugParallel parallel) {
    auto f = shape->block == wide ? convolution_second<T, wide> : convolution_second<T, narrow>;
    f(*shape, n_senders, begin, end, sent, harmonics, *radial, sender, first, grad, move_sent, move_harmonics,
      move_values, grad_grad, grad_sent, grad_values, parallel);
  }
  static void dens(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,
                   const MdplugRadial* radial, const int32_t* species, const int32_t* first, T* out,
                   MdplugParallel parallel) {
    density<T>(begin, end, b, m, kinds, harmonics, *radial, species, first, out, parallel);
  }
  static void dens_backward(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,
                            const MdplugRadial* radial, const int32_t* species, const int32_t* first, const T* grad,
                            T* grad_harmonics, T* grad_radial, MdplugParallel parallel) {
    density_backward<T>(begin, end, b, m, kinds, harmonics, *radial, species, first, grad, grad_harmonics, grad_radial,
                        parallel);
  }
  static void poly(const MdplugPolynomial* shape, int64_t n, int64_t k, const T* inputs, const T* coefficients,
                   const int32_t* kind, T* out, MdplugParallel parallel) {
    polynomial<T>(*shape, n, k, inputs, coefficients, kind, out, parallel);
  }
  static void poly_backward(const MdplugPolynomial* shape, int64_t n, int64_t k, const T* inputs,
                            const T* coefficients, const int32_t* kind, const T* grad, T* grad_inputs,
                            MdplugParallel parallel) {
    polynomial_backward<T>(*shape, n, k, inputs, coefficients, kind, grad, grad_inputs, parallel);
  }
  static void prod(const MdplugProduct* shape, const T* messages, const T* linear, const T* norm, const T* coefficients,
                   const T* mix, T* out, T* mixed, MdplugParallel parallel) {
    product<T>(*shape, messages, linear, norm, coefficients, mix, out, mixed, parallel);
  }
  static void prod_backward(const MdplugProduct* shape, const T* grad, const T* mixed, const T* linear, const T* norm,
                            const T* coefficients, const T* mix, T* grad_messages, T* grad_density,
                            MdplugParallel parallel) {
    product_backward<T>(*shape, grad, mixed, linear, norm, coefficients, mix, grad_messages, grad_density, parallel);
  }
  static void lin(const MdplugLinear* shape, const T* features, const T* weight, const T* base, T* out,
                  MdplugParallel parallel) {
    irrep_linear<T>(*shape, features, weight, base, out, parallel);
  }
  static void poly_coefficients(const MdplugPolynomial* shape, int64_t n, int64_t k, int64_t kinds, const T* inputs,
                                const int32_t* kind, const T* grad, T* out, MdplugParallel parallel) {
    polynomial_coefficients<T, narrow>(*shape, n, k, kinds, inputs, kind, grad, out, parallel);
  }
  static void poly_second(const MdplugPolynomial* shape, int64_t n, int64_t k, int64_t kinds, const T* inputs,
                          const T* coefficients, const int32_t* kind, const T* grad, const T* along, T* grad_grad,
                          T* grad_inputs, T* grad_coefficients, MdplugParallel parallel) {
    polynomial_second<T, narrow>(*shape, n, k, kinds, inputs, coefficients, kind, grad, along, grad_grad, grad_inputs,
                                 grad_coefficients, parallel);
  }
};

}  // namespace MDPLUG_ISA

using namespace MDPLUG_ISA;

#define MDPLUG_ENTRIES(T)                                                                                  \
  harmonics<T>, harmonics_backward<T>, harmonics_tangent<T>, Entry<T>::dens, Entry<T>::dens_backward,      \
      Entry<T>::conv, Entry<T>::conv_backward, Entry<T>::conv_second, Entry<T>::poly,                      \
      Entry<T>::poly_backward, Entry<T>::prod, Entry<T>::prod_backward, Entry<T>::lin,                     \
      Entry<T>::poly_coefficients, Entry<T>::poly_second

extern "C" const MdplugKernels* MDPLUG_JOIN(mdplug_kernels_, MDPLUG_ISA)() {
  static const MdplugKernels table = {MDPLUG_STRING(MDPLUG_ISA), MDPLUG_ENTRIES(float), MDPLUG_ENTRIES(double)};
  return &table;
}
