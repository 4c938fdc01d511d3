"""What several test files share."""

import csv
import io
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the flat files, wherever pytest is started

import data  # noqa: E402
import evaluate  # noqa: E402
import localize  # noqa: E402
import train  # noqa: E402
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


ROOT = Path(__file__).parents[1]
TINY = words(
    "--images 24 --epochs 3 --size 64 48 --channels 8 --batch-size 8 --freeze 0 --device cpu"
)


def tiny(out, *more):
    """A training of seconds; returns its last.pt."""
    train.main([*TINY, "--out", str(out), *more])
    return torch.load(out / "last.pt", weights_only=True)


def command(*parts):
    """Runs a command as its file would, in this process: importing torch anew takes seconds."""
    name, *arguments = words(*parts)
    module = {"data": data, "train": train, "evaluate": evaluate, "localize": localize}[name[:-3]]
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", [name, *arguments])
    with redirect_stdout(out), redirect_stderr(err), argv:
        try:
            data.command(module.main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def succeed(*parts):
    """What a command prints, which must succeed."""
    done = command(*parts)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(*parts):
    """The one line with which a command must refuse its input."""
    done = command(*parts)
    assert done.returncode == 2, done.stderr
    # Progress, shown every ten seconds, may go before it.
    lines = [line for line in done.stderr.splitlines() if not line.endswith(" min left")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def assert_same(a, b, path=""):
    """Equality of nested dicts and lists to the bit; the log's seconds excepted."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


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
