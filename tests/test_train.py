"""Training, resume and every command end to end, on a tiny drawn set."""

import copy
import csv
import functools
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import localize
import train
from data import synthetic
from conftest import random_model
from evaluate import read_checkpoint
from sspnet import Baseline
from test_data import write_pa100k

ROOT = Path(__file__).parents[1]
TINY = ["--images", "24", "--epochs", "3", "--size", "64", "48", "--channels", "8", "--batch-size", "8", "--freeze", "0", "--device", "cpu"]


def tiny(out, *more):
    train.main([*TINY, "--out", str(out), *more])
    return torch.load(out / "last.pt", weights_only=True)


def command(name, *arguments):
    """Runs a command as its file would, in this process: importing torch anew takes seconds."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    main = {"data.py": data, "train.py": train, "evaluate.py": evaluate, "localize.py": localize}[name].main
    with redirect_stdout(out), redirect_stderr(err), mock.patch.object(sys, "argv", [name, *map(str, arguments)]):
        try:
            data.command(main)
        except SystemExit as stop:
            code = stop.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def assert_same(a, b, path=""):
    """Equality of nested dicts and lists to the bit; the log's seconds excepted."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            if key != "seconds":
                assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}/{i}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b or (a != a and b != b), path


class Died(Exception):
    pass


@pytest.mark.parametrize("more", [["--ple", "S"], ["--ple", "none", "--schedule", "plateau"],
                                  ["--ple", "K", "--afss", "attribute", "--amp", "bf16", "--freeze", "2"]])
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
    first, again = tiny(tmp_path / "a", "--epochs", "1"), tiny(tmp_path / "b", "--epochs", "1", "--workers", "2")
    assert_same(first["model"], again["model"])
    other = tiny(tmp_path / "c", "--epochs", "1", "--seed", "1")
    assert not torch.equal(first["model"]["fpn.smooth.0.weight"], other["model"]["fpn.smooth.0.weight"])


def test_log_has_a_row_per_epoch_with_metrics_and_choices(tmp_path):
    state = tiny(tmp_path / "run", "--ple", "S", "--freeze", "2")
    rows = list(csv.DictReader(open(tmp_path / "run" / "log.csv")))
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


def test_compile_trains_like_eager(tmp_path, monkeypatch):
    """`--compile` with AFSS selecting, then frozen; the eager backend needs no compiler."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    arguments = ["--ple", "S", "--epochs", "2", "--freeze", "1"]
    plain = tiny(tmp_path / "plain", *arguments)
    compiled = tiny(tmp_path / "compiled", *arguments, "--compile")
    for name in ("loss", "offset_px", "val_mA"):
        for a, b in zip(plain["rows"], compiled["rows"]):
            assert a[name] == pytest.approx(b[name], rel=1e-4), name


def test_best_is_the_epoch_with_the_highest_validation_mA(tmp_path):
    tiny(tmp_path / "run", "--ple", "none")
    rows = list(csv.DictReader(open(tmp_path / "run" / "log.csv")))
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
        expected = [decay * e + (1 - decay) * v for e, v in zip(expected, new)]
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
        done = command("train.py", *TINY, "--ple", ple, "--epochs", 1, "--out", folder / ple)
        assert done.returncode == 0, done.stderr
        checkpoints[ple] = folder / ple / "best.pt"
    return checkpoints


@pytest.mark.parametrize("ple", ["S", "K", "R", "none"])
def test_evaluate_and_localize_end_to_end(trained, tmp_path, ple):
    done = command("evaluate.py", trained[ple], "--images", 12, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "e.json").read_text())
    assert result["images"] == 12 and len(result["attributes"]) == 26 and set(result["groups"]) == {"head", "torso", "bottom", "all"}
    assert f"mA {result['mA']:.2f}" in done.stdout
    assert all((row["scale"] is None) == (ple == "none") for row in result["attributes"])
    done = command("localize.py", trained[ple], "--images", 12, "--panels", 3, "--out", tmp_path / "p", "--json", tmp_path / "l.json",
                   "--cam", "grad-cam" if ple == "R" else "grad-cam-p")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "l.json").read_text())
    boxed = np.isfinite(synthetic("test", count=12).boxes[:, :, 0])
    assert sum(row["boxes"] for row in scores["attributes"]) == boxed.sum()
    assert all(0 <= row["IoU"] <= 1 for row in scores["attributes"])
    assert len(list((tmp_path / "p").glob("*.png"))) == 3


def test_the_commands_run_as_files_from_anywhere(tmp_path):
    """What the other tests call in this process, as a user does."""
    for arguments in (["train.py", *TINY, "--ple", "R", "--epochs", "1"], ["evaluate.py", "runs/synthetic-R/best.pt", "--images", "8"],
                      ["localize.py", "runs/synthetic-R/best.pt", "--images", "8", "--panels", "1"], ["train.py", "--data", "nowhere"]):
        done = subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == (2 if "nowhere" in arguments else 0), done.stderr
    assert done.stderr == "train.py: nowhere/annotation.mat: no such file\n"
    assert len(list((tmp_path / "runs/synthetic-R/panels").iterdir())) == 1


def test_localize_plain_pictures(trained, tmp_path):
    for i, picture in enumerate(synthetic("val", count=2).images):
        Image.fromarray(picture).resize((50 + i, 90)).save(tmp_path / f"{i}.png")
    done = command("localize.py", trained["S"], tmp_path, tmp_path / "0.png", "--attributes", "Hat", "boots", "--out", tmp_path / "p")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all("Hat 0." in line and "boots 0." in line for line in lines[:3])
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["0.png", "1.png", "2-0.png"]
    done = command("localize.py", "--panels", 0, trained["S"], tmp_path / "1.png", tmp_path / "0.png")  # options first
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    done = command("localize.py", trained["K"], tmp_path / "0.png")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "PLE-K needs keypoints" in done.stderr


def test_pa100k_end_to_end_with_keypoints(tmp_path):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    names = [f"{i:06d}.jpg" for i in range(1, 17)]
    np.savez(tmp_path / "k.npz", names=np.array(names), keypoints=np.full((16, 16, 3), 10, np.float32))
    small = ["--data", tmp_path, "--size", 64, 48, "--epochs", 1, "--backbone", "resnet18", "--weights", "none", "--channels", 8, "--batch-size", 4]
    done = command("train.py", *small, "--ple", "K", "--keypoints", tmp_path / "k.npz", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for name in ("evaluate.py", "localize.py"):
        done = command(name, tmp_path / "run" / "best.pt")
        assert done.returncode == 0, done.stderr
    done = command("train.py", *small, "--ple", "R", "--train-split", "trainval", "--out", tmp_path / "both")
    assert done.returncode == 0 and "12 images" in done.stdout, done.stderr
    done = command("train.py", *small, "--ple", "K", "--out", tmp_path / "none")
    assert done.returncode == 2 and "PLE-K needs keypoints, give --keypoints FILE" in done.stderr


@pytest.mark.parametrize("name, arguments, message", [
    ("train.py", ["--data", "nowhere"], "nowhere/annotation.mat: no such file"),
    ("train.py", ["--dataset", "pa100k"], "give its folder with --data"),
    ("train.py", ["--dataset", "synthetic", "--data", "folder"], "the synthetic set is drawn"),
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
])
def test_bad_input_is_one_line_and_exit_status_2(trained, name, arguments, message):
    done = command(name, *[trained.get(a, a) for a in arguments])
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error" in line or line.startswith(f"{name}:")]) == 1


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
    again = command("train.py", *TINY, "--epochs", 1, "--out", folder)
    assert again.returncode == 2 and "give --resume to continue it, or another --out" in again.stderr
    other = command("train.py", *TINY, "--epochs", 1, "--ple", "R", "--out", folder, "--resume")
    assert other.returncode == 2 and "was trained with ple S, not R" in other.stderr
    assert {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()} == before
