"""Eq. 2, 3 and 13, IoU and correlation against slow references."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from localize import box_iou, box_of, chosen_attributes, grad_cam, grad_cam_p, heat_map, heatmaps, panel, pearson
from sspnet import Baseline, SSPNet

GROUPS = ["torso", "head", "all", "bottom", "head"]


def random_model(ple):
    torch.manual_seed(0)
    if ple == "none":
        return Baseline(GROUPS, "resnet18").eval()
    model = SSPNet(GROUPS, ple, "resnet18", channels=8).eval()
    model.afss.selection[:] = torch.tensor([1, 0, 2, 1, 0])
    return model


@pytest.mark.parametrize("ple", ["none", "R", "K", "S"])
def test_eq13_grad_cam_p_matches_loops_over_images_attributes_pixels_and_channels(ple):
    model = random_model(ple)
    images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
    attributes = [4, 0, 2]
    logits, responses = heatmaps(model, images, attributes, keypoints)
    with torch.no_grad():
        assert_close(logits, model(images, keypoints))
    for b in range(2):
        for j, response in zip(attributes, responses):
            maps = [None if m is None else m.detach().requires_grad_() for m in model.features(images[b : b + 1])]
            A = maps[model.map_of(j)]
            model.classify(maps, keypoints[b : b + 1])[0, j].backward()
            for y in range(A.shape[2]):
                for x in range(A.shape[3]):
                    total = sum(A.grad[0, k, y, x].item() * A[0, k, y, x].item() for k in range(A.shape[1]))
                    assert response[b, y, x].item() == pytest.approx(max(0, total), abs=1e-5)


def test_original_grad_cam_weights_channels_by_their_mean_gradient():
    torch.manual_seed(1)
    A, G = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for b in range(2):
        total = sum(G[b, k].mean() * A[b, k] for k in range(3))
        assert_close(grad_cam(A, G)[b], total.clamp(min=0))
    # Eq. 13's reason: a channel that matters only at one pixel answers there alone with weights per pixel.
    A, G = torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    G[0, 0, 1, 1] = 1
    assert (grad_cam_p(A, G) > 0).sum() == 1 and (grad_cam(A, G) > 0).sum() == 9


def test_eq02_the_head_regions_map_answers_in_the_head_region_alone():
    model = random_model("R")
    _, (response,) = heatmaps(model, torch.randn(2, 3, 64, 48), [1])  # a head attribute, at P1: rows 0..6 of 16
    assert response.shape == (2, 16, 12) and response[:, 6:].abs().sum() == 0 and response[:, :6].sum() > 0


def test_one_forward_of_the_backbone_serves_all_attributes():
    model, calls = random_model("S"), []
    model.backbone.register_forward_hook(lambda *_: calls.append(1))
    _, responses = heatmaps(model, torch.randn(2, 3, 64, 48), range(5))
    assert len(calls) == 1 and len(responses) == 5
    assert all(p.grad is None for p in model.parameters())


def test_heat_map_lies_where_the_maps_pixels_look():
    response = torch.tensor([[0.0, 0, 4], [0, 0, 0]])
    heat = heat_map(response, 4, False, (8, 12), (8, 12))  # pixel k at image pixel 4 k
    assert heat.max() == 1 and heat[0, 8] == 1
    assert_close(heat[0], torch.tensor([0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]))
    heat = heat_map(response, 4, True, (8, 12), (8, 12))  # at the middle of pixels 4 k .. 4 k + 3
    assert_close(heat[0], torch.tensor([0, 0, 0, 0, 0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1]))
    assert heat_map(torch.zeros(2, 3), 4, False, (8, 12), (16, 30)).sum() == 0


def test_heat_map_of_a_resized_image_aligns_edges():
    response = torch.zeros(4, 4)
    response[1, 2] = 1
    heat = heat_map(response, 1, False, (4, 4), (12, 20))  # pixel (2, 1) covers 10..14 x 3..5 of the image
    y, x = divmod(heat.argmax().item(), 20)
    assert 10 <= x <= 14 and 3 <= y <= 5


def test_eq03_box_is_the_outer_rectangle_of_all_foreground():
    torch.manual_seed(2)
    for _ in range(20):
        heat = torch.rand(7, 9)
        found = [(x, y) for y in range(7) for x in range(9) if heat[y, x] >= 0.9]
        expected = None
        if found:
            xs, ys = [x for x, _ in found], [y for _, y in found]
            expected = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        assert box_of(heat, 0.9) == expected
    assert box_of(torch.zeros(3, 3)) is None


def test_iou_matches_counting_pixels():
    random = np.random.default_rng(3)
    for _ in range(50):
        boxes = []
        for _ in range(2):
            left, right = sorted(random.choice(13, 2, replace=False))
            top, bottom = sorted(random.choice(11, 2, replace=False))
            boxes.append((left, top, right, bottom))
        pixels = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in boxes]
        assert box_iou(*boxes) == pytest.approx(len(pixels[0] & pixels[1]) / len(pixels[0] | pixels[1]))
    assert box_iou(None, boxes[0]) == 0 and box_iou(boxes[0], boxes[0]) == 1


def test_pearson_matches_the_definition():
    random = np.random.default_rng(4)
    x = random.random(30)
    y = 0.3 * x + random.random(30)
    mean = lambda v: sum(v) / len(v)
    covariance = mean([(a - mean(x)) * (b - mean(y)) for a, b in zip(x, y)])
    deviation = [math.sqrt(mean([(a - mean(v)) ** 2 for a in v])) for v in (x, y)]
    assert pearson(x, y) == pytest.approx(covariance / deviation[0] / deviation[1])
    assert pearson([1, 2], [3, 5]) == pytest.approx(1) and pearson([1, 2, 3], [2, 1, 0]) == pytest.approx(-1)
    assert math.isnan(pearson([1], [2])) and math.isnan(pearson([1, 1], [1, 2]))


def test_panel_draws_both_boxes():
    image = np.full((64, 48, 3), 128, np.uint8)
    picture = np.asarray(panel(image, [("Hat", torch.zeros(64, 48), (10, 10, 30, 30), (5, 5, 20, 40))], width=48))
    assert (picture == [255, 0, 0]).all(2).any() and (picture == [0, 220, 0]).all(2).any()
    assert picture.shape[1] == 48 + 4 + 48


def test_chosen_attributes():
    assert chosen_attributes(None, ["Hat", "boots"]) == [0, 1]
    assert chosen_attributes(["Boots"], ["Hat", "boots"]) == [1]
    with pytest.raises(ValueError, match="--attributes Wig: expected some of Hat, boots"):
        chosen_attributes(["Wig"], ["Hat", "boots"])
