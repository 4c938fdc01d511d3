"""Panels and the choice of attributes."""

import numpy as np
import pytest
import torch

from localize import TILE, chosen_attributes, panel, panel_files, tile_size


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
