"""Radial functions by quintic Hermite interpolation in a kernel; the definition is mdplug.kernels.spline."""

import triton
import triton.language as tl


@triton.jit
def knot(r, FIRST: tl.constexpr, INVERSE: tl.constexpr, PER_KIND: tl.constexpr):
    """Row of the lower knot, six weights for the value, six for the slope (1/A), as numbers at both knots stand."""
    x = (r - FIRST) * INVERSE
    index = tl.minimum(tl.maximum(tl.floor(x), 0.0), PER_KIND - 2.0)
    s = x - index
    u = 1.0 - s
    s2 = s * s
    s3 = s2 * s
    v3 = s3 * (10.0 + s * (6.0 * s - 15.0))
    v1 = s + s3 * (s * (8.0 - 3.0 * s) - 6.0)
    v2 = 0.5 * s2 * u * u * u
    v4 = s3 * (s * (7.0 - 3.0 * s) - 4.0)
    v5 = 0.5 * s3 * u * u
    d3 = 30.0 * s2 * u * u * INVERSE
    d1 = (1.0 + s2 * (s * (32.0 - 15.0 * s) - 18.0)) * INVERSE
    d2 = 0.5 * s * (2.0 + s * (s * (12.0 - 5.0 * s) - 9.0)) * INVERSE
    d4 = s2 * (s * (28.0 - 15.0 * s) - 12.0) * INVERSE
    d5 = 0.5 * s2 * (3.0 + s * (5.0 * s - 8.0)) * INVERSE
    return index.to(tl.int32), 1.0 - v3, v1, v2, v3, v4, v5, -d3, d1, d2, d3, d4, d5
