"""Boxes of a split, panels, the command and bad input."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    ATTRIBUTES,
    command,
    load,
    person_image,
    random_model,
    read_json,
    refuse,
    succeed,
    words,
    write_keypoints,
)
from PIL import Image, ImageFile
from torch.testing import assert_close

import data
import localize
from data import Pedestrians, Split, normalize, read_image, synthetic, together_loader
from evaluate import load_model
from localize import TILE, find, find_boxes, tile_size
from sspnet import box_iou, heatmap_to_box, response_maps, to_image


def test_panel_draws_both_boxes():
    image = torch.full((3, 64, 48), 128, dtype=torch.uint8)
    # Of an image from which the part right of and below (100, 200) was taken.
    crop = 100, 200, 148, 264
    record = {"heat": np.zeros(tile_size((64, 48))), "probability": 0.9}
    record["boxes"] = [(110, 210, 130, 230)]
    true_boxes = (105, 205, 120, 240), None
    tiles = [("Hat", {**record, "true_box": box}) for box in true_boxes]
    pixels = np.asarray(localize.panel(image, crop, [tiles, tiles[:1]]))
    start = pixels.shape[1] - 2 * (TILE + 4) + 4  # behind the image
    first, second = pixels[:, start : start + TILE], pixels[:, start + TILE + 4 :]
    for part, truth in ((first, True), (second, False)):
        assert (part == [255, 0, 0]).all(2).any()
        assert (part == [0, 220, 0]).all(2).any() == truth
    for colour, expected in (([255, 0, 0], (30, 30, 89, 89)), ([0, 220, 0], (15, 15, 59, 119))):
        rows, columns = np.nonzero((first == colour).all(2)[: 3 * 64])  # three pixels each
        assert (columns.min(), rows.min(), columns.max(), rows.max()) == expected
    # Of one model the image itself, 400 pixels high, has all boxes, with their names beside it.
    overview = np.asarray(localize.panel(image, crop, [tiles[:1]]))[:400, :300]
    colour = [int(localize.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero((overview == colour).all(2))
    scale = 400 / 64
    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert edges == pytest.approx([10 * scale, 10 * scale, 30 * scale, 30 * scale], abs=1)
    sex = np.asarray(localize.panel(image, crop, [[("Female", tiles[0][1])]]))[:400, :300]
    assert (sex == 128).all()  # nowhere in particular, so without a box


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t"])
def test_a_record_has_the_boxes_of_the_outputs_that_stand_for_its_attribute(backbone):
    """Of several outputs the one with the highest logit; boxes where the backbone's maps look."""
    model = random_model("R", backbone, afss="attribute").eval()
    model.afss.scales = [0, 2, 1, 1, 0]
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.3)
    drawn = synthetic("train", images=6, size=(96, 72))
    attributes, groups = ["one", "two"], ["torso", "head"]
    labels, boxes = drawn.labels[:, :2], np.full((6, 2, 4), np.nan, np.float32)
    boxes[2, 1] = 5, 10, 30, 40
    split = Split("t", attributes, groups, drawn.names, drawn.images, labels, boxes=boxes)
    first = normalize(Pedestrians(split, (64, 48))[0][0])
    logits = model(first[None])[0].tolist()
    output_indices = [sorted(pair, key=logits.__getitem__) for pair in ([3, 0], [1, 4])]
    thresholds, records = [0.3, 0.6], []
    for index, (item,), crops, *_ in together_loader(split, [(64, 48)], 4):
        run = {"model": model, "split": split, "outputs": output_indices, "wanted": [0, 1]}
        for _, found in find_boxes(run, index, item, crops, thresholds):
            records += found
    assert len(records) == 12
    chosen = set()
    for record in records:
        i, k = record["image"], record["attribute"]
        image, _, keypoints, _ = Pedestrians(split, (64, 48))[i]
        images = normalize(image[None])
        logits, responses = response_maps(model, images, range(5), keypoints[None])
        j = max(output_indices[k], key=lambda j: logits[0, j].item())
        chosen.add((k, output_indices[k].index(j)))
        stride = model.strides[model.map_of(j)]
        (heat,) = to_image(responses[j], stride, model.patches, (64, 48), (96, 72))
        tile = F.interpolate(heat[None, None], tile_size((96, 72)), mode="bilinear")[0, 0]
        assert_close(record["heat"], tile, atol=1e-5, rtol=1e-4)
        for threshold, box in zip(thresholds, record["boxes"], strict=True):
            assert box == pytest.approx(heatmap_to_box(heat, threshold))
        assert record["probability"] == pytest.approx(logits[0, j].sigmoid().item(), abs=1e-5)
        assert record["true_box"] == ([5, 10, 30, 40] if (i, k) == (2, 1) else None)
        if record["true_box"]:
            expected = [box_iou(box, (5, 10, 30, 40)) for box in record["boxes"]]
            assert record["IoU"] == pytest.approx(expected)
    assert backbone == "swin_t" or (0, 1) in chosen  # the higher output was not the first


def test_find_gives_a_photos_predicted_attributes_and_boxes_in_its_pixels(trained, tmp_path):
    """As the command does, by a path and by a tensor."""
    write_photos(tmp_path / "q")
    write_keypoints(tmp_path / "k.npz", ["0.png", "1.png"])
    photo, points = tmp_path / "q/0.png", np.full((16, 2), 10.0)
    points[:, 1] += 2 * np.arange(16)  # as in the file
    for ple in ("S", "K"):
        model, config = load_model(trained[ple])
        state = torch.get_rng_state()
        found = find(model, config, photo, points)
        assert torch.equal(torch.get_rng_state(), state)
        again = find(model, config, read_image(photo), torch.from_numpy(points))
        with Image.open(photo) as opened:
            assert found == again == find(model, config, opened, points)
        for more in ({"threshold": 0.05}, {"cam": "grad-cam"}):
            other = find(model, config, photo, points, **more)
            assert [one["box"] for one in other] != [one["box"] for one in found]
        options = words("--panels 0 --json l.json --threshold 0.2 0.4")
        options += ["--keypoints", tmp_path / "k.npz"]
        succeed("localize.py", trained[ple], photo, *options)
        records = read_json("l.json")["records"]
        assert len(found) == len(records) > 0
        probabilities = [one["probability"] for one in found]
        assert probabilities == sorted(probabilities, reverse=True)
        for record in records:
            (same,) = [one for one in found if one["attribute"] == record["attribute"]]
            assert same["probability"] == pytest.approx(record["probability"], abs=1e-5)
            assert list(same["box"]) == record["boxes"][0]
        succeed("localize.py", trained[ple], photo, *options, "--cam", "grad-cam")
        assert not Path("runs/panels").exists()
        averaged = find(model, config, photo, points, cam="grad-cam", threshold=0.2)
        by_name = {record["attribute"]: record for record in read_json("l.json")["records"]}
        for one in averaged:
            assert by_name[one["attribute"]]["boxes"][0] == list(one["box"])
    assert records[0]["image"] == str(photo)
    assert all(record["true_box"] is None and "IoU" not in record for record in records)


def test_boxes_are_in_the_photos_own_pixels_also_where_it_was_cropped(trained, bright_person):
    """And as EXIF turns it."""
    pixels = person_image((60, 50, 90, 150))
    model, config = load_model(trained["K"])
    image, points, crop = data.look_at(read_image(pixels), crop=True)
    expected = find(model, config, image, points, crop=False)  # points with a confidence
    found = find(model, config, pixels)
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        assert one["box"] == localize.moved(other["box"], *crop[:2])
    turned = Image.Exif()
    turned[0x0112] = 6  # stored lying, shown standing
    lying = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    lying.save("p.png", exif=turned)
    assert find(model, config, "p.png") == found
    for option, part in (("--crop", list(crop)), ("--no-crop", [0, 0, 150, 200])):
        succeed("localize.py", trained["K"], "p.png", option, *words("--json l.json --panels 0"))
        (photo,) = read_json("l.json")["photos"]
        assert photo["crop"] == part
        first, last = photo["keypoints"][0][:2], photo["keypoints"][15][:2]
        assert [*first, *last] == pytest.approx([60, 50, 89, 149], abs=2)
        if option == "--crop":
            boxes = [record["boxes"][0] for record in read_json("l.json")["records"]]
            assert sorted(boxes) == sorted(list(one["box"]) for one in found)


def test_tab10_is_of_both_populations_and_the_mean_over_attributes():
    """PCC at the first threshold."""
    records = [{"attribute": "a", "probability": 0.9}]  # without a true box
    for p, iou in ((0.1, 0.2), (0.6, 0.1), (0.7, 0.3), (0.9, 0.2)):
        records.append({"attribute": "a", "probability": p, "IoU": [iou, 1 - iou]})
    records.append({"attribute": "b", "probability": 0.4, "IoU": [0.6, 0.4]})
    scores = localize.tabulate(["a", "b"], records, [0.2, 0.5])
    lines = localize.table_lines(scores, [0.2, 0.5])
    first, second = scores["attributes"]
    assert (first["boxes"], first["IoU"]) == (4, pytest.approx(0.2))
    correlation = np.corrcoef([0.2, 0.1, 0.3, 0.2], [0.1, 0.6, 0.7, 0.9])[0, 1]
    assert [first["PCC"], scores["average"]["PCC"]] == pytest.approx([correlation] * 2)
    assert (second["boxes"], second["IoU"]) == (1, pytest.approx(0.6))
    assert scores["average"]["IoU"] == pytest.approx(0.4)  # not weighted by boxes
    assert scores["IoU_by_threshold"] == pytest.approx([0.4, 0.6])
    (row,) = scores["predicted"]["attributes"]
    assert (row["boxes"], row["IoU"]) == (3, pytest.approx(0.2))
    correlation = np.corrcoef([0.1, 0.3, 0.2], [0.6, 0.7, 0.9])[0, 1]
    assert row["PCC"] == pytest.approx(correlation)
    assert "0.200" in lines[-2]


@pytest.mark.parametrize("ple", ["S", "K", "R", "none"])
def test_localize_end_to_end(trained, tmp_path, ple):
    options = words("--images 12 --panels 3 --out p --json l.json --cam")
    options += words("grad-cam --amp bf16") if ple == "R" else ["grad-cam-p"]
    succeed("localize.py", trained[ple], *options)
    scores = read_json("l.json")
    boxes = synthetic("test", images=12, size=(64, 48)).boxes
    assert sum(row["boxes"] for row in scores["attributes"]) == np.isfinite(boxes[:, :, 0]).sum()
    found = [record for record in scores["records"] if record["true_box"]]
    assert all(record["true_box"] in boxes for record in found)
    for record in found:
        assert record["IoU"] == [pytest.approx(box_iou(record["boxes"][0], record["true_box"]))]
    assert len(list((tmp_path / "p").glob("*.png"))) == 3


def test_fig07_models_side_by_side(trained, tmp_path, monkeypatch):
    models = [trained[ple] for ple in ("none", "R", "K", "S")]
    options = words("--images 30 --attributes Hat --panels 2 --out p --json l.json")
    succeed("localize.py", *models, *options)
    split = synthetic("test", images=30, size=(64, 48))
    hats = np.flatnonzero(np.isfinite(split.boxes[:, split.attributes.index("Hat"), 0]))
    files = sorted((tmp_path / "p").iterdir())
    assert [split.names[i] in file.stem for i, file in zip(hats, files, strict=False)] == [True] * 2
    with Image.open(files[0]) as image:  # the image, room for names, and a tile per model
        assert image.width == 300 + 190 + 4 * (TILE + 4)
    assert [result["config"]["ple"] for result in read_json("l.json")] == ["none", "R", "K", "S"]
    # Not of models that see other images.
    checkpoint = load(trained["R"])
    checkpoint["config"]["size"] = [32, 24]
    torch.save(checkpoint, tmp_path / "small.pt")
    monkeypatch.setattr(localize, "look_through", lambda *_: 1 / 0)  # before any work
    assert "small.pt" in refuse("localize.py", trained["S"], tmp_path / "small.pt", "--images", "2")


def write_photos(folder):
    folder.mkdir()
    for i, pixels in enumerate(synthetic("val", images=2).images):
        Image.fromarray(pixels).resize((50 + i, 90)).save(folder / f"{i}.png")
    (folder / "._0.png").write_bytes(b"a Mac was here")


def test_photos_and_folders_of_them(trained, tmp_path, monkeypatch):
    """With the photos' own folder for the panels: no photo is overwritten. Each is decoded once."""
    write_photos(tmp_path / "q")
    before = {file: file.read_bytes() for file in (tmp_path / "q").iterdir()}
    options = [tmp_path / "q", tmp_path / "q/0.png", "--attributes", "hat", "Boots"]
    lines = succeed("localize.py", trained["S"], *options, "--out", tmp_path / "q").splitlines()
    assert len(lines) == 4
    assert all("Hat 0." in line and "boots 0." in line for line in lines[:3])
    assert {file: file.read_bytes() for file in before} == before
    assert len(list((tmp_path / "q").glob("panel-*.png"))) == 3
    # Each is decoded once, by whatever opens it, for two models and with panels.
    files = [tmp_path / "q/1.png", tmp_path / "q/0.png"]
    decoded = []
    prepare = ImageFile.ImageFile.load_prepare  # Pillow calls it where it decodes a file

    def counted(image):
        decoded.append(image.filename)
        prepare(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", counted)
    options = ["--workers", "0", "--out", "p", trained["S"], trained["R"], *files]
    assert len(succeed("localize.py", *options).splitlines()) == 5
    assert decoded == [str(file) for file in files]


def test_a_photo_that_cannot_be_read_is_skipped_and_every_other_is_told_whole(trained, tmp_path):
    """Also one whose name is not UTF-8, and one in which nothing is predicted; of a dataset's split
    it ends the run."""
    write_photos(tmp_path / "q")
    (tmp_path / "q/0b.jpg").write_bytes(b"damaged")
    (tmp_path / "q/film.mpg").write_bytes(b"no still image")
    os.rename(tmp_path / "q/1.png", tmp_path / "q/caf\udce9.png")
    checkpoint = load(trained["R"])
    for group in ("head", "torso", "bottom", "all"):
        checkpoint["ema"][f"heads.{group}.bias"].fill_(-9)
    torch.save(checkpoint, "sure.pt")
    names = [str(tmp_path / "q" / name) for name in ("0.png", "0b.jpg", "caf\udce9.png")]
    for models in ([trained["S"]], ["sure.pt", trained["none"]]):
        options = [*models, tmp_path / "q", "--json", "l.json", "--out", "p", "--workers", "1"]
        done = command("localize.py", *options)
        assert done.returncode == 1
        assert "drawings" in done.stderr  # what the tests' models were trained on
        assert "0b.jpg" in done.stderr
        results = read_json("l.json")
        for result in [results] if len(models) == 1 else results:
            assert list(result["skipped"]) == names[1:2]
            assert [photo["image"] for photo in result["photos"]] == [names[0], names[2]]
            assert {record["image"] for record in result["records"]} <= {names[0], names[2]}
            for photo in result["photos"]:
                assert list(photo["probabilities"]) == ATTRIBUTES
                predicted = {a for a, p in photo["probabilities"].items() if p > 0.5}
                records = [r for r in result["records"] if r["image"] == photo["image"]]
                assert {record["attribute"] for record in records} == predicted
        assert len(list(Path("p").glob("panel-*.png"))) == 2
    assert results[0]["records"] == []
    assert "0.png: nothing\n" in done.stdout


def test_an_interrupt_keeps_what_was_found_of_photos(trained, tmp_path, monkeypatch):
    write_photos(tmp_path / "q")
    add_image, kept = localize.add_image, []

    def interrupted(run, image, *arguments):
        kept.append(image)
        if len(kept) == 2:
            raise KeyboardInterrupt
        return add_image(run, image, *arguments)

    monkeypatch.setattr(localize, "add_image", interrupted)
    options = ["--json", "l.json", "--panels", "0"]
    done = command("localize.py", trained["S"], tmp_path / "q", *options)
    assert done.returncode == 130
    assert [photo["image"] for photo in read_json("l.json")["photos"]] == kept[:1]
    assert str(kept[0]) in done.stdout
