"""The tools beside the tests: comparison of predictions, Tab. 3's profile."""

import re
from pathlib import Path

import benchmark
import compare
import figures
import numpy as np
import pretrained
import pytest
import torch
from conftest import load, read_json, words

import data
from evaluate import group_means, load_model, metrics


def write_predictions(file, labels, seed, skill):
    rng = np.random.default_rng(seed)
    right = rng.random(labels.shape) < skill
    probabilities = np.where(right == (labels == 1), 0.9, 0.1)
    known = {"names": [str(i) for i in range(len(labels))], "attributes": ["a", "b", "c"]}
    groups = ["head", "head", "all"]
    np.savez(file, **known, groups=groups, labels=labels, probabilities=probabilities)
    return probabilities


def test_compare_gives_means_spreads_differences_and_intervals(tmp_path):
    labels = (np.random.default_rng(0).random((200, 3)) < 0.4).astype(np.float32)
    found = {}
    for name, skill in (("none", 0.7), ("S", 0.8)):
        for seed in range(3):
            file = tmp_path / f"{name}-{seed}.npz"
            probabilities = write_predictions(file, labels, seed + 10 * len(name), skill)
            logits = torch.from_numpy(probabilities).logit()
            result = metrics(logits, torch.from_numpy(labels))
            groups = group_means(result["label_mA"], ["head", "head", "all"])
            found.setdefault(name, []).append([result["mA"], result["F1"], *groups.values()])
    _, none, S = compare.compare([str(tmp_path / "none-*.npz"), str(tmp_path / "S-*.npz")], 200)
    assert len(re.split(r"\s{2,}", S)) == 6  # the pattern, seeds, four cells apart
    means = {name: np.mean(values, 0) for name, values in found.items()}
    for k in range(4):
        spread = np.std([values[k] for values in found["none"]], ddof=1)
        assert f"{means['none'][k]:.2f} ± {spread:.2f}" in none
        assert f"{means['S'][k] - means['none'][k]:+.2f} [" in S
    low, high = S.split("[")[1].split("]")[0].split(", ")
    difference = means["S"][0] - means["none"][0]
    assert 0 < float(low) < difference < float(high) < 2 * difference
    # A model against itself; seeds that only one of two models has.
    same = compare.compare([str(tmp_path / "S-*.npz")] * 2, 200)[2]
    assert "+0.00 [+0.00, +0.00]" in same
    (tmp_path / "none-1.npz").unlink()
    *_, S, said = compare.compare([str(tmp_path / "none-*.npz"), str(tmp_path / "S-*.npz")], 200)
    within = [found["S"][seed][0] - found["none"][seed][0] for seed in (0, 2)]
    assert f"{np.mean(within):+.2f} [" in S
    assert "2 seeds" in said


@pytest.mark.parametrize("image_deviation", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("seeds", [2, 3, 5, 12])
@pytest.mark.parametrize("together", [0, 3])
def test_an_interval_covers_the_truth_95_times_in_100(together, seeds, image_deviation):
    """Two equal models, whose seeds deviate by 1, and together by 0 or 3; images are shared."""
    rng, covered = np.random.default_rng(seeds), 0
    for _ in range(4000):
        both = rng.normal(0, together, seeds)
        ours = both + rng.normal(rng.normal(0, 1) * image_deviation, 1, seeds)
        base = both + rng.normal(0, 1, seeds)
        _, low, high = compare.interval(ours - base, image_deviation)
        covered += low <= 0 <= high
    assert 0.93 < covered / 4000 < 0.985


def test_compare_records_each_seed_and_the_differences(tmp_path):
    """What is there of them is replaced; other records stay as they are."""
    labels = (np.random.default_rng(0).random((100, 3)) < 0.4).astype(np.float32)
    for name, skill in (("none", 0.7), ("S", 0.8)):
        for seed in range(3):
            write_predictions(tmp_path / f"{name}-{seed}.npz", labels, seed, skill)
    other = {"setting": "other", "model": "S", "seeds": [0], "mA": 1.0, "note": "kept"}
    data.write_json("r.json", {"about": "x", "trainings": [other], "differences": []})
    patterns = [str(tmp_path / "none-*.npz"), str(tmp_path / "S-*.npz")]
    for _ in range(2):
        compare.record(patterns, "new", ["baseline", "S"], Path("r.json"), 100)
    content = read_json("r.json")
    _, (none, S) = compare.measure(patterns, 100)
    assert content["trainings"][0] == other
    found = content["trainings"][1:]
    assert [(run["model"], *run["seeds"]) for run in found] == [
        *(("baseline", seed) for seed in range(3)),
        *(("S", seed) for seed in range(3)),
    ]
    for run, values in zip(found, [*none[0], *S[0]], strict=True):
        measured = [run["mA"], run["F1"], run["groups"]["head"], run["groups"]["all"]]
        assert measured == pytest.approx(values, abs=0.006)
    by_metric = {record["metric"]: record for record in content["differences"]}
    assert list(by_metric) == ["mA", "F1", "head", "all"]
    assert by_metric["mA"]["n"] == 3
    ends = [by_metric["mA"]["mean"], *by_metric["mA"]["interval"]]
    assert ends == pytest.approx(S[2][0], abs=0.006)


def test_compare_of_boxes_takes_the_mean_over_attributes(tmp_path):
    rng, expected = np.random.default_rng(1), {}
    for name, skill in (("none", 0.1), ("S", 0.3)):
        records, by_attribute = [], {"a": [], "b": []}
        for i in range(60):
            for attribute in "ab" if i % 3 else "a":  # fewer boxes of b
                iou, p = skill + 0.1 * rng.random(), rng.random()
                record = {"image": str(i), "attribute": attribute, "probability": p}
                records.append({**record, "IoU": [iou, 0.9], "true_box": [0, 0, 1, i + 1]})
                by_attribute[attribute].append((iou, p))
        records.append({"image": "60", "attribute": "a"})  # predicted, without a true box
        content = {"thresholds": [0.2, 0.5], "records": records}
        data.write_json(tmp_path / f"{name}.json", content)
        found = []
        for least in (0, 0.5):
            a, b = (np.array([v for v in by_attribute[k] if v[1] > least]) for k in "ab")
            iou = (a[:, 0].mean() + b[:, 0].mean()) / 2
            pcc = (np.corrcoef(a.T)[0, 1] + np.corrcoef(b.T)[0, 1]) / 2
            found += [f"{iou:.3f}", "0.900", f"{pcc:.3f}"]
        expected[name] = found
    _, none, S = compare.compare([str(tmp_path / "none.json"), str(tmp_path / "S.json")])
    assert none.split()[2:] == expected["none"]
    assert S.split()[2] == expected["S"][0]
    assert f"{float(expected['S'][0]) - float(expected['none'][0]):+.2f}" in S
    assert "[+0.1" in S
    data.write_json("r.json", {"trainings": [], "differences": []})
    models = ["baseline at stride 16", "S"]
    compare.record(["none.json", "S.json"], "new", models, Path("r.json"), 10)
    content = read_json("r.json")
    iou = {"0.2": float(expected["none"][0]), "0.5": 0.9}
    first = {"setting": "new", "model": "baseline", "seeds": [0], "IoU at stride 16": iou}
    assert content["trainings"][0] == first
    assert {record["minus"] for record in content["differences"]} == {"baseline at stride 16"}


def test_compare_refuses_what_cannot_be_compared_in_one_line():
    """Also foreign files, such as evaluate.py's --json, and two files of one seed."""
    for name, labels in (("a", np.eye(4, 3)), ("b", np.eye(3)), ("c", 1 - np.eye(4, 3))):
        write_predictions(f"{name}.npz", labels, 0, 0.8)
    write_predictions("e1.npz", np.eye(4, 3), 0, 0.8)
    np.savez("d.npz", **{**np.load("a.npz"), "probabilities": np.full((4, 3), np.nan)})
    record = {"image": "0", "attribute": "a", "probability": 1}
    record.update(IoU=[0.5], true_box=[0, 0, 1, 1])
    content = {"thresholds": [0.2], "records": [record]}
    data.write_json("a.json", content)
    data.write_json("b.json", {**content, "thresholds": [0.5]})
    data.write_json("c.json", {"mA": 80})
    data.write_json("d.json", [content])
    Path("e.JSON").write_text("{")
    for name in "xy":
        write_predictions(f"{name}-1.npz", np.eye(4, 3), 0, 0.8)
    write_predictions("m-0.npz", np.eye(4, 3), 0, 0.8)
    write_predictions("m-1.npz", np.eye(3), 0, 0.8)  # the second seed's images differ
    with pytest.raises(SystemExit, match=r"m-\*\.npz: has other images"):
        compare.compare(["m-*.npz"])
    for pattern in ("e.JSON", "[xy]-1.npz"):
        with pytest.raises(SystemExit, match=r"^compare.py: .*$"):
            compare.open_model(pattern)
    for base, others in (("a.npz", "b c d nowhere e1"), ("a.json", "b c d")):
        for other in words(others):
            other += Path(base).suffix
            with pytest.raises(SystemExit, match=rf"^compare.py: {other}: .*$"):
                compare.compare([base, other])


def test_a_published_file_answers_as_its_checkpoint_and_names_no_folder(trained, tmp_path):
    given = load(trained["K"])
    given["config"].update(data="/a/folder", keypoints="/a/folder/k.npz", weights="/a/file.pt")
    torch.save({**given, "command": "train.py --data /a/folder"}, "given.pt")
    pretrained.publish(["given.pt"], tmp_path / "published.pt")
    assert "/a/" not in str(load("published.pt"))
    assert b"/a/folder" not in Path("published.pt").read_bytes()
    images, keypoints = torch.randn(4, 3, 64, 48), torch.rand(4, 16, 2) * 48
    answers = [load_model(file)[0](images, keypoints) for file in ("given.pt", "published.pt")]
    torch.testing.assert_close(*answers, atol=0.02, rtol=0.02)
    # SimCC's files are state dicts alone.
    torch.save({"weight": torch.ones(2), "count": torch.tensor(3)}, "one.pt")
    torch.save({"weight": torch.zeros(2), "count": torch.tensor(5)}, "two.pt")
    pretrained.publish(["one.pt", "two.pt"], "simcc.pt")
    assert load("simcc.pt")["weight"].tolist() == [0.5, 0.5]
    assert load("simcc.pt")["weight"].dtype == torch.float16
    # Of several checkpoints the mean.
    other = {name: torch.zeros_like(tensor) for name, tensor in given["ema"].items()}
    torch.save({**given, "ema": other}, "other.pt")
    pretrained.publish(["given.pt", "other.pt"], tmp_path / "mean.pt")
    mean = load("mean.pt")["ema"]
    for name, tensor in load("published.pt")["ema"].items():
        expected = tensor / 2 if tensor.is_floating_point() else tensor
        torch.testing.assert_close(mean[name], expected, atol=1e-3, rtol=1e-3)


def test_batch_norms_statistics_are_those_of_training_images(trained):
    """Of the first layer, against its inputs; weights stay as they are."""
    given = load(trained["S"])
    config = given["config"]
    split = data.open_split(config, "train")
    batches = data.loader(data.Pedestrians(split, config["size"], train=True), 64)
    ((images, *_),) = batches
    model, _ = load_model(trained["S"])
    found = pretrained.estimate_batch_norm(config, given["ema"])
    with torch.no_grad():
        x = model.backbone.stages[0][0][0](data.normalize(images))
    name = "backbone.stages.0.0.1."
    torch.testing.assert_close(found[name + "running_mean"], x.mean((0, 2, 3)))
    torch.testing.assert_close(found[name + "running_var"], x.var((0, 2, 3)))
    for other, tensor in given["ema"].items():
        if other.endswith(("weight", "bias")):
            assert torch.equal(found[other], tensor), other


def test_cocos_points_become_mpiis():
    """A person standing straight, 100 high: each point against its place by hand."""
    coco = words("50,10 52,8 48,8 54,12 46,12 60,20 40,20 65,35 35,35 66,50 34,50")
    coco += words("55,50 45,50 55,75 45,75 55,95 45,95")
    face = (10 + 8 + 8 + 12 + 12) / 5
    neck, top = 20 + 0.45 * (face - 20), 20 + 1.65 * (face - 20)
    mpii = words(f"45,95 45,75 45,50 55,50 55,75 55,95 50,50 50,20 50,{neck} 50,{top}")
    mpii += words("34,50 35,35 40,20 60,20 65,35 66,50")
    found, expected = (torch.tensor([[*map(float, p.split(","))] for p in x]) for x in (coco, mpii))
    torch.testing.assert_close(pretrained.coco_to_mpii() @ found, expected)
    torch.testing.assert_close(
        pretrained.coco_to_mpii().sum(1), torch.ones(16)
    )  # moving the person moves all points alike


def test_the_pages_numbers_are_those_of_results_json():
    """Every table is made anew; results.md has no decimals elsewhere."""
    pages = {page: page.read_text(encoding="utf-8") for page in figures.PAGES}
    for page, text in pages.items():
        assert figures.with_tables(text) == text, page
    marks = re.findall(r"<!-- (\w+) -->\n\|", "".join(pages.values()))
    assert sorted(marks) == sorted(made.__name__ for made in figures.TABLES)
    made_or_code = r"<!-- \w+ -->\n.*?<!-- end -->|`.*?`"
    prose = re.sub(made_or_code, "", pages[figures.PAGES[0]], flags=re.DOTALL)
    assert not re.findall(r"\d\.\d", prose)


def test_a_verdict_needs_three_runs_and_an_interval_without_zero():
    record = {"n": 3, "metric": "mA", "mean": 1, "interval": [0.1, 2]}
    assert figures.verdict(record) == "ahead (3)"
    assert figures.verdict(record, reverse=True) == "behind (3)"
    assert figures.verdict({**record, "interval": [-2, -0.1]}) == "behind (3)"
    assert figures.verdict({**record, "interval": [-0.1, 2]}) == "undecided (3)"
    assert figures.verdict({"n": 2, "metric": "mA", "mean": 1}) == "undecided (2)"
    assert figures.verdict(None) == "not run"


def test_the_figures_are_those_of_results_json(tmp_path):
    """Their texts, and where their marks lie, to a tenth of a pixel."""
    pytest.importorskip("matplotlib")
    figures.draw(tmp_path)
    for name in figures.FIGURES:
        texts = []
        places = []
        for folder in (tmp_path, figures.TESTS.parent / ".pictures"):
            drawing = (folder / f"{name}.svg").read_text(encoding="utf-8")
            texts.append(re.findall(r"<text[^>]*>([^<]*)<", drawing))
            found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"', drawing)
            places.append(np.array(found, float))
        assert texts[0] == texts[1], name
        assert len(places[0]) > 20
        np.testing.assert_allclose(*places, atol=0.1, err_msg=name)


def test_tab03_profile_counts_multiply_adds():
    """Each output number of a layer costs the numbers that it is made from."""
    (row,) = benchmark.profile("cpu", [("R", "resnet18")], (1,), (64, 32), rounds=1)
    model, counted = benchmark.build("R", "cpu", backbone="resnet18").eval(), []

    def count(layer, _, out):
        counted.append(out.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        model(torch.zeros(1, 3, 64, 32))
    assert row["GFLOPs 64x32"] == pytest.approx(sum(counted) / 1e9, rel=1e-6)
