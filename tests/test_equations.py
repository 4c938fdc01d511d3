"""The paper's equations and tables of Section 3, in its order, against slow and obvious references.

Each test states its equation and computes it with loops over images, attributes, points and pixels.
Shapes: B images, C channels, H x W a map, L attributes, M offset points; points are (x, y).
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import sspnet
from localize import pearson
from sspnet import (
    AFSS,
    GROUPS,
    KEYPOINT_GROUPS,
    PLE_K,
    PLE_R,
    PLE_S,
    Baseline,
    SSPNet,
    box_iou,
    grad_cam,
    grad_cam_p,
    heatmap_to_box,
    response_maps,
)

ATTRIBUTE_GROUPS = ["torso", "head", "all", "bottom", "head"]
TAB_A11 = {  # half-open rows at P1, P2, P3, whose heights are 64, 32, 16
    "head": [(0, 24), (0, 12), (0, 6)],
    "torso": [(8, 40), (4, 20), (2, 10)],
    "bottom": [(32, 64), (16, 32), (8, 16)],
    "all": [(0, 64), (0, 32), (0, 16)],
}


def value_at(x, px, py):
    """Bilinear interpolation of x (C, H, W) at one point, from its four pixels, zero outside."""
    value = torch.zeros(len(x), dtype=x.dtype)
    for row in (math.floor(py), math.floor(py) + 1):
        for column in (math.floor(px), math.floor(px) + 1):
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                share = (1 - abs(px - column)) * (1 - abs(py - row))
                value = value + share * x[:, row, column]
    return value


def offset_sampling_at(module, x, px, py):
    """A sum_m W_m x(P + dP_m) for one point of x (C, H, W), with the module's parameters."""
    M = module.M
    predicted = module.predict.weight @ value_at(x, px, py) + module.predict.bias
    offsets, scores = predicted[: 2 * M].reshape(M, 2), predicted[2 * M :].exp()
    total = torch.zeros(len(x), dtype=x.dtype)
    for m in range(M):
        dx, dy = offsets[m].tolist()
        W = scores[m] / scores.sum()
        total = total + W * value_at(x, px + dx, py + dy)
    return module.A.weight @ total


def randomized(module, seed=0):
    """The module in float64, with every parameter random: its start would hide terms."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double()


@pytest.mark.parametrize("ple", ["S", "none"])
def test_eq02_eq13_grad_cam_p(ple):
    """Eq. 2 and 13: A_c(X) = ReLU(sum_k da_j/dA^k(x, y) A^k(x, y)) on the map of attribute j."""
    torch.manual_seed(2)
    model = Baseline(ATTRIBUTE_GROUPS, "resnet18").eval()
    if ple == "S":
        model = SSPNet(ATTRIBUTE_GROUPS, "S", "resnet18", channels=4).eval()
        model.afss.scales = [1, 0, 2, 1, 0]
    images = torch.randn(2, 3, 64, 48)
    _, responses = response_maps(model, images, [4, 0, 2])
    assert list(responses) == [4, 0, 2]
    for j, response in responses.items():
        for b in range(2):
            maps = model.features(images[b : b + 1])
            A = maps[model.map_of(j)]
            A.retain_grad()
            model.attribute_logits(maps)[j].sum().backward()
            expected = torch.zeros(A.shape[2:])
            for k in range(A.shape[1]):
                for y in range(A.shape[2]):
                    for x in range(A.shape[3]):
                        expected[y, x] += A.grad[0, k, y, x].item() * A[0, k, y, x].item()
            assert_close(response[b], expected.clamp(min=0), atol=1e-6, rtol=1e-4)


def test_sec_3_2_5_grad_cam_weighs_channels_where_grad_cam_p_weighs_pixels():
    """Sec. 3.2.5: the original Grad-CAM takes the mean of each channel's gradient as its weight."""
    torch.manual_seed(3)
    A, gradient = torch.randn(1, 3, 4, 5), torch.randn(1, 3, 4, 5)
    expected = sum(gradient[0, k].mean() * A[0, k] for k in range(3)).clamp(min=0)
    assert_close(grad_cam(A, gradient)[0], expected)
    # The reason for Eq. 13: a channel that matters at one pixel alone answers there alone.
    A, gradient = torch.ones(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    gradient[0, 0, 1, 1] = 1
    assert (grad_cam_p(A, gradient) > 0).sum() == 1
    assert (grad_cam(A, gradient) > 0).sum() == 9


def test_eq03_the_box_encloses_all_foreground():
    """Eq. 3: b = f_orm(A_c(X)), the outer rectangle of the binary mask."""
    torch.manual_seed(4)
    for _ in range(20):
        heat = torch.rand(7, 9)
        heat[3, 5] = 0.9  # a value at the threshold is foreground
        xs = [x for y in range(7) for x in range(9) if heat[y, x] >= 0.9]
        ys = [y for y in range(7) for x in range(9) if heat[y, x] >= 0.9]
        expected = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
        assert heatmap_to_box(heat, heat[3, 5].item()) == expected
    assert heatmap_to_box(torch.zeros(3, 3)) is None


@pytest.mark.parametrize("mode", ["group", "attribute"])
def test_eq04_afss_takes_the_scale_with_the_highest_mA(mode):
    """Eq. 4: x* = argmax_x mA(f_A(x), Y) over P1, P2, P3, per group (or attribute: AFSS*)."""
    torch.manual_seed(5)
    afss = AFSS(ATTRIBUTE_GROUPS, mode)
    logits, labels = torch.randn(3, 60, 5), (torch.rand(60, 5) < 0.4).float()
    for i in range(0, 60, 20):  # three batches of one epoch
        afss.update(logits[:, i : i + 20], labels[i : i + 20])
    label_mA = [[], [], []]  # by scale and attribute
    for s in range(3):
        for j in range(5):
            true = [i for i in range(60) if labels[i, j] == 1]
            false = [i for i in range(60) if labels[i, j] == 0]
            hits = sum(logits[s, i, j] > 0 for i in true) / len(true)
            rejections = sum(logits[s, i, j] <= 0 for i in false) / len(false)
            label_mA[s].append((hits + rejections).item() / 2)
    returned = afss.select()
    assert_close(returned, torch.tensor(label_mA, dtype=torch.float64), atol=1e-6, rtol=0)
    for j, group in enumerate(ATTRIBUTE_GROUPS):
        alike = [k for k in range(5) if k == j or mode == "group" and ATTRIBUTE_GROUPS[k] == group]
        mean = [sum(label_mA[s][k] for k in alike) / len(alike) for s in range(3)]
        assert afss.scales[j] == mean.index(max(mean))


def test_eq05_ple_r_crops_the_groups_rows():
    """Eq. 5: F_g = Psi_agr(Phi_reg(x_g*, R_g)), with R_g the rows of Tab. A.11."""
    x = torch.arange(2 * 16 * 3.0).reshape(1, 2, 16, 3)
    for group in GROUPS:
        region = PLE_R()(x, group)
        top, bottom = TAB_A11[group][2]
        assert_close(region, torch.stack([x[:, :, row] for row in range(top, bottom)], 2))


@pytest.mark.parametrize("shape, parts", [((2, 3, 5, 4), 2), ((2, 3, 9), 4)])
def test_eq05_eq07_eq09_pyramid_pool(shape, parts):
    """Psi_agr: the maximum over the whole and over its parts, which overlap where sizes are odd."""
    torch.manual_seed(6)
    x = torch.randn(shape)

    def runs(size):
        """The runs of indices of one axis."""
        bounds = [(k * size / parts, (k + 1) * size / parts) for k in range(parts)]
        return [list(range(math.floor(low), math.ceil(high))) for low, high in bounds]

    cells = []
    for last in runs(shape[-1]) if len(shape) == 3 else runs(shape[2]):
        if len(shape) == 3:
            cells.append(x[:, :, last].amax(2))
            continue
        for columns in runs(shape[3]):
            cells.append(x[:, :, last][:, :, :, columns].amax((2, 3)))
    whole = x.flatten(2).amax(2)
    expected = torch.cat([whole, torch.stack(cells, 2).flatten(1)], 1)
    assert_close(sspnet.pyramid_pool(x), expected)


def test_eq06_eq08_bilinear_sample():
    """x(P) of Eq. 6 and 8: bilinear interpolation, summed over m with the weights W_m."""
    torch.manual_seed(7)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    points = torch.rand(2, 6, 2, 2, dtype=torch.float64) * 8 - 2  # also outside the map
    points[0, 0] = torch.tensor([[3.0, 4.0], [-1.0, 2.0]])  # and on pixels
    weights = torch.rand(2, 6, 2, dtype=torch.float64)
    expected = torch.zeros(2, 6, 3, dtype=torch.float64)
    for b in range(2):
        for n in range(6):
            for m in range(2):
                expected[b, n] += weights[b, n, m] * value_at(x[b], *points[b, n, m].tolist())
    inputs = [tensor.requires_grad_() for tensor in (x, points, weights)]
    found = sspnet.bilinear_sample(*inputs)
    assert_close(found, expected)
    # And torch's own operation, whose points run from -1 to 1; on pixels its gradient jumps, too.
    place = (2 * points + 1) / torch.tensor([4, 5]) - 1
    sampled = F.grid_sample(x, place, align_corners=False)  # (B, C, N, M)
    expected = (sampled * weights[:, None]).sum(3).transpose(1, 2)
    assert_close(found, expected, atol=1e-12, rtol=0)
    upstream, off = torch.randn(2, 6, 3, dtype=torch.float64), torch.ones(2, 6, 1).double()
    off[0, 0] = 0
    gradients = [torch.autograd.grad(out, inputs, upstream * off) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert_close(one, other, atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("M", [1, 3, 4])
def test_eq06_eq08_offset_sampling(M):
    """Eq. 6 and 8: Phi(x, P_n) = sum_m A_m W_m x(P_n + dP_m), with one A for all m."""
    module = randomized(sspnet.OffsetSampling(4, M))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    points = torch.rand(2, 7, 2, dtype=torch.float64) * 6 - 0.5
    found = module(x, points)
    for b in range(2):
        for n in range(7):
            assert_close(found[b, n], offset_sampling_at(module, x[b], *points[b, n].tolist()))


@torch.no_grad()
def test_eq06_eq07_ple_k_samples_the_groups_keypoints():
    """Eq. 6: Phi_kpt(x_g*, P_n^K) at the keypoints of Tab. A.12, in index order."""
    ple = randomized(PLE_K(4, 3))
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    keypoints = torch.rand(2, 16, 2, dtype=torch.float64) * 5
    for group in GROUPS:
        feature = ple(x, group, keypoints)
        assert feature.shape == (2, 4, len(KEYPOINT_GROUPS[group]))
        for b in range(2):
            for k, n in enumerate(KEYPOINT_GROUPS[group]):
                expected = offset_sampling_at(ple.sample, x[b], *keypoints[b, n].tolist())
                assert_close(feature[b, :, k], expected)


def test_sec_3_2_3_simcc_classifies_columns_and_rows():
    """SimCC: cross-entropy with Gaussians around each point; its decoding and confidence."""
    torch.manual_seed(13)
    # 6x8 pixels, and 10 more on each side.
    x, y = torch.randn(2, 16, 52).double(), torch.randn(2, 16, 56).double()
    points = torch.rand(2, 16, 2).double() * torch.tensor([25, 27]) - 10
    points[0, 0, 0], points[0, 1, 1] = -12, 19  # outside: neither counts
    points[1] = math.nan  # nobody: every bin is as likely
    total, count = 0.0, 0
    for b in range(2):
        for k in range(16):
            if b == 0 and k < 2:
                continue
            count += 1
            for axis, logits in enumerate((x[b, k], y[b, k])):
                bins = [0.5 * n - 10.25 for n in range(len(logits))]  # where bins are, in pixels
                place = points[b, k, axis].item()
                weights = [1.0 if b else math.exp(-((n - place) ** 2) / 8) for n in bins]
                total_exp = sum(math.exp(value) for value in logits.tolist())
                for weight, logit in zip(weights, logits.tolist(), strict=True):
                    probability = math.exp(logit) / total_exp
                    total -= weight / sum(weights) * math.log(probability)
    assert sspnet.simcc_loss(x, y, points).item() == pytest.approx(total / count)
    x, y = torch.randn(1, 16, 232).double(), torch.randn(1, 16, 296).double() * 5
    found, confidence = sspnet.simcc_decode(x, y)
    for k in range(16):
        near = 1.0
        for axis, logits in enumerate((x[0, k], y[0, k])):
            exps = [math.exp(value) for value in logits.tolist()]
            bins = [0.5 * n - 10.25 for n in range(len(exps))]
            likeliest = bins[exps.index(max(exps))]
            inside = [(e, n) for e, n in zip(exps, bins, strict=True) if abs(n - likeliest) <= 10]
            place = sum(e * n for e, n in inside) / sum(e for e, _ in inside)
            assert found[0, k, axis].item() == pytest.approx(place)
            near *= sum(e for e, _ in inside) / sum(exps)
        assert confidence[0, k].item() == pytest.approx(near)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.25, 0.75, 1.0])
def test_eq08_eq09_ple_s_samples_a_uniform_grid_over_the_region(ratio):
    """Eq. 8: Phi_sps(x_g*, P_n^S), the points evenly spaced and centred in the prior region."""
    ple = randomized(PLE_S(4, 3, ratio))
    x = torch.randn(1, 4, 16, 6, dtype=torch.float64)
    for group in GROUPS:
        feature = ple(x, group)
        top, bottom = TAB_A11[group][2]
        rows, columns = round((bottom - top) * ratio**0.5), round(6 * ratio**0.5)
        assert feature.shape == (1, 4, rows, columns)
        for i in range(rows):
            for j in range(columns):
                py = top + (i + 0.5) * (bottom - top) / rows - 0.5
                px = (j + 0.5) * 6 / columns - 0.5
                expected = offset_sampling_at(ple.sample, x[0], px, py)
                assert_close(feature[0, :, i, j], expected, atol=1e-5, rtol=1e-5)


def loss_by_terms(logits, labels, ratio):
    """Eq. 10 with the weights of Eq. 11 and the minus sign that Eq. 10 lacks, for (B, L)."""
    total = 0.0
    for i in range(len(labels)):
        for j in range(labels.shape[1]):
            a, y, r = logits[i, j].item(), labels[i, j].item(), ratio[j].item()
            probability = 1 / (1 + math.exp(-a))
            weight = math.exp(1 - r) if y == 1 else math.exp(r)
            total -= weight * (y * math.log(probability) + (1 - y) * math.log(1 - probability))
    return total / len(labels)


def test_eq10_weighted_bce():
    """Eq. 10: Loss = -1/N sum_i sum_j w_j (Y_ij log s(a_ij) + (1 - Y_ij) log(1 - s(a_ij)))."""
    torch.manual_seed(8)
    logits, ratio = torch.randn(6, 5).double(), torch.rand(5).double()
    labels = (torch.rand(6, 5) < 0.4).double()
    expected = loss_by_terms(logits, labels, ratio)
    assert sspnet.weighted_bce(logits, labels, ratio).sum().item() == pytest.approx(expected)


def test_eq11_imbalance_weights():
    """Eq. 11: w_j = e^(1 - r_j) for a positive label, e^(r_j) for a negative one."""
    weights = sspnet.imbalance_weights(torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([0.1, 0.7]))
    expected = [[math.exp(0.9), math.exp(0.3)], [math.exp(0.1), math.exp(0.7)]]
    assert_close(weights, torch.tensor(expected))


def test_eq12_hierarchical_loss():
    """Eq. 12: Loss_total = sum_g Loss_g; AFSS's three scales are averaged."""
    torch.manual_seed(9)
    groups = ["torso", "head", "all", "torso"]  # no bottom attribute
    logits, ratio = torch.randn(3, 6, 4).double(), torch.rand(4).double()
    labels = (torch.rand(6, 4) < 0.4).double()
    by_scale = [0.0, 0.0, 0.0]
    for s in range(3):
        for group in set(groups):
            members = [j for j in range(4) if groups[j] == group]
            by_scale[s] += loss_by_terms(logits[s][:, members], labels[:, members], ratio[members])
    loss = sspnet.HierarchicalLoss(groups, ratio)
    assert loss(logits, labels).item() == pytest.approx(sum(by_scale) / 3)
    assert loss(logits[0], labels).item() == pytest.approx(by_scale[0])


def test_eq14_mean_accuracy():
    """Eq. 14: mA = 1/2L sum_i (TP_i / P_i + TN_i / N_i), L for the paper's divisor N."""
    torch.manual_seed(10)
    logits, labels = torch.randn(40, 7), (torch.rand(40, 7) < 0.3).float()
    logits[0, 0], labels[0, 0] = 0, 0  # a logit of 0 is no positive
    labels[:, 2] = 0  # without a positive: undefined, left out of the mean
    terms = []
    for j in range(7):
        TP = sum(logits[i, j] > 0 and labels[i, j] == 1 for i in range(40))
        TN = sum(logits[i, j] <= 0 and labels[i, j] == 0 for i in range(40))
        P = sum(labels[i, j].item() for i in range(40))
        terms.append((TP / P + TN / (40 - P)).item() / 2 if P else math.nan)
    found = sspnet.mean_accuracy(sspnet.label_counts(logits, labels))
    assert_close(found.float(), torch.tensor(terms), equal_nan=True)
    defined = [term for term in terms if not math.isnan(term)]
    assert found.nanmean().item() == pytest.approx(sum(defined) / 6, rel=1e-6)


def test_tab10_iou():
    """Tab. 10: pixels in both boxes over pixels in either."""
    rng = np.random.default_rng(11)
    for _ in range(50):
        boxes = []
        for _ in range(2):
            left, right = sorted(rng.choice(13, 2, replace=False))
            top, bottom = sorted(rng.choice(11, 2, replace=False))
            boxes.append((left, top, right, bottom))
        pixels = []
        for left, top, right, bottom in boxes:
            pixels.append({(x, y) for x in range(left, right) for y in range(top, bottom)})
        a, b = pixels
        assert box_iou(*boxes) == pytest.approx(len(a & b) / len(a | b))
    assert box_iou(None, boxes[0]) == 0
    assert box_iou((3, 3, 3, 3), (3, 3, 3, 3)) == 0


def test_tab10_pcc():
    """Tab. 10: cov(x, y) / (std(x) std(y)), undefined for a constant side."""
    rng = np.random.default_rng(12)
    x = rng.random(30)
    y = 0.3 * x + rng.random(30)
    mean_x, mean_y = sum(x) / 30, sum(y) / 30
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / 30
    deviation_x = math.sqrt(sum((a - mean_x) ** 2 for a in x) / 30)
    deviation_y = math.sqrt(sum((b - mean_y) ** 2 for b in y) / 30)
    assert pearson(x, y) == pytest.approx(covariance / deviation_x / deviation_y)
    assert math.isnan(pearson([1, 1], [1, 2]))
    assert math.isnan(pearson([1], [2]))


@pytest.mark.parametrize("group", GROUPS)
def test_tab_a11_prior_regions(group):
    """Tab. A.11: each group's rows at the heights of P1, P2 and P3."""
    assert [sspnet.prior_region(group, height) for height in (64, 32, 16)] == TAB_A11[group]


def test_tab_a12_keypoint_groups():
    """Tab. A.12: head(7-9), shoulder(12, 13), arms(10-15), hip(2, 3, 6), legs(0-5), body(0-15)."""
    expected = {
        "head": {7, 8, 9} | {12, 13},
        "torso": {12, 13} | {10, 11, 12, 13, 14, 15} | {2, 3, 6},
        "bottom": {2, 3, 6} | {0, 1, 2, 3, 4, 5},
        "all": set(range(16)),
    }
    for group in GROUPS:
        assert KEYPOINT_GROUPS[group] == sorted(expected[group])
