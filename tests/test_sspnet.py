"""Each equation and table of Sec. 3 against a slow, obvious reference."""

import math

import pytest
import torch
from torch.testing import assert_close

import sspnet
from data import PA100K_GROUPS
from evaluate import TAB_3_SCALES
from sspnet import (AFSS, FPN, GROUPS, KEYPOINT_GROUPS, PLE_K, PLE_R, PLE_S, Backbone, Baseline, HierarchicalLoss,
                    OffsetSampling, SSPNet, bilinear_sample, enlarge, image_to_map, imbalance_weights, label_counts, mean_accuracy,
                    prior_region, pyramid_pool, weighted_bce)

PA100K = list(PA100K_GROUPS.values())


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def sample_pixel(x, px, py):
    """Bilinear interpolation of one image x (C, H, W) at one point, by the four pixels around it."""
    C, H, W = x.shape
    value = x.new_zeros(C)
    for row in range(H):
        for column in range(W):
            share = max(0, 1 - abs(px - column)) * max(0, 1 - abs(py - row))
            value = value + share * x[:, row, column]
    return value


# ---- sampling ----


def test_bilinear_sample_matches_loops_also_outside_the_map():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    points = torch.rand(2, 6, 2, 2, dtype=torch.float64) * 8 - 2
    weights = torch.rand(2, 6, 2, dtype=torch.float64)
    expected = torch.stack([torch.stack([sum(weights[b, n, m] * sample_pixel(x[b], *points[b, n, m].tolist()) for m in range(2))
                                         for n in range(6)]) for b in range(2)])
    assert_close(bilinear_sample(x, points, weights), expected)


def test_bilinear_sample_at_pixel_centres_is_the_pixel_and_far_away_is_zero():
    x = torch.arange(12.0).reshape(1, 1, 3, 4)
    points = torch.tensor([[0.0, 0.0], [3, 2], [1, 2], [-1, 0], [4, 1], [1e6, -1e6]]).reshape(1, 6, 1, 2)
    assert_close(bilinear_sample(x, points)[0, :, 0], torch.tensor([0.0, 11, 9, 0, 0, 0]))


def test_bilinear_sample_agrees_with_grid_sample():
    torch.manual_seed(1)
    x, points = torch.randn(2, 8, 16, 12), torch.rand(2, 30, 3, 2) * 20 - 4
    grid = (2 * points + 1) / torch.tensor([12.0, 16.0]) - 1
    expected = torch.nn.functional.grid_sample(x, grid, align_corners=False).permute(0, 2, 3, 1).sum(2)
    assert_close(bilinear_sample(x, points), expected, atol=1e-5, rtol=1e-5)


def test_bilinear_sample_gradcheck():
    torch.manual_seed(2)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(2, 4, 2, 2, dtype=torch.float64) * 7 - 1.5).requires_grad_()
    weights = torch.rand(2, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(bilinear_sample, (x, points, weights))


@pytest.mark.parametrize("stride", [4, 8, 16])
def test_image_to_map_sends_where_a_pixel_looks_to_that_pixel(stride):
    k = torch.arange(5.0).repeat(2, 1).T
    assert_close(image_to_map(k * stride, stride), k)
    # Patches: map pixel k covers image pixels k s .. k s + s - 1, whose middle is at k s + (s - 1) / 2.
    assert_close(image_to_map(k * stride + (stride - 1) / 2, stride, centred=True), k)


# ---- Tab. A.11 and A.12 ----


TAB_A11 = {  # half-open rows at P1, P2, P3
    "head": [(0, 24), (0, 12), (0, 6)],
    "torso": [(8, 40), (4, 20), (2, 10)],
    "bottom": [(32, 64), (16, 32), (8, 16)],
    "all": [(0, 64), (0, 32), (0, 16)],
}


@pytest.mark.parametrize("group", GROUPS)
def test_tab_a11_prior_regions(group):
    assert [prior_region(group, height) for height in (64, 32, 16)] == TAB_A11[group]


def test_prior_region_keeps_a_row_on_tiny_maps():
    for group in GROUPS:
        for height in range(1, 9):
            top, bottom = prior_region(group, height)
            assert 0 <= top < bottom <= height


def test_tab_a11_attribute_groups():
    members = {g: {a for a, group in PA100K_GROUPS.items() if group == g} for g in GROUPS}
    assert members["head"] == {"Hat", "Glasses"}
    assert members["torso"] == {"ShortSleeve", "LongSleeve", "UpperStride", "UpperLogo", "UpperPlaid", "UpperSplice", "Backpack"}
    assert members["bottom"] == {"LowerStripe", "LowerPattern", "Trousers", "Shorts", "boots"}
    assert len(members["all"]) == 12 and sum(map(len, members.values())) == 26


def test_tab_a12_keypoint_groups():
    span = lambda a, b: set(range(a, b + 1))
    assert set(KEYPOINT_GROUPS["head"]) == span(7, 9) | {12, 13}
    assert set(KEYPOINT_GROUPS["torso"]) == {12, 13} | span(10, 15) | {2, 3, 6}
    assert set(KEYPOINT_GROUPS["bottom"]) == {2, 3, 6} | span(0, 5)
    assert set(KEYPOINT_GROUPS["all"]) == span(0, 15)
    assert all(list(points) == sorted(points) for points in KEYPOINT_GROUPS.values())


# ---- backbone, FPN and parameter counts (Tab. 3) ----


@pytest.mark.parametrize("name, millions", [("resnet50", 23.56), ("swin_s", 48.86)])
def test_tab03_baseline_parameters(name, millions):
    assert round(parameters(Baseline(PA100K, name)) / 1e6, 2) == millions


@pytest.mark.parametrize("ple, millions", [("S", 26.30), ("K", 26.27)])
def test_tab03_sspnet_parameters_within_one_percent(ple, millions):
    assert parameters(SSPNet(PA100K, ple, "resnet50")) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "swin_t"])
def test_backbone_taps_have_strides_4_to_32(name):
    backbone = Backbone(name).eval()
    maps = backbone(torch.zeros(1, 3, 128, 96))
    assert [tuple(m.shape[1:]) for m in maps] == [(c, 128 // s, 96 // s) for c, s in zip(backbone.out_channels, (4, 8, 16, 32))]


def test_backbone_weights_file(tmp_path):
    from torchvision.models import resnet18
    torch.manual_seed(3)
    net = resnet18()
    torch.save({k: v for k, v in net.state_dict().items() if not k.startswith("fc.")}, tmp_path / "w.pt")
    backbone = Backbone("resnet18", tmp_path / "w.pt")
    assert_close(backbone.stages[3][1].conv2.weight, net.layer4[1].conv2.weight)
    with pytest.raises(ValueError, match=r"w\.pt: layer1.0.conv1.weight is \[64, 64, 3, 3\], expected \[64, 64, 1, 1\]"):
        Backbone("resnet50", tmp_path / "w.pt")
    (tmp_path / "bad.pt").write_bytes(b"not weights")
    with pytest.raises(ValueError, match="bad.pt: not a readable state dict"):
        Backbone("resnet18", tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="backbone 'vgg'"):
        Backbone("vgg")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnets_map_pixels_look_at_image_pixel_stride_times_k(name):
    """With equal positive weights the gradient of map pixel k is symmetric about where it looks."""
    backbone = Backbone(name).double().eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
        if isinstance(module, torch.nn.MaxPool2d):  # ties at equal inputs: the mean has the same window
            backbone.stages[0][0][3] = torch.nn.AvgPool2d(module.kernel_size, module.stride, module.padding)
    images = torch.ones(1, 3, 640, 64, dtype=torch.float64, requires_grad=True)
    for stride, C in zip((4, 8, 16, 32), backbone(images)):
        k = 320 // stride
        (gradient,) = torch.autograd.grad(C[0, 0, k, C.shape[3] // 2], images, retain_graph=True)
        rows = gradient[0].sum((0, 2))
        assert (rows @ torch.arange(640.0, dtype=torch.float64) / rows.sum()).item() == pytest.approx(stride * k, abs=1e-6)


def reference_enlarge(x, H, W, factor, centred):
    """Each pixel of the result sampled where it lies in x (1, C, h, w), x's edge pixels held beyond its edges."""
    _, C, h, w = x.shape
    out = x.new_zeros(1, C, H, W)
    for i in range(H):
        for j in range(W):
            y, z = ((i + 0.5) / factor - 0.5, (j + 0.5) / factor - 0.5) if centred else (i / factor, j / factor)
            out[0, :, i, j] = sample_pixel(x[0], min(max(z, 0), w - 1), min(max(y, 0), h - 1))
    return out


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("h, w, factor", [(3, 2, 2), (2, 3, 4), (1, 1, 8)])
def test_enlarge_matches_loops(h, w, factor, centred):
    torch.manual_seed(3)
    x = torch.randn(1, 2, h, w, dtype=torch.float64)
    for H, W in ((h * factor, w * factor), (h * factor - factor + 1, w * factor - factor // 2)):
        assert_close(enlarge(x, (H, W), factor, centred), reference_enlarge(x, H, W, factor, centred))


@pytest.mark.parametrize("centred", [True, False])
def test_fpn_matches_the_definition_and_skips_what_is_not_asked_for(centred):
    torch.manual_seed(4)
    fpn = FPN([2, 3, 4, 5], channels=6, centred=centred).double()
    C = [torch.randn(1, c, 16 // s, 8 // s, dtype=torch.float64) for c, s in zip((2, 3, 4, 5), (1, 2, 4, 8))]
    with torch.no_grad():
        lateral = [conv(c) for conv, c in zip(fpn.laterals, C)]
        T3 = lateral[2] + reference_enlarge(lateral[3], 4, 2, 2, centred)
        T2 = lateral[1] + reference_enlarge(T3, 8, 4, 2, centred)
        T1 = lateral[0] + reference_enlarge(T2, 16, 8, 2, centred)
        expected = [conv(t) for conv, t in zip(fpn.smooth, (T1, T2, T3))]
        for found, wanted in zip(fpn(C), expected):
            assert_close(found, wanted)
        only = fpn([None, *C[1:]], scales={1})  # P2 needs no C2
    assert only[0] is None and only[2] is None
    assert_close(only[1], expected[1])


@torch.no_grad()
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("H, W", [(16, 8), (13, 7), (3, 2)])
def test_a_lazy_maps_rows_are_the_maps_rows(centred, H, W):
    """In whatever order rows are asked for, and nothing but those and the rows between is computed."""
    torch.manual_seed(4)
    fpn = FPN([2, 3, 4, 5], channels=6, centred=centred).double()
    size = lambda s: (-(-H // s), -(-W // s))
    C = [torch.randn(2, c, *size(s), dtype=torch.float64) for c, s in zip((2, 3, 4, 5), (1, 2, 4, 8))]
    whole = fpn(C)
    for finest, scales in ((0, {0, 1, 2}), (0, {0}), (1, {1, 2}), (2, {2})):
        for requests in ([(0, 1)], [(1, 2), (0, H)], [(2, 3), (0, 1), (1, 9)], [(-4, H + 5)], [(H - 1, H), (0, 1)]):
            lazy = fpn(C, scales, lazily=True)
            assert lazy[finest].shape == whole[finest].shape
            low, high = whole[finest].shape[2], 0
            for top, bottom in requests:
                top, bottom = max(0, min(top, whole[finest].shape[2] - 1)), max(1, min(bottom, whole[finest].shape[2]))
                low, high = min(low, top), max(high, bottom)
                x, first = lazy[finest].rows(top, bottom)
                assert first in (low, low - 1) and x.shape[2] <= high - low + 2
                assert_close(x[:, :, low - first : high - first], whole[finest][:, :, low:high])
            for i in scales - {finest}:
                assert_close(lazy[i].rows(0, whole[i].shape[2])[0], whole[i])


@pytest.mark.parametrize("ple, backbone, selection", [
    ("R", "resnet18", TAB_3_SCALES), ("K", "resnet18", TAB_3_SCALES), ("S", "resnet18", TAB_3_SCALES), ("S", "swin_t", TAB_3_SCALES),
    ("K", "resnet18", {"head": 1, "torso": 0, "bottom": 0, "all": 1}), ("S", "swin_t", {"head": 1, "torso": 0, "bottom": 0, "all": 1}),
    ("S", "resnet18", dict.fromkeys(GROUPS, 0))])
def test_reading_lazily_changes_no_logit_and_no_gradient(ple, backbone, selection):
    torch.manual_seed(0)
    model = SSPNet(list(PA100K_GROUPS.values()), ple, backbone, channels=16).train()
    model.afss.selection.copy_(torch.tensor([selection[g] for g in PA100K_GROUPS.values()]))
    model.afss.live = False
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d) or type(layer).__name__ == "StochasticDepth":
            layer.eval()
    if ple != "R":  # offsets that leave the region, the rows around it, and here and there the map
        torch.nn.init.normal_(model.ple.sample.offsets.weight, std=3)
    images, keypoints = torch.randn(2, 3, 96, 64), torch.rand(2, 16, 2) * torch.tensor([80, 110]) - 8
    found = []
    for lazily in (False, True):
        model.zero_grad()
        logits = model(images, keypoints)[0] if lazily else model.classify(model.features(images), keypoints)
        logits.square().sum().backward()
        found.append((logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (eager, eager_gradients), (lazy, lazy_gradients) = found
    assert_close(lazy, eager, atol=1e-5, rtol=1e-4)
    for name, gradient in eager_gradients.items():
        assert (gradient is None) == (lazy_gradients[name] is None), name
        if gradient is not None:
            assert_close(lazy_gradients[name], gradient, atol=1e-5 * gradient.abs().max().item() + 1e-7, rtol=1e-3, msg=lambda m: f"{name}: {m}")
    with torch.inference_mode():
        assert_close(model.eval()(images, keypoints), eager, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_fpn_passes_activations_through_at_about_unit_scale():
    torch.manual_seed(5)
    P = FPN([256, 512, 1024, 2048])([torch.randn(2, c, 64 // s, 48 // s) for c, s in zip((256, 512, 1024, 2048), (1, 2, 4, 8))])
    for p in P:
        assert 0.5 < p.std() < 2


# ---- AFSS (Eq. 4) and mean accuracy (Eq. 14) ----


def reference_mA(predicted, labels):
    """Eq. 14 with L for the divisor, and each attribute's term, by counting."""
    terms = []
    for j in range(labels.shape[1]):
        tp = sum(1 for p, y in zip(predicted[:, j].tolist(), labels[:, j].tolist()) if p and y)
        tn = sum(1 for p, y in zip(predicted[:, j].tolist(), labels[:, j].tolist()) if not p and not y)
        positives = sum(labels[:, j].tolist())
        negatives = len(labels) - positives
        terms.append((tp / positives + tn / negatives) / 2 if positives and negatives else math.nan)
    defined = [t for t in terms if t == t]
    return terms, sum(defined) / len(defined)


def test_eq14_mean_accuracy_matches_counting():
    torch.manual_seed(6)
    logits, labels = torch.randn(40, 7), (torch.rand(40, 7) < 0.3).float()
    labels[:, 2] = 0  # no positive: undefined, left out of the mean
    terms, mean = reference_mA(logits.sigmoid() > 0.5, labels)
    found = mean_accuracy(label_counts(logits, labels))
    assert_close(found, torch.tensor(terms, dtype=torch.float64), equal_nan=True)
    assert found.nanmean().item() == pytest.approx(mean)


def test_eq14_counts_add_up_over_batches_and_keep_leading_dimensions():
    torch.manual_seed(7)
    logits, labels = torch.randn(3, 20, 5), (torch.rand(20, 5) < 0.5).float()
    parts = sum(label_counts(logits[:, i : i + 5], labels[i : i + 5]) for i in range(0, 20, 5))
    assert_close(parts, label_counts(logits, labels))
    assert_close(parts[:, 1], label_counts(logits[1], labels))


def afss_with(mode, groups, seed=8, B=60):
    torch.manual_seed(seed)
    afss = AFSS(groups, mode)
    logits, labels = torch.randn(3, B, len(groups)), (torch.rand(B, len(groups)) < 0.5).float()
    for i in range(0, B, 20):
        afss.update(logits[:, i : i + 20], labels[i : i + 20])
    terms = [reference_mA(logits[s] > 0, labels)[0] for s in range(3)]
    return afss, terms


def test_eq04_afss_takes_each_groups_best_scale():
    groups = ["torso", "head", "all", "torso", "head", "bottom", "all"]
    afss, terms = afss_with("group", groups)
    returned = afss.select()
    assert_close(returned, torch.tensor(terms, dtype=torch.float64))
    for group in GROUPS:
        members = [j for j, g in enumerate(groups) if g == group]
        means = [sum(terms[s][j] for j in members) / len(members) for s in range(3)]
        assert [afss.scales()[j] for j in members] == [means.index(max(means))] * len(members)
    assert afss.counts.sum() == 0


def test_eq04_afss_star_takes_each_attributes_best_scale():
    afss, terms = afss_with("attribute", ["head"] * 3 + ["all"] * 2)
    afss.select()
    assert afss.scales() == [max(range(3), key=lambda s: terms[s][j]) for j in range(5)]


def test_eq04_afss_choice_follows_the_better_scale_when_it_changes():
    groups, labels = ["head", "all"], torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    afss = AFSS(groups)
    right, wrong = 2 * labels - 1, 1 - 2 * labels
    afss.update(torch.stack([right, wrong, wrong]), labels)
    afss.select()
    assert afss.scales() == [0, 0]
    mixed = torch.stack([right[:, 0], wrong[:, 1]], 1)  # P2 now good for head, P3 for all
    afss.update(torch.stack([wrong, mixed, -mixed]), labels)
    afss.select()
    assert afss.scales() == [1, 2]


def test_afss_keeps_its_choice_without_a_defined_mA_and_travels_in_the_state_dict():
    afss = AFSS(["head", "all"])
    afss.update(torch.randn(3, 4, 2), torch.ones(4, 2))
    assert afss.select().isnan().all() and afss.scales() == [1, 1]
    afss.selection[:] = torch.tensor([2, 0])
    other = AFSS(["head", "all"])
    assert other.scales() == [1, 1]
    other.load_state_dict(afss.state_dict())
    assert other.scales() == [2, 0]
    assert AFSS(["head", "all"], "P3").scales() == [2, 2]
    with pytest.raises(ValueError, match="AFSS mode 'P4'"):
        AFSS(["head"], "P4")


# ---- PLE (Eq. 5-9) ----


def test_eq05_ple_r_crops_the_groups_rows():
    x = torch.arange(2 * 16 * 3.0).reshape(1, 2, 16, 3)
    for group in GROUPS:
        top, bottom = TAB_A11[group][2]
        assert_close(PLE_R()(x, group), x[:, :, list(range(top, bottom))])
    assert PLE_R(prior=False)(x, "head").shape == x.shape


def reference_offset_sampling(module, x, points):
    """Eq. 6 and 8 point by point: A sum_m W_m x(P_n + dP_m)."""
    out = []
    for b in range(len(x)):
        row = []
        for px, py in points[b].tolist():
            feature = sample_pixel(x[b], px, py)
            offsets = (module.offsets.weight @ feature + module.offsets.bias).reshape(module.M, 2)
            scores = (module.offset_weights.weight @ feature + module.offset_weights.bias).exp()
            W = scores / scores.sum()
            total = sum(W[m] * sample_pixel(x[b], px + offsets[m, 0].item(), py + offsets[m, 1].item()) for m in range(module.M))
            row.append(module.A.weight @ total)
        out.append(torch.stack(row))
    return torch.stack(out)


def randomized(module, seed=9):
    torch.manual_seed(seed)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


@pytest.mark.parametrize("M, N", [(1, 7), (3, 7), (4, 7), (3, 40)])  # 40 points are more than the map's pixels: projected first
@torch.no_grad()
def test_eq06_offset_sampling_matches_loops(M, N):
    module = randomized(OffsetSampling(4, M).double())
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    points = torch.rand(2, N, 2, dtype=torch.float64) * 6 - 0.5
    assert_close(module(x, points), reference_offset_sampling(module, x, points))


@pytest.mark.parametrize("N", [3, 17])
def test_eq06_offset_sampling_gradcheck(N):
    module = randomized(OffsetSampling(3, 2).double())
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(1, N, 2, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(module, (x, points))


@torch.no_grad()
def test_offset_points_start_evenly_around_the_prior_point_with_equal_weights():
    for M in (1, 3, 5):
        module = OffsetSampling(4, M)
        offsets = module.offsets(torch.randn(4)).reshape(M, 2)
        assert_close(offsets.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
        assert_close(module.offset_weights(torch.randn(4)).softmax(0), torch.full((M,), 1 / M))
        assert_close(module.A.weight, torch.eye(4))


def test_offset_points_part_in_training():
    # Started at one place with equal weights, M points would get the same gradient and remain one point.
    torch.manual_seed(10)
    module = OffsetSampling(4, 3)
    x, points = torch.randn(4, 4, 8, 8), torch.rand(4, 10, 2) * 7
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(20):
        loss = (module(x, points) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    change = (module.offsets.bias - OffsetSampling(4, 3).offsets.bias).detach().reshape(3, 2)
    assert torch.pdist(change).min() > 1e-3


@pytest.mark.parametrize("offsets", [True, False])
@torch.no_grad()
def test_eq06_eq07_ple_k_samples_the_groups_keypoints(offsets):
    module = PLE_K(4, 3, offsets).double()
    if offsets:
        randomized(module.sample)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    keypoints = torch.rand(2, 16, 2, dtype=torch.float64) * 5
    for group in GROUPS:
        points = torch.stack([keypoints[:, n] for n in KEYPOINT_GROUPS[group]], 1)
        if offsets:
            expected = reference_offset_sampling(module.sample, x, points)
        else:
            expected = torch.stack([torch.stack([sample_pixel(x[b], *p.tolist()) for p in points[b]]) for b in range(2)])
        assert_close(module(x, group, keypoints), expected.transpose(1, 2))
    assert PLE_K(4, prior=False).double()(x, "head", keypoints).shape == (2, 4, 16)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 1.0])
def test_eq08_ple_s_grid_is_uniform_over_the_prior_region(ratio):
    module = PLE_S(4, ratio=ratio)
    for group in GROUPS:
        top, bottom = prior_region(group, 64)
        grid = module.points(group, 64, 48)
        h, w = round((bottom - top) * ratio**0.5), round(48 * ratio**0.5)
        assert grid.shape == (h, w, 2)
        for i in (0, h // 2, h - 1):
            for j in (0, w // 2, w - 1):
                x, y = (j + 0.5) * 48 / w - 0.5, top + (i + 0.5) * (bottom - top) / h - 0.5
                assert_close(grid[i, j], torch.tensor([x, y], dtype=torch.float32))
        assert abs(h * w / ((bottom - top) * 48) - ratio) < 0.03  # the share of points, not the share per axis


@torch.no_grad()
def test_eq08_eq09_ple_s_matches_loops_and_ratio_1_without_offsets_is_ple_r():
    module = PLE_S(4, 3, 0.75).double()
    randomized(module.sample)
    x = torch.randn(2, 4, 16, 6, dtype=torch.float64)
    for group in GROUPS:
        grid = module.points(group, 16, 6)
        expected = reference_offset_sampling(module.sample, x, grid.reshape(1, -1, 2).expand(2, -1, 2).double())
        assert_close(module(x, group), expected.transpose(1, 2).unflatten(2, grid.shape[:2]), atol=1e-5, rtol=1e-5)
        assert_close(PLE_S(4, ratio=1, offsets=False)(x, group), PLE_R()(x, group))
        assert PLE_S(4, ratio=1, prior=False).double()(x, group).shape == x.shape


def test_pyramid_pool_matches_loops():
    torch.manual_seed(11)
    x = torch.randn(2, 3, 5, 4)
    cells = [x.amax((2, 3))]
    parts = {(i, j): x[:, :, math.floor(i * 5 / 2) : math.ceil((i + 1) * 5 / 2), j * 2 : j * 2 + 2].amax((2, 3))
             for i in range(2) for j in range(2)}
    expected = torch.cat([cells[0], torch.stack([parts[i, j] for i in range(2) for j in range(2)], 2).flatten(1)], 1)
    assert_close(pyramid_pool(x), expected)
    x = torch.randn(2, 3, 9)
    runs = [x[:, :, math.floor(i * 9 / 4) : math.ceil((i + 1) * 9 / 4)].amax(2) for i in range(4)]
    assert_close(pyramid_pool(x), torch.cat([x.amax(2), torch.stack(runs, 2).flatten(1)], 1))


# ---- the model (Eq. 1) ----


def small(ple="S", groups=("torso", "head", "all", "bottom", "head"), **kw):
    torch.manual_seed(12)
    return SSPNet(list(groups), ple, "resnet18", channels=16, **kw)


@pytest.mark.parametrize("ple", ["R", "K", "S"])
@pytest.mark.parametrize("switches", [{}, {"offsets": False}, {"prior": False}, {"afss": "P1"}, {"afss": "attribute"}])
def test_eq01_forward_shapes_and_gradients(ple, switches):
    model = small(ple, **switches)
    images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
    logits = model.train()(images, keypoints)
    assert logits.shape == ((1 if "afss" in switches and switches["afss"] == "P1" else 3), 2, 5)
    logits.square().sum().backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    if switches.get("afss") != "P1":
        assert used == {name for name, _ in model.named_parameters()}
    assert model.eval()(images, keypoints).shape == (2, 5)


@torch.no_grad()
def test_eq01_evaluation_takes_each_attribute_from_its_chosen_scale():
    for ple in ("R", "K", "S"):
        model = small(ple, afss="attribute").eval()
        images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
        maps = model.features(images, range(3))
        each = torch.stack([model.classify(maps, keypoints, [s] * 5) for s in range(3)])
        for choice in ([0, 1, 2, 1, 0], [2, 2, 2, 2, 1], [1, 0, 0, 2, 1]):
            model.afss.selection[:] = torch.tensor(choice)
            expected = torch.stack([each[s, :, j] for j, s in enumerate(choice)], 1)
            assert_close(model(images, keypoints), expected)
            assert [model.map_of(j) for j in range(5)] == choice


@torch.no_grad()
def test_only_chosen_scales_are_computed_in_evaluation_and_when_frozen():
    model = small("R").eval()
    model.afss.selection[:] = torch.tensor([2, 1, 2, 2, 1])
    assert [m is None for m in model.features(torch.randn(1, 3, 64, 48))] == [True, False, False]
    model.afss.live = False
    assert model.train()(torch.randn(2, 3, 64, 48)).shape == (1, 2, 5)


@torch.no_grad()
def test_heads_read_their_own_group_in_the_datasets_order():
    model = small("R").eval()
    images = torch.randn(1, 3, 64, 48)
    before = model(images)
    model.heads["head"].bias[1] += 1  # the second head attribute is the fifth of the dataset
    after = model(images)
    assert_close(after - before, torch.tensor([[0.0, 0, 0, 0, 1]]))


@torch.no_grad()
def test_prior_keeps_the_other_rows_out():
    """A change of the map below the head's region moves no head attribute; without prior it does."""
    for prior in (True, False):
        model = small("R", prior=prior).eval()
        maps = model.features(torch.randn(1, 3, 64, 48), range(3))
        before = model.classify(maps)
        maps[1][:, :, 4:] += 10
        changed = (model.classify(maps) - before).abs()[0] > 1e-6
        assert changed.tolist() == ([True, False, True, True, False] if prior else [True] * 5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="attribute 1 has group 'feet'"):
        SSPNet(["head", "feet"], backbone="resnet18")
    with pytest.raises(ValueError, match="ple 'X'"):
        SSPNet(["head"], "X", backbone="resnet18")
    with pytest.raises(ValueError, match="PLE-K needs keypoints"):
        small("K")(torch.zeros(1, 3, 64, 48))


# ---- loss (Eq. 10-12) ----


def reference_loss(logits, labels, ratio):
    """Eq. 10 and 11 term by term, with Eq. 10's missing minus sign."""
    total = 0.0
    for i in range(len(labels)):
        for j in range(labels.shape[1]):
            a, y, r = logits[i, j].item(), labels[i, j].item(), ratio[j].item()
            p = 1 / (1 + math.exp(-a))
            w = math.exp(1 - r) if y == 1 else math.exp(r)
            total -= w * (y * math.log(p) + (1 - y) * math.log(1 - p))
    return total / len(labels)


def test_eq10_weighted_bce_matches_loops():
    torch.manual_seed(13)
    logits, labels, ratio = torch.randn(6, 5).double(), (torch.rand(6, 5) < 0.4).double(), torch.rand(5).double()
    assert weighted_bce(logits, labels, ratio).item() == pytest.approx(reference_loss(logits, labels, ratio))


def test_eq11_weights_favour_rare_positives():
    weights = imbalance_weights(torch.tensor([[1.0, 1], [0, 0]]), torch.tensor([0.1, 0.9]))
    assert_close(weights, torch.tensor([[math.exp(0.9), math.exp(0.1)], [math.exp(0.1), math.exp(0.9)]]))


def test_eq12_hierarchical_loss_sums_groups_and_averages_scales():
    torch.manual_seed(14)
    groups = ["torso", "head", "all", "torso"]  # no bottom attribute
    logits, labels, ratio = torch.randn(3, 6, 4).double(), (torch.rand(6, 4) < 0.4).double(), torch.rand(4).double()
    loss = HierarchicalLoss(groups, ratio)
    each = []
    for s in range(3):
        members = {g: [j for j in range(4) if groups[j] == g] for g in GROUPS}
        each.append(sum(reference_loss(logits[s][:, m], labels[:, m], ratio[m]) for m in members.values() if m))
    assert loss(logits, labels).item() == pytest.approx(sum(each) / 3)
    assert loss(logits[0], labels).item() == pytest.approx(each[0])


def test_a_model_made_in_inference_mode_works_there():
    with torch.inference_mode():
        model = small().eval()
        assert model(torch.randn(1, 3, 64, 48)).shape == (1, 5)
        model.afss.selection.fill_(2)
        assert model.afss.scales() == [2] * 5


def test_sspnet_imports_nothing_of_the_project():
    import ast
    tree = ast.parse(open(sspnet.__file__).read())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert {m.split(".")[0] for m in modules} <= {"math", "torch", "torchvision"}
