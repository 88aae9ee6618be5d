"""The kernels of the entmax transform: under Triton's interpreter on short rows, on a GPU also at full size."""

import pytest
import torch
from torch import Tensor

from adasplash import entmax
from adasplash.ops.entmax.reference import entmax as reference

operator = pytest.importorskip("adasplash.ops.entmax.operator", reason="needs triton")
INTERPRETED = pytest.importorskip("adasplash.ops.jit").INTERPRETED
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or Triton's interpreter"
)

ALPHAS = [1.01, 1.25, 1.5, 1.75, 2.0, "by row"]


@pytest.fixture(params=["held", "swept"])
def way(request, monkeypatch):
    """Both ways through the kernels: the tests' rows are short enough to be held."""
    if request.param == "swept":
        sweep(monkeypatch)


def sweep(monkeypatch):
    monkeypatch.setattr(operator, "LONGEST_HELD", 0)
    monkeypatch.setattr(operator, "SWEPT_BLOCK", 128)


def alpha_of(choice, x: Tensor) -> float | Tensor:
    if choice != "by row":
        return choice
    return torch.linspace(1.01, 2.0, x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)


def gradients(transform, x: Tensor, alpha, g: Tensor, dtype=None) -> list[Tensor]:
    """[p, dx] and, for a tensor alpha, its gradient, in float64; computed in another dtype where one is given."""
    x = x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(dtype or alpha.dtype, copy=True).requires_grad_()
    p = transform(x, alpha)
    assert p.dtype == x.dtype and p.shape == x.shape
    p.backward(g.to(p.dtype))
    return [y.double() for y in (p.detach(), x.grad, *([alpha.grad] if isinstance(alpha, Tensor) else []))]


def at_the_edge(x: Tensor, p: Tensor, alpha, edge: float) -> Tensor:
    """Where z is so near the threshold that the rounding of a sum of the row decides: for alpha near 2, u jumps there."""
    z = (alpha - 1) * x.double()
    top, at = z.max(-1, keepdim=True)
    distance_of_top = p.double().gather(-1, at) ** (alpha - 1)
    distance = z - top + distance_of_top
    near = distance.abs() <= edge * distance_of_top
    return near & (torch.as_tensor(alpha, device=x.device) > 1.75)


def check(x: Tensor, alpha, norm=torch.inf, edge=0.0):
    """Errs against float64, in this norm, at most twice what plain torch errs in the same dtype.

    Entries count that are further from the threshold than a share `edge` of the distance of the largest.
    """
    g = torch.randn(x.shape, device=x.device).to(x.dtype)
    computed = gradients(operator.entmax_kernels, x, alpha, g)
    plain = gradients(reference, x, alpha, g)
    exact = gradients(reference, x, alpha, g, torch.float64)
    if edge:
        near = at_the_edge(x, exact[0], alpha, edge)
        # an entry on the other side of the threshold moves the mean of g, and with it dx of the whole row
        crossed = near & (((computed[0] > 0) != (exact[0] > 0)) | ((plain[0] > 0) != (exact[0] > 0)))
        rows = crossed.any(-1, keepdim=True).expand_as(x)
        assert near.float().mean() < 1e-3 and rows.float().mean() < 0.5
        for left_out, ours, theirs, truth in zip((near, near | rows), computed, plain, exact, strict=False):
            ours[left_out] = theirs[left_out] = truth[left_out]
    for name, ours, theirs, truth in zip(("p", "dx", "dalpha"), computed, plain, exact, strict=False):
        error, allowed = (torch.linalg.vector_norm(y - truth, norm).item() for y in (ours, theirs))
        if INTERPRETED and x.dtype == torch.bfloat16:  # there the interpreter cuts off instead of rounding
            allowed += truth.abs().max().item() * torch.finfo(x.dtype).eps / 2
        slack = 1e-6 * max(1.0, torch.linalg.vector_norm(truth, norm).item())
        assert error <= 2 * allowed + slack, f"{name} errs {error:.2g}, plain torch {allowed:.2g}"


# ----------------------------------------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [1, 63, 507])
def test_values_and_gradients(alpha, length, device):
    x = 2 * torch.randn(3, length, device=device)
    check(x, alpha_of(alpha, x))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length, sharpness", [(127, 2.0), (257, 2.0), (257, 0.01)])
def test_rows_swept_in_blocks(alpha, length, sharpness, device, monkeypatch):
    sweep(monkeypatch)
    x = sharpness * torch.randn(2, length, device=device)
    check(x, alpha_of(alpha, x))


def test_a_row_too_long_to_be_held(device):
    x = 2 * torch.randn(2, operator.LONGEST_HELD + operator.SWEPT_BLOCK // 3, device=device)
    check(x, alpha_of("by row", x))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_difficult_rows(alpha, device, way):
    length = 250
    x = torch.randn(7, length, device=device)
    x[0] = -3.7  # all equal
    x[1, 200] = 1000.0  # one takes everything
    x[2] *= 1e4
    x[3] *= 1e-6
    x[4] = x[4] * 1e-3 + 1e3  # large, and nearly equal: z loses digits unless it is relative to the largest
    span = 1.0 if alpha == "by row" else 1.0 / (alpha - 1.0)
    x[5] = span * (-0.97 + 1e-3 * torch.rand(length, device=device))  # most just above the threshold
    x[5, 0] = 0.0
    x[6] = -span * (1.0 - 0.9 ** torch.arange(length, device=device))  # each step of Newton's method drops a few
    check(x, alpha_of(alpha, x))


@pytest.mark.parametrize("alpha", [1.5, 2.0, "by row"])
def test_masked_entries_and_rows(alpha, device, way):
    x = torch.randn(4, 200, device=device)
    x[:, ::2] = -torch.inf
    x[1] = -torch.inf
    x[2, :190] = -torch.inf
    alpha = alpha_of(alpha, x)
    p, dx, *d_alpha = gradients(operator.entmax_kernels, x, alpha, torch.randn(x.shape, device=device))
    masked = x == -torch.inf
    assert (p[masked] == 0).all() and (dx[masked] == 0).all()
    assert all(y.isfinite().all() and y[1] == 0 for y in d_alpha)
    check(x, alpha)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0, "by row"])
def test_half_precision_in_and_out(dtype, alpha, device):
    x = (2 * torch.randn(3, 127, device=device)).to(dtype)
    check(x, alpha_of(alpha, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [1.25, 1.5, 2.0])
def test_extreme_scores(dtype, alpha, device):
    large = torch.finfo(dtype).max
    x = torch.randn(5, 33, device=device).to(dtype)
    x[0, 1:] = -large
    x[1] = -large
    x[2, 5] = large
    x[3] = large
    x[4, ::2] = -large
    check(x, alpha)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_inf_or_a_nan_spoils_its_own_row_alone(bad, device, way):
    x = torch.randn(3, 200, device=device)
    x[1, 150] = bad
    p = operator.entmax_kernels(x, 1.5)
    assert p[1].isnan().all() and p[0].isfinite().all() and p[2].isfinite().all()
    assert reference(x, 1.5)[1].isnan().all()


# ------------------------------------------------------------------------------------------- layouts, alphas, operator


def test_any_layout(device):
    x = torch.randn(3, 4, 5, device=device)
    for strided in (x.movedim(0, -1), x[..., ::2], x[:2, 1:3, 1:4], x[0, 0], x[1:1], x[0, :, :1]):
        before = strided.clone()
        g = torch.randn(*strided.shape[:-1], strided.shape[-1] + 3, device=device)[..., 3:]  # rows apart
        for got, expected in zip(
            gradients(operator.entmax_kernels, strided, 1.5, g), gradients(reference, before, 1.5, g), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        assert torch.equal(strided, before)


@pytest.mark.parametrize(
    "shape, dtype",
    [
        ((), torch.float64),
        ((1,), torch.float32),
        ((4, 1), torch.bfloat16),
        ((3, 1, 1), torch.float64),
        ((3, 4, 1), torch.float32),
    ],
)
def test_alphas_that_broadcast(shape, dtype, device):
    x = torch.randn(3, 4, 9, device=device, requires_grad=True)
    alpha = (1.2 + 0.7 * torch.rand(shape, device=device)).to(dtype).requires_grad_()
    operator.entmax_kernels(x, alpha).pow(2).sum().backward()
    expected = alpha.detach().double().requires_grad_()
    reference(x.detach().double(), expected).pow(2).sum().backward()
    assert alpha.grad.dtype == dtype and alpha.grad.shape == shape
    torch.testing.assert_close(
        alpha.grad.double(), expected.grad, atol=1e-5, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4
    )


def test_a_tensor_alpha_means_what_the_number_means(device):
    x = torch.randn(3, 50, device=device)
    for alpha in (1.25, 1.5, 2, 2.0):
        expected = operator.entmax_kernels(x, alpha)
        torch.testing.assert_close(operator.entmax_kernels(x, torch.tensor(float(alpha))), expected)


def test_a_broadcast_gradient(device):
    """The gradient of a sum has stride 0; it is 0, since p sums to 1 whatever x is."""
    x = torch.randn(3, 50, device=device, requires_grad=True)
    operator.entmax_kernels(x, 1.5).sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("learned", [False, True])
def test_the_operator_is_registered_in_full(learned, device):
    x = torch.randn(3, 20, device=device, requires_grad=True)
    alpha = torch.full((3,), 1.3, device=device, requires_grad=learned)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(operator.entmax_forward, (x, alpha, operator.GENERAL), test_utils=checks)
    _, threshold = operator.entmax_forward(x.detach(), alpha.detach(), operator.GENERAL)
    inputs = (torch.randn_like(x), x.detach(), alpha.detach(), threshold, operator.GENERAL, learned)
    torch.library.opcheck(operator.entmax_backward, inputs, test_utils=checks)


# -------------------------------------------------------------------------------------------------------- the public one


@pytest.mark.parametrize(
    "dtype, alpha, by_kernels",
    [(torch.float32, 1.5, True), (torch.bfloat16, 1.2, True), (torch.float64, 1.5, False), (torch.float32, 1.0, False)],
)
@pytest.mark.gpu
def test_where_the_public_function_uses_the_kernels(dtype, alpha, by_kernels, monkeypatch):
    calls = []
    monkeypatch.setattr(operator, "entmax_kernels", lambda x, alpha: calls.append(alpha) or reference(x, alpha))
    x = torch.randn(3, 8, 5, device="cuda").to(dtype)
    torch.testing.assert_close(entmax(x, alpha, dim=1), reference(x, alpha, dim=1))
    assert bool(calls) == by_kernels


@pytest.mark.gpu
def test_the_public_function_compiles():
    x = torch.randn(6, 300, device="cuda", requires_grad=True)
    compiled = torch.compile(lambda x: (2 * entmax(2 * x, 1.5, dim=0)).square().sum(), fullgraph=True)
    torch.testing.assert_close(compiled(x), (2 * reference(2 * x, 1.5, dim=0)).square().sum())
    compiled(x).backward()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("length", [4095, 16384, 131072])
@pytest.mark.parametrize("sharpness", [1e-4, 0.01, 1.0, 5.0])
def test_full_size(length, alpha, dtype, sharpness):
    x = (sharpness * torch.randn(20, length, device="cuda")).to(dtype)
    x[:, length // 2 :: 3] = -torch.inf
    # near the edge of a large support u is steep for alpha > 1.5, and the largest error of all is a matter of luck, too
    check(x, alpha_of(alpha, x), norm=2, edge=1e-4)
