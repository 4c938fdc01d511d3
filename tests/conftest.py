"""What several test files share."""

import csv
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models._api import register_model
from torchvision.models.resnet import BasicBlock, ResNet

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/tools")]  # wherever pytest is started

import data  # noqa: E402
import evaluate  # noqa: E402
import localize  # noqa: E402
import train  # noqa: E402
from data import PA100K_GROUPS  # noqa: E402
from sspnet import Backbone, Baseline, HierarchicalLoss, SSPNet, bin_centres  # noqa: E402

ATTRIBUTES, PA100K = list(PA100K_GROUPS), list(PA100K_GROUPS.values())
FEW_GROUPS = ["torso", "head", "all", "bottom", "head"]
words = str.split  # such as options without paths
REAL = Path(os.environ.get("SSPNET_DATA", "nowhere")).absolute()  # the real annotations' folder


class Thin(ResNet):
    """ResNet18 with a quarter of its channels, so that trainings take seconds. Not fewer: on a CPU
    the backward pass of a strided 1x1 convolution in channels_last of under 16 input channels
    writes past its memory (oneDNN issue 6035, also in torch 2.14)."""

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        return super()._make_layer(block, planes // 4, blocks, stride, dilate)


@register_model("thin")
def thin(weights=None):
    net = Thin(BasicBlock, [2, 2, 2, 2])
    net.relu = torch.nn.Dropout(0.1)  # random in training, as Swin is
    net.fc = torch.nn.Linear(128, 1000)
    return net


Backbone.names += ("thin",)
DEVICE = os.environ.get("SSPNET_DEVICE", "cpu")  # such as cuda, for the trainings of all tests
SIZES = words(f"--size 64 48 --channels 8 --batch-size 8 --freeze 0 --workers 0 --device {DEVICE}")
TINY_RESNET18 = [*words("--images 16 --epochs 3"), *SIZES]  # on the synthetic set
TINY = [*TINY_RESNET18, "--backbone", "thin"]
SMALL = [*words("--weights none --epochs 1 --backbone thin"), *SIZES]  # on others


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Whatever a test writes to the current folder stays out of the project."""
    monkeypatch.chdir(tmp_path)


def random_model(ple, backbone="resnet18", seed=12, **options):
    """A small model of five attributes with random weights; ple "none" is the baseline."""
    torch.manual_seed(seed)
    if ple == "none":
        return Baseline(FEW_GROUPS, backbone)
    return SSPNet(FEW_GROUPS, ple, backbone, channels=16, **options)


def tiny(out, *more):
    """A training of seconds; returns its last.pt."""
    train.main([*TINY, "--out", str(out), *more])
    return load(Path(out) / "last.pt")


def as_process(*options):
    """The command line of a training of seconds, in a process of its own, which lacks "thin"."""
    return [sys.executable, str(ROOT / "train.py"), *TINY_RESNET18, *options]


def command(name, *arguments):
    """Runs a command as its file would."""
    module = {"data": data, "train": train, "evaluate": evaluate, "localize": localize}[name[:-3]]
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")  # strict, as a terminal's
    err, code = io.StringIO(), 0
    argv = mock.patch.object(sys, "argv", [name, *map(str, arguments)])
    with redirect_stdout(out), redirect_stderr(err), argv:
        try:
            data.command(module.main)
        except SystemExit as stop:
            code = stop.code
    out.flush()
    printed = out.buffer.getvalue().decode()
    return SimpleNamespace(returncode=code, stdout=printed, stderr=err.getvalue())


def succeed(*arguments):
    """What a command prints, which must succeed."""
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(*arguments):
    """The one line with which a command must refuse its input."""
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    if lines[0].startswith("usage: "):  # argparse says its usage first
        return lines[-1]
    # Progress, shown every ten seconds, may go before it.
    lines = [line for line in lines if not line.endswith(" min left")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of each variant, written by the command."""
    folder, checkpoints = tmp_path_factory.mktemp("runs"), {}
    for ple in ("S", "K", "R", "none"):
        succeed("train.py", *TINY, "--ple", ple, "--epochs", "1", "--out", folder / ple)
        checkpoints[ple] = folder / ple / "best.pt"
    return checkpoints


def read_json(file):
    return json.loads(Path(file).read_text())


def load(file):
    return torch.load(file, weights_only=True)


def assert_same(a, b, path=""):
    """Equality of nested dicts and lists to the bit; the log's seconds excepted."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


def log_rows(folder):
    """The rows of a training's log.csv, as dicts of strings."""
    return list(csv.DictReader((folder / "log.csv").read_text().splitlines()))


def steps_of(amp=None, device="cpu", count=2, scale=None):
    """Steps of the product on 8 images each: the state after them, the loss, how many were taken.
    scale: the fp16 scaler's first one, if not its own."""
    options = words("--ple S --size 64 48 --channels 8 --backbone thin --epochs 1 --batch-size 8")
    args = train.parse_arguments([*options, "--images", str(8 * count), "--device", device])
    config = {**vars(args), "amp": amp}
    batches, _ = train.open_splits(config, Path("run"))
    state = train.make_state(config, len(batches))
    if scale:
        state["scaler"] = torch.amp.GradScaler(device, init_scale=scale)
    split = batches.dataset.split
    loss_of = HierarchicalLoss(split.groups, torch.from_numpy(split.labels.mean(0))).to(device)
    network = train.wrap(state["model"])
    options = {"device": args.device, "amp": amp}
    loss, taken = train.train_one_epoch(0, 1, state, network, loss_of, batches, **options)
    return state, loss.item(), taken


class BrightPerson(torch.nn.Module):
    """In SimCC's place: the joints of the right side are at the left edge of what is white, of the
    left side at its right edge, ankles above, wrists below. It is unsure where nothing is white."""

    places = (
        [0, 0, 0, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0, 1, 1, 1],  # x
        [0, 0.2, 0.4, 0.4, 0.2, 0, 0.5, 0.5, 0.5, 0.5, 1, 0.8, 0.6, 0.6, 0.8, 1],  # y
    )

    def forward(self, images):
        logits = [torch.zeros(len(images), 16, 232), torch.zeros(len(images), 16, 296)]
        for b, image in enumerate(images):
            for axis, found in enumerate(logits):
                white = (image.mean(0) > 1.5).any(axis).nonzero().flatten().tolist()
                if white:
                    share = torch.tensor(self.places[axis])
                    points = white[0] + (white[-1] - white[0]) * share
                    found[b] = -((bin_centres(found.shape[2]) - points[:, None]) ** 2)
        return logits


@pytest.fixture
def bright_person(monkeypatch):
    monkeypatch.setattr(data, "keypoint_network", BrightPerson)


def person_image(box, size=(200, 150)):
    """A black image (H, W, 3) with a white person at (left, top, right, bottom)."""
    left, top, right, bottom = box
    pixels = np.zeros((*size, 3), np.uint8)
    pixels[top:bottom, left:right] = 255
    return pixels


def random_images(folder, names, size=(40, 20)):
    rng = np.random.default_rng(1)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)


def cells(values):
    """A MATLAB column of cells."""
    column = np.empty((len(values), 1), object)
    column[:, 0] = values
    return column


def savemat(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("scipy.io", reason="writing .mat files needs scipy").savemat(file, content)


def write_pa100k(folder, images="data", counts=(4, 2, 2)):
    """A few images and an annotation.mat in PA-100K's layout; returns what was written."""
    rng, mat, truth, number = np.random.default_rng(0), {"attributes": cells(ATTRIBUTES)}, {}, 0
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        names = [f"{number + i + 1:06d}.jpg" for i in range(count)]
        number += count
        labels = rng.integers(0, 2, (count, 26), dtype=np.uint8)
        random_images(folder / images, names)
        mat.update({f"{split}_images_name": cells(names), f"{split}_label": labels})
        truth[split] = names, labels
    savemat(folder / "annotation.mat", mat)
    return truth


ROWS = "a.png,1,0", "b.png,0,1"


def write_csv(folder, header="path,Hat,boots", rows=ROWS, groups=None, images=None):
    """One's own data: the same rows in each split."""
    folder.mkdir(exist_ok=True)
    for part in ("train", "val", "test"):
        (folder / f"{part}.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    random_images(images or folder, ["a.png", "b.png"])
    if groups is not None:
        (folder / "groups.json").write_text(groups)


def write_keypoints(file, names):
    """Points along a line from (10, 10), two pixels apart."""
    points = np.full((len(names), 16, 3), 10.0)
    points[:, :, 1] += 2 * np.arange(16)
    np.savez(file, names=names, keypoints=points)
