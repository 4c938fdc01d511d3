"""On a GPU what the other tests check on the CPU; skipped without one.

python -m pytest tests/test_cuda.py
SSPNET_DEVICE=cpu python -m pytest tests/test_cuda.py   the CPU in its place: the file itself
SSPNET_DEVICE=cuda python -m pytest -k torchrun   with two GPUs
"""

import os

import pytest
import torch
from conftest import random_model, steps_of, succeed, tiny, words
from torch.testing import assert_close

from sspnet import bilinear_sample, response_maps

DEVICE = os.environ.get("SSPNET_DEVICE", "cuda")
if DEVICE.startswith("cuda") and not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
PLES = pytest.mark.parametrize("ple", ["none", "R", "K", "S"])


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_bilinear_sample_both_ways(dtype, tolerance):
    torch.manual_seed(0)
    x, points = torch.randn(2, 8, 16, 12).to(dtype), torch.rand(2, 30, 3, 2) * 18 - 2
    weights, results = torch.rand(2, 30, 3), []
    for device in ("cpu", DEVICE):
        given = [t.detach().clone().to(device).requires_grad_() for t in (x, points, weights)]
        sampled = bilinear_sample(*given)
        sampled.float().square().sum().backward()
        results.append([sampled, *(tensor.grad for tensor in given)])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        largest = expected.float().abs().max().item()
        assert_close(found.cpu(), expected, atol=tolerance * largest, rtol=tolerance)


@PLES
def test_logits_and_response_maps(ple):
    model = random_model(ple).eval()
    images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
    expected, maps = response_maps(model, images, range(5), keypoints)
    model.to(DEVICE)
    with torch.inference_mode():
        logits = model(images.to(DEVICE), keypoints.to(DEVICE))
        again, found = response_maps(model, images.to(DEVICE), range(5), keypoints.to(DEVICE))
    for values in (logits, again):
        assert_close(values.cpu(), expected, atol=1e-4, rtol=1e-3)
    for one, other in zip(maps.values(), found.values(), strict=True):
        assert_close(other.cpu(), one, atol=1e-3 * one.max().item(), rtol=1e-2)


@pytest.mark.parametrize("amp, scale", [(None, None), ("bf16", None), ("fp16", 1024.0)])
def test_training_steps(amp, scale):
    """Near the CPU's in float32, with finite gradients."""
    _, expected, _ = steps_of()
    state, loss, taken = steps_of(amp, DEVICE, scale=scale)
    assert taken == 2
    assert loss == pytest.approx(expected, rel=0.02)
    gradients = [p.grad for p in state["model"].parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


def test_resume(tmp_path):
    out, options = tmp_path / "run", [*words("--ple S --freeze 2 --schedule step --device"), DEVICE]
    state = tiny(out, *options, "--epochs", "1")
    state["config"]["epochs"] = 3  # as if it had been meant to go on
    torch.save(state, out / "last.pt")
    assert tiny(out, *options, "--resume")["epoch"] == 3


def test_compile(tmp_path):
    options = [*words("--ple S --epochs 1 --images 8 --device"), DEVICE]
    plain = tiny(tmp_path / "plain", *options)["rows"][0]["loss"]
    compiled = tiny(tmp_path / "compiled", *options, "--compile")["rows"][0]["loss"]
    assert compiled == pytest.approx(plain, rel=0.02)


def test_evaluate_and_localize(trained, tmp_path):
    for amp in ([], ["--amp", "bf16"]):
        options = [*words("--images 12 --device"), DEVICE, *amp]
        assert "mA" in succeed("evaluate.py", trained["S"], *options)
        assert "IoU" in succeed("localize.py", trained["K"], *options, "--panels", "0")
