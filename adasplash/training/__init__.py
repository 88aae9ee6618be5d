"""A training run: its configuration, its loop, what it writes."""

from ..typed import from_mapping
from .config import TrainConfig, check_overrides, groups_of
from .jobs import Jobs
from .loop import TrainingDiverged, train
from .run_folder import read_config, read_summary, resumed

__all__ = [
    "Jobs",
    "TrainConfig",
    "TrainingDiverged",
    "check_overrides",
    "from_mapping",
    "groups_of",
    "read_config",
    "read_summary",
    "resumed",
    "train",
]
