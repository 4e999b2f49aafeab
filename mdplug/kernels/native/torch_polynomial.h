// The lists of a polynomial, from tensors.
#pragma once
#include "api.h"
#include "torch_shim.h"

namespace mdplug {

inline MdplugPolynomial shape_of(const Tensor& nodes, const Tensor& term, const Tensor& starts, int64_t n_inputs) {
  MdplugPolynomial shape;
  shape.n_inputs = n_inputs;
  shape.n_nodes = nodes.size(0);
  shape.n_terms = term.numel();
  shape.n_outputs = starts.numel() - 1;
  shape.nodes = nodes.data<int32_t>("nodes");
  shape.term = term.data<int32_t>("term");
  shape.starts = starts.data<int32_t>("starts");
  return shape;
}

}  // namespace mdplug
