"""What is recorded of a measurement."""

import subprocess

import facts
import torch
import triton


def test_the_commit_says_where_the_tree_has_changed(tmp_path):
    assert facts.read_commit(tmp_path) is None  # no repository
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("first")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "message"], ["tag", "-am", "message", "v1"]):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    assert facts.read_commit(tmp_path) == commit
    (tmp_path / "file").write_text("second")
    assert facts.read_commit(tmp_path) == f"{commit}-dirty"


def test_a_row_names_machine_versions_and_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    found = facts.read_facts("bench_training.py", ["flash:16384", "--out", "my rows.jsonl"])
    assert found | {"commit": None} == {
        "device": "NVIDIA H200",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": None,
        "command": "bench_training.py flash:16384 --out 'my rows.jsonl'",
    }
    assert facts.facts_line(found).startswith("device NVIDIA H200, torch ")
