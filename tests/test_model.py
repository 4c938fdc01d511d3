"""The parts of sspnet.py and how they are wired: a whole model against a slow reference."""

import itertools

import pytest
import torch
from conftest import FEW_GROUPS, PA100K, random_model
from test_equations import value_at
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import get_model

import sspnet
from sspnet import (
    AFSS,
    FPN,
    GROUPS,
    PLE_K,
    PLE_S,
    Baseline,
    SSPNet,
    bilinear_sample,
    prior_region,
    response_maps,
    to_image,
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_point_that_is_not_finite_spoils_its_own_value_alone(value):
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    points = torch.rand(2, 4, 2) * 3
    expected = bilinear_sample(x, points).detach()
    points[1, 2, 0] = value
    found = bilinear_sample(x, points)
    assert (found[1, 2] == 0).all() if value == 1e30 else found[1, 2].isnan().all()
    found[1, 2] = expected[1, 2]
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad[0].isfinite().all()  # of the other image


@torch.no_grad()
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5])
def test_offset_points_start_on_a_ring_off_the_pixels_rows_and_columns(M):
    """There the gradient of bilinear interpolation jumps. Evenly on the ring, since equal points
    would never part in training, with equal weights; on all grids of 256x192 and 128x96."""
    module = sspnet.OffsetSampling(4, M)
    predicted = module.predict(torch.randn(4))
    offsets, weights = predicted[: 2 * M].reshape(M, 2), predicted[2 * M :].softmax(0)
    assert_close(offsets.norm(dim=1), torch.full((M,), 0.62))
    assert M == 1 or offsets.mean(0).abs().max() < 1e-6
    assert M == 1 or torch.pdist(offsets).min() > 0.5
    assert_close(weights, torch.full((M,), 1 / M))
    assert_close(module.A.weight, torch.eye(4))
    for height, width in ((64, 48), (32, 24), (16, 12), (8, 6)):
        for ratio in (0.75, 1):
            for group in GROUPS:
                starts = PLE_S(4, ratio=ratio).points(group, height, width).unsqueeze(2) + offsets
                distances = (starts - starts.round()).abs()
                assert distances[..., 0].min() > 0.02
                # The 55 rows of 64 leave gaps of 1 / 55 pixel, of which 0.02 is more than a half.
                rare = (group, height, ratio) == ("all", 64, 0.75)
                assert distances[..., 1].min() > (0.003 if rare else 0.02)


@torch.no_grad()
def test_sampling_and_offsets_are_computed_in_float32_under_autocast():
    x, points = torch.randn(1, 4, 50, 50, dtype=torch.bfloat16), torch.full((1, 1, 2), 40.4)
    module, found, copies = sspnet.OffsetSampling(4, 3), [], []
    module.predict.register_forward_hook(lambda _, inputs, out: found.extend([*inputs, out]))

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation is torch.ops.aten._to_copy.default and args[0].numel() == x.numel():
                copies.append(args[0].dtype)
            return operation(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16):
        sampled = bilinear_sample(x, points)
        with Copies():
            module(x, points)
    assert copies == [torch.bfloat16]  # one of the map, for both samplings
    assert sampled.dtype == torch.bfloat16
    assert_close(sampled[0, 0].float(), value_at(x[0].float(), 40.4, 40.4), atol=0, rtol=0.005)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ple", ["R", "K", "S"])
def test_a_model_runs_in_lower_precision_with_keypoints_of_any_float(ple, dtype):
    model = random_model(ple).eval()
    images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
    expected = model(images, keypoints)
    assert_close(model(images, keypoints.double()), expected)
    for points in (keypoints, keypoints.double()):
        found = model.to(dtype)(images.to(dtype), points)
        assert found.dtype == dtype
        assert_close(found.float(), expected, atol=0.02, rtol=0.1)


def test_tab03_parameters():
    """The baseline's to the number, SSPNet's to one percent."""
    with torch.device("meta"):
        for model, expected, share in (
            (Baseline(PA100K, "resnet50"), 23_561_306, 0),
            (Baseline(PA100K, "swin_s"), 48_857_252, 0),
            (SSPNet(PA100K, "S", "resnet50"), 26.30e6, 0.01),
            (SSPNet(PA100K, "K", "resnet50"), 26.27e6, 0.01),
        ):
            count = sum(p.numel() for p in model.parameters())
            assert count == pytest.approx(expected, rel=share, abs=0)


@pytest.mark.parametrize("content", [b"not weights", 3, {"conv1.weight": torch.zeros(2)}])
def test_a_file_that_is_no_state_dict_of_the_network_is_named(tmp_path, content):
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="bad.pt: "):
        sspnet.Backbone("resnet18", tmp_path / "bad.pt")


def test_weights_are_read_on_the_cpu_and_imagenets_are_the_first_of_torchvision(monkeypatch):
    """A GPU's file on a machine without one; V1, which the paper's baseline started from."""
    asked = []
    monkeypatch.setattr(torch, "load", lambda *_, **options: asked.append(options))
    sspnet.read_tensors("file.pt")
    assert asked == [{"map_location": "cpu", "weights_only": True}]
    net = get_model("resnet18")
    monkeypatch.setattr(sspnet, "get_model", lambda name, **given: asked.append(given) or net)
    sspnet.Backbone("resnet18", "imagenet")
    assert asked[1:] == [{"weights": "IMAGENET1K_V1"}]


def test_a_file_that_lacks_a_layer_is_refused(tmp_path):
    """All of a resnet18's names are in a resnet34, which has more."""
    state = get_model("resnet18").state_dict()
    older = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(older, tmp_path / "18.pt")  # which an older torch did not count
    sspnet.Backbone("resnet18", tmp_path / "18.pt")
    with pytest.raises(ValueError, match=r"18\.pt: .*layer1\.2"):
        sspnet.Backbone("resnet34", tmp_path / "18.pt")


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2"])
def test_map_pixels_look_at_image_pixel_stride_times_k(name):
    """With equal positive weights the gradient of map pixel k is symmetric about where it looks."""
    backbone = sspnet.Backbone(name).double().eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.constant_(module.weight, 1 / module.weight[0].numel())
    if name != "mobilenet_v2":  # its pooling has ties at equal inputs: the mean has the same window
        pool = backbone.stages[0][0][3]
        backbone.stages[0][0][3] = torch.nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding)
    images = torch.full((1, 3, 640, 64), 1e-3, dtype=torch.float64)  # ReLU6 clips none
    images.requires_grad_()
    rows = torch.arange(640.0, dtype=torch.float64)
    for stride, C in zip((4, 8, 16, 32), backbone(images), strict=True):
        k = 320 // stride
        pixel = C[0, 0, k, C.shape[3] // 2]
        (gradient,) = torch.autograd.grad(pixel, images, retain_graph=True)
        weight = gradient[0].sum((0, 2))
        assert (rows @ weight / weight.sum()).item() == pytest.approx(stride * k, abs=1e-6)


def upsample_by_loops(x, H, W, factor, patches):
    """Each pixel of the result sampled where it lies in x, whose edge pixels are held."""
    B, C, h, w = x.shape
    out = x.new_zeros(B, C, H, W)
    for i in range(H):
        for j in range(W):
            y = (i + 0.5) / factor - 0.5 if patches else i / factor
            z = (j + 0.5) / factor - 0.5 if patches else j / factor
            y, z = min(max(y, 0), h - 1), min(max(z, 0), w - 1)
            for b in range(B):
                out[b, :, i, j] = value_at(x[b], z, y)
    return out


@pytest.mark.parametrize("patches", [True, False])
@pytest.mark.parametrize("h, w, factor", [(3, 2, 2), (2, 3, 4), (1, 1, 8)])
@pytest.mark.parametrize("more", [-1, 0, 1])
def test_upsample_matches_loops(h, w, factor, patches, more):
    """Also to sizes that are no multiple of the factor, on either side."""
    torch.manual_seed(3)
    x = torch.randn(1, 2, h, w, dtype=torch.float64)
    H, W = h * factor + more, w * factor + more
    expected = upsample_by_loops(x, H, W, factor, patches)
    assert_close(sspnet.upsample(x, (H, W), factor, patches), expected)


@torch.no_grad()
def test_fpn_passes_activations_through_at_about_unit_scale():
    torch.manual_seed(5)
    channels = (256, 512, 1024, 2048)
    C = [torch.randn(2, c, 64 >> s, 48 >> s) for s, c in enumerate(channels)]
    for P in FPN(channels)(C):
        assert 0.5 < P.std() < 2


def test_afss_selects_anew_each_epoch_and_treats_what_is_undefined_or_equal():
    labels = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]])  # nobody has the last
    right, wrong = 2 * labels - 1, 1 - 2 * labels
    mixed = torch.stack([right[:, 0], wrong[:, 1], wrong[:, 2]], 1)
    afss = AFSS(["head", "bottom", "head"])
    for logits, expected in (
        ([wrong, wrong, right], [2, 2, 2]),  # head's mean is that of its defined attribute
        ([wrong, mixed, -mixed], [1, 2, 1]),  # from this epoch's counts alone
        ([wrong, right, right], [1, 1, 1]),  # of equal scales the finest
    ):
        afss.update(torch.stack(logits), labels)
        afss.select()
        assert afss.scales == expected
    afss.half().update(torch.randn(3, 4, 3).half(), torch.ones(4, 3).half())
    assert afss.counts.dtype == torch.int64  # a low precision changes no count
    assert afss.select().isnan().all()
    assert afss.scales == [1, 1, 1]  # undefined: kept


def test_afss_choice_and_whether_it_is_frozen_travel_in_the_state_dict_as_tensors(tmp_path):
    model, other = random_model("R"), random_model("R")
    model.afss.scales, model.afss.selecting = [2, 0, 1, 1, 0], False
    torch.save(model.state_dict(), tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    average = {name: (tensor + tensor) / 2 for name, tensor in state.items()}
    for given in (state, average):
        other.afss.selecting = True
        other.load_state_dict(given)
        assert other.afss.scales == [2, 0, 1, 1, 0]
        assert not other.afss.selecting


def test_afss_refuses_a_state_that_contradicts_it_and_logits_not_of_three_scales():
    for mode, state in (
        ("P1", [1, 1, 1, 0]),  # the choice of a group
        ("group", [0, 3, 0, 1]),
        ("group", [0, 1, 1]),
        ("group", [0, 1, 2, 1]),  # the scales of one group differ, as AFSS*'s may
        ("attribute", [0, 0.5, 2, 1]),  # the average of two choices
    ):
        afss = AFSS(["head", "all", "head"], mode)
        before = list(afss.scales)
        with pytest.raises(ValueError, match="AFSS"):
            afss.set_extra_state(torch.tensor(state))
        assert afss.scales == before
    for shape in ((1, 4, 2), (4, 2), (3, 4, 1), (3, 5, 2)):
        with pytest.raises(ValueError, match="AFSS"):
            AFSS(["head", "all"]).update(torch.zeros(shape), torch.ones(4, 2))
    for shape in ((2, 1), (2,), (1, 2)):  # which would be broadcast
        with pytest.raises(ValueError, match="AFSS"):
            AFSS(["head", "all"]).update(torch.zeros(3, 2, 2), torch.ones(shape))
    fixed = AFSS(["head"], "P2")
    fixed.set_extra_state(torch.tensor([1, 1]))  # of a model that chooses and has chosen P2
    assert not fixed.selecting


def test_afss_counts_and_selects_nothing_once_frozen_or_fixed():
    labels = torch.tensor([[1.0], [0.0]])
    for afss in (AFSS(["head"]), AFSS(["head"], "P3")):
        afss.selecting, before = False, list(afss.scales)
        afss.update((2 * labels - 1)[None], labels)
        assert afss.counts is None
        assert afss.select() is None
        assert afss.scales == before


@torch.no_grad()
def test_without_offsets_the_prior_points_themselves_are_read():
    """PLE-K's keypoints; PLE-S's grid, which at ratio 1 is the region of PLE-R."""
    torch.manual_seed(6)
    x, keypoints = torch.randn(1, 4, 16, 6), torch.rand(1, 16, 2) * 5
    feature = PLE_K(4, offsets=False)(x, "head", keypoints)
    for k, n in enumerate(sspnet.KEYPOINT_GROUPS["head"]):
        assert_close(feature[0, :, k], value_at(x[0], *keypoints[0, n].tolist()))
    for ple in ("K", "S"):  # each of the two is what it is called
        model = random_model(ple, offsets=False)
        assert (model.ple.sample is bilinear_sample, model.ple.prior) == (True, True)
        model = random_model(ple, prior=False)
        assert (model.ple.sample is bilinear_sample, model.ple.prior) == (False, False)
    for group in GROUPS:
        grid = PLE_S(4, ratio=1, offsets=False)(x, group)
        assert_close(grid, sspnet.PLE_R()(x, group), atol=1e-5, rtol=1e-5, check_stride=False)


@torch.no_grad()
def test_without_prior_each_group_is_seen_as_all_is():
    x, keypoints = torch.randn(2, 4, 16, 6), torch.rand(2, 16, 2) * 5
    for PLE in (sspnet.PLE_R, lambda **prior: PLE_K(4, **prior), lambda **prior: PLE_S(4, **prior)):
        expected = PLE()(x, "all", keypoints)
        for group in GROUPS:
            assert_close(PLE(prior=False)(x, group, keypoints), expected)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 1.0])
def test_fig06_the_ratio_is_a_share_of_points_not_of_each_axis(ratio):
    for group in GROUPS:
        top, bottom = prior_region(group, 64)
        points = PLE_S(4, ratio=ratio).points(group, 64, 48)[..., 0].numel()
        assert points / ((bottom - top) * 48) == pytest.approx(ratio, abs=0.03)
        assert PLE_S(4, ratio=ratio / 99).points(group, 3, 2).shape == (1, 1, 2)  # never none
    for wrong in (0, 75, float("nan")):
        with pytest.raises(ValueError, match="ratio"):
            PLE_S(ratio=wrong)
    assert prior_region("torso", 4) == (1, 3)  # halves are rounded up
    for height in range(1, 20):
        for top, bottom in (prior_region(group, height) for group in GROUPS):
            assert 0 <= top < bottom <= height


def reference_maps(model, net, images):
    """C2..C5 from torchvision's own network, Swin's with the model's LayerNorms."""
    maps, x = [], images
    if hasattr(net, "classifier"):  # mobilenet_v2, by its layers' strides
        for i, layer in enumerate(net.features):
            x = layer(x)
            if i in (3, 6, 13, 18):
                maps.append(x)
        return maps
    if not model.patches:
        x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            maps.append(x)
        return maps
    for i in range(4):
        x = net.features[2 * i + 1](net.features[2 * i](x))
        norm = net.norm if i == 3 else model.backbone.norms[i]
        y = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        maps.append((y * norm.weight + norm.bias).permute(0, 3, 1, 2))
    return maps


def reference_pyramid(model, C):
    """P1, P2, P3 by loops."""
    tops = [model.fpn.laterals[3](C[3])]
    for s in (2, 1, 0):
        lateral = model.fpn.laterals[s](C[s])
        H, W = lateral.shape[2:]
        tops.insert(0, lateral + upsample_by_loops(tops[0], H, W, 2, model.patches))
    return [model.fpn.smooth[s](tops[s]) for s in range(3)]


@pytest.mark.parametrize(
    "ple, backbone",
    [*itertools.product("RKS", ["resnet18", "swin_t"]), ("S", "mobilenet_v2")],
)
@torch.no_grad()
def test_eq01_a_whole_model_matches_a_slow_reference(tmp_path, ple, backbone):
    """Image by image, attribute by attribute, at a size that is no multiple of the strides. PLE and
    pooling, which it takes from the model, have references in test_equations.py. The last of the
    scales separates two attributes of one group, as AFSS* does."""
    torch.manual_seed(20)
    net = get_model(backbone).double().eval()
    if backbone == "swin_t":
        torch.nn.init.normal_(net.norm.weight)  # as a trained one: its own is used, not a new one
    state = {name: t for name, t in net.state_dict().items() if not name.startswith("classifier.")}
    torch.save(state, tmp_path / "net.pt")
    model = SSPNet(FEW_GROUPS, ple, backbone, tmp_path / "net.pt", "attribute", channels=4)
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if name.startswith(("ple.", "heads.", "backbone.norms.0", "backbone.norms.1")):
            torch.nn.init.normal_(parameter, std=0.5)
    model.afss.scales = scales = [1, 0, 2, 1, 0] if backbone == "resnet18" else [0, 2, 0, 2, 1]
    images = torch.randn(2, 3, 62, 46, dtype=torch.float64)
    keypoints = torch.rand(2, 16, 2, dtype=torch.float64) * 46
    pyramid = reference_pyramid(model, reference_maps(model, net, images))
    found = model(images, keypoints)
    for j, group in enumerate(FEW_GROUPS):
        P, stride, head = pyramid[scales[j]], (4, 8, 16)[scales[j]], model.heads[group]
        points = (keypoints + 0.5) / stride - 0.5 if model.patches else keypoints / stride
        k = [i for i, g in enumerate(FEW_GROUPS) if g == group].index(j)
        for b in range(2):
            region = model.ple(P[b : b + 1], group, points[b : b + 1])
            expected = head.weight[k] @ sspnet.pyramid_pool(region)[0] + head.bias[k]
            assert_close(found[b, j], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t"])
@torch.no_grad()
def test_the_baseline_matches_a_slow_reference(tmp_path, backbone):
    torch.manual_seed(21)
    net = get_model(backbone).eval()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    model = Baseline(["head", "all"], backbone, tmp_path / "net.pt").eval()
    assert model.patches == (backbone == "swin_t")
    images = torch.randn(2, 3, 62, 46)
    if backbone == "resnet18":
        C5 = reference_maps(model, net, images)[3]
    else:
        C5 = net.norm(net.features(images)).permute(0, 3, 1, 2)
    mean = sum(C5[:, :, y, x] for y in range(C5.shape[2]) for x in range(C5.shape[3]))
    mean = mean / C5[0, 0].numel()
    assert_close(model(images), mean @ model.head.weight.T + model.head.bias)


@torch.no_grad()
@pytest.mark.parametrize("ple", ["R", "K", "S"])
def test_training_compares_each_scale_for_all_attributes(ple):
    model = random_model(ple, afss="attribute").eval()
    images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
    alone = []
    for s in range(3):
        model.afss.scales = [s] * 5
        alone.append(model(images, keypoints))
    model.afss.scales = scales = [0, 1, 2, 1, 0]
    chosen = torch.stack([alone[s][:, j] for j, s in enumerate(scales)], 1)
    assert_close(model(images, keypoints), chosen)
    assert [model.map_of(j) for j in range(5)] == scales
    for module in model.modules():  # the three sets of logits of a training step
        module.training = not isinstance(module, torch.nn.BatchNorm2d)
    assert_close(model(images, keypoints), torch.stack(alone))


@torch.no_grad()
def test_only_chosen_scales_are_computed_in_evaluation_and_when_frozen():
    model = random_model("R")
    model.afss.scales = [2, 1, 2, 2, 1]
    laterals = []
    model.fpn.laterals[0].register_forward_hook(lambda *_: laterals.append(0))
    maps = model.eval().features(torch.randn(1, 3, 64, 48))
    assert [m is None for m in maps] == [True, False, False]
    assert laterals == []
    model.afss.selecting = False
    assert model.train()(torch.randn(2, 3, 64, 48)).shape == (1, 2, 5)


def test_a_backbone_of_ones_own_looks_at_image_pixels_as_resnets_do_unless_it_says_patches():
    backbone = torch.nn.Module()
    backbone.out_channels = [3] * 4
    assert SSPNet(["all"], backbone=backbone).fpn.patches is False


@pytest.mark.parametrize("shape", [None, (2, 17, 2), (2, 16, 3), (1, 16, 2)])
def test_ple_k_takes_16_points_for_each_image_alone(shape):
    with pytest.raises(ValueError, match="PLE-K"):
        random_model("K").eval()(torch.zeros(2, 3, 64, 48), shape and torch.zeros(shape))


def test_the_loss_takes_labels_of_any_type_but_of_the_logits_shape_alone():
    torch.manual_seed(23)
    logits, labels = torch.randn(3, 4, 2), torch.rand(4, 2) < 0.5
    loss = sspnet.HierarchicalLoss(["head", "all"], torch.tensor([0.2, 0.6]))
    for dtype in (torch.int64, torch.bool):
        assert_close(loss(logits, labels.to(dtype)), loss(logits, labels.float()))
    for shape in ((2,), (1, 2), (4, 3), (4, 1), (3, 4, 2)):
        with pytest.raises(ValueError, match="loss"):
            loss(logits, torch.ones(shape))
    with pytest.raises(ValueError, match="loss"):
        loss(torch.randn(3, 4, 1), torch.ones(4, 1))
    listed = sspnet.HierarchicalLoss(["head", "all"], [0.2, 0.6])
    compiled = torch.compile(listed, fullgraph=True, backend="eager")
    assert_close(compiled(logits, labels), loss(logits, labels))
    with pytest.raises(ValueError, match="loss"):
        sspnet.HierarchicalLoss(["head", "all"], torch.full((3,), 0.2))


@pytest.mark.parametrize("patches, size", [(True, (25, 19)), (False, (26, 17))])
def test_to_image_lays_each_map_pixel_where_it_looks(patches, size):
    """At input sizes that are no multiple of the stride 4; Swin's maps are smaller than those. An
    image of another size than the input has its edges where the input's are."""
    torch.manual_seed(22)
    h, w = (size[0] // 4, size[1] // 4) if patches else (-(-size[0] // 4), -(-size[1] // 4))
    response = torch.rand(h, w, dtype=torch.float64) + 1  # its minimum is not 0
    stacked = torch.stack([torch.ones(h, w), response, response**2])
    over = upsample_by_loops(response[None, None], *size, 4, patches)
    resized = upsample_by_loops(over.float(), 3 * size[0], 3 * size[1], 3, patches=True)
    for factor, at_size in ((1, over), (3, resized)):
        expected = ((at_size - at_size.min()) / (at_size.max() - at_size.min()))[0, 0].float()
        found = to_image(stacked, 4, patches, size, (size[0] * factor, size[1] * factor))
        assert_close(found[1], expected, atol=1e-6, rtol=1e-5)
        assert found[0].sum() == 0  # constant
        assert found[2].min() == 0  # each by its own range
        assert found[2].max() == 1


@pytest.mark.parametrize("ple", ["none", "R", "K", "S"])
def test_response_maps_give_the_models_logits_from_one_forward_of_the_backbone(ple):
    model, calls = random_model(ple).eval(), []
    images, keypoints = torch.randn(2, 3, 64, 48), torch.rand(2, 16, 2) * 48
    with torch.no_grad():  # the gradient to the maps is taken all the same
        expected = model(images, keypoints)
        model.backbone.register_forward_hook(lambda *_: calls.append(1))
        logits, responses = response_maps(model, images, range(5), keypoints)
    assert len(calls) == 1
    assert len(responses) == 5
    assert_close(logits, expected)
    assert all(p.grad is None for p in model.parameters())
    seen = []  # chosen by the logits: no other gradient is taken
    _, chosen = response_maps(model, images, lambda given: seen.append(given) or [3], keypoints)
    assert_close(seen, [logits])
    assert_close(chosen, {3: responses[3]})
    with torch.inference_mode():
        again = response_maps(model, images.clone(), range(5), keypoints.clone())
    assert_close(again, (logits, responses))
    with pytest.raises(ValueError, match="eval"):
        response_maps(model.train(), images, range(5), keypoints)


def assert_same_gradients(network, module, *inputs):
    """Of the module and of the network that it was compiled to, but the unused ones."""
    found = []
    for called in (module, network):
        module.zero_grad()
        called(*inputs)[0].square().sum().backward()
        found.append([p.grad for p in module.parameters() if p.grad is not None])
    largest = max(gradient.abs().max() for gradient in found[0])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < 1e-4 * largest


def test_compiled_offsets_start_with_the_gradients_of_eager():
    """Offset points begin where bilinear interpolation has one gradient."""
    torch.compiler.reset()
    torch.manual_seed(25)
    sample, x = sspnet.OffsetSampling(8), torch.randn(2, 8, 32, 24)
    points = PLE_S(8).points("all", 32, 24).flatten(0, 1).expand(2, -1, 2)
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    assert_same_gradients(compiled, sample, x, points)


def test_compiles_to_one_graph_in_evaluation_and_in_frozen_training():
    torch.compiler.reset()
    model, images = random_model("S").train(), torch.randn(2, 3, 64, 48)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    model.afss.selecting = False
    assert_same_gradients(compiled, model, images)
    assert [conv.weight.grad is None for conv in model.fpn.smooth] == [True, False, True]
    model.afss.scales = [0] * 5  # a new choice is seen
    with torch.no_grad():
        assert_close(compiled.eval()(images), model(images))
