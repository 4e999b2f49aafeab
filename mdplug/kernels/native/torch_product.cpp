// Operators on atoms: the polynomial, what surrounds it in a layer, and matrices per irrep.
#include "dispatch.h"
#include "torch_polynomial.h"

namespace mdplug {
namespace {

void expect(bool fits, const char* what) {
  if (!fits) throw std::runtime_error(std::string("mdplug kernels: wrong size of ") + what);
}

template <class T>
Tensor polynomial(Arguments& a, const Tensor& inputs, bool backward) {
  Tensor &coefficients = a.tensor(), &kind = a.tensor(), &nodes = a.tensor(), &term = a.tensor(), &starts = a.tensor();
  const int64_t n = inputs.size(1), k = inputs.size(2);
  const MdplugPolynomial shape = shape_of(nodes, term, starts, inputs.size(0));
  const T *x = inputs.data<T>("inputs"), *c = coefficients.data<T>("coefficients");
  const int32_t* z = kind.data<int32_t>("kind");
  if (!backward) {
    Tensor out = Tensor::empty<T>({shape.n_outputs, n, k});
    Of<T>::polynomial()(&shape, n, k, x, c, z, out.data<T>("out"), parallel);
    return out;
  }
  Tensor& grad = a.tensor();
  Tensor out = Tensor::empty<T>({shape.n_inputs, n, k});
  Of<T>::polynomial_backward()(&shape, n, k, x, c, z, grad.data<T>("grad"), out.data<T>("out"), parallel);
  return out;
}

void op_polynomial(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& x = a.tensor();
  Tensor out = x.is_float32() ? polynomial<float>(a, x, false) : polynomial<double>(a, x, false);
  stack[0] = out.release();
}

void op_polynomial_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& x = a.tensor();
  Tensor out = x.is_float32() ? polynomial<float>(a, x, true) : polynomial<double>(a, x, true);
  stack[0] = out.release();
}


template <class T>
void product(StableIValue* stack, Arguments& a, Tensor& first, bool backward) {
  Tensor* mixed_in = backward ? &a.tensor() : nullptr;
  Tensor &linear = a.tensor(), &rows = a.tensor(), &group = a.tensor(), &norm = a.tensor(), &coefficients = a.tensor(),
         &kind = a.tensor(), &nodes = a.tensor(), &term = a.tensor(), &starts = a.tensor(), &mix = a.tensor();
  MdplugProduct shape;
  shape.n = a.integer();
  shape.k = a.integer();
  shape.k_out = a.integer();
  shape.l_max = rows.numel() - 1;
  const int64_t n_inputs = rows.numel() * rows.numel();
  const MdplugPolynomial polynomial = shape_of(nodes, term, starts, n_inputs);
  shape.polynomial = &polynomial;
  shape.rows = rows.data<int32_t>("rows");
  shape.group = group.data<int32_t>("group");
  shape.kind = kind.data<int32_t>("kind");
  expect(shape.n == 0 || !group.numel() || group.numel() == shape.n, "group");
  expect(shape.n == 0 || !kind.numel() || kind.numel() == shape.n, "kind");
  int64_t size = 0;
  for (int64_t l = 0; l <= shape.l_max; ++l) size += (2 * l + 1) * shape.n * shape.rows[l];
  const T *w = linear.data<T>("linear"), *d = norm.data<T>("norm"), *c = coefficients.data<T>("coefficients"),
          *m = mix.data<T>("mix");
  if (!backward) {
    expect(first.numel() == size, "messages");
    Tensor out = Tensor::empty<T>({polynomial.n_outputs, shape.n, shape.k_out}),
           mixed = Tensor::empty<T>({n_inputs, shape.n, shape.k});
    Of<T>::product()(&shape, first.data<T>("messages"), w, d, c, m, out.data<T>("out"), mixed.data<T>("mixed"), parallel);
    stack[0] = out.release();
    stack[1] = mixed.release();
    return;
  }
  expect(first.numel() == polynomial.n_outputs * shape.n * shape.k_out, "grad");
  expect(mixed_in->numel() == n_inputs * shape.n * shape.k, "mixed");
  Tensor messages = Tensor::empty<T>({size}), density = Tensor::empty<T>({norm.numel()});
  Of<T>::product_backward()(&shape, first.data<T>("grad"), mixed_in->data<T>("mixed"), w, d, c, m,
                            messages.data<T>("messages"), density.data<T>("density"), parallel);
  stack[0] = messages.release();
  stack[1] = density.release();
}

void op_product(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& first = a.tensor();
  first.is_float32() ? product<float>(stack, a, first, false) : product<double>(stack, a, first, false);
}

void op_product_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& first = a.tensor();
  first.is_float32() ? product<float>(stack, a, first, true) : product<double>(stack, a, first, true);
}

template <class T>
Tensor linear(Arguments& a, const Tensor& features) {
  Tensor &weight = a.tensor(), &group = a.tensor(), &base = a.tensor();
  MdplugLinear shape;
  shape.components = a.integer();
  shape.k_out = a.integer();
  shape.components_in = features.size(0);
  shape.n = features.size(1);
  shape.k = features.size(2);
  shape.n_irreps = weight.size(-4);  // ([groups,] irreps, blocks, k, C)
  shape.group = group.data<int32_t>("group");
  expect(weight.size(-2) == shape.k, "weight");
  expect(!base.numel() || base.numel() == shape.components * shape.n * shape.k_out, "base");
  expect(shape.n == 0 || !group.numel() || group.numel() == shape.n, "group");
  Tensor out = Tensor::empty<T>({shape.components, shape.n, shape.k_out});
  Of<T>::linear()(&shape, features.data<T>("features"), weight.data<T>("weight"), base.data<T>("base"),
                  out.data<T>("out"), parallel);
  return out;
}

void op_linear(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& x = a.tensor();
  Tensor out = x.is_float32() ? linear<float>(a, x) : linear<double>(a, x);
  stack[0] = out.release();
}

#define MDPLUG_PRODUCT                                                                                            \
  "Tensor linear, Tensor rows, Tensor group, Tensor norm, Tensor coefficients, Tensor kind, Tensor nodes, "      \
  "Tensor term, Tensor starts, Tensor mix, int n, int k, int k_out"

struct Registration {
  Registration() {
    const Operator operators[] = {
        {"polynomial", "Tensor inputs, Tensor coefficients, Tensor kind, Tensor nodes, Tensor term, Tensor starts",
         "Tensor", op_polynomial},
        {"polynomial_backward",
         "Tensor inputs, Tensor coefficients, Tensor kind, Tensor nodes, Tensor term, Tensor starts, Tensor grad",
         "Tensor", op_polynomial_backward},
        {"product", "Tensor messages, " MDPLUG_PRODUCT, "(Tensor, Tensor)", op_product},
        {"product_backward", "Tensor grad, Tensor mixed, " MDPLUG_PRODUCT, "(Tensor, Tensor)", op_product_backward},
        {"linear", "Tensor features, Tensor weight, Tensor group, Tensor base, int components, int k_out", "Tensor",
         op_linear},
    };
    register_operators(operators);
  }
} registration;

}  // namespace
}  // namespace mdplug
