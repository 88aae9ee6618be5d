"""Who may import what. The arrows are read from the sources, so that a wrong import fails here and not in a review."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "adasplash"
LAYERS = ("ops", "typed", "attention", "models", "evaluation", "training")  # a part imports those before it, and itself


def sources(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if not any(part.startswith(".") for part in path.parts)]


def imports(path: Path) -> set[str]:
    """Absolute names of all that a file imports, inside functions too; 'adasplash.ops.checks' for relative imports."""
    names = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def outside(path: Path) -> set[str]:
    """Top-level names of the imports that are not this package's."""
    return {name.split(".")[0] for name in imports(path)} - {"adasplash"} - sys.stdlib_module_names


def part_of(name: str) -> str | None:
    """'adasplash.ops.checks' -> 'ops'."""
    words = name.split(".")
    return words[1] if words[0] == "adasplash" and len(words) > 1 else None


def part_at(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def users_of(library: str) -> set[str]:
    """Files that import an outside library, relative to the repository; tests and scripts may use what they like."""
    files = [*sources(PACKAGE), *ROOT.glob("*.py")]
    return {str(path.relative_to(ROOT)) for path in files if library in outside(path)}


def test_the_reader_of_imports_reads(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    file = tmp_path / "adasplash" / "attention" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import os, torch.nn\nfrom ..ops.checks import a\nfrom . import b\ndef f():\n    from wandb import c\n"
    )
    assert imports(file) >= {"os", "torch.nn", "adasplash.ops.checks", "adasplash.attention.b", "wandb"}
    assert outside(file) == {"torch", "wandb"}


@pytest.mark.parametrize("path", sources(PACKAGE), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_lower_parts_never_import_higher_ones(path):
    part = part_at(path)
    used = {part_of(name) for name in imports(path)} - {None, part, "version", "files"}
    if part in LAYERS:
        allowed = set(LAYERS[: LAYERS.index(part)]) | ({"data"} if part == "training" else set())
        assert used <= allowed
    elif part == "data":
        assert not used
    for name in imports(path):
        assert name.split(".")[0] not in ("scripts", "tests", "train", "eval")


@pytest.mark.parametrize(
    "library, places",
    [
        ("triton", ("adasplash/ops/",)),
        ("transformers", ("adasplash/attention/huggingface.py", "adasplash/models.py", "adasplash/data/")),
        ("wandb", ("adasplash/training/log.py",)),
        ("hydra", ("train.py", "eval.py")),
        ("omegaconf", ("train.py", "eval.py")),
        ("matplotlib", ("adasplash/training/plots.py", "adasplash/evaluation/")),
    ],
)
def test_outside_libraries_have_their_places(library, places):
    strays = {user for user in users_of(library) if not user.startswith(places)}
    assert not strays


def test_each_library_is_found_where_it_is_used():
    """The test above would pass too if the reader found nothing."""
    assert "adasplash/models.py" in users_of("transformers") and "train.py" in users_of("hydra")


@pytest.mark.parametrize("path", sources(PACKAGE / "ops"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_operations_need_torch_and_triton_alone(path):
    meanings = path.name in ("reference.py", "range_attention.py", "reorder.py")
    assert outside(path) <= ({"torch"} if meanings else {"torch", "triton"})


def test_importing_the_package_is_light():
    """Nothing heavy beyond torch, whose compiler alone would double the time; in a process of its own."""
    heavy = "{'transformers', 'datasets', 'wandb', 'matplotlib', 'triton', 'hydra', 'tiktoken', 'torch._dynamo'}"
    program = "import sys, torch; before = set(sys.modules); import adasplash; "
    program += f"print({heavy} & (set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


def test_references_stay_out_of_compiled_graphs():
    """A graph before and one after; what decides so is imported only then."""
    program = """
import torch
from adasplash import KeyRange
from adasplash.ops.range_attention import range_attention
visible = KeyRange.causal(4, 4)
graphs = []
def remember(graph, inputs):
    graphs.append([node.name for node in graph.graph.nodes if node.op.startswith("call")])
    return graph
def double_attend(x):
    return 2 * range_attention(2 * x, x, x, visible, alpha=1.5, scale=1.0)
x = torch.randn(1, 1, 4, 4)
compiled = torch.compile(double_attend, backend=remember)
for _ in range(3):
    assert torch.equal(compiled(x), double_attend(x))
print(graphs)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[['mul'], ['mul']]", done.stdout + done.stderr


def test_every_public_name_exists():
    program = "import adasplash; [getattr(adasplash, name) for name in adasplash.__all__]; print(adasplash.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
