"""What all tests share."""

import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run as Python there; read when triton is first imported

torch.set_num_threads(1)  # the tests' tensors are tiny, and pytest's workers share the cores


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def test_data() -> Path:
    """The folder of example data; the test is skipped where there is none."""
    folder = os.environ.get("ADASPLASH_TEST_DATA")
    if not folder:
        pytest.skip("ADASPLASH_TEST_DATA is not set")
    return Path(folder)
