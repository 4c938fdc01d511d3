"""The training: one step and one epoch's end against references, options, files, bad input."""

import copy
import functools
import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    TINY,
    command,
    log_rows,
    random_model,
    refuse,
    succeed,
    tiny,
    words,
    write_keypoints,
    write_pa100k,
)

import data
import evaluate
import train
from evaluate import read_checkpoint
from sspnet import Baseline, HierarchicalLoss, build_model

# ---- One step, one epoch's end


def last_of_one_step(tmp_path, *more):
    """last.pt after one epoch of one step, with the model it started from and its batch."""
    options = [*words("--images 8 --epochs 1 --batch-size 8 --schedule plateau"), *more]
    state = tiny(tmp_path / "run", *options)
    torch.manual_seed(0)
    model = build_model(state["config"])
    split = data.synthetic("train", images=8, size=(64, 48))
    batches = data.loader(split, (64, 48), 8, train=True)
    data.start_epoch(batches, 0)
    (batch,) = batches
    return state, model, split, batch


def test_one_step_uses_the_training_sets_ratios_clips_and_decays(tmp_path):
    """Adam's first moment after one step is a tenth of the clipped gradient plus the decay."""
    state, model, split, (images, labels, _, _) = last_of_one_step(tmp_path, "--ple", "none")
    ratio = torch.tensor([sum(split.labels[:, j]) / 8 for j in range(26)])
    probability = model.train()(images)[0].sigmoid()
    likelihood = labels * probability.log() + (1 - labels) * (1 - probability).log()
    weights = labels * (1 - ratio).exp() + (1 - labels) * ratio.exp()
    loss = -(weights * likelihood).sum() / 8
    loss.backward()
    assert state["rows"][0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    parameters = list(model.parameters())
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert norm > 10  # else this test would not see the clipping
    for index, parameter in enumerate(parameters):
        moment = state["optimizer"]["state"][index]["exp_avg"]
        expected = 10 / norm * parameter.grad + 5e-4 * parameter.detach()
        torch.testing.assert_close(10 * moment, expected, atol=1e-4, rtol=1e-3)


def test_an_epochs_loss_is_the_mean_over_its_steps(tmp_path, monkeypatch):
    real, losses = HierarchicalLoss.forward, []

    def record(self, logits, labels):
        loss = real(self, logits, labels)
        if logits.requires_grad:  # not in validation
            losses.append(loss.item())
        return loss

    monkeypatch.setattr(HierarchicalLoss, "forward", record)
    state = tiny(tmp_path / "run", "--ple", "R", "--epochs", "1")
    assert len(losses) == 2
    assert state["rows"][0]["loss"] == pytest.approx(sum(losses) / 2)


def test_the_plateau_watches_the_validation_loss_of_the_averaged_weights(tmp_path):
    state, model, split, _ = last_of_one_step(tmp_path, "--ple", "none")
    model.load_state_dict(state["ema"])
    validation = data.synthetic("val", images=8, size=(64, 48))
    logits, labels = evaluate.predict(model, data.loader(validation, (64, 48), 8))
    loss = HierarchicalLoss(split.groups, torch.from_numpy(split.labels.mean(0)))(logits, labels)
    assert state["scheduler"]["best"] == pytest.approx(loss.item(), rel=1e-4)


def test_the_rate_falls_to_a_tenth_after_four_epochs_without_a_lower_loss():
    args = train.parse_arguments(["--data", "x"])
    optimizer = torch.optim.Adam(random_model("none").parameters(), 1.0)
    scheduler, rates = train.make_scheduler(args, optimizer, 10), []
    for loss in (2.0, *[3.0] * 5):
        scheduler.step(loss)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1] * 5 + [0.1])


def test_without_a_validation_split_the_rate_falls_in_steps():
    args = train.parse_arguments(words("--schedule step --epochs 20"))
    optimizer, rates = torch.optim.Adam(random_model("none").parameters(), 1.0), []
    scheduler = train.make_scheduler(args, optimizer, 10)
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([1] * 12 + [0.1] * 5 + [0.01] * 3)  # 60% and 85% of the epochs
    for options in (["--dataset", "rap1"], ["--train-split", "trainval"]):
        assert train.parse_arguments(["--data", "x", *options]).schedule == "step"
    assert train.parse_arguments(["--data", "x"]).schedule == "plateau"


def test_ema_follows_its_definition():
    """decay = min(0.9998, (1 + steps) / (10 + steps)) for weights and batch-norm statistics."""
    torch.manual_seed(0)
    model = Baseline(["head"], "resnet18")
    ema = copy.deepcopy(model)
    weight, batch_norm = model.head.weight, model.backbone.stages[0][0][1]
    expected = [weight.detach().clone(), batch_norm.running_mean.clone()]
    for step in [*range(1, 20), 10**6]:
        with torch.no_grad():
            weight += 0.1
            batch_norm.running_mean += 0.2
            batch_norm.num_batches_tracked += 1
        train.update_ema(ema, model, step)
        decay = min(0.9998, (1 + step) / (10 + step))
        new = weight.detach(), batch_norm.running_mean
        expected = [decay * e + (1 - decay) * v for e, v in zip(expected, new, strict=True)]
    torch.testing.assert_close(ema.head.weight.detach(), expected[0])
    torch.testing.assert_close(ema.backbone.stages[0][0][1].running_mean, expected[1])
    assert ema.backbone.stages[0][0][1].num_batches_tracked == 20


def test_the_offset_predictor_learns_at_a_tenth_of_the_rate():
    model = random_model("S")
    groups = train.parameter_groups(model, 0.01)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.ple.sample.predict.weight)] == pytest.approx(0.001)
    assert rate[id(model.ple.sample.predict.bias)] == pytest.approx(0.001)
    assert rate[id(model.ple.sample.A.weight)] == pytest.approx(0.01)
    assert len(rate) == len(list(model.parameters()))


# ---- Files


def test_log_has_a_row_per_epoch_with_metrics_and_choices(tmp_path):
    state = tiny(tmp_path / "run", "--ple", "S", "--freeze", "2")
    rows = log_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert {f"val_{m}" for m in ("mA", "Accu", "Prec", "Rec", "F1")} <= row.keys()
        chosen = {g: row[f"scale_{g}"] for g in ("head", "torso", "bottom", "all")}
        if row["epoch"] != "3":  # frozen then, nothing measured
            for group, scale in chosen.items():
                measured = {s: float(row[f"{group}_{s}"]) for s in ("P1", "P2", "P3")}
                assert measured[scale] == max(measured.values())
        else:
            assert row["head_P1"] == ""
            assert chosen == {g: rows[1][f"scale_{g}"] for g in chosen}
    scales = state["model"]["afss._extra_state"]
    assert scales == state["ema"]["afss._extra_state"]
    assert rows[-1]["scale_head"] == f"P{scales[7] + 1}"  # Hat is the 8th


def test_best_is_the_epoch_with_the_highest_validation_mA(tmp_path):
    tiny(tmp_path / "run", "--ple", "none")
    rows = log_rows(tmp_path / "run")
    best = max(rows, key=lambda row: float(row["val_mA"]))
    assert read_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == int(best["epoch"])


# ---- The ways to train


@pytest.mark.parametrize("options", ["--ple none --amp bf16", "--ple K --afss attribute"])
def test_other_ways_to_train(tmp_path, options):
    state = tiny(tmp_path / "run", *words(options), *words("--epochs 1 --schedule onecycle"))
    assert math.isfinite(state["rows"][0]["loss"])


def test_compile_trains_like_eager(tmp_path, monkeypatch):
    """`--compile` with AFSS selecting; the eager backend needs no compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    options = words("--ple S --epochs 1")
    plain = tiny(tmp_path / "plain", *options)
    compiled = tiny(tmp_path / "compiled", *options, "--compile")
    for name in ("loss", "val_mA"):
        for a, b in zip(plain["rows"], compiled["rows"], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_pa100k_end_to_end_with_keypoints(tmp_path):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    write_keypoints(tmp_path / "k.npz", [f"{i:06d}.jpg" for i in range(1, 17)])
    options = ["--data", tmp_path, *SMALL]
    out = tmp_path / "run"
    assert "--keypoints" in refuse("train.py", *options, "--ple", "K", "--out", out)
    known = "--keypoints", tmp_path / "k.npz"
    succeed("train.py", *options, "--ple", "K", *known, "--out", out)
    for name in ("evaluate.py", "localize.py"):
        succeed(name, out / "best.pt")
    more = words("--ple R --train-split trainval")
    assert "12 images" in succeed("train.py", *options, *more, "--out", tmp_path / "both")


def test_an_attribute_that_is_on_everybody_or_nobody_trains_and_is_told(tmp_path):
    def change(mat):
        for part in ("train", "val", "test"):
            mat[f"{part}_label"][:, 0], mat[f"{part}_label"][:, 7] = 1, 0

    write_pa100k(tmp_path, counts=(8, 4, 4), change=change)
    options = ["--data", tmp_path, *SMALL, "--ple", "R", "--out", tmp_path / "run"]
    assert "in training: Female, Hat\n" in succeed("train.py", *options)
    evaluated = succeed("evaluate.py", tmp_path / "run/best.pt", "--json", tmp_path / "r.json")
    assert "no positives or no negatives" in evaluated
    assert json.loads((tmp_path / "r.json").read_text())["attributes"][7]["mA"] is None


def test_a_clusters_own_RANK_is_not_torchruns(tmp_path):
    line = [sys.executable, ROOT / "train.py", *TINY, *words("--ple none --epochs 1 --images 8")]
    environment = {"PATH": "", "RANK": "1", "WORLD_SIZE": "2"}
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert "done: " in done.stdout


# ---- Bad input


@pytest.mark.parametrize(
    "options, named",
    [
        (["--data", "nowhere"], "nowhere"),
        (["--dataset", "pa100k"], "--data"),
        (["--weights", "nowhere.pt"], "nowhere.pt"),
        (["--ratio", "1.5"], "--ratio"),
        (words("--train-split trainval --schedule plateau"), "--schedule"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(tmp_path, options, named):
    assert named in refuse("train.py", *TINY, "--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [[], ["--resume", "--ple", "R"], ["--resume", "--images", "8"], ["--resume", "--lr", "1"]],
)
def test_nothing_already_written_is_lost(trained, options):
    """An --out that exists, and a resumed run with other settings or images."""
    folder = trained["S"].parent
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert str(folder) in refuse("train.py", *TINY, "--epochs", "1", "--out", folder, *options)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("options", [[], ["--resume"]])
def test_a_best_checkpoint_without_its_last_is_not_overwritten(tmp_path, options):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "best.pt").write_text("kept")
    assert "run" in refuse("train.py", *TINY, "--out", tmp_path / "run", *options)
    assert (tmp_path / "run" / "best.pt").read_text() == "kept"


def test_a_foreign_checkpoint_is_not_resumed(trained, tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint = torch.load(trained["S"], weights_only=True)  # best.pt lacks the optimizer
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    options = [*TINY, *words("--epochs 1 --ple S --resume"), "--out", tmp_path / "run"]
    assert "last.pt" in refuse("train.py", *options)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_unreadable_image_in_training_is_named(tmp_path, workers):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    (tmp_path / "data" / "000003.jpg").write_bytes(b"")
    options = ["--data", tmp_path, *SMALL, "--ple", "none", "--workers", workers]
    assert "000003.jpg" in refuse("train.py", *options, "--out", tmp_path / "run")


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_ends_the_run_before_anything_is_saved(tmp_path, monkeypatch, what):
    """In the second epoch, by the loss of a step, or by a weight after the last step."""
    real, epochs = train.train_one_epoch, []

    def spoilt(epoch, state, *arguments):
        loss = real(epoch, state, *arguments)
        epochs.append(epoch)
        if len(epochs) == 2 and what == "weights":
            next(state["ema"].parameters()).data.fill_(math.nan)
        return math.nan if len(epochs) == 2 and what == "loss" else loss

    monkeypatch.setattr(train, "train_one_epoch", spoilt)
    done = command("train.py", *TINY, *words("--ple R --epochs 2"), "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "epoch 2" in done.stderr
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    monkeypatch.undo()
    assert tiny(tmp_path / "run", *words("--ple R --epochs 2 --resume"))["epoch"] == 2
