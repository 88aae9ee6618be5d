"""Tuning, as far as it runs without a GPU."""

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tune_tiles

import adasplash
from adasplash.ops.tile_table import entmax_tiles, softmax_tiles


def event(key, microseconds):
    return SimpleNamespace(key=key, device_time_total=microseconds)


def test_a_kernel_is_timed_by_any_of_its_names():
    names, _ = tune_tiles.KERNELS["entmax.collect"]
    others = [event("key_norm_kernel", 50.0), event("recollect_kernel", 70.0)]
    for name in ("collect_kernel", "collect_hopper_kernel"):
        assert tune_tiles.kernel_time([*others, event(name, 6000.0)], names) == 6.0 / tune_tiles.STEPS


def test_a_kernel_that_did_not_run_is_no_time():
    events = [event("new_kernel", 1.0), event("Memset (Device)", 2.0)]
    with pytest.raises(RuntimeError, match="a_kernel or b_kernel .* what ran is: Memset .Device., new_kernel;"):
        tune_tiles.kernel_time(events, ("a_kernel", "b_kernel"))
    with pytest.raises(RuntimeError, match="what ran is: nothing"):
        tune_tiles.kernel_time([], ("a_kernel",))


def test_every_name_is_that_of_a_kernel():
    defined = set()
    for path in (Path(adasplash.__file__).parent / "ops").rglob("*.py"):
        defined |= {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
    assert {name for names, _ in tune_tiles.KERNELS.values() for name in names} <= defined


@pytest.mark.parametrize("kernel", tune_tiles.KERNELS)
def test_the_shape_of_the_table_is_the_first_candidate(kernel):
    family, part = kernel.split(".")
    table = (entmax_tiles if family == "entmax" else softmax_tiles)(64, torch.bfloat16, torch.device("cpu"))
    shapes = list(tune_tiles.candidates(kernel, table))
    assert shapes[0] == table[part] and len(set(shapes)) == len(shapes) > 1


def test_a_wrong_kernel_and_no_gpu_are_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune_tiles.main(["entmax.colect"]) == 1
    assert "Did you mean 'entmax.collect'?" in capsys.readouterr().err
    assert tune_tiles.main([]) == 1
    assert capsys.readouterr().err == "Error: tuning needs an NVIDIA GPU, and torch finds none.\n"
