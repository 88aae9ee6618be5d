"""The formulas of entmax in kernels: weights from distances to the threshold, steps to the threshold, what gradients need.

FORMULA is r = 1 / (alpha - 1) where alpha is 2, 1.5 or 1.25, and 0 for any alpha (see `launch_arguments.formula_of`). In plain torch:
`entmax.reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .jit import IN_PYTHON


@triton.jit
def log2(x, ROUGH: tl.constexpr):
    """log2 of x >= 0, below -120 for 0; ROUGH: in one instruction, which errs by up to 2^-22 near 1, where tl.log2 takes a dozen."""
    if ROUGH and not IN_PYTHON:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(tl.maximum(x, 1e-37))


@triton.jit
def power(x, exponent, ROUGH: tl.constexpr = False):
    """x ** exponent for x, exponent >= 0 in float32, with 0 ** anything = 0; ROUGH: as in `log2`."""
    if ROUGH and not IN_PYTHON:  # the logarithm of 0 is -inf, and its power 0
        return tl.exp2(tl.maximum(exponent, 1e-30) * log2(x, ROUGH))
    else:
        return tl.where(x > 0.0, tl.exp2(exponent * log2(x, ROUGH)), 0.0)


@triton.jit
def entmax_weights(distance, r, FORMULA: tl.constexpr, ROUGH: tl.constexpr = False):
    """p = d ** r and u = p ** (2 - alpha) = d ** (r - 1), both 0 where d = z - tau <= 0; ROUGH: as in `log2`."""
    d = tl.maximum(distance, 0.0)
    if FORMULA == 2:
        return d * d, d
    elif FORMULA == 1:
        return d, tl.where(d > 0.0, 1.0, 0.0)
    elif FORMULA == 4:
        u = d * d * d
        return u * d, u
    else:
        u = power(d, r - 1.0, ROUGH)
        return u * d, u


@triton.jit
def alpha_weights(p, distance, ROUGH: tl.constexpr = False):
    """w / (128 r ** 2), of which sum w (dP - delta) is a row's share of the gradient for alpha: w = r ** 2 p - r p log p, and p = d ** r.

    Correia, Niculae and Martins 2019, Prop. 1. The limits, which spare a look at d = 0, come with the product.
    """
    share = 2.0**-7 - (2.0**-7 * 0.6931471805599453) * log2(distance, ROUGH)
    return p * tl.minimum(tl.maximum(share, 0.0), 1.0)


@triton.jit
def near_delta(d_out, out):
    """sum p dP of rows (M, D), near delta = sum u dP / sum u: sums of u (dP - near) do not cancel as those of u dP would.

    0 for rows that are not finite: as a part of delta it would reach keys that they do not see.
    """
    near = tl.sum(d_out.to(tl.float32) * out.to(tl.float32), 1)
    return tl.where(tl.abs(near) < float("inf"), near, 0.0)


@triton.jit
def mass_over_norm(mass, r, FORMULA: tl.constexpr):
    """mass / norm = mass ** (1 - 1 / r), where norm = (sum (z - t) ** r) ** (1 / r) and mass = norm ** r."""
    if FORMULA == 2:
        return tl.sqrt(mass)
    elif FORMULA == 1:
        return 1.0
    elif FORMULA == 4:
        return tl.sqrt(mass) * tl.sqrt(tl.sqrt(mass))
    else:
        return power(mass, 1.0 - 1.0 / r)


@triton.jit
def newton_step(mass, slope, r, FORMULA: tl.constexpr):
    """What to add to t, given mass = sum p and slope = sum u at t: Newton's method on norm = 1 (see `mass_over_norm`).

    The norm is convex and decreasing in t, so that from the left the steps never pass the root, and it is so nearly a
    straight line that a few of them are enough even for alpha near 1, where r is large.
    """
    return tl.where(slope > 0.0, (mass - mass_over_norm(mass, r, FORMULA)) / tl.maximum(slope, 1e-30), 0.0)


@triton.jit
def halley_step(mass, slope, below, r, FORMULA: tl.constexpr):
    """As newton_step, but of third order, given also `below`: sum (z - t) ** (r - 2), or for the general FORMULA the number of keys above t.

    With the power sums M(s) = sum (z - t) ** s, norm * norm'' / norm' ** 2 = (r - 1) (bend - 1) for bend = M(r) M(r - 2) / M(r - 1) ** 2.
    From the number of keys, M(0), M(r - 2) is estimated: log M(s) is drawn as a parabola through s = 0, r - 1 and r. At most 1.4 Newton
    steps, and Newton's own where norm > 3: of a single key, 1.4 of them go past its z from 3.3 on. Such a step is at least 2 / 3 of
    the mean distance from t, so that none that is taken for the last one has Newton's larger error (see `tiles`).
    """
    newton = newton_step(mass, slope, r, FORMULA)
    if FORMULA == 0:
        to_slope = tl.log2(mass) - tl.log2(slope)
        to_count = (tl.log2(slope) - tl.log2(below)) / tl.maximum(r - 1.0, 1e-3)
        bend = tl.exp2((to_slope - to_count) * 2.0 / r)
    else:
        bend = mass * below / tl.maximum(slope * slope, 1e-30)
    norm = mass / tl.maximum(mass_over_norm(mass, r, FORMULA), 1e-30)
    ahead = tl.where(norm < 3.0, 0.5 * (r - 1.0) * (bend - 1.0) * (norm - 1.0) / tl.maximum(norm, 1e-30), 0.0)
    return tl.where(slope > 0.0, newton / (1.0 - tl.minimum(ahead, 0.3)), 0.0)
