"""The five metrics against counting, and checkpoints that cannot be used."""

import json
import math
import re
from functools import partial

import benchmark
import pytest
import torch
from conftest import PA100K, words
from test_data import table_of

from evaluate import (
    FORMAT,
    METRICS,
    compare,
    group_means,
    load_model,
    main,
    metrics,
    report,
)
from sspnet import build_model


def reference_metrics(predicted, labels):
    """Sec. 4.1 by Python sets, per attribute and per image."""
    N, L = labels.shape
    label_mA = []
    for j in range(L):
        positives = {i for i in range(N) if labels[i, j]}
        found = {i for i in range(N) if predicted[i, j]}
        negatives = set(range(N)) - positives
        if positives and negatives:
            hits = len(found & positives) / len(positives)
            label_mA.append((hits + len(negatives - found) / len(negatives)) / 2)
    accu = prec = rec = 0.0
    for i in range(N):
        true = {j for j in range(L) if labels[i, j]}
        found = {j for j in range(L) if predicted[i, j]}
        accu += len(true & found) / len(true | found) if true | found else 0
        prec += len(true & found) / len(found) if found else 0
        rec += len(true & found) / len(true) if true else 0
    prec, rec = prec / N, rec / N
    return {
        "mA": sum(label_mA) / len(label_mA),
        "Accu": accu / N,
        "Prec": prec,
        "Rec": rec,
        "F1": 2 * prec * rec / (prec + rec),
    }


def field_mA(predicted, labels):
    """mA as the field's usual tool writes it, with its epsilon."""
    gt, pred, eps = labels.numpy().astype(float), predicted.numpy().astype(float), 1e-20
    tpr = (gt * pred).sum(0) / ((gt == 1).sum(0) + eps)
    tnr = ((1 - gt) * (1 - pred)).sum(0) / ((gt == 0).sum(0) + eps)
    return ((tpr + tnr) / 2).mean()


@pytest.mark.parametrize("seed", range(3))
def test_metrics_match_counting(seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(50, 6), (torch.rand(50, 6) < 0.3).float()
    labels[0], logits[1] = 0, -1  # no true one, no predicted one
    labels[2], logits[2] = 0, -1  # neither
    result = metrics(logits, labels)
    for name, value in reference_metrics(logits > 0, labels).items():
        assert result[name] == pytest.approx(100 * value)
    assert result["mA"] == pytest.approx(100 * field_mA(logits > 0, labels), abs=1e-6)
    assert result["undefined"] == 0


def test_undefined_attributes_are_left_out_and_counted():
    torch.manual_seed(3)
    logits, labels = torch.randn(20, 4), (torch.rand(20, 4) < 0.5).float()
    labels[:, 1], labels[:, 3] = 0, 1
    result = metrics(logits, labels)
    assert result["undefined"] == 2
    assert [math.isnan(mA) for mA in result["label_mA"]] == [False, True, False, True]
    assert result["mA"] == pytest.approx(100 * reference_metrics(logits > 0, labels)["mA"])
    text = "\n".join(report(table_of(labels.numpy()), logits, labels)[1])
    assert text.count("undefined") == 3 and "2 attributes have no positives or no negatives" in text


def test_a_logit_of_zero_is_a_negative():
    assert metrics(torch.zeros(2, 1), torch.tensor([[1.0], [0.0]]))["mA"] == 50


def count(counted, layer, _, out):
    counted.append(out.numel() * layer.weight[0].numel())


def test_tab03_profile_counts_multiply_adds():
    """Against a count by hooks on every layer: each output number of a layer costs the numbers it
    is made from."""
    models = {("none", "resnet18"): (1, 2, 3), ("R", "resnet18"): (1, 2, 3)}
    rows = benchmark.profile("cpu", models, batches=(1, 2), size=(64, 32), rounds=1)
    for row in rows:
        config = {**CONFIG, "ple": row["ple"], "groups": PA100K, "channels": 256}
        model, counted = build_model(config).eval(), []
        if row["ple"] == "R":
            model.afss.scales = [benchmark.PAPER_SCALES[group] for group in config["groups"]]
        for layer in model.modules():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.register_forward_hook(partial(count, counted))
        for H, W in ((64, 32), (256, 128)):
            counted.clear()
            with torch.inference_mode():
                model(torch.zeros(1, 3, H, W))
            assert row[f"gflops_{H}x{W}"] == pytest.approx(sum(counted) / 1e9, rel=1e-6)
        assert row["params"] * 1e6 == pytest.approx(sum(p.numel() for p in model.parameters()))
        assert row["images_per_second_2"] > 0
    lines = benchmark.profile_lines(rows)
    assert len(lines) == 3 and lines[1].startswith("baseline resnet18")


def write_result(file, ple, seed, values, **config):
    """A result of evaluate.py, or where the values are pairs of IoU and PCC, of localize.py."""
    rows = []
    for attribute, value in values.items():
        pair = isinstance(value, tuple)
        measures = {"IoU": value[0], "PCC": value[1]} if pair else {"mA": value}
        rows.append({"attribute": attribute, **measures})
    totals = {"average": {"IoU": 0.25, "PCC": None}} if pair else {}
    totals.update({} if pair else dict.fromkeys(METRICS, 70.0 + seed))
    config = {"ple": ple, "seed": seed, "keypoints": None, **config}
    file.write_text(json.dumps({"config": config, "split": "test", "attributes": rows, **totals}))
    return file


def test_compare_gives_means_spreads_and_differences(tmp_path, capsys, monkeypatch):
    files = [
        write_result(tmp_path / "a.json", "none", 0, {"Hat": 60.0, "Boots": 50.0}),
        write_result(tmp_path / "b.json", "none", 1, {"Hat": 64.0, "Boots": None}),
    ]
    values = {"Boots": 53.5, "Hat": 61.0, "Wig": 1.0}
    files.append(write_result(tmp_path / "c.json", "S", 0, values, freeze=3))
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--compare", *map(str, files)])
    main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["baseline", "SSPNet-S", "freeze", "3"]
    assert lines[1] == words("Hat mA 62.00±2.83 61.00 (-1.00)")
    assert lines[2] == words("Boots mA 50.00 53.50 (+3.50)")
    assert lines[3] == words("average mA 70.50±0.71 70.00 (-0.50)")
    assert len(lines) == 9 and lines[-1] == ["runs", "2", "1"]


def test_compare_localization_results_and_name_bad_ones(tmp_path):
    file = write_result(tmp_path / "a.json", "K", 0, {"Hat": (0.1, 0.5)})
    lines = [line.split() for line in compare([file])]
    assert lines == [
        ["SSPNet-K"],
        ["Hat", "IoU", "0.100"],
        ["Hat", "PCC", "0.500"],
        ["average", "IoU", "0.250"],
        ["average", "PCC", "nan"],
        ["runs", "1"],
    ]
    (tmp_path / "b.json").write_text('{"config": 1}')
    (tmp_path / "c.json").write_text("not JSON")
    (tmp_path / "d.json").write_text(file.read_text().replace('"ple"', '"pole"'))
    for bad in ("b.json", "c.json", "d.json"):
        with pytest.raises(ValueError, match=f"{bad}: not a result of evaluate.py or localize.py"):
            compare([file, tmp_path / bad])
    with pytest.raises(FileNotFoundError, match="nowhere.json: no such file"):
        compare([tmp_path / "nowhere.json"])


def test_compare_prints_the_groups_of_tab_1(tmp_path):
    for file, head in (("a.json", 80.0), ("b.json", 81.5)):
        write_result(tmp_path / file, "R", 0, {"Hat": 60.0}, afss=file[0])
        result = json.loads((tmp_path / file).read_text())
        (tmp_path / file).write_text(json.dumps({**result, "groups": {"head": head}}))
    lines = [line.split() for line in compare([tmp_path / "a.json", tmp_path / "b.json"])]
    assert lines[0] == ["afss", "a", "afss", "b"]
    assert words("group head mA 80.00 81.50 (+1.50)") in lines


def test_compare_tells_tab_2s_rows_apart(tmp_path):
    rows = [
        ("none", {}),
        ("S", {"afss": "P3"}),
        ("S", {"offsets": False, "prior": False}),
        ("S", {"prior": False}),
        ("S", {}),
    ]
    files = []
    for i, (ple, rest) in enumerate(rows):
        config = {"afss": "group", "offsets": True, "prior": True, **rest}
        files.append(write_result(tmp_path / f"{i}.json", ple, 0, {"Hat": 60.0}, **config))
    heads = re.split("  +", compare(files)[0].strip())
    assert heads == [
        "baseline",
        "SSPNet-S afss P3",
        "SSPNet-S afss group no offsets no prior",
        "SSPNet-S afss group no prior",
        "SSPNet-S afss group",
    ]


def test_group_means_skip_undefined_attributes():
    means = group_means([1.0, math.nan, 3.0, 5.0], ["head", "head", "all", "all"])
    assert means == {"head": 1.0, "all": 4.0}


CONFIG = {
    "ple": "none",
    "dataset": "synthetic",
    "backbone": "resnet18",
    "afss": "group",
    "M": 3,
    "ratio": 0.75,
    "offsets": True,
    "prior": True,
    "channels": 8,
    "size": [64, 48],
    "attributes": ["Hat"],
    "groups": ["head"],
}


def checkpoint_of(config):
    return {"format": FORMAT, "config": config, "ema": {}}


class Malicious:
    def __reduce__(self):
        return (print, ("executed",))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such checkpoint"),
        (b"not a checkpoint", "not a readable checkpoint"),
        ({"weights": 1}, "not a checkpoint of train.py"),
        ({"config": {"ple": "S"}, "ema": {}}, "another version of this code"),
        ({"config": Malicious(), "ema": {}}, "not a readable checkpoint"),
        (checkpoint_of({"ple": "S"}), "its config has no 'dataset'"),
        (checkpoint_of(CONFIG), "Missing key"),
        (checkpoint_of({**CONFIG, "size": [10**6, 10**6]}), "expected 1 to 4096"),
        (checkpoint_of({**CONFIG, "afss": 3}), "its config has no 'afss'"),
        (checkpoint_of([]), "its config has no 'ple'"),
    ],
)
def test_unusable_checkpoints_are_named_and_nothing_is_executed(tmp_path, capsys, content, message):
    file = tmp_path / "c.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_model(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert "executed" not in capsys.readouterr().out
