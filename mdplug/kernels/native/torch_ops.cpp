// The kernels as operators of torch, namespace mdplug; schemas are explained in ../README.md.
#include "dispatch.h"
#include "graph.h"
#include "torch_shim.h"

namespace mdplug {
namespace {

template <class T>
struct RadialArguments {
  MdplugRadial radial;
  int64_t block = 0, columns = 0;
  RadialArguments(const Tensor& table, const Tensor& values, const Tensor& r, const Tensor& kind, double first,
                  double step, int64_t per_kind) {
    radial.table = table.data<T>("table");
    radial.values = values.data<T>("values");
    radial.r = r.data<T>("r");
    radial.kind = kind.data<int32_t>("kind");
    radial.first = first;
    radial.step = step;
    radial.per_kind = per_kind;
    radial.rows = 0;
  }
};

template <class T>
void graph(StableIValue* stack, const Tensor& pairs, const Tensor& vectors, const Tensor& place, int64_t n_owned,
           double cutoff) {
  const int64_t n = vectors.size(0);
  Graph<T> g(n, pairs.data<int64_t>("pairs"), vectors.data<T>("vectors"), place.data<int32_t>("place"), n_owned,
             T(cutoff));
  const int64_t p = g.n_pairs;
  Tensor v = Tensor::empty<T>({p, 3}), r = Tensor::empty<T>({p}), receiver = Tensor::empty<int32_t>({p}),
         sender = Tensor::empty<int32_t>({p}), first = Tensor::empty<int32_t>({n_owned + 1}),
         origin = Tensor::empty<int64_t>({p});
  std::memcpy(first.data<int32_t>("first"), g.first.data(), sizeof(int32_t) * (n_owned + 1));
  g.fill(v.data<T>("v"), r.data<T>("r"), receiver.data<int32_t>("receiver"), sender.data<int32_t>("sender"),
         origin.data<int64_t>("origin"));
  Tensor* out[] = {&v, &r, &receiver, &sender, &first, &origin};
  for (int i = 0; i < 6; ++i) stack[i] = out[i]->release();
}

void op_graph(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &pairs = a.tensor(), &vectors = a.tensor(), &place = a.tensor();
  const int64_t n_owned = a.integer();
  const double cutoff = a.real();
  vectors.is_float32() ? graph<float>(stack, pairs, vectors, place, n_owned, cutoff)
                       : graph<double>(stack, pairs, vectors, place, n_owned, cutoff);
}

template <class T>
Tensor harmonics(const Tensor& vectors, const Tensor& r, const Tensor& left, const Tensor& right, const Tensor& table,
                 int64_t l_max, const Tensor* grad, const Tensor* grad_r) {
  const int64_t n = r.numel(), m = (l_max + 1) * (l_max + 1);
  Tensor out = grad ? Tensor::empty<T>({n, 3}) : Tensor::empty<T>({n, m});
  const int32_t *l = left.data<int32_t>("left"), *k = right.data<int32_t>("right");
  const T *t = table.data<T>("table"), *v = vectors.data<T>("vectors"), *d = r.data<T>("r");
  const int rows = int(table.size(0));
  if (grad)
    Of<T>::harmonics_backward()(n, int(l_max), rows, l, k, t, v, d, grad->data<T>("grad"), grad_r->data<T>("grad_r"),
                                out.data<T>("out"), parallel);
  else
    Of<T>::harmonics()(n, int(l_max), rows, l, k, t, v, d, out.data<T>("out"), parallel);
  return out;
}

void op_harmonics(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &v = a.tensor(), &r = a.tensor(), &left = a.tensor(), &right = a.tensor(), &table = a.tensor();
  const int64_t l_max = a.integer();
  Tensor out = r.is_float32() ? harmonics<float>(v, r, left, right, table, l_max, nullptr, nullptr)
                              : harmonics<double>(v, r, left, right, table, l_max, nullptr, nullptr);
  stack[0] = out.release();
}

void op_harmonics_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor &v = a.tensor(), &r = a.tensor(), &left = a.tensor(), &right = a.tensor(), &table = a.tensor();
  const int64_t l_max = a.integer();
  Tensor &grad = a.tensor(), &grad_r = a.tensor();
  Tensor out = r.is_float32() ? harmonics<float>(v, r, left, right, table, l_max, &grad, &grad_r)
                              : harmonics<double>(v, r, left, right, table, l_max, &grad, &grad_r);
  stack[0] = out.release();
}

template <class T>
void density(StableIValue* stack, Arguments& a, const Tensor& harmonics, bool backward) {
  Tensor &table = a.tensor(), &values = a.tensor(), &r = a.tensor(), &kind = a.tensor(), &species = a.tensor(),
         &first = a.tensor();
  const int64_t kinds = a.integer(), begin = a.integer(), end = a.integer();
  const double knot = a.real(), step = a.real();
  const int64_t per_kind = a.integer();
  RadialArguments<T> radial(table, values, r, kind, knot, step, per_kind);
  const int64_t b = radial.radial.table ? table.size(-1) : values.size(-1), m = harmonics.size(1);
  const int32_t* starts = first.data<int32_t>("first");
  const T* y = harmonics.data<T>("harmonics");
  const int32_t* z = species.data<int32_t>("species");
  if (!backward) {
    Tensor out = Tensor::empty<T>({m, end - begin, kinds * b});
    Of<T>::density()(begin, end, b, m, kinds, y, &radial.radial, z, starts, out.data<T>("out"), parallel);
    stack[0] = out.release();
    return;
  }
  Tensor& grad = a.tensor();
  const int64_t n = starts[end] - starts[begin];
  Tensor dy = Tensor::empty<T>({n, m});
  Tensor dr = radial.radial.table ? Tensor::empty<T>({n}) : Tensor::empty<T>({n, b});
  Of<T>::density_backward()(begin, end, b, m, kinds, y, &radial.radial, z, starts, grad.data<T>("grad"),
                            dy.data<T>("dy"), dr.data<T>("dr"), parallel);
  stack[0] = dy.release();
  stack[1] = dr.release();
}

void op_density(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& y = a.tensor();
  y.is_float32() ? density<float>(stack, a, y, false) : density<double>(stack, a, y, false);
}

void op_density_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& y = a.tensor();
  y.is_float32() ? density<float>(stack, a, y, true) : density<double>(stack, a, y, true);
}

template <class T>
void convolution(StableIValue* stack, Arguments& a, const Tensor& sent, int order) {
  Tensor &harmonics = a.tensor(), &table = a.tensor(), &values = a.tensor(), &r = a.tensor(), &kind = a.tensor(),
         &sender = a.tensor();
  Tensor &first = a.tensor(), &paths = a.tensor(), &coupling = a.tensor(), &coefficient = a.tensor();
  const int64_t begin = a.integer(), end = a.integer();
  const double knot = a.real(), step = a.real();
  const int64_t per_kind = a.integer();
  RadialArguments<T> radial(table, values, r, kind, knot, step, per_kind);
  MdplugConvolution shape;
  shape.k = sent.size(2);
  shape.n_paths = paths.size(0);
  shape.n_coupling = coupling.size(0);
  shape.l_in = shape.l_max = 0;
  while ((shape.l_in + 1) * (shape.l_in + 1) < sent.size(0)) ++shape.l_in;
  while ((shape.l_max + 1) * (shape.l_max + 1) < harmonics.size(1)) ++shape.l_max;
  shape.paths = paths.data<int32_t>("paths");
  shape.coupling = coupling.data<int32_t>("coupling");
  shape.coefficient = coefficient.data<double>("coefficient");
  const Tensor& functions = radial.radial.table ? table : values;
  shape.block = functions.size(-1);
  radial.radial.rows = functions.size(radial.radial.table ? 1 : 0);
  if (shape.block != 64 / int64_t(sizeof(T)) && shape.block != 128 / int64_t(sizeof(T)))
    throw std::runtime_error("mdplug kernels: the radial functions come in another width than the kernels");
  const int32_t* starts = first.data<int32_t>("first");
  const T *h = sent.data<T>("sent"), *y = harmonics.data<T>("harmonics");
  const int64_t n = end - begin, pairs = starts[end] - starts[begin];
  int64_t rows = 0;
  for (int64_t p = 0; p < shape.n_paths; ++p) rows += 2 * shape.paths[3 * p + 2] + 1;
  const int64_t blocks = (shape.k + shape.block - 1) / shape.block;
  if (order == 0) {
    Tensor out = Tensor::empty<T>({rows * n * shape.k});
    Of<T>::convolution()(&shape, sent.size(1), begin, end, h, y, &radial.radial, sender.data<int32_t>("sender"), starts,
                         out.data<T>("out"), parallel);
    stack[0] = out.release();
    return;
  }
  Tensor& grad = a.tensor();
  Tensor dh = Tensor::empty<T>({sent.size(0), sent.size(1), shape.k}), dy = Tensor::empty<T>({pairs, harmonics.size(1)});
  Tensor dr = radial.radial.table
                  ? Tensor::empty<T>({pairs})
                  : Tensor::empty<T>({radial.radial.rows, blocks, shape.n_paths, shape.block});
  if (order == 2) {
    Tensor &move_sent = a.tensor(), &move_harmonics = a.tensor(), &move_values = a.tensor();
    Tensor out = Tensor::empty<T>({rows * n * shape.k});
    Of<T>::convolution_second()(&shape, sent.size(1), begin, end, h, y, &radial.radial, sender.data<int32_t>("sender"),
                                starts, grad.data<T>("grad"), move_sent.data<T>("move_sent"),
                                move_harmonics.data<T>("move_harmonics"), move_values.data<T>("move_values"),
                                out.data<T>("out"), dh.data<T>("dh"), dr.data<T>("dr"), parallel);
    stack[0] = out.release();
    stack[1] = dh.release();
    stack[2] = dr.release();
    return;
  }
  Of<T>::convolution_backward()(&shape, sent.size(1), begin, end, h, y, &radial.radial, sender.data<int32_t>("sender"),
                                starts, grad.data<T>("grad"), dh.data<T>("dh"), dy.data<T>("dy"), dr.data<T>("dr"),
                                parallel);
  stack[0] = dh.release();
  stack[1] = dy.release();
  stack[2] = dr.release();
}

void op_convolution(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& sent = a.tensor();
  sent.is_float32() ? convolution<float>(stack, a, sent, 0) : convolution<double>(stack, a, sent, 0);
}

void op_convolution_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& sent = a.tensor();
  sent.is_float32() ? convolution<float>(stack, a, sent, 1) : convolution<double>(stack, a, sent, 1);
}

void op_convolution_second(StableIValue* stack, uint64_t, uint64_t) {
  Arguments a(stack);
  Tensor& sent = a.tensor();
  sent.is_float32() ? convolution<float>(stack, a, sent, 2) : convolution<double>(stack, a, sent, 2);
}

#define MDPLUG_RADIAL "Tensor table, Tensor values, Tensor r, Tensor kind, "
#define MDPLUG_CONVOLUTION                          \
  "Tensor sent, Tensor harmonics, " MDPLUG_RADIAL \
  "Tensor sender, Tensor first, Tensor paths, Tensor coupling, Tensor coefficient, " MDPLUG_KNOTS
#define MDPLUG_KNOTS "int begin, int end, float first_knot, float step, int per_kind"

struct Registration {
  Registration() {
    const Operator operators[] = {
        {"graph", "Tensor pairs, Tensor vectors, Tensor place, int n_owned, float cutoff",
         "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", op_graph},
        {"harmonics", "Tensor vectors, Tensor r, Tensor left, Tensor right, Tensor table, int l_max", "Tensor",
         op_harmonics},
        {"harmonics_backward",
         "Tensor vectors, Tensor r, Tensor left, Tensor right, Tensor table, int l_max, Tensor grad, Tensor grad_r",
         "Tensor", op_harmonics_backward},
        {"density", "Tensor harmonics, " MDPLUG_RADIAL "Tensor species, Tensor first, int kinds, " MDPLUG_KNOTS,
         "Tensor", op_density},
        {"density_backward",
         "Tensor harmonics, " MDPLUG_RADIAL "Tensor species, Tensor first, int kinds, " MDPLUG_KNOTS ", Tensor grad",
         "(Tensor, Tensor)", op_density_backward},
        {"convolution", MDPLUG_CONVOLUTION, "Tensor", op_convolution},
        {"convolution_backward", MDPLUG_CONVOLUTION ", Tensor grad", "(Tensor, Tensor, Tensor)",
         op_convolution_backward},
        {"convolution_second",
         MDPLUG_CONVOLUTION ", Tensor grad, Tensor move_sent, Tensor move_harmonics, Tensor move_values",
         "(Tensor, Tensor, Tensor)", op_convolution_second},
    };
    register_operators(operators);
  }
} registration;

}  // namespace
}  // namespace mdplug

extern "C" __attribute__((visibility("default"))) const char* mdplug_instruction_set() { return mdplug::kernels().name; }
