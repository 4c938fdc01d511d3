"""Boxes of a split, panels, and the choice of attributes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import random_model

from data import Pedestrians, Split, loader, synthetic
from localize import (
    TILE,
    box_iou,
    chosen_attributes,
    find_boxes,
    heat_size,
    heatmap_to_box,
    make_record,
    panel,
    panel_files,
    response_maps,
    tile_size,
    to_image,
)


def test_panel_draws_both_boxes():
    image = torch.full((3, 64, 48), 128, dtype=torch.uint8)
    record = {"heat": np.zeros(tile_size((64, 48))), "boxes": [(10, 10, 30, 30)]}
    tiles = [
        ("Hat", {**record, "true_box": (5, 5, 20, 40)}),
        ("Boots", {**record, "true_box": None}),
    ]
    pixels = np.asarray(panel(image, [tiles, tiles[:1]]))
    first, second = pixels[:, TILE + 4 : 2 * TILE + 4], pixels[:, 2 * (TILE + 4) :]
    for part, truth in ((first, True), (second, False)):
        assert (part == [255, 0, 0]).all(2).any()
        assert (part == [0, 220, 0]).all(2).any() == truth
    assert pixels.shape[1] == 3 * TILE + 8


def test_chosen_attributes():
    assert chosen_attributes(None, ["Hat", "boots"]) == [0, 1]
    assert chosen_attributes(["Boots"], ["Hat", "boots"]) == [1]
    with pytest.raises(ValueError, match="--attributes Wig: expected some of Hat, boots"):
        chosen_attributes(["Wig"], ["Hat", "boots"])


def test_panel_files_are_unique():
    files = panel_files(["x.jpg", "x.bmp", "1-x.jpg", "a/x.png"])
    assert len(set(files)) == 4
    assert files[0] == "x.png"


def test_tiles_of_odd_images_are_bounded():
    for size in ((5000, 2), (2, 5000), (9000, 9000)):
        height, width = tile_size(size)
        assert 1 <= width <= TILE
        assert 1 <= height <= 4 * TILE


def test_a_record_has_the_boxes_of_the_outputs_that_stand_for_its_attribute():
    """Of several outputs the one with the highest logit on the image; boxes in image pixels."""
    model = random_model("R").eval()
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.3)
    drawn = synthetic("train", count=6, size=(96, 72))
    attributes, groups = ["one", "two"], ["torso", "head"]
    labels, boxes = drawn.labels[:, :2], np.full((6, 2, 4), np.nan, np.float32)
    boxes[2, 1] = 5, 10, 30, 40
    split = Split("t", attributes, groups, drawn.names, drawn.images, labels, boxes=boxes)
    first = Pedestrians(split, (64, 48))[0][0]
    logits = model(first[None])[0].tolist()
    output_indices = [sorted(pair, key=logits.__getitem__) for pair in ([3, 0], [1, 4])]
    args = SimpleNamespace(device="cpu", cam="grad-cam-p", threshold=[0.3, 0.6], attributes=["all"])
    batches = loader(split, (64, 48), 4)
    probabilities, records = find_boxes(model, split, output_indices, batches, [0, 1], args)
    assert len(records) == 12
    chosen = set()
    for record in records:
        i, k = record["image"], record["attribute"]
        image, _, keypoints, _ = Pedestrians(split, (64, 48))[i]
        logits, responses = response_maps(model, image[None], range(5), keypoints[None])
        j = max(output_indices[k], key=lambda j: logits[0, j].item())
        chosen.add((k, output_indices[k].index(j)))
        stride = model.strides[model.map_of(j)]
        heat = to_image(responses[j][0], stride, False, (64, 48), (96, 72))
        for threshold, box in zip(args.threshold, record["boxes"], strict=True):
            assert box == pytest.approx(heatmap_to_box(heat, threshold))
        assert record["probability"] == pytest.approx(logits[0, j].sigmoid().item(), abs=1e-5)
        assert probabilities[i, k] == pytest.approx(record["probability"])
        assert record["true_box"] == ([5, 10, 30, 40] if (i, k) == (2, 1) else None)
        if record["true_box"]:
            expected = [box_iou(box, (5, 10, 30, 40)) for box in record["boxes"]]
            assert record["IoU"] == pytest.approx(expected)
    assert (0, 1) in chosen  # the higher output was not the first


def test_a_large_images_box_is_in_its_own_pixels():
    heat = torch.zeros(heat_size((2048, 1024)))
    assert heat.shape == (1024, 512)
    heat[100:200, 50:80] = 1
    record = make_record(heat, (2048, 1024), [100, 200, 160, 400], [0.5])
    assert record["boxes"] == [[100, 200, 160, 400]]
    assert record["IoU"] == [1.0]
