"""What would stop or stall a GPU, found without one.

Training steps, inference, response maps and the weights' average run on torch's "meta" device,
whose tensors hold no numbers: reading one on the host raises, and `OneDevice` raises where an
operation mixes devices, which on a GPU is an error or a copy that the host waits for. Not seen
here are tensors made from Python lists (small copies), mixed precision, what a CUDA kernel refuses
(dtypes), and speed.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from benchmark import PAPER_SCALES
from conftest import PA100K
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import localize
import train
from sspnet import Baseline, HierarchicalLoss, SSPNet

KINDS = [*((ple, "resnet18") for ple in ("none", "R", "K", "S")), ("S", "swin_t")]
UPLOADS = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OneDevice(TorchDispatchMode):
    """Raises where one operation touches tensors of two devices."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        # Elsewhere than in a copy, a single number of the host travels with the kernel.
        counts = [t for t in tensors if t.dim() or t.is_meta or operation in UPLOADS]
        devices = {t.device.type for t in counts}
        assert len(devices) < 2, f"{operation} on {' and '.join(sorted(devices))}"
        return result


def on_meta(ple, backbone, B=4, H=64, W=48):
    """A model, images, keypoints, labels, and a loss."""
    if ple == "none":
        model = Baseline(PA100K, backbone)
    else:
        model = SSPNet(PA100K, ple, backbone, channels=32)
        model.afss.scales = [PAPER_SCALES[group] for group in PA100K]
    model = model.to("meta", memory_format=torch.channels_last)
    images = torch.zeros(B, 3, H, W, device="meta").to(memory_format=torch.channels_last)
    keypoints = torch.zeros(B, 16, 2, device="meta")
    loss_of = HierarchicalLoss(PA100K, torch.full((26,), 0.3)).to("meta")
    return model, images, keypoints, torch.zeros(B, 26, device="meta"), loss_of


@pytest.fixture(autouse=True)
def without_autocast(monkeypatch):
    """It does not know this device; test_cuda.py and test_train.py have mixed precision."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def training_step(model, images, keypoints, labels, loss_of):
    logits = model.train()(images, keypoints)
    loss_of(logits.float(), labels).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), train.GRADIENT_NORM)
    if isinstance(model, SSPNet):
        model.afss.update(logits.detach(), labels)
    return logits


@pytest.mark.parametrize("ple, backbone", KINDS)
def test_training_steps_inference_and_response_maps_read_nothing_from_the_device(ple, backbone):
    model, *given = on_meta(ple, backbone)
    images, keypoints = given[:2]
    with OneDevice():
        for selecting in (True, False):
            if ple != "none":
                model.afss.selecting = selecting
            logits = training_step(model, *given)
            assert logits.shape == (3 if selecting and ple != "none" else 1, 4, 26)
        with torch.inference_mode():
            assert model.eval()(images, keypoints).shape == (4, 26)
        logits, responses = localize.response_maps(model, images, [0, 13], keypoints)
    assert logits.shape == (4, 26)
    assert len(responses) == 2


class Launches(TorchDispatchMode):
    """Counts the operations that are no views: on a GPU a launch or more each."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def test_launches_of_ple_s_against_the_baselines():
    """With ResNet50, AFSS frozen, from the second step on: 1.44 in training, 2.03 in inference."""
    counts = {}
    for ple in ("none", "S"):
        model, *given = on_meta(ple, "resnet50")
        if ple == "S":
            model.afss.selecting = False
        training_step(model, *given)  # makes PLE-S's grids
        with Launches() as training:
            training_step(model, *given)
        with Launches() as inference, torch.inference_mode():
            model.eval()(*given[:2])
        counts[ple] = training.count, inference.count
    ratios = [ours / base for ours, base in zip(counts["S"], counts["none"], strict=True)]
    assert ratios[0] < 1.53
    assert ratios[1] < 2.1


def test_the_weights_average_reads_nothing_from_the_device():
    model = SSPNet(PA100K, "S", "resnet18", channels=8).to("meta")
    with OneDevice():
        train.update_ema(*train.averaged_tensors(copy.deepcopy(model), model), steps=7)


def test_these_checks_see_mistakes():
    x = torch.zeros(4, device="meta")
    mistakes = [lambda: x + torch.zeros(4), lambda: x[x > 0], x.tolist, x.cpu]
    mistakes.append(lambda: torch.tensor(1.0).to(x.device))
    for mistake in mistakes:
        with OneDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
            mistake()
