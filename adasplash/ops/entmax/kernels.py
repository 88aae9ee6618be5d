"""The entmax transform of rows and its gradients: one program per row, so that every sum is over all of its threads.

A row of up to BLOCK entries is HELD in registers, a longer one swept in memory. Derivation of the gradients in terms of
d = z - tau, with p = d ** r, u = d ** (r - 1) and r = 1 / (alpha - 1), from the formulas in reference.py:
-p log p = -r u d log d and sum u (g - mean) = 0, so that for c = g - mean, mean = sum u g / sum u,

    dx_j = u_j c_j,    dalpha = r ** 2 * sum_j c_j u_j (phi(d_j) - phi(m)),    phi(d) = d - d log d,

for any m. With m = 1 / sum u, the u-weighted mean of d, and y = d - m, the difference is y - d log(1 + y / m) - y log m,
which keeps its digits where alpha is near 1, r is large and y is small.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..entmax_formulas import entmax_weights, newton_step

# By convexity step times slope falls to a quarter or less in each step, which from 2 ** 34 (a row of 2 ** 17 entries) is
# 27 steps at the very worst; five or six are usual.
NEWTON_STEPS = tl.constexpr(32)
SMALL_STEP = tl.constexpr(1e-6)  # the step after it is far below tau's last digit


@triton.jit
def load_entries(X, begin, length, outside, BLOCK: tl.constexpr):
    """Entries begin..begin+BLOCK-1 of a row in float32; `outside` past its end."""
    e = begin + tl.arange(0, BLOCK)
    return tl.load(X + e, mask=e < length, other=outside).to(tl.float32)


@triton.jit
def load_scores(X, begin, length, BLOCK: tl.constexpr):
    """As load_entries, for the maximum: -inf past the end, and inf for NaN, which a maximum would pass over."""
    x = load_entries(X, begin, length, float("-inf"), BLOCK)
    return tl.where(x == x, x, float("inf"))


@triton.jit
def load_z(X, begin, length, top, alpha, BLOCK: tl.constexpr):
    """z = (alpha - 1) x relative to the largest; -inf where masked."""
    x = load_entries(X, begin, length, float("-inf"), BLOCK)
    return (x - tl.where(top > float("-inf"), top, 0.0)) * (alpha - 1.0)


@triton.jit
def entmax_kernel(
    X, ALPHA, P, THRESHOLD, x_row, alpha_row, length,
    FORMULA: tl.constexpr, BLOCK: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """P (R, length), contiguous, from X (R, length) with rows x_row apart, for ALPHA (R,), entries alpha_row apart.

    THRESHOLD (R, 3): the largest x; tau relative to (alpha - 1) times it; and Newton's last step, which is to be taken
    from z - tau instead of being added to tau: tau has not the digits where z - tau is small, as in a large support.
    """
    row = tl.program_id(0).to(tl.int64)
    X += row * x_row
    P += row * length
    alpha = tl.load(ALPHA + row * alpha_row)
    r = 1.0 / (alpha - 1.0)
    best = load_scores(X, 0, length, BLOCK)
    if not HELD:
        for begin in range(BLOCK, length, BLOCK):
            best = tl.maximum(best, load_scores(X, begin, length, BLOCK))
    top = tl.max(best, 0)

    # `best` is the row, or of a longer one BLOCK of its largest entries, whose threshold is a lower bound near the row's
    z = (best - tl.where(top > float("-inf"), top, 0.0)) * (alpha - 1.0)
    tau = -1.0
    step = 0.0
    mass_sum = 1.0
    slope_sum = 1.0
    steps = 0
    while steps < NEWTON_STEPS:
        tau += step
        mass, slope = entmax_weights(z - tau, r, FORMULA)
        mass_sum = tl.sum(mass, 0)
        slope_sum = tl.sum(slope, 0)
        step = newton_step(mass_sum, slope_sum, r, FORMULA)
        steps = tl.where(step > SMALL_STEP, steps + 1, NEWTON_STEPS)
    if not HELD:
        steps = 0
        while steps < NEWTON_STEPS:
            tau += step
            mass = tl.zeros((BLOCK,), tl.float32)
            slope = tl.zeros((BLOCK,), tl.float32)
            for begin in range(0, length, BLOCK):
                p, u = entmax_weights(load_z(X, begin, length, top, alpha, BLOCK) - tau, r, FORMULA)
                mass += p
                slope += u
            mass_sum = tl.sum(mass, 0)
            slope_sum = tl.sum(slope, 0)
            step = newton_step(mass_sum, slope_sum, r, FORMULA)
            steps = tl.where(step > SMALL_STEP, steps + 1, NEWTON_STEPS)

    # the last step is taken in p itself, to first order: near alpha = 1 any error of z - tau grows by r in p
    last = tl.where(slope_sum > 0.0, (mass_sum - 1.0) / (r * tl.maximum(slope_sum, 1e-30)), 0.0)
    # read again even where the row is held: kept, the weights of the last step would take half of the registers
    for begin in range(0, length, BLOCK):
        p, u = entmax_weights(load_z(X, begin, length, top, alpha, BLOCK) - tau, r, FORMULA)
        p = tl.maximum(p - u * (r * last), 0.0)
        p = tl.where(top < float("inf"), p, float("nan"))  # a row that holds an inf or a NaN
        e = begin + tl.arange(0, BLOCK)
        tl.store(P + e, p.to(P.dtype.element_ty), mask=e < length)
    tl.store(THRESHOLD + row * 3, top)
    tl.store(THRESHOLD + row * 3 + 1, tau)
    tl.store(THRESHOLD + row * 3 + 2, last)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= -1 to float32's digits also where x is small: what 1 + x rounds off is put right by a factor."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(tl.maximum(y, 1e-37)) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def load_gradient(
    G, X, begin, length, top, tau, last, alpha, r, FORMULA: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """g, d and u of one block."""
    d = tl.maximum(load_z(X, begin, length, top, alpha, BLOCK) - tau - last, 0.0)
    _, u = entmax_weights(d, r, FORMULA)
    return load_entries(G, begin, length, 0.0, BLOCK), d, u


@triton.jit
def entmax_backward_kernel(
    G, X, ALPHA, THRESHOLD, DX, D_ALPHA, g_row, x_row, alpha_row, length,
    FORMULA: tl.constexpr, ALPHA_GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DX (R, length), contiguous, and the rows' shares D_ALPHA (R,) of the gradient for alpha, from the gradient G for P."""
    row = tl.program_id(0).to(tl.int64)
    G += row * g_row
    X += row * x_row
    DX += row * length
    alpha = tl.load(ALPHA + row * alpha_row)
    r = 1.0 / (alpha - 1.0)
    top = tl.load(THRESHOLD + row * 3)
    tau = tl.load(THRESHOLD + row * 3 + 1)
    last = tl.load(THRESHOLD + row * 3 + 2)
    weight = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, length, BLOCK):
        g, _, u = load_gradient(G, X, begin, length, top, tau, last, alpha, r, FORMULA, BLOCK)
        weight += u
        weighted += u * g
    weight_sum = tl.sum(weight, 0)
    weight_sum = tl.where(weight_sum > 0.0, weight_sum, 1.0)  # 0: a row that is masked throughout
    mean = tl.sum(weighted, 0) / weight_sum
    d_mean = 1.0 / weight_sum
    share = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, length, BLOCK):
        g, d, u = load_gradient(G, X, begin, length, top, tau, last, alpha, r, FORMULA, BLOCK)
        dx = u * (g - mean)
        e = begin + tl.arange(0, BLOCK)
        tl.store(DX + e, dx.to(DX.dtype.element_ty), mask=e < length)
        if ALPHA_GRADIENT:
            y = d - d_mean
            share += dx * (y - d * log1p(y * weight_sum) - y * tl.log(d_mean))
    if ALPHA_GRADIENT:
        tl.store(D_ALPHA + row, tl.sum(share, 0) * r * r)
