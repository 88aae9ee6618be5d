"""Train a language model: python train.py attention=adasplash seq_len=16384

Hydra composes configs/train.yaml with the command line; a typed configuration goes in, nothing else happens here.
Several jobs: python train.py -m attention=flash,adasplash seq_len=8192,16384
"""

import sys
from pathlib import Path

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from adasplash.training import (
    Jobs,
    TrainConfig,
    check_overrides,
    from_mapping,
    groups_of,
    resumed,
    train,
)

CONFIGS = Path(__file__).parent / "configs"

# A run without `model=`: a small one, unless there is a GPU.
DEFAULT_MODEL = "gpt2" if torch.cuda.is_available() else "small"
ConfigStore.instance().store(
    group="model", name="default", node=OmegaConf.load(CONFIGS / f"model/{DEFAULT_MODEL}.yaml")
)

jobs = Jobs("train.py", "failed")


def typed_config(composed: DictConfig, overrides: list[str]) -> TrainConfig:
    """The composed configuration as dataclasses; `resume=FOLDER` takes that run's own, changed by the command line."""
    values = OmegaConf.to_container(composed, resolve=True)
    if values["resume"] not in ("auto", "never"):
        folder, saved = resumed(values["resume"])
        saved = OmegaConf.create(saved.to_mapping() | {"resume": str(folder), "run_dir": str(folder)})
        for word in overrides:
            key = word.lstrip("+").partition("=")[0]
            if key in groups_of(CONFIGS):
                raise ValueError(f"resume={folder} goes on with that run's own {key}; leave {key}= out.")
            OmegaConf.update(saved, key, OmegaConf.select(composed, key))
        values = OmegaConf.to_container(saved)
    return from_mapping(TrainConfig, values)


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
def main(composed: DictConfig) -> None:
    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    sweep = hydra_config.mode == RunMode.MULTIRUN
    summary = jobs.run(lambda: train(typed_config(composed, overrides)), overrides, sweep=sweep)
    if summary and summary["status"] == "stopped":
        how = f"python train.py resume={summary['run_dir']}"
        print(f"Stopped and saved at step {summary['step']}. Go on with: {how}", flush=True)
        jobs.report()  # the jobs that would follow are left out
        sys.exit(128 + summary["signal"])


if __name__ == "__main__":
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:], TrainConfig, groups_of(CONFIGS))
    except ValueError as error:
        sys.exit(f"Error: {error}")
    try:
        main()
    except KeyboardInterrupt:  # before the training loop, which saves, or a second one in it
        jobs.report()
        print("\nInterrupted.", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if jobs.report() else 0)
