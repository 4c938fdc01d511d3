"""What several test files share."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the flat files, wherever pytest is started

from data import PA100K_GROUPS  # noqa: E402
from sspnet import Baseline, SSPNet  # noqa: E402

PA100K = list(PA100K_GROUPS.values())
FEW_GROUPS = ["torso", "head", "all", "bottom", "head"]


def random_model(ple, backbone="resnet18", seed=12, **options):
    """A small model of five attributes with random weights; ple "none" is the baseline."""
    torch.manual_seed(seed)
    if ple == "none":
        return Baseline(FEW_GROUPS, backbone)
    return SSPNet(FEW_GROUPS, ple, backbone, channels=16, **options)


def words(*parts):
    """Command-line arguments from text: words("train.py --out", folder)."""
    return [word for part in parts for word in str(part).split()]


def log_rows(folder):
    """The rows of a training's log.csv, as dicts of strings."""
    with open(Path(folder) / "log.csv", newline="") as opened:
        return list(csv.DictReader(opened))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the longest tests, too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --slow"))
