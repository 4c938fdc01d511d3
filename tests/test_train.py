"""The training: one step and one epoch's end against references, options, files, bad input."""

import copy
import math

import conftest
import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, load, refuse, steps_of, succeed, tiny, words, write_pa100k
from torch.testing import assert_close

import data
import evaluate
import train
from evaluate import build_model
from sspnet import Baseline, HierarchicalLoss


def test_one_step_uses_the_training_sets_ratios_clips_and_decays_and_validates(tmp_path):
    """Adam's first moment after one step is a tenth of the clipped gradient plus the decay; the
    plateau watches the validation loss of the averaged weights."""
    options = words("--ple none --images 8 --epochs 1 --batch-size 8 --schedule plateau")
    state = tiny(tmp_path / "run", *options)
    torch.manual_seed(0)
    model = build_model(state["config"])
    split = data.synthetic("train", images=8, size=(64, 48))
    batches = data.loader(data.Pedestrians(split, (64, 48), train=True), 8)
    data.start_epoch(batches, 0)
    ((images, labels, _, _),) = batches
    ratio = torch.tensor([sum(split.labels[:, j]) / 8 for j in range(26)])
    torch.manual_seed(0)  # as an epoch begins; dropout follows the memory's order
    images = data.normalize(images.to(memory_format=torch.channels_last))
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
        assert_close(10 * moment, expected, atol=1e-4, rtol=1e-3)
    model.load_state_dict(state["ema"])
    validation = data.synthetic("val", images=8, size=(64, 48))
    logits, labels = evaluate.predict(model, data.loader(data.Pedestrians(validation, (64, 48)), 8))
    loss = HierarchicalLoss(split.groups, ratio)(logits, labels)
    assert state["scheduler"]["best"] == pytest.approx(loss.item(), rel=1e-4)


def test_the_synthetic_sets_defaults_are_its_own_and_give_way_to_what_is_said():
    assert train.parse_arguments(words("--data x")).freeze == 0
    assert train.parse_arguments([]).freeze == 3
    args = train.parse_arguments(words("--freeze 0 --size 64 48"))
    assert (args.freeze, args.size, args.backbone) == (0, [64, 48], "resnet18")
    assert train.parse_arguments(words("--dataset csv --data x")).backbone == "resnet50"


@pytest.mark.parametrize("options", ["", "--train-split trainval", "--dataset rap1"])
def test_the_rate_falls_on_a_plateau_or_in_steps_without_validation(options):
    args = train.parse_arguments(words(f"--data x --epochs 20 {options}"))
    optimizer, rates = torch.optim.Adam([torch.zeros(1)], 1.0), []
    scheduler = train.make_scheduler(args.schedule, optimizer, args.epochs, 10)
    for loss in [2] + [3] * 19:
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([] if options else [loss]))
    if options:  # after 60% and 85%
        assert rates == pytest.approx([1] * 12 + [0.1] * 5 + [0.01] * 3)
    else:  # on the fifth epoch without a lower loss
        assert rates[:7] == pytest.approx([1] * 6 + [0.1])


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
        train.update_ema(train.averaged_tensors(ema), train.averaged_tensors(model), step)
        decay = min(0.9998, (1 + step) / (10 + step))
        new = weight.detach(), batch_norm.running_mean
        expected = [decay * e + (1 - decay) * v for e, v in zip(expected, new, strict=True)]
    assert_close(ema.head.weight.detach(), expected[0])
    assert_close(ema.backbone.stages[0][0][1].running_mean, expected[1])


def test_the_offset_predictor_learns_at_a_tenth_of_the_rate():
    """Also inside another module, such as a compiled one, and at the peak of one cycle."""
    model = conftest.random_model("S")
    tenth = {id(p) for p in model.ple.sample.predict.parameters()}
    expected = {id(p): pytest.approx(0.001 if id(p) in tenth else 0.01) for p in model.parameters()}
    for network in (model, torch.nn.Sequential(model), torch.compile(model)):
        optimizer = torch.optim.Adam(train.parameter_groups(network, 0.01))
        groups = optimizer.param_groups
        assert {id(p): group["lr"] for group in groups for p in group["params"]} == expected
    train.make_scheduler("onecycle", optimizer, 1, 10)
    assert {id(p): group["max_lr"] for group in groups for p in group["params"]} == expected


def test_best_has_the_highest_mA_and_the_average_all_steps(tmp_path, monkeypatch):
    """F1 and later epochs do not count; the average's warm-up does not restart in each epoch."""
    found, seen = iter([(50, 1), (60, 5), (55, 9), (58, 7)]), []
    monkeypatch.setattr(train, "update_ema", lambda old, new, steps: seen.append(steps))

    def validate(*_):
        mA, F1 = next(found)
        return {**dict.fromkeys(train.METRICS, 0.0), "mA": mA, "F1": F1}, 1.0

    monkeypatch.setattr(train, "validate", validate)
    tiny(tmp_path / "run", *words("--ple none --epochs 4"))
    assert load(tmp_path / "run/best.pt")["epoch"] == 2
    assert seen == list(range(1, 9))


def test_log_and_best_checkpoint_follow_metrics_and_choices(tmp_path):
    state = tiny(tmp_path / "run", "--ple", "S", "--freeze", "2")
    rows = conftest.log_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows[:2]:
        for group in ("head", "torso", "bottom", "all"):
            measured = {scale: float(row[f"{group}_{scale}"]) for scale in ("P1", "P2", "P3")}
            assert measured[row[f"scale_{group}"]] == max(measured.values())
            assert rows[2][f"scale_{group}"] == rows[1][f"scale_{group}"]  # frozen then
    assert rows[2]["head_P1"] == ""  # nothing measured
    *scales, selecting = state["model"]["afss._extra_state"].tolist()
    assert [*scales, selecting] == state["ema"]["afss._extra_state"].tolist()
    counts = [m[name] for m in (state["model"], state["ema"]) for name in m if "tracked" in name]
    assert {count.item() for count in counts} == {6}  # batches, in the average, too
    assert not selecting
    assert rows[2]["scale_head"] == f"P{scales[7] + 1}"  # Hat is the 8th
    optimizer = torch.optim.Adam([torch.zeros(1)], 0.001)
    scheduler = train.make_scheduler("onecycle", optimizer, 3, 2)
    for row in rows:  # the rate is that with which an epoch begins
        assert float(row["lr"]) == pytest.approx(optimizer.param_groups[0]["lr"])
        for _ in range(2):
            last = optimizer.param_groups[0]["lr"]
            optimizer.step()
            scheduler.step()
    assert last < 1e-8  # the cycle ends with the run
    measured = [float(rows[0][f"{group}_P1"]) for group in ("head", "torso", "bottom", "all")]
    assert max(measured) > 1  # percent
    tiny(tmp_path / "step", *words("--ple none --epochs 4 --train-split trainval --schedule step"))
    rates = [float(row["lr"]) for row in conftest.log_rows(tmp_path / "step")]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])


def test_a_step_in_bf16_and_fp16_is_near_that_of_float32(monkeypatch):
    """The loss is of float32 logits; gradients are unscaled before they are clipped."""
    plain, loss, taken = steps_of(None)
    assert taken == 2
    given, forward = [], HierarchicalLoss.forward

    def told(self, logits, labels):
        given.append(logits.dtype)
        return forward(self, logits, labels)

    monkeypatch.setattr(HierarchicalLoss, "forward", told)
    assert plain["optimizer"].defaults["fused"] is None  # so that on CUDA a resumed run is fused
    for amp, scale in (("bf16", None), ("fp16", 1024.0)):
        state, found, taken = steps_of(amp, scale=scale)
        assert taken == 2
        assert found == pytest.approx(loss, rel=0.02)
        first, second = (s["model"].heads["all"].weight for s in (plain, state))
        assert not torch.equal(first, second)  # it was low precision
        assert_close(first, second, atol=0.01, rtol=0.1)
        moments = [s["optimizer"].state_dict()["state"][0]["exp_avg"] for s in (plain, state)]
        assert moments[1].norm().item() == pytest.approx(moments[0].norm().item(), rel=0.2)
    assert set(given) == {torch.float32}


def test_where_fp16_skips_steps_the_schedule_waits_and_it_is_said(tmp_path, monkeypatch):
    """The scaler's scale, for which a GPU would wait, is read once a step."""
    read, Scaler = [], torch.amp.GradScaler
    get_scale = Scaler.get_scale
    monkeypatch.setattr(Scaler, "get_scale", lambda self: read.append(1) or get_scale(self))
    skipping, _, taken = steps_of("fp16", scale=2.0**100)  # the gradients overflow
    assert taken == 0
    assert len(read) == 1 + 2
    assert skipping["scheduler"].last_epoch == 0
    options = words("--ple R --epochs 1 --amp fp16 --images 8")  # one step, skipped at scale 2^16
    assert "no step was taken" in succeed("train.py", *TINY, *options, "--out", tmp_path / "run")


def test_each_epoch_has_each_image_once_and_its_steps_mean_loss(monkeypatch, tmp_path):
    real, steps = HierarchicalLoss.forward, []

    def record(self, logits, labels):
        loss = real(self, logits, labels)
        if logits.requires_grad:  # not in validation
            steps.append((loss.item(), labels.tolist()))
        return loss

    monkeypatch.setattr(HierarchicalLoss, "forward", record)
    state = tiny(tmp_path / "run", "--ple", "none", "--epochs", "2")
    images = data.synthetic("train", images=16).labels.tolist()
    for row, (a, first), (b, second) in zip(state["rows"], steps[::2], steps[1::2], strict=False):
        assert sorted(first + second) == sorted(images)
        assert row["loss"] == pytest.approx((a + b) / 2)


@pytest.mark.parametrize("ple", ["S", "none"])
def test_fine_tuning_takes_all_but_heads_of_other_attributes(tmp_path, trained, ple):
    """Of a head its known attributes' rows, in any order; AFSS chooses anew."""
    groups = '{"Wig": "head", "hat": "head", "Shorts": "all", "boots": "bottom"}'
    rows = "a.png,1,0,1,0", "b.png,0,1,0,1"
    conftest.write_csv(tmp_path, "path,Wig,boots,hat,Shorts", rows, groups)  # PA-100K has Hat
    checkpoint = load(trained[ple])
    for name in checkpoint["ema"]:
        if name.startswith("head") and name.endswith("bias"):
            checkpoint["ema"][name] += 1 + torch.arange(len(checkpoint["ema"][name]))
    if ple == "S":
        checkpoint["ema"]["afss._extra_state"][-1] = 0  # frozen
    torch.save(checkpoint, "given.pt")
    options = ["--dataset", "csv", "--data", tmp_path, *SMALL, "--ple", ple, "--lr", "1e-9"]
    options += words("--weights given.pt --train-split trainval --schedule onecycle --out run")
    printed = succeed("train.py", *options)
    assert "the heads of 2 of 4 attributes" in printed  # Shorts is in another group here
    given, tuned = checkpoint["ema"], load("run/last.pt")["model"]
    for name in given:
        if not name.startswith(("head", "afss")) and name.endswith(("weight", "bias")):
            assert_close(tuned[name], given[name], atol=1e-6, rtol=1e-5)
    heads = {"Hat": ("head", 2, 7), "boots": ("head", 1, 25)}  # its rows here and there
    if ple != "none":
        heads = {"Hat": ("heads.head", 1, 0), "boots": ("heads.bottom", 0, 4)}
        assert tuned["afss._extra_state"][-1] == 1
    for head, new, old in heads.values():
        for part in ("weight", "bias"):
            name = f"{head}.{part}"
            assert_close(tuned[name][new], given[name][old], atol=1e-6, rtol=1e-5)
    options = words(f"--ple {ple} --epochs 1 --lr 1e-9 --weights given.pt --out same")
    assert "26 of 26" in succeed("train.py", *TINY, *options)
    if ple == "S":
        assert load("same/last.pt")["model"]["afss._extra_state"][-1] == 1
        other = words("--ple S --M 2 --epochs 1 --weights given.pt --out other")
        assert "taken" in succeed("train.py", *TINY, *other)  # but what predicts the offsets


@pytest.mark.parametrize("change", ["--ple R", "--channels 16", "--backbone resnet18", "finite"])
def test_fine_tuning_refuses_another_model_by_the_option_that_differs(trained, change):
    checkpoint = load(trained["S"])
    if not change.startswith("--"):
        checkpoint["ema"]["heads.all.bias"][0] = math.nan
    torch.save(checkpoint, "given.pt")
    options = [*TINY, *words("--ple S --weights given.pt --out run")]
    options += words(change) if change.startswith("--") else []
    line = refuse("train.py", *options)
    assert "given.pt" in line
    assert change.split()[0] in line


@pytest.mark.parametrize("ple", ["S", "K", "none"])
def test_a_training_that_diverges_says_so_in_one_line(ple):
    options = words(f"--ple {ple} --schedule plateau --lr 1e10 --out run")
    assert "not finite" in refuse("train.py", *TINY, *options)


def test_pa100k_end_to_end_with_keypoints(tmp_path):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    conftest.write_keypoints(tmp_path / "k.npz", [f"{i:06d}.jpg" for i in range(1, 17)])
    options = ["--data", tmp_path, *SMALL]
    known = "--keypoints", tmp_path / "k.npz"
    succeed("train.py", *options, "--ple", "K", *known, "--out", "run")
    for name in ("evaluate.py", "localize.py"):
        succeed(name, "run/best.pt")
    more = words("--ple R --train-split trainval --out both")
    assert "12 images" in succeed("train.py", *options, *more)


def test_ple_k_without_a_file_takes_simccs_points_and_keeps_them(tmp_path, monkeypatch):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    options = ["train.py", "--data", tmp_path, *SMALL, *words("--ple K --out run")]
    assert succeed(*options).count("SimCC finds them") == 2  # training and validation images
    with np.load("run/keypoints.npz") as archive:
        assert sorted(archive["names"]) == [f"{i:06d}.jpg" for i in range(1, 13)]
        assert archive["keypoints"].shape == (12, 16, 3)
    with monkeypatch.context() as patch:
        patch.setattr(data, "find_points", lambda image: 1 / 0)
        succeed(*options, "--resume")  # which looks at no image again
    for name in ("evaluate.py", "localize.py"):
        done = conftest.command(name, "run/best.pt")
        assert done.returncode == 0
        assert done.stderr.count("SimCC finds them") == 1


def test_an_attribute_that_is_on_everybody_or_nobody_trains_and_is_told(tmp_path):
    conftest.write_csv(tmp_path, rows=("a.png,1,0", "b.png,1,0"))
    options = ["--dataset", "csv", "--data", tmp_path, *SMALL, "--ple", "R", "--out", "run"]
    printed = succeed("train.py", *options)
    assert "in training: Hat, boots\n" in printed
    assert "1 steps are few: give more --epochs" in printed
    evaluated = succeed("evaluate.py", "run/best.pt", "--json", "r.json")
    assert "no positives or no negatives" in evaluated
    assert conftest.read_json("r.json")["attributes"][1]["mA"] is None


def test_nothing_already_written_is_lost(trained):
    """An --out that exists, and a resumed run with other settings or images."""
    folder = trained["S"].parent
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for options in ("", "--resume --ple R", "--resume --images 8", "--resume --lr 1"):
        more = ["--epochs", "1", "--out", folder, *words(options)]
        assert str(folder) in refuse("train.py", *TINY, *more)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_best_checkpoint_without_its_own_last_is_not_overwritten(trained, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/best.pt").write_text("kept")
    options = [*TINY, *words("--epochs 1 --ple S --out run")]
    for more in ("", "--resume"):
        assert "run" in refuse("train.py", *options, *words(more))
    torch.save(load(trained["S"]), tmp_path / "run/last.pt")  # a best.pt lacks the optimizer
    assert "last.pt" in refuse("train.py", *options, "--resume")
    assert (tmp_path / "run/best.pt").read_text() == "kept"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_in_training_is_named(tmp_path, workers):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    (tmp_path / "data" / "000003.jpg").write_bytes(b"")
    options = ["--data", tmp_path, *SMALL, "--ple", "none", "--workers", workers]
    line = refuse("train.py", *options, "--out", "run")
    assert "000003.jpg" in line
    assert "Traceback" not in line


@pytest.mark.parametrize("what", ["loss", "weights"])
def test_what_is_not_finite_ends_the_run_before_anything_is_saved(tmp_path, monkeypatch, what):
    """In the second epoch, by the loss of a step, or by a weight after the last step."""
    real = train.train_one_epoch

    def spoilt(epoch, epochs, state, *arguments, **options):
        loss, taken = real(epoch, epochs, state, *arguments, **options)
        if epoch == 1 and what == "weights":
            next(state["ema"].parameters()).data.fill_(math.nan)
        return loss * (math.nan if epoch == 1 and what == "loss" else 1), taken

    monkeypatch.setattr(train, "train_one_epoch", spoilt)
    options = words("--ple none --epochs 2 --train-split trainval --out run")  # nothing validates
    assert "epoch 2" in refuse("train.py", *TINY, *options)
    assert load(tmp_path / "run" / "last.pt")["epoch"] == 1
