"""Training, resume and every command end to end, on a tiny drawn set."""

import copy
import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    assert_same,
    command,
    log_rows,
    random_model,
    refuse,
    succeed,
    tiny,
    words,
)
from PIL import Image
from test_data import write_pa100k

import data
import evaluate
import localize
import train
from data import synthetic
from evaluate import read_checkpoint
from sspnet import Baseline, HierarchicalLoss


class Died(Exception):
    pass


@pytest.mark.parametrize(
    "more",
    [
        ["--ple", "S"],
        pytest.param(words("--ple none --schedule plateau"), marks=pytest.mark.slow),
        pytest.param(
            words("--ple K --afss attribute --amp bf16 --freeze 2"), marks=pytest.mark.slow
        ),
    ],
)
def test_resume_is_bit_equal_to_an_uninterrupted_run(tmp_path, monkeypatch, more):
    whole = tiny(tmp_path / "whole", *more)
    real, calls = train.train_one_epoch, []

    def dies_in_the_third(*arguments):
        calls.append(1)
        loss = real(*arguments)
        if len(calls) == 3:
            raise Died
        return loss

    monkeypatch.setattr(train, "train_one_epoch", dies_in_the_third)
    with pytest.raises(Died):
        tiny(tmp_path / "cut", *more)
    monkeypatch.undo()
    assert torch.load(tmp_path / "cut" / "last.pt", weights_only=True)["epoch"] == 2
    torch.manual_seed(99)  # a new process would start elsewhere
    resumed = tiny(tmp_path / "cut", *more, "--resume")
    assert_same(whole, resumed)


def test_same_seed_same_result_for_any_number_of_workers(tmp_path):
    first = tiny(tmp_path / "a", "--epochs", "1")["model"]
    again = tiny(tmp_path / "b", "--epochs", "1", "--workers", "2")["model"]
    assert_same(first, again)
    other = tiny(tmp_path / "c", "--epochs", "1", "--seed", "1")["model"]
    assert not torch.equal(first["fpn.smooth.0.weight"], other["fpn.smooth.0.weight"])


def test_log_has_a_row_per_epoch_with_metrics_and_choices(tmp_path):
    state = tiny(tmp_path / "run", "--ple", "S", "--freeze", "2")
    rows = log_rows(tmp_path / "run")
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert {f"val_{m}" for m in ("mA", "Accu", "Prec", "Rec", "F1")} <= row.keys()
        assert float(row["loss"]) > 0 and float(row["offset_px"]) > 0
        chosen = {g: row[f"scale_{g}"] for g in ("head", "torso", "bottom", "all")}
        if row["epoch"] != "3":  # frozen then, nothing measured
            for group, scale in chosen.items():
                measured = {s: float(row[f"{group}_{s}"]) for s in ("P1", "P2", "P3")}
                assert measured[scale] == max(measured.values())
        else:
            assert row["head_P1"] == "" and chosen == {g: rows[1][f"scale_{g}"] for g in chosen}
    scales = state["model"]["afss._extra_state"]
    assert scales == state["ema"]["afss._extra_state"]
    head = data.PA100K_GROUPS["Hat"] == "head" and list(data.PA100K_GROUPS).index("Hat")
    assert rows[-1]["scale_head"] == f"P{scales[head] + 1}"


@pytest.mark.slow
def test_compile_trains_like_eager(tmp_path, monkeypatch):
    """`--compile` with AFSS selecting, then frozen; the eager backend needs no compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    arguments = words("--ple S --epochs 2 --freeze 1")
    plain = tiny(tmp_path / "plain", *arguments)
    compiled = tiny(tmp_path / "compiled", *arguments, "--compile")
    for name in ("loss", "offset_px", "val_mA"):
        for a, b in zip(plain["rows"], compiled["rows"], strict=True):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_best_is_the_epoch_with_the_highest_validation_mA(tmp_path):
    tiny(tmp_path / "run", "--ple", "none")
    rows = log_rows(tmp_path / "run")
    best = max(rows, key=lambda row: float(row["val_mA"]))
    assert read_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == int(best["epoch"])


def test_ema_follows_its_definition():
    """decay = min(0.9998, (1 + steps) / (10 + steps)) for weights and batch-norm statistics."""
    torch.manual_seed(0)
    model = Baseline(["head"], "resnet18")
    ema = copy.deepcopy(model)
    weight, batch_norm = model.head.weight, model.backbone.stages[0][0][1]
    expected = [weight.detach().clone(), batch_norm.running_mean.clone()]
    for step in range(1, 20):
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
    assert ema.backbone.stages[0][0][1].num_batches_tracked == 19


def test_the_offset_predictor_learns_at_a_tenth_of_the_rate():
    model = random_model("S")
    groups = train.parameter_groups(model, 0.01)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.ple.sample.predict.weight)] == pytest.approx(0.001)
    assert rate[id(model.ple.sample.predict.bias)] == pytest.approx(0.001)
    assert rate[id(model.ple.sample.A.weight)] == pytest.approx(0.01)
    assert len(rate) == len(list(model.parameters()))


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    train.save(tmp_path / "c.pt", {"epoch": 1})

    def full(value, file):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        train.save(tmp_path / "c.pt", {"epoch": 2})
    assert torch.load(tmp_path / "c.pt", weights_only=True) == {"epoch": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of each variant, written by the command."""
    folder, checkpoints = tmp_path_factory.mktemp("runs"), {}
    for ple in ("S", "K", "R", "none"):
        succeed("train.py", *TINY, f"--ple {ple} --epochs 1 --out {folder}/{ple}")
        checkpoints[ple] = folder / ple / "best.pt"
    return checkpoints


@pytest.mark.parametrize("ple", ["S", "K", "R", "none"])
def test_evaluate_and_localize_end_to_end(trained, tmp_path, ple):
    printed = succeed("evaluate.py", trained[ple], f"--images 12 --json {tmp_path}/e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["images"] == 12 and len(result["attributes"]) == 26
    assert set(result["groups"]) == {"head", "torso", "bottom", "all"}
    assert f"mA {result['mA']:.2f}" in printed
    assert all((row["scale"] is None) == (ple == "none") for row in result["attributes"])
    succeed(
        "localize.py",
        trained[ple],
        f"--images 12 --panels 3 --out {tmp_path}/p --json {tmp_path}/l.json --cam",
        "grad-cam" if ple == "R" else "grad-cam-p",
    )
    scores = json.loads((tmp_path / "l.json").read_text())
    boxed = np.isfinite(synthetic("test", count=12).boxes[:, :, 0])
    assert sum(row["boxes"] for row in scores["attributes"]) == boxed.sum()
    assert all(0 <= row["IoU"] <= 1 for row in scores["attributes"])
    assert len(list((tmp_path / "p").glob("*.png"))) == 3


@pytest.mark.slow
def test_the_commands_run_as_files_from_anywhere(tmp_path):
    """What the other tests call in this process, as a user does."""
    for arguments in (
        words("train.py", *TINY, "--ple R --epochs 1"),
        words("evaluate.py runs/synthetic-R/best.pt --images 8"),
        words("localize.py runs/synthetic-R/best.pt --images 8 --panels 1"),
        ["train.py", "--data", "nowhere"],
    ):
        line = [sys.executable, ROOT / arguments[0], *arguments[1:]]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == (2 if "nowhere" in arguments else 0), done.stderr
    assert done.stderr == "train.py: nowhere/annotation.mat: no such file\n"
    assert len(list((tmp_path / "runs/synthetic-R/panels").iterdir())) == 1


def test_localize_plain_pictures(trained, tmp_path):
    for i, picture in enumerate(synthetic("val", count=2).images):
        Image.fromarray(picture).resize((50 + i, 90)).save(tmp_path / f"{i}.png")
    wanted = f"{tmp_path} {tmp_path}/0.png --attributes Hat boots --out {tmp_path}/p"
    lines = succeed("localize.py", trained["S"], wanted).splitlines()
    assert len(lines) == 4 and all("Hat 0." in line and "boots 0." in line for line in lines[:3])
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["0.png", "1.png", "2-0.png"]
    files = f"{tmp_path}/1.png {tmp_path}/0.png"
    printed = succeed("localize.py --panels 0", trained["S"], files)  # options first
    assert len(printed.splitlines()) == 2
    assert "PLE-K needs keypoints" in refuse("localize.py", trained["K"], f"{tmp_path}/0.png")


def test_pa100k_end_to_end_with_keypoints(tmp_path):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    names = [f"{i:06d}.jpg" for i in range(1, 17)]
    np.savez(tmp_path / "k.npz", names=names, keypoints=np.full((16, 16, 3), 10.0))
    small = words(
        f"--data {tmp_path} --size 64 48 --epochs 1 --backbone resnet18 --weights none",
        "--channels 8 --batch-size 4",
    )
    succeed("train.py", *small, f"--ple K --keypoints {tmp_path}/k.npz --out {tmp_path}/run")
    for name in ("evaluate.py", "localize.py"):
        done = command(f"{name} {tmp_path}/run/best.pt")
        assert done.returncode == 0, done.stderr
    printed = succeed("train.py", *small, f"--ple R --train-split trainval --out {tmp_path}/both")
    assert "12 images" in printed
    assert "PLE-K needs keypoints, give --keypoints FILE" in refuse(
        "train.py", *small, f"--ple K --out {tmp_path}/none"
    )


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("train.py", ["--data", "nowhere"], "nowhere/annotation.mat: no such file"),
        ("train.py", ["--dataset", "pa100k"], "give its folder with --data"),
        ("train.py", words("--dataset synthetic --data x"), "--data x: synthetic has none"),
        ("train.py", ["--resume", "--out", "nowhere"], "nowhere/last.pt: no such checkpoint"),
        ("train.py", ["--weights", "nowhere.pt"], "--weights nowhere.pt: no such file"),
        ("train.py", ["--epochs", "0"], "--epochs 0: expected at least 1"),
        ("train.py", ["--ratio", "1.5"], "--ratio 1.5: expected more than 0"),
        ("train.py", ["--images", "1"], "expected at least 2"),
        ("evaluate.py", ["nowhere.pt"], "nowhere.pt: no such checkpoint"),
        ("localize.py", ["nowhere.pt"], "nowhere.pt: no such checkpoint"),
        ("localize.py", ["S", "nowhere.jpg"], "nowhere.jpg: no such image or folder"),
        ("localize.py", ["S", "--attributes", "Wig"], "--attributes Wig: expected some of"),
        ("localize.py", ["S", "--threshold", "0"], "--threshold 0.0: expected more than 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(trained, name, arguments, message):
    line = refuse(name, *[trained.get(a, a) for a in arguments])
    assert message in line and line.startswith(f"{name}: ")


def test_imagenet_weights_that_cannot_be_fetched(tmp_path, monkeypatch, capsys):
    from urllib.error import URLError

    def offline(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match="give --weights none"):
        train.main([*TINY, "--weights", "imagenet", "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_nothing_already_written_is_lost(trained, tmp_path):
    folder = trained["S"].parent
    before = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    assert "give --resume to continue it, or another --out" in refuse(
        "train.py", *TINY, f"--epochs 1 --out {folder}"
    )
    assert "was trained with ple S, not R" in refuse(
        "train.py", *TINY, f"--epochs 1 --ple R --out {folder} --resume"
    )
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} == before


# ---- One step, one epoch's end


def last_of_one_step(tmp_path, *more):
    """last.pt after one epoch of one step, with the model it started from and its batch."""
    arguments = words("--images 8 --epochs 1 --batch-size 8 --schedule plateau", *more)
    state = tiny(tmp_path / "run", *arguments)
    args = train.parse_arguments([*TINY, *arguments])
    config = {key: getattr(args, key) for key in train.RESUME_KEYS}
    split = data.open_split({**config, "size": (64, 48)}, "train")
    config.update(groups=split.groups)
    model = train.make_model(config, args)
    batches = data.loader(split, (64, 48), 8, train=True)
    data.start_epoch(batches, 0)
    (batch,) = batches
    return state, model, split, batch


def test_one_step_uses_the_training_sets_ratios_clips_and_decays(tmp_path):
    """Adam's first moment after one step is a tenth of the clipped gradient plus the decay."""
    state, model, split, (images, labels, _, _) = last_of_one_step(tmp_path, "--ple", "none")
    ratio = torch.tensor([sum(split.labels[:, j]) / 8 for j in range(26)])
    torch.manual_seed(0)
    probability = model.train()(images)[0].sigmoid()
    likelihood = labels * probability.log() + (1 - labels) * (1 - probability).log()
    weights = labels * (1 - ratio).exp() + (1 - labels) * ratio.exp()
    loss = -(weights * likelihood).sum() / 8
    loss.backward()
    assert state["rows"][0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    parameters = list(model.parameters())
    norm = torch.stack([p.grad.norm() for p in parameters]).norm()
    assert norm > train.GRADIENT_NORM  # else this test would not see the clipping
    for index, parameter in enumerate(parameters):
        moment = state["optimizer"]["state"][index]["exp_avg"]
        expected = 10 / norm * parameter.grad + 5e-4 * parameter.detach()
        torch.testing.assert_close(10 * moment, expected, atol=1e-4, rtol=1e-3)


def test_the_plateau_watches_the_validation_loss_of_the_averaged_weights(tmp_path):
    state, model, split, _ = last_of_one_step(tmp_path, "--ple", "none")
    model.load_state_dict(state["ema"])
    validation = data.synthetic("val", count=8, size=(64, 48))
    logits, labels = evaluate.predict(model, data.loader(validation, (64, 48), 8))
    loss = HierarchicalLoss(split.groups, torch.from_numpy(split.labels.mean(0)))(logits, labels)
    assert state["scheduler"]["best"] == pytest.approx(loss.item(), rel=1e-4)


def test_without_a_validation_split_the_rate_falls_in_steps(tmp_path):
    options = "--images 8 --train-split trainval --schedule step --epochs 6 --ple none --lr 0.01"
    tiny(tmp_path / "run", *words(options))
    rates = [float(row["lr"]) for row in log_rows(tmp_path / "run")]
    assert rates == pytest.approx([0.01] * 4 + [0.001, 0.0001])  # 60% and 85% of six epochs
    for arguments in (["--dataset", "rap1"], ["--dataset", "pcs"], ["--train-split", "trainval"]):
        assert train.parse_arguments(["--data", "x", *arguments]).schedule == "step"
    assert train.parse_arguments(["--data", "x"]).schedule == "plateau"


def test_frozen_afss_keeps_its_choice(tmp_path):
    tiny(tmp_path / "run", "--ple", "R", "--freeze", "1")
    rows = log_rows(tmp_path / "run")
    assert rows[0]["head_P1"] and not rows[1]["head_P1"] and not rows[2]["head_P1"]


# ---- Results as numbers


def test_checkpoints_and_results_say_what_made_them(trained, tmp_path):
    for file in ("best.pt", "last.pt"):
        checkpoint = read_checkpoint(trained["S"].parent / file)
        assert checkpoint["torch"] == str(torch.__version__)
        assert checkpoint["command"].startswith("train.py --images")
    command("evaluate.py", trained["S"], f"--images 4 --json {tmp_path}/e.json")
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["torch"] == str(torch.__version__) and "evaluate.py" in result["command"]


def test_predictions_suffice_for_any_other_measure(trained, tmp_path):
    succeed(
        "evaluate.py",
        trained["S"],
        f"--images 30 --json {tmp_path}/e.json --predictions {tmp_path}/p.npz",
    )
    result = json.loads((tmp_path / "e.json").read_text())
    with np.load(tmp_path / "p.npz") as archive:
        assert archive["names"].tolist() == synthetic("test", count=30).names
        true, predicted = archive["labels"] == 1, archive["probabilities"] > 0.5
        for j, row in enumerate(result["attributes"]):
            assert row["attribute"] == archive["attributes"][j]
            shares = ("TP/P", predicted & true, true), ("TN/N", ~predicted & ~true, ~true)
            for key, hits, of in shares:
                share = 100 * hits[:, j].sum() / of[:, j].sum() if of[:, j].any() else None
                assert row[key] == (None if share is None else pytest.approx(share, abs=1e-4))
            if row["mA"] is not None:
                assert row["mA"] == pytest.approx((row["TP/P"] + row["TN/N"]) / 2)


def test_several_thresholds_share_one_pass_and_boxes_are_numbers(trained, tmp_path):
    results = {}
    for thresholds in (["0.2", "0.5"], ["0.5"]):
        options = "--images 12 --panels 0 --threshold", *thresholds, f"--json {tmp_path}/l.json"
        printed = succeed("localize.py", trained["R"], *options)
        results[len(thresholds)] = json.loads((tmp_path / "l.json").read_text())
    assert "mean IoU by threshold: 0.2: " not in printed
    both, one = results[2], results[1]
    assert both["IoU_by_threshold"][1] == pytest.approx(one["average"]["IoU"])
    split = synthetic("test", count=12, size=(64, 48))
    for first, second in zip(both["records"], one["records"], strict=True):
        assert first["boxes"][1] == second["boxes"][0]
        i, k = split.names.index(first["image"]), split.attributes.index(first["attribute"])
        if first["true_box"]:
            assert first["true_box"] == split.boxes[i, k].tolist()
            iou = localize.box_iou(first["boxes"][0], first["true_box"])
            assert first["IoU"][0] == pytest.approx(iou)


def test_fig07_models_side_by_side(trained, tmp_path):
    models = [trained[ple] for ple in ("none", "R", "K", "S")]
    succeed(
        "localize.py",
        *models,
        f"--images 60 --attributes Hat --panels 2 --out {tmp_path}/p --json",
        f"{tmp_path}/l.json",
    )
    split = synthetic("test", count=60, size=(64, 48))
    boxed = np.isfinite(split.boxes[:, split.attributes.index("Hat"), 0])
    hats = [split.names[i] for i in np.flatnonzero(boxed)]
    assert sorted(f.stem for f in (tmp_path / "p").iterdir()) == sorted(hats[:2])
    with Image.open(tmp_path / "p" / f"{hats[0]}.png") as image:  # the image and a tile per model
        assert image.width == 5 * (localize.TILE + 4) - 4
    results = json.loads((tmp_path / "l.json").read_text())
    assert [result["config"]["ple"] for result in results] == ["none", "R", "K", "S"]


def test_ple_k_on_ones_own_photos(trained, tmp_path):
    for i, pixels in enumerate(synthetic("val", count=2).images):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "._0.png").write_bytes(b"a Mac was here")
    np.savez(tmp_path / "k.npz", names=["0.png", "1.png"], keypoints=np.full((2, 16, 3), 20.0))
    succeed(
        "localize.py",
        trained["K"],
        f"{tmp_path} --keypoints {tmp_path}/k.npz --out {tmp_path}/p --json",
        f"{tmp_path}/l.json --attributes Hat",
    )
    records = json.loads((tmp_path / "l.json").read_text())["records"]
    assert [record["image"] for record in records] == ["0.png", "1.png"]
    assert all(record["true_box"] is None and "IoU" not in record for record in records)


# ---- A hostile user


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("train.py", ["--images", "0"], "--images 0: expected at least 1"),
        ("train.py", ["--freeze", "-5"], "--freeze -5: expected at least 0"),
        ("train.py", ["--lr", "-1"], "--lr -1.0: expected a positive number"),
        ("train.py", ["--lr", "nan"], "--lr nan: expected a positive number"),
        ("train.py", ["--lr", "inf"], "--lr inf: expected a positive number"),
        ("train.py", ["--seed", "-1"], "--seed -1: expected 0 to"),
        ("train.py", ["--seed", "1" + "0" * 20], "expected 0 to"),
        ("train.py", ["--device", "foo"], "--device foo: expected cpu, or cuda"),
        ("train.py", words("--device meta --images 8"), "--device meta: expected cpu, or cuda"),
        ("evaluate.py", ["S", "--device", "xpu"], "--device xpu: expected cpu, or cuda"),
        ("localize.py", ["S", "--device", "cuda:99"], "--device cuda:99: expected cpu, or cuda"),
        ("localize.py", ["S", "--panels", "-1"], "--panels -1: expected at least 0"),
        ("localize.py", ["photo.jpg"], "expected a checkpoint"),
        ("evaluate.py", ["S", "--images", "-5"], "--images -5: expected at least 1"),
        ("evaluate.py", ["--compare", "S"], "not a result of evaluate.py or localize.py"),
        (
            "train.py",
            words("--train-split trainval --schedule plateau"),
            "needs a validation split",
        ),
    ],
)
def test_numbers_and_devices_out_of_range_are_one_line(trained, name, arguments, message):
    line = refuse(name, *[trained.get(a, a) for a in arguments])
    assert message in line and len(line) < 400


def test_arguments_of_the_drawn_set_are_refused_elsewhere(tmp_path):
    write_pa100k(tmp_path)
    for flag in ("--images", "--domain"):
        assert f"{flag} 1: pa100k has none, expected synthetic" in refuse(
            f"train.py --data {tmp_path} {flag} 1 --weights none --out {tmp_path}/run"
        )


def test_an_out_that_holds_something_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    assert "this is a file, expected a folder" in refuse(
        "train.py", *TINY, f"--out {tmp_path}/file"
    )
    for name in ("best.pt", "log.csv", "last.pt.tmp"):
        (tmp_path / name / name).mkdir(parents=True)
        assert f"{name}: this is a folder, expected a file" in refuse(
            "train.py", *TINY, f"--out {tmp_path}/{name}"
        )
    for name in ("best.pt", "log.csv"):  # last.pt alone was deleted
        (tmp_path / f"old-{name}").mkdir()
        (tmp_path / f"old-{name}" / name).write_text("kept")
        done = command("train.py", *TINY, "--out", tmp_path / f"old-{name}")
        assert done.returncode == 2 and (tmp_path / f"old-{name}" / name).read_text() == "kept"


def test_foreign_checkpoints_are_not_resumed(trained, tmp_path):
    last = torch.load(trained["S"].parent / "last.pt", weights_only=True)
    missing = {k: v for k, v in last.items() if k != "optimizer"}
    shaped = copy.deepcopy(last)
    shaped["model"]["heads.head.bias"] = torch.zeros(1)
    renamed = copy.deepcopy(last)
    renamed["config"]["attributes"].reverse()
    fewer = {**last, "config": {**last["config"], "digest": "other"}}
    contents = [
        (torch.load(trained["S"], weights_only=True), "cannot be resumed (KeyError: "),
        (missing, "cannot be resumed (KeyError: 'optimizer')"),
        (shaped, "cannot be resumed (RuntimeError: "),
        (renamed, "other images (attributes)"),
        (fewer, "other images (digest)"),
        ({**last, "config": 5}, "its config has no 'ple'"),
        ({**last, "rows": None}, "cannot be resumed"),
    ]
    for i, (content, message) in enumerate(contents):
        (tmp_path / str(i)).mkdir()
        torch.save(content, tmp_path / str(i) / "last.pt")
        assert message in refuse(
            "train.py", *TINY, "--epochs 1 --ple S --out", tmp_path / str(i), "--resume"
        )


def test_a_finished_run_without_its_best_checkpoint_says_so(trained, tmp_path):
    shutil.copytree(trained["R"].parent, tmp_path / "R")
    (tmp_path / "R" / "best.pt").unlink()
    assert "best.pt: is gone" in refuse(
        "train.py", *TINY, f"--ple R --epochs 1 --out {tmp_path}/R --resume"
    )


def test_weights_that_are_not_numbers_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained["none"], weights_only=True)
    checkpoint["ema"]["head.bias"][0] = float("nan")
    torch.save(checkpoint, tmp_path / "nan.pt")
    assert "nan.pt: head.bias has values that are not finite" in refuse(
        f"evaluate.py {tmp_path}/nan.pt --images 4"
    )


def test_afss_scales_out_of_range_are_refused(trained, tmp_path):
    checkpoint = torch.load(trained["R"], weights_only=True)
    checkpoint["ema"]["afss._extra_state"] = [7] * 26
    torch.save(checkpoint, tmp_path / "seven.pt")
    assert "seven.pt: AFSS: expected 26 scales" in refuse(
        f"evaluate.py {tmp_path}/seven.pt --images 4"
    )


def test_named_pipes_and_odd_images_do_not_hang(trained, tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    assert "pipe.jpg: no such image or folder" in refuse(
        "localize.py", trained["R"], f"{tmp_path}/pipe.jpg"
    )
    Image.fromarray(np.zeros((5000, 2, 3), np.uint8)).save(tmp_path / "thin.png")
    succeed("localize.py", trained["R"], f"{tmp_path}/thin.png --out {tmp_path}/p")


def test_another_folders_keypoints_are_not_taken(tmp_path):
    for folder in ("a", "b"):
        write_pa100k(tmp_path / folder, counts=(8, 4, 4))
    names = [f"{i:06d}.jpg" for i in range(1, 17)]
    np.savez(tmp_path / "k.npz", names=names, keypoints=np.full((16, 16, 3), 10.0))
    small = words(
        "--size 64 48 --epochs 1 --backbone resnet18 --weights none --channels 8", "--batch-size 4"
    )
    done = command(
        "train.py",
        *small,
        f"--data {tmp_path}/a --ple K --keypoints {tmp_path}/k.npz --out {tmp_path}/run",
    )
    assert done.returncode == 0, done.stderr
    assert "PLE-K needs keypoints, give --keypoints FILE" in refuse(
        f"evaluate.py {tmp_path}/run/best.pt --data {tmp_path}/b"
    )


def test_json_files_survive_names_and_failures(tmp_path, monkeypatch):
    data.write_json(tmp_path / "r.json", {"name": "caf\udce9.jpg", "value": float("nan")})
    assert json.loads((tmp_path / "r.json").read_text()) == {"name": "caf\udce9.jpg", "value": None}
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError):
        data.write_json(tmp_path / "r.json", {})
    assert (tmp_path / "r.json").stat().st_size > 10


def test_an_epoch_is_saved_before_it_is_printed(tmp_path, monkeypatch):
    def closed(line):
        if line.startswith("epoch"):
            raise BrokenPipeError("closed")

    monkeypatch.setattr(train, "print_rank0", closed)
    done = command("train.py", *TINY, f"--ple none --out {tmp_path}/run")
    assert "epoch 1 of 3 is in" in done.stderr
    assert read_checkpoint(tmp_path / "run" / "last.pt")["epoch"] == 1
    assert (tmp_path / "run" / "log.csv").stat().st_size > 50
