// The plain C interface of the kernels: what they compute is said in ../README.md, shape by shape.
#pragma once
#include <cstdint>

extern "C" {

typedef void (*MdplugBody)(int64_t begin, int64_t end, void* context);
// Runs body over [0, n) on several threads and waits for it.
typedef void (*MdplugParallel)(int64_t n, MdplugBody body, void* context);

// Radial functions of pairs: a table to interpolate in (table != 0), or the values themselves.
typedef struct {
  const void* table;      // (blocks, rows, P, 3, C) value, slope x step, curvature x step^2 at the knots; zero-padded
  const void* values;     // (rows, blocks, P, C), or (pairs of the call, b) of a density; used if table == 0
  const void* r;          // (E) A
  const int32_t* kind;    // (E) which table, or which row of the values; 0: one table, or the pairs' order in the call
  double first, step;     // A, of the knots
  int64_t rows, per_kind; // of the table (knots) or of the values; knots of each table
} MdplugRadial;

typedef struct {
  int64_t k, n_paths, n_coupling, l_in, l_max, block;  // block: channels treated at a time
  const int32_t* paths;     // (n_paths, 3) l1 of the sender, l2 of the harmonics, l3; sorted by l3
  const int32_t* coupling;  // (n_coupling, 2) outer component (path, m1, m2) and output component (path, m3)
  const double* coefficient;  // (n_coupling)
} MdplugConvolution;

typedef struct {
  int64_t n_inputs, n_nodes, n_outputs, n_terms;
  const int32_t* nodes;   // (n_nodes, 2) factors of each product: inputs first, then earlier nodes
  const int32_t* term;    // (n_terms) the product or input a term multiplies, terms of one output together
  const int32_t* starts;  // (n_outputs + 1)
} MdplugPolynomial;

typedef struct {
  const MdplugPolynomial* polynomial;
  int64_t n, k, k_out, l_max;
  const int32_t* rows;   // (l_max + 1) numbers of a message of each irrep
  const int32_t* group;  // (n) ascending: which matrices follow the messages; null: one set
  const int32_t* kind;   // (n) coefficients of the polynomial; null: one set
} MdplugProduct;

typedef struct {
  int64_t n, k, k_out, n_irreps, components_in, components;
  const int32_t* group;  // (n) ascending, or null
} MdplugLinear;

#define MDPLUG_FUNCTIONS(T, S)                                                                                         \
  void (*harmonics_##S)(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right,             \
                        const T* table, const T* vectors, const T* r, T* out, MdplugParallel parallel);               \
  void (*harmonics_backward_##S)(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right,    \
                                 const T* table, const T* vectors, const T* r, const T* grad, const T* grad_r,        \
                                 T* out, MdplugParallel parallel);                                                    \
  void (*harmonics_tangent_##S)(int64_t n, int l_max, int n_monomials, const int32_t* left, const int32_t* right,     \
                                const T* table, const T* vectors, const T* r, const T* along, T* out, T* out_r,       \
                                MdplugParallel parallel);                                                              \
  void (*density_##S)(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,            \
                      const MdplugRadial* radial, const int32_t* species, const int32_t* first, T* out,               \
                      MdplugParallel parallel);                                                                       \
  void (*density_backward_##S)(int64_t begin, int64_t end, int64_t b, int64_t m, int64_t kinds, const T* harmonics,   \
                               const MdplugRadial* radial, const int32_t* species, const int32_t* first,              \
                               const T* grad, T* grad_harmonics, T* grad_radial, MdplugParallel parallel);            \
  void (*convolution_##S)(const MdplugConvolution* shape, int64_t n_senders, int64_t begin, int64_t end,              \
                          const T* sent, const T* harmonics, const MdplugRadial* radial, const int32_t* sender,       \
                          const int32_t* first, T* out, MdplugParallel parallel);                                     \
  void (*convolution_backward_##S)(const MdplugConvolution* shape, int64_t n_senders, int64_t begin, int64_t end,     \
                                   const T* sent, const T* harmonics, const MdplugRadial* radial,                     \
                                   const int32_t* sender, const int32_t* first, const T* grad, T* grad_sent,          \
                                   T* grad_harmonics, T* grad_radial, MdplugParallel parallel);                       \
  void (*convolution_second_##S)(const MdplugConvolution* shape, int64_t n_senders, int64_t begin, int64_t end,       \
                                 const T* sent, const T* harmonics, const MdplugRadial* radial,                       \
                                 const int32_t* sender, const int32_t* first, const T* grad, const T* move_sent,      \
                                 const T* move_harmonics, const T* move_values, T* grad_grad, T* grad_sent,           \
                                 T* grad_values, MdplugParallel parallel);                                            \
  void (*polynomial_##S)(const MdplugPolynomial* shape, int64_t n, int64_t k, const T* inputs,                        \
                         const T* coefficients, const int32_t* kind, T* out, MdplugParallel parallel);                \
  void (*polynomial_backward_##S)(const MdplugPolynomial* shape, int64_t n, int64_t k, const T* inputs,               \
                                  const T* coefficients, const int32_t* kind, const T* grad, T* grad_inputs,          \
                                  MdplugParallel parallel);                                                            \
  void (*product_##S)(const MdplugProduct* shape, const T* messages, const T* linear, const T* norm,                   \
                      const T* coefficients, const T* mix, T* out, T* mixed, MdplugParallel parallel);                 \
  void (*product_backward_##S)(const MdplugProduct* shape, const T* grad, const T* mixed, const T* linear,             \
                               const T* norm, const T* coefficients, const T* mix, T* grad_messages, T* grad_density,  \
                               MdplugParallel parallel);                                                               \
  void (*linear_##S)(const MdplugLinear* shape, const T* features, const T* weight, const T* base, T* out,             \
                     MdplugParallel parallel);                                                                         \
  void (*polynomial_coefficients_##S)(const MdplugPolynomial* shape, int64_t n, int64_t k, int64_t kinds,             \
                                      const T* inputs, const int32_t* kind, const T* grad, T* out,                    \
                                      MdplugParallel parallel);                                                        \
  void (*polynomial_second_##S)(const MdplugPolynomial* shape, int64_t n, int64_t k, int64_t kinds, const T* inputs,  \
                                const T* coefficients, const int32_t* kind, const T* grad, const T* along,            \
                                T* grad_grad, T* grad_inputs, T* grad_coefficients, MdplugParallel parallel);

typedef struct {
  const char* name;
  MDPLUG_FUNCTIONS(float, f32)
  MDPLUG_FUNCTIONS(double, f64)
} MdplugKernels;
}
