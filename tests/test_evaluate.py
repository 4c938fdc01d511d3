"""The five metrics against counting; the command, its files and bad input."""

import math
import os

import conftest
import numpy as np
import pytest
import torch
from conftest import ATTRIBUTES, PA100K, SMALL, load, read_json, refuse, succeed, words

import data
from data import Split, synthetic
from evaluate import group_means, load_model, metrics, predict, report


def reference_metrics(predicted, labels):
    """Sec. 4.1 by Python sets, per attribute and per image."""
    N, L = labels.shape
    label_mA, accu, prec, rec = [], 0.0, 0.0, 0.0
    for j in range(L):
        positives = {i for i in range(N) if labels[i, j]}
        found = {i for i in range(N) if predicted[i, j]}
        negatives = set(range(N)) - positives
        if positives and negatives:
            hits = len(found & positives) / len(positives)
            label_mA.append((hits + len(negatives - found) / len(negatives)) / 2)
    for i in range(N):
        true = {j for j in range(L) if labels[i, j]}
        found = {j for j in range(L) if predicted[i, j]}
        accu += len(true & found) / len(true | found) / N if true | found else 0
        prec += len(true & found) / len(found) / N if found else 0
        rec += len(true & found) / len(true) / N if true else 0
    F1 = 2 * prec * rec / (prec + rec)
    return {"mA": sum(label_mA) / len(label_mA), "Accu": accu, "Prec": prec, "Rec": rec, "F1": F1}


@pytest.mark.parametrize("seed", range(3))
def test_metrics_match_counting(seed):
    torch.manual_seed(seed)
    logits, labels = torch.randn(50, 6), (torch.rand(50, 6) < 0.3).float()
    labels[0], logits[1] = 0, -1  # no true one, no predicted one
    labels[2], logits[2] = 0, -1  # neither
    result = metrics(logits, labels)
    for name, value in reference_metrics(logits > 0, labels).items():
        assert result[name] == pytest.approx(100 * value)
    assert result["undefined"] == 0


def test_undefined_attributes_are_left_out_and_counted():
    torch.manual_seed(3)
    logits, labels = torch.randn(20, 4), (torch.rand(20, 4) < 0.5).float()
    labels[:, 1], labels[:, 3] = 0, 1
    result = metrics(logits, labels)
    assert result["undefined"] == 2
    assert [math.isnan(mA) for mA in result["label_mA"]] == [False, True, False, True]
    assert result["mA"] == pytest.approx(100 * reference_metrics(logits > 0, labels)["mA"])
    means = group_means(result["label_mA"], ["head", "head", "all", "all"])
    assert means == pytest.approx({"head": result["label_mA"][0], "all": result["label_mA"][2]})
    known = ATTRIBUTES[:4], PA100K[:4], ["x"] * 20, ["x"] * 20
    text = "\n".join(report(Split("t", *known, labels.numpy()), logits, labels)[1])
    assert text.count(" nan") == 2
    assert "2 attributes have no positives or no negatives" in text


def test_metrics_refuse_what_would_give_a_wrong_number():
    """Swapped arguments, labels that would be broadcast or mean unknown, logits that are none."""
    logits, labels = torch.randn(5, 3), torch.eye(5)[:, :3]
    nan = logits.clone()
    nan[2, 1] = math.nan
    wrong = [(labels, logits), (nan, labels), (logits, labels[:, :1]), (logits, labels[:1])]
    for given in (*wrong, (logits, labels - 1), (logits, labels + 0.5)):
        with pytest.raises(ValueError, match="metrics"):
            metrics(*given)


def test_a_loading_process_s_batches_are_not_kept_open():
    """Each held a file descriptor until the end: too many for a large split."""
    images = data.Pedestrians(synthetic("val", images=40), (32, 24))
    counts, batches = [], data.loader(images, 1, workers=1)

    class Model(torch.nn.Module):
        def forward(self, images, keypoints):
            counts.append(len(os.listdir("/proc/self/fd")))
            return torch.zeros(1, 26)

    assert predict(Model(), batches)[0].shape == (40, 26)
    assert max(counts) - counts[0] < 10


@pytest.mark.parametrize("ple", ["S", "K", "R", "none"])
def test_evaluate_end_to_end(trained, ple):
    options = words("--images 12 --json e.json --predictions p.npz")
    options += words("--amp bf16") if ple == "R" else []
    printed = succeed("evaluate.py", trained[ple], *options)
    result = read_json("e.json")
    assert result["images"] == 12
    assert len(result["attributes"]) == 26
    assert set(result["groups"]) == {"head", "torso", "bottom", "all"}
    assert f"mA {result['mA']:.2f}" in printed
    model, _ = load_model(trained[ple])
    for j, row in enumerate(result["attributes"]):
        assert row["scale"] == (None if ple == "none" else f"P{model.afss.scales[j] + 1}")
    assert result["torch"] == str(torch.__version__)
    assert "evaluate.py" in result["command"]


def test_predictions_suffice_for_any_other_measure(trained):
    files = words("--json e.json --predictions p.npz")
    succeed("evaluate.py", trained["S"], "--images", "30", *files)
    result = read_json("e.json")
    with np.load("p.npz") as archive:
        assert archive["names"].tolist() == synthetic("test", images=30).names
        assert archive["groups"].tolist() == PA100K
        true, predicted = archive["labels"] == 1, archive["probabilities"] > 0.5
        for j, row in enumerate(result["attributes"]):
            assert row["attribute"] == archive["attributes"][j]
            shares = ("TP/P", predicted & true, true), ("TN/N", ~predicted & ~true, ~true)
            for key, hits, of in shares:  # null: undefined
                share = 100 * hits[:, j].sum() / of[:, j].sum() if of[:, j].any() else None
                assert row[key] == (None if share is None else pytest.approx(share, abs=1e-4))


@pytest.mark.parametrize("name", ["evaluate.py", "localize.py"])
def test_results_are_written_before_they_are_printed(trained, monkeypatch, name):
    """A closed standard output loses what is printed alone."""
    monkeypatch.setattr("builtins.print", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug shows its traceback
        conftest.command(name, trained["R"], *words("--images 8 --json r.json"))
    assert read_json("r.json")["config"]["ple"] == "R"


def test_no_result_is_written_over_an_input(trained, tmp_path):
    best = tmp_path / "best.pt"
    best.write_bytes(trained["K"].read_bytes())
    names = synthetic("test", images=2).names
    conftest.write_keypoints(tmp_path / "k.npz", names)
    told = load(trained["K"])
    told["config"].update(keypoints="k.npz")
    torch.save(told, "told.pt")  # trained with this file
    assert "k.npz" in refuse("evaluate.py", "told.pt", *words("--images 2 --predictions ./k.npz"))
    (tmp_path / "told.pt").unlink()
    for name in ("evaluate.py", "localize.py"):
        assert "best.pt" in refuse(name, best, "--images", "2", "--json", "./best.pt")
    keypoints = words("--keypoints k.npz --predictions k.npz")
    assert "k.npz" in refuse("evaluate.py", best, *keypoints)
    assert best.read_bytes() == trained["K"].read_bytes()
    # Of one's own data: tables and images are not results.
    conftest.write_csv(tmp_path, groups='{"Hat": "head", "boots": "bottom"}')
    (tmp_path / "link.json").symlink_to("groups.json")
    files = [file for file in tmp_path.iterdir() if file.name != "best.pt"]
    before = {file: file.read_bytes() for file in files}
    for name in ("evaluate.py", "localize.py"):
        options = [name, trained["R"], *words("--dataset csv --data ."), "--json"]
        for file in ("groups.json", "link.json", "dataset_all.json", "test.csv", "a.png"):
            assert file in refuse(*options, file)
    assert "test.csv" in refuse("evaluate.py", trained["R"], "--predictions", "test.csv")
    both = words("--json both.json --predictions both.json")
    assert "both.json" in refuse("evaluate.py", best, *both)
    assert {file: file.read_bytes() for file in files} == before
    data.write_json("new/r.json", {"name": "caf\udce9.jpg", "value": float("nan")})
    assert read_json("new/r.json") == {"name": "caf\udce9.jpg", "value": None}


def test_the_raw_weights_are_not_measured(trained, tmp_path):
    last = load(trained["R"].with_name("last.pt"))
    for tensor in last["model"].values():
        tensor.zero_()
    torch.save(last, tmp_path / "last.pt")
    printed = [succeed("evaluate.py", file, "--images", "8") for file in (trained["R"], "last.pt")]
    assert printed[0] == printed[1]


def test_bad_input_is_one_line_and_exit_status_2(trained, tmp_path):
    for command, named in (
        ("evaluate.py nowhere.pt", "nowhere.pt"),
        ("evaluate.py", "pa100k: give its folder with --data"),  # the published model's dataset
        ("localize.py", "pa100k: give its folder with --data"),
        ("evaluate.py S --data x", "--data x"),  # which was trained on the synthetic set
        ("localize.py nowhere.pth photo.jpg", "nowhere.pth"),  # a model, no photo
        ("evaluate.py S --dataset pa100k --data nowhere", "nowhere"),
        ("evaluate.py S --device cuda:99", "--device"),
        ("evaluate.py S --dataset synthetic --data x", "--data"),
        ("localize.py photo.jpg", "photo.jpg"),
        ("localize.py S nowhere.jpg", "nowhere.jpg"),
        ("localize.py S --images 2 --attributes Wig", "Wig"),
        ("localize.py S --threshold 0", "--threshold"),
        ("localize.py S --panels -1", "--panels"),
        ("localize.py S photo.jpg --data PCS", "--data"),
        ("train.py --data nowhere", "nowhere"),
        ("train.py --dataset pa100k", "--data"),
        ("train.py --dataset pcs --data x", "--dataset pcs"),
        ("train.py --dataset pcs --data x --train-split trainval", "--dataset pcs"),
        ("train.py --data x --partition 2", "pa100k train partition 2"),  # which it does not take
        ("train.py --exclude a", "synthetic train exclude"),
        ("train.py --images 8 --weights nowhere.pt", "nowhere.pt"),
        ("train.py --lr -1", "--lr"),
        ("train.py --freeze -1", "--freeze"),
        ("train.py --train-split trainval --schedule plateau", "--schedule"),
    ):
        file, *options = [trained.get(word, word) for word in words(command)]
        before = [*SMALL, "--out", "run"] if file == "train.py" else []
        assert named in refuse(file, *before, *options)
        assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_differs_or_holds_code_is_named_and_nothing_runs(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/marker",)

    good = load(trained["S"])
    variance = "backbone.stages.1.0.bn1.running_var"
    for content in (
        Evil(),
        {"weights": 1},
        {key: value for key, value in good.items() if key != "config"},
        {**good, "config": {k: v for k, v in good["config"].items() if k != "attributes"}},
        {**good, "config": {k: v for k, v in good["config"].items() if k != "data"}},
        {**good, "config": {**good["config"], "attributes": ATTRIBUTES[:3]}},
        {**good, "config": {**good["config"], "ple": "Q"}},
        {**good, "ema": {**good["ema"], "heads.head.weight": torch.zeros(3, 3)}},
        {**good, "ema": {**good["ema"], "afss._extra_state": torch.tensor([7] * 27)}},
        {**good, "ema": {**good["ema"], "heads.head.bias": torch.full((2,), math.nan)}},
        {**good, "ema": {**good["ema"], variance: torch.full((32,), math.nan)}},
    ):
        torch.save(content, tmp_path / "bad.pt")
        line = refuse("evaluate.py", tmp_path / "bad.pt")
        assert "bad.pt" in line
        assert "weights_only" not in line  # torch's advice would run it
    line = refuse("train.py", *SMALL[2:], "--images", "8", "--weights", tmp_path / "bad.pt")
    assert "bad.pt" in line
    assert not (tmp_path / "marker").exists()
