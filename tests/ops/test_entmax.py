"""The entmax transform: its definition, its derivatives, and the numbers that break careless code."""

import pytest
import torch
from dense_attention import bisected_entmax
from torch.autograd import gradcheck

from adasplash import entmax
from adasplash.ops.entmax.reference import FIRST_CANDIDATES

ALPHAS = [1.0, 1.05, 1.25, 1.5, 1.75, 2.0]


def randn64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25, 1.75])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 300])
def test_agrees_with_the_entmax_package(alpha, length):
    package = pytest.importorskip("entmax")
    x = 2 * randn64(7, length)
    if alpha in (1.5, 2.0):
        expected = (package.entmax15 if alpha == 1.5 else package.sparsemax)(x, dim=-1)
    else:
        expected = package.entmax_bisect(x, alpha, dim=-1, n_iter=80)
    torch.testing.assert_close(entmax(x, alpha), expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 2.0])
def test_agrees_with_bisection_in_float32(alpha):
    x = 3 * torch.randn(20, 200)
    torch.testing.assert_close(entmax(x, alpha).double(), bisected_entmax(x.double(), alpha), atol=1e-5, rtol=1e-4)


def test_alpha_1_is_softmax_and_alphas_near_1_approach_it():
    x = randn64(5, 30)
    torch.testing.assert_close(entmax(x, 1), x.softmax(-1))
    torch.testing.assert_close(entmax(x, 1.0001), x.softmax(-1), atol=1e-3, rtol=0)


# ---------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0])
def test_gradient_for_x(alpha):
    x = (2 * randn64(3, 9)).requires_grad_()
    assert gradcheck(lambda x: entmax(x, alpha), (x,))


@pytest.mark.parametrize("alpha", [1.1, 1.5])
@pytest.mark.parametrize("shape", [(), (3, 1, 1)])
def test_gradient_for_a_tensor_alpha(alpha, shape):
    x = randn64(1, 3, 2, 6).requires_grad_()
    alpha = torch.full(shape, alpha, dtype=torch.float64)
    alpha = (alpha + 0.05 * torch.arange(alpha.numel()).reshape(shape)).requires_grad_()
    assert gradcheck(entmax, (x, alpha))


@pytest.mark.parametrize("dim", [0, 1])
def test_gradient_along_another_dim(dim):
    x = randn64(6, 5, 2).requires_grad_()
    alpha = torch.tensor(1.4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, alpha: entmax(x, alpha, dim=dim), (x, alpha))


def test_gradient_of_a_float32_alpha_with_float64_scores_has_alphas_dtype():
    alpha = torch.tensor(1.5, requires_grad=True)
    (entmax(randn64(3, 8), alpha) * torch.arange(8)).sum().backward()
    assert alpha.grad.dtype == torch.float32 and alpha.grad != 0


@pytest.mark.parametrize("alpha", [1.5, torch.tensor(1.5)])
def test_second_derivatives_are_refused(alpha):
    """Instead of being wrong without a word."""
    x = torch.randn(3, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(entmax(x, alpha).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


# --------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("alpha", ALPHAS)
def test_is_a_distribution_and_ignores_shifts_and_order(alpha):
    x = 3 * randn64(10, 65)
    p = entmax(x, alpha)
    torch.testing.assert_close(p.sum(-1), torch.ones(10, dtype=torch.float64))
    assert (p >= 0).all()
    torch.testing.assert_close(entmax(x + 1e3, alpha), p)
    order = torch.randperm(65)
    torch.testing.assert_close(entmax(x[:, order], alpha), p[:, order])
    assert (p.argsort(-1)[:, -1] == x.argmax(-1)).all()  # keeps the order of the scores


def test_support_shrinks_as_alpha_grows():
    x = 2 * randn64(50, 100)
    supports = torch.stack([(entmax(x, alpha) > 0).sum(-1) for alpha in (1.0, 1.1, 1.3, 1.5, 1.8, 2.0)])
    assert (supports[1:] <= supports[:-1]).all()
    assert (supports[0] == 100).all() and (supports[-1] < 20).all()


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_share_and_one_entry_may_take_everything(alpha, dtype):
    for length in (1, 2, 63, 1000):
        p = entmax(torch.full((2, length), -3.7, dtype=dtype), alpha)
        torch.testing.assert_close(p, torch.full_like(p, 1 / length), atol=1e-7, rtol=1e-3)
    x = torch.zeros(1, 65, dtype=dtype)
    x[0, 40] = 1000.0
    p = entmax(x, alpha)
    assert p[0, 40] == 1 and p.sum() == 1


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_supports_beyond_the_first_candidates(alpha):
    length = 40 * FIRST_CANDIDATES
    x = 1e-4 * randn64(3, length)
    x[1] *= 1e4  # one row of the batch needs no more candidates
    p = entmax(x, alpha)
    support = (p > 0).sum(-1)
    assert support[0] > 8 * FIRST_CANDIDATES > FIRST_CANDIDATES > support[1]
    torch.testing.assert_close(p, bisected_entmax(x, alpha), atol=1e-12, rtol=1e-7)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_masked_entries_get_nothing_and_masked_rows_are_zero(alpha):
    x = 0.3 * torch.randn(4, 10)
    x[:, ::2] = -torch.inf
    x[1] = -torch.inf
    x.requires_grad_()
    p = entmax(x, alpha)
    assert (p[:, ::2] == 0).all() and (p[1] == 0).all()
    torch.testing.assert_close(p.sum(-1), torch.tensor([1.0, 0, 1, 1]))
    kept = [0, 2, 3]
    torch.testing.assert_close(p[kept, 1::2], entmax(x[kept, 1::2], alpha))
    (p * torch.randn_like(p)).sum().backward()
    assert x.grad.isfinite().all() and (x.grad[1] == 0).all() and (x.grad[:, ::2] == 0).all()
    assert x.grad[0].abs().sum() > 0


def test_gradient_of_a_tensor_alpha_survives_masked_rows():
    x = torch.randn(2, 3, 5, 8)
    x[:, :, 2] = -torch.inf
    alpha = torch.tensor([1.2, 1.5, 1.9]).view(3, 1, 1).requires_grad_()
    (entmax(x, alpha) * torch.randn(8)).sum().backward()
    assert alpha.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("alpha", [*ALPHAS, "tensor"])
def test_extreme_scores(dtype, alpha):
    alpha = torch.tensor(1.5) if alpha == "tensor" else alpha
    large = torch.finfo(dtype).max
    x = torch.randn(6, 33).to(dtype)
    x[0, 1:] = -1e4
    x[1, 1:] = -large
    x[2] = -large
    x[3, 5] = large
    x[4] = large
    x[5, ::2] = -large
    x.requires_grad_()
    p = entmax(x, alpha)
    assert p.dtype == dtype and p.isfinite().all()
    torch.testing.assert_close(p.float().sum(-1), torch.ones(6), atol=4 * torch.finfo(dtype).eps, rtol=0)
    (p.float() * torch.randn(33)).sum().backward()
    assert x.grad.isfinite().all() and x.grad.dtype == dtype


@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_a_large_support_far_below_the_maximum(alpha):
    # every entry but one lies just above the threshold: the sums of squares in the closed form cancel
    x = torch.full((1, 2000), -0.97) + 1e-3 * torch.rand(1, 2000)
    x[0, 0] = 0
    x /= alpha - 1
    p = entmax(x, alpha).double()
    torch.testing.assert_close(p, bisected_entmax(x.double(), alpha), atol=1e-6, rtol=1e-2)
    torch.testing.assert_close(p.sum(-1), torch.ones(1, dtype=torch.float64), atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("dim", [0, 1, -2, -1])
@pytest.mark.parametrize("alpha", [1.0, 1.3, 1.5])
def test_dim(dim, alpha):
    x = randn64(4, 5, 6)
    expected = torch.stack([entmax(row, alpha) for row in x.movedim(dim, -1).reshape(-1, x.shape[dim])])
    expected = expected.view(x.movedim(dim, -1).shape).movedim(-1, dim)
    torch.testing.assert_close(entmax(x, alpha, dim=dim), expected)


def test_a_tensor_alpha_means_what_the_number_means():
    x = randn64(2, 3, 4, 9)
    for alpha in (1.25, 1.5, 2.0):
        torch.testing.assert_close(entmax(x, torch.tensor(alpha)), entmax(x, alpha))
    per_head = torch.tensor([1.25, 1.5, 2.0])
    expected = torch.stack([entmax(x[:, h], float(alpha)) for h, alpha in enumerate(per_head)], 1)
    torch.testing.assert_close(entmax(x, per_head.view(3, 1, 1)), expected)
    torch.testing.assert_close(entmax(x.movedim(-1, 0), per_head.view(3, 1), dim=0), expected.movedim(-1, 0))


def test_does_not_change_its_input_and_takes_strided_ones():
    x = torch.randn(5, 8, 3).transpose(0, 2)
    before = x.clone()
    torch.testing.assert_close(entmax(x, 1.5), entmax(before.contiguous(), 1.5))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "alpha, message",
    [
        (0.5, "1 <= alpha <= 2"),
        (2.5, "1 <= alpha <= 2"),
        (1.00001, "alpha of at least 1.0001, unless softmax is meant, got alpha = 1.00001"),
        (float("nan"), "1 <= alpha <= 2"),
        (torch.tensor(1.0), "1.0001 <= alpha <= 2 throughout a tensor alpha, got 1"),
        (torch.ones(2, 1, dtype=torch.bfloat16), "throughout a tensor alpha, got 1"),
        (torch.ones(2, 1, dtype=torch.float16), "throughout a tensor alpha, got 1"),
        (torch.tensor(float("nan")), "got nan"),
        (torch.tensor([1.5, 2.5]).view(2, 1), "got 2.5"),
        (torch.full((3, 1), 1.5), "size 1 at dim -1"),
        (torch.full((8,), 1.5), "size 1 at dim -1"),
        (torch.full((5, 2, 1), 1.5), "broadcasts to x"),
    ],
)
def test_alpha_errors(alpha, message):
    with pytest.raises(ValueError, match=message):
        entmax(torch.randn(2, 8), alpha)


def test_input_errors():
    with pytest.raises(ValueError, match="scalar"):
        entmax(torch.tensor(1.0))
    with pytest.raises(ValueError, match="Expected x as a tensor, got list"):
        entmax([1.0, 2.0])
    with pytest.raises(ValueError, match=r"a dim of x, whose shape is \(3, 2\), got 2"):
        entmax(torch.zeros(3, 2), dim=2)
    with pytest.raises(ValueError, match="at least one entry"):
        entmax(torch.zeros(3, 0))
    with pytest.raises(ValueError, match="floating point x, got torch.int64"):
        entmax(torch.arange(3))
    with pytest.raises(ValueError, match="implementation"):
        entmax(torch.zeros(3), implementation="fast")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="implementation=triton cannot run here"):
            entmax(torch.zeros(3), implementation="triton")
