"""What is done to arguments before kernels are launched."""

import pytest
import torch

launch_arguments = pytest.importorskip("adasplash.ops.launch_arguments", reason="needs triton")


@pytest.mark.parametrize(
    "shape, expanded, copied",
    [
        ((1, 1, 20), (1, 4, 20), False),  # no row lies apart from another
        ((2, 1, 32), (2, 4, 32), False),
        ((2, 1, 20), (2, 4, 20), True),
        ((2, 4, 20), (2, 4, 20), True),
        ((1, 4, 1), (3, 4, 1), True),
    ],
)
def test_ends_of_ranges_in_wide_pieces(shape, expanded, copied):
    x = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape).expand(expanded)
    wide = launch_arguments.with_wide_strides(x)
    assert (wide.data_ptr() != x.data_ptr()) == copied
    assert torch.equal(wide[..., : x.shape[2]], x) and wide.stride(2) == 1
    assert not any(stride % 16 for stride in wide.stride()[:2])
    assert all(stride == 0 for stride, once, size in zip(wide.stride(), shape, expanded, strict=True) if once < size)


def test_positions_with_the_stride_of_rows():
    x = torch.arange(2 * 3 * 20, dtype=torch.int32).view(2, 3, 20)
    padded = launch_arguments.with_row_stride(x)
    assert padded.shape == (2, 3, 32) and padded.is_contiguous() and torch.equal(padded[..., :20], x)
    assert launch_arguments.with_row_stride(padded) is padded
