// Operators that training alone needs: gradients of weights, and adjoints of adjoints.
#include "dispatch.h"
#include "torch_polynomial.h"

namespace mdplug {
namespace {

template <class T>
void harmonics_tangent(StableIValue* stack, Arguments& a, const Tensor& vectors) {
  Tensor &r = a.tensor(), &left = a.tensor(), &right = a.tensor(), &table = a.tensor();
  const int64_t l_max = a.integer(), n = r.numel();
  Tensor& along = a.tensor();
  Tensor out = Tensor::empty<T>({n, (l_max + 1) * (l_max + 1)}), out_r = Tensor::empty<T>({n});
  Of<T>::harmonics_tangent()(n, int(l_max), int(table.size(0)), left.data<int32_t>("left"),
                             right.data<int32_t>("right"), table.data<T>("table"), vectors.data<T>("vectors"),
                             r.data<T>("r"), along.data<T>("along"), out.data<T>("out"), out_r.data<T>("out_r"),
                             parallel);
  stack[0] = out.release();
  stack[1] = out_r.release();
}

void op_harmonics_tangent(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& v = a.tensor();
  v.is_float32() ? harmonics_tangent<float>(stack, a, v) : harmonics_tangent<double>(stack, a, v);
}

struct Shape : MdplugPolynomial {
  int64_t n, k;
  Shape(const Tensor& inputs, const Tensor& nodes_of, const Tensor& term_of, const Tensor& starts_of)
      : MdplugPolynomial(shape_of(nodes_of, term_of, starts_of, inputs.size(0))), n(inputs.size(1)), k(inputs.size(2)) {}
  template <class T>
  Tensor coefficients(int64_t kinds) const {  // as the kernels want them
    const int64_t block = 64 / int64_t(sizeof(T));
    return Tensor::empty<T>({kinds, (k + block - 1) / block, n_terms, block});
  }
};

template <class T>
void polynomial_coefficients(StableIValue* stack, Arguments& a, const Tensor& inputs) {
  Tensor &kind = a.tensor(), &nodes = a.tensor(), &term = a.tensor(), &starts = a.tensor(), &grad = a.tensor();
  const int64_t kinds = a.integer();
  const Shape shape(inputs, nodes, term, starts);
  Tensor out = shape.coefficients<T>(kinds);
  Of<T>::polynomial_coefficients()(&shape, shape.n, shape.k, kinds, inputs.data<T>("inputs"),
                                   kind.data<int32_t>("kind"), grad.data<T>("grad"), out.data<T>("out"), parallel);
  stack[0] = out.release();
}

void op_polynomial_coefficients(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& x = a.tensor();
  x.is_float32() ? polynomial_coefficients<float>(stack, a, x) : polynomial_coefficients<double>(stack, a, x);
}

template <class T>
void polynomial_second(StableIValue* stack, Arguments& a, const Tensor& inputs) {
  Tensor &coefficients = a.tensor(), &kind = a.tensor(), &nodes = a.tensor(), &term = a.tensor(), &starts = a.tensor();
  Tensor &grad = a.tensor(), &along = a.tensor();
  const Shape shape(inputs, nodes, term, starts);
  const int64_t kinds = coefficients.size(0);
  Tensor grad_grad = Tensor::empty<T>({shape.n_outputs, shape.n, shape.k}),
         grad_inputs = Tensor::empty<T>({shape.n_inputs, shape.n, shape.k}),
         grad_coefficients = shape.coefficients<T>(kinds);
  Of<T>::polynomial_second()(&shape, shape.n, shape.k, kinds, inputs.data<T>("inputs"),
                             coefficients.data<T>("coefficients"), kind.data<int32_t>("kind"), grad.data<T>("grad"),
                             along.data<T>("along"), grad_grad.data<T>("grad_grad"),
                             grad_inputs.data<T>("grad_inputs"), grad_coefficients.data<T>("grad_coefficients"),
                             parallel);
  stack[0] = grad_grad.release();
  stack[1] = grad_inputs.release();
  stack[2] = grad_coefficients.release();
}

void op_polynomial_second(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& x = a.tensor();
  x.is_float32() ? polynomial_second<float>(stack, a, x) : polynomial_second<double>(stack, a, x);
}

struct Registration {
  Registration() {
    const Operator operators[] = {
        {"harmonics_tangent",
         "Tensor vectors, Tensor r, Tensor left, Tensor right, Tensor table, int l_max, Tensor along",
         "(Tensor, Tensor)", op_harmonics_tangent},
        {"polynomial_coefficients",
         "Tensor inputs, Tensor kind, Tensor nodes, Tensor term, Tensor starts, Tensor grad, int kinds", "Tensor",
         op_polynomial_coefficients},
        {"polynomial_second",
         "Tensor inputs, Tensor coefficients, Tensor kind, Tensor nodes, Tensor term, Tensor starts, Tensor grad, "
         "Tensor along",
         "(Tensor, Tensor, Tensor)", op_polynomial_second},
    };
    register_operators(operators);
  }
} registration;

}  // namespace
}  // namespace mdplug
