"""What would stop or stall a GPU, found without one.

Training steps, inference, response maps and the weights' average run on torch's "meta" device,
whose tensors hold no numbers: reading one on the host raises, and `OneDevice` raises where an
operation mixes devices, which on a GPU is an error or a copy that the host waits for. Not seen
here are tensors made from Python lists (small copies), what a CUDA kernel refuses (dtypes), and
speed.
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

PAPER_CHOICE = [PAPER_SCALES[group] for group in PA100K]
KINDS = [*((ple, "resnet18") for ple in ("none", "R", "K", "S")), ("S", "swin_t")]
MODELS = pytest.mark.parametrize("ple, backbone", KINDS)
AMP = pytest.mark.parametrize("amp", [False, True])
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
    """A model, images, keypoints and labels."""
    if ple == "none":
        model = Baseline(PA100K, backbone)
    else:
        model = SSPNet(PA100K, ple, backbone, channels=32)
        model.afss.scales = list(PAPER_CHOICE)
    model = model.to("meta", memory_format=torch.channels_last)
    images = torch.zeros(B, 3, H, W, device="meta").to(memory_format=torch.channels_last)
    keypoints = torch.zeros(B, 16, 2, device="meta")
    return model, images, keypoints, torch.zeros(B, 26, device="meta")


def autocast(amp):
    return torch.autocast("cpu", torch.bfloat16) if amp else nullcontext()


@MODELS
@pytest.mark.parametrize("amp, selecting", [(False, True), (True, False)])
def test_a_training_step_reads_nothing_from_the_device(ple, backbone, amp, selecting):
    model, images, keypoints, labels = on_meta(ple, backbone)
    loss_of = HierarchicalLoss(PA100K, torch.full((26,), 0.3)).to("meta")
    if ple != "none":
        model.afss.selecting = selecting
    with OneDevice():
        with autocast(amp):
            logits = model.train()(images, keypoints)
        loss_of(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.GRADIENT_NORM)
        if ple != "none":
            model.afss.update(logits.detach(), labels)
    assert logits.shape == (3 if selecting and ple != "none" else 1, 4, 26)
    assert any(p.grad is not None for p in model.parameters())


@MODELS
@AMP
def test_inference_reads_nothing_from_the_device(ple, backbone, amp):
    model, images, keypoints, _ = on_meta(ple, backbone)
    with OneDevice(), torch.inference_mode(), autocast(amp):
        assert model.eval()(images, keypoints).shape == (4, 26)


@MODELS
def test_response_maps_read_nothing_from_the_device(ple, backbone):
    model, images, keypoints, _ = on_meta(ple, backbone)
    with OneDevice():
        logits, responses = localize.response_maps(model.eval(), images, [0, 13], keypoints)
    assert logits.shape == (4, 26)
    assert len(responses) == 2


def test_the_weights_average_reads_nothing_from_the_device():
    model = SSPNet(PA100K, "S", "resnet18", channels=8).to("meta")
    with OneDevice():
        train.update_ema(copy.deepcopy(model), model, steps=7)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.zeros(4),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.tensor(1.0).to(x.device),
    ],
)
def test_these_checks_see_mistakes(mistake):
    x = torch.zeros(4, device="meta")
    with OneDevice(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        mistake(x)
