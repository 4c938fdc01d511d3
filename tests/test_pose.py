"""Keypoints for PLE-K: SimCC, Keypoint R-CNN's points as MPII's, the commands of data.py."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, refuse, succeed, words
from PIL import Image, ImageDraw
from test_data import write_pa100k
from torch.testing import assert_close

import data
from data import (
    KeypointRCNN,
    SimCC,
    coco_to_mpii,
    find_keypoints,
    from_square,
    pose_model,
    read_keypoints,
    square,
    synthetic,
)


@pytest.fixture(scope="module")
def simcc():
    torch.manual_seed(0)
    return SimCC().eval()


def test_simcc_has_the_public_checkpoints_names_and_shapes(simcc):
    shapes = {name: list(value.shape) for name, value in simcc.state_dict().items()}
    head = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    assert head == {
        "head.final_layer.weight": [16, 2048, 1, 1],
        "head.final_layer.bias": [16],
        "head.mlp_head_x.weight": [512, 64],
        "head.mlp_head_x.bias": [512],
        "head.mlp_head_y.weight": [512, 64],
        "head.mlp_head_y.bias": [512],
    }
    from torchvision.models import resnet50

    state = {k: v for k, v in resnet50().state_dict().items() if not k.startswith("fc.")}
    backbone = {f"backbone.{name}": list(value.shape) for name, value in state.items()}
    assert backbone == {name: shape for name, shape in shapes.items() if name not in head}


def test_simcc_forward_is_final_layer_then_a_classifier_per_axis(simcc):
    images = torch.randn(2, 3, 256, 256)
    with torch.inference_mode():
        x, y = simcc(images)
        net = simcc.backbone
        maps = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            maps = layer(maps)
        assert maps.shape == (2, 2048, 8, 8) and x.shape == y.shape == (2, 16, 512)
        head = simcc.head
        for b, k in ((0, 0), (1, 15)):
            weight, bias = head.final_layer.weight[k, :, 0, 0], head.final_layer.bias[k]
            flat = torch.stack([weight @ maps[b, :, i // 8, i % 8] + bias for i in range(64)])
            for logits, layer in ((x, head.mlp_head_x), (y, head.mlp_head_y)):
                expected = layer.weight @ flat + layer.bias
                assert_close(logits[b, k], expected, atol=1e-3, rtol=1e-4)


def test_simcc_decode_matches_loops():
    torch.manual_seed(0)
    x, y = torch.randn(3, 16, 512), torch.randn(3, 16, 512)
    points = SimCC.decode(x, y)
    for b in range(3):
        for k in range(16):
            sure = []
            for axis, logits in enumerate((x[b, k].tolist(), y[b, k].tolist())):
                best = logits.index(max(logits))
                assert points[b, k, axis] == best / 2
                sure.append(math.exp(logits[best]) / sum(map(math.exp, logits)))
            assert points[b, k, 2].item() == pytest.approx(min(sure), rel=1e-4)


@pytest.mark.parametrize("H, W", [(160, 64), (90, 150), (400, 180), (205, 205), (21, 9)])
def test_square_keeps_the_aspect_and_points_come_back(H, W):
    """The crop, measured: a bright square of the picture is found in the crop, and its middle
    mapped back."""
    for cy, cx in ((H // 4, W // 4), (H // 2, 3 * W // 4), (3 * H // 4, W // 2)):
        r = max(1, min(H, W) // 8)
        image = torch.zeros(3, H, W, dtype=torch.uint8)
        image[:, cy - r : cy + r + 1, cx - r : cx + r + 1] = 255
        crop = square(image, 256).float().mean(0)
        assert crop.shape == (256, 256)
        ys, xs = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
        middle = torch.stack([(crop * xs).sum(), (crop * ys).sum()]) / crop.sum()
        back = from_square(torch.cat([middle, torch.tensor([0.7])]), (H, W), 256)
        near = 0.05 * max(H, W) / 100 + 0.02
        assert_close(back, torch.tensor([float(cx), float(cy), 0.7]), atol=near, rtol=0)
        tall, wide = (crop > 128).any(1).sum().item(), (crop > 128).any(0).sum().item()
        assert abs(tall - wide) <= 1  # a square stays one
    whole = square(torch.full((3, H, W), 255, dtype=torch.uint8), 256)[0] > 128
    side = np.ceil(1.25 * max(H, W))
    assert abs(whole.any(1).sum() - 256 * H / side) <= 2
    assert abs(whole.any(0).sum() - 256 * W / side) <= 2


def test_square_and_back_is_exact():
    """Every pixel centre of a picture, placed in the crop by the padding and the scale, comes back
    to where it was."""
    for H, W in ((160, 64), (90, 150), (333, 100)):
        side = int(np.ceil(1.25 * max(H, W)))
        points = torch.rand(50, 2, dtype=torch.float64) * torch.tensor([W, H])
        margins = torch.tensor([(side - W) // 2, (side - H) // 2])
        placed = (points + margins + 0.5) * 256 / side - 0.5
        assert_close(from_square(placed, (H, W), 256), points, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda s: s.pop("head.mlp_head_x.bias"), "head.mlp_head_x.bias is missing"),
        (
            lambda s: s.update({"head.final_layer.weight": torch.zeros(17, 2048, 1, 1)}),
            r"head.final_layer.weight: .*\[17, 2048, 1, 1\].*\[16, 2048, 1, 1\]",
        ),
        (lambda s: s.update({"head.more": torch.zeros(2)}), "head.more is missing or unexpected"),
        (
            lambda s: s.pop("backbone.layer4.2.conv3.weight"),
            "backbone.layer4.2.conv3.weight is missing",
        ),
    ],
)
def test_a_state_dict_that_differs_says_where(simcc, tmp_path, spoil, message):
    state = dict(simcc.state_dict())
    spoil(state)
    torch.save({"state_dict": state}, tmp_path / "simcc.pth")
    with pytest.raises(ValueError, match=message):
        pose_model("simcc", tmp_path / "simcc.pth")


def test_a_state_dict_is_loaded(simcc, tmp_path):
    wrapped = {"meta": {"epoch": 1}, "state_dict": simcc.state_dict()}  # as frameworks do
    torch.save(wrapped, tmp_path / "simcc.pth")
    loaded = pose_model("simcc", tmp_path / "simcc.pth").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in simcc.state_dict().items())
    with pytest.raises(FileNotFoundError, match="nowhere.pth: no such file, expected a state dict"):
        pose_model("simcc", "nowhere.pth")


def figures(count, seed=0):
    """Coloured stick figures in random places, and their 16 points, in MPII's order."""
    random, images, points = np.random.default_rng(seed), [], []
    x = words("-2 -2 -1 1 2 2 0 0 0 0 -4 -3 -2 2 3 4")
    y = words("9 6 3 3 6 9 3 -2 -3 -6 2 0 -2 -2 0 2")
    shape = np.array([x, y], float).T
    bones = words("0-1 1-2 2-6 6-3 3-4 4-5 6-7 7-8 8-9 10-11 11-12 12-13 13-14 14-15")
    bones = [tuple(map(int, bone.split("-"))) for bone in bones]
    for _ in range(count):
        at = shape * random.uniform(4, 7) + [random.uniform(30, 66), random.uniform(60, 90)]
        at += random.normal(0, 1, (16, 2))
        image = Image.new("RGB", (96, 160), tuple(random.integers(0, 80, 3).tolist()))
        for n, (a, b) in enumerate(bones):
            ImageDraw.Draw(image).line([*at[a], *at[b]], fill=(255, 17 * n, 255 - 17 * n), width=4)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        points.append(torch.from_numpy(at).float())
    return images, torch.stack(points)


def test_simcc_head_learns_and_ple_k_runs_on_its_points(tmp_path):
    torch.manual_seed(0)
    model = SimCC()
    images, truth = figures(8)
    side, left, top = 200, 52, 20  # of a 96x160 picture: 1.25 times the longer side, and margins
    places = (truth + torch.tensor([left, top]) + 0.5) * 256 / side - 0.5
    target = (2 * places).round().long()  # bins of half a pixel
    crops = data.normalize(torch.stack([square(image, 256) for image in images]))
    with torch.no_grad():  # the backbone's random features, batch norm set to these pictures
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        model.backbone(crops)
        features = model.eval().backbone(crops).unflatten(1, (2048, 8, 8))

    def error():
        with torch.inference_mode():
            return (model.find(images)[:, :, :2] - truth).norm(dim=2).mean().item()

    before = error()
    optimizer = torch.optim.Adam(model.head.parameters(), 3e-3)
    for _ in range(60):
        flat = model.head.final_layer(features).flatten(2)
        loss = 0
        for axis, layer in enumerate((model.head.mlp_head_x, model.head.mlp_head_y)):
            logits, bins = layer(flat).flatten(0, 1), target[:, :, axis].flatten()
            loss = loss + torch.nn.functional.cross_entropy(logits, bins)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert before > 20 and error() < 0.25 * before

    # Its file serves PLE-K: written by the command, read by the training.
    write_pa100k(tmp_path / "set", counts=(6, 2, 2))
    torch.save(model.state_dict(), tmp_path / "simcc.pth")
    assert "16 points on each of 10 images" in succeed(
        f"data.py keypoints --dataset pa100k --data {tmp_path}/set --weights",
        f"{tmp_path}/simcc.pth --out {tmp_path}/k.npz --batch-size 4 --device cpu",
    )
    with np.load(tmp_path / "k.npz") as archive:
        assert archive["names"].tolist() == [f"{i:06d}.jpg" for i in range(1, 11)]
        assert archive["keypoints"].shape == (10, 16, 3)
        assert (archive["keypoints"][:, :, 2] > 0).all()
    succeed(
        "train.py",
        *TINY[2:],
        f"--data {tmp_path}/set --weights none --backbone resnet18 --ple K --keypoints",
        f"{tmp_path}/k.npz --epochs 1 --batch-size 4 --out {tmp_path}/run",
    )


def test_keypoint_rcnn_points_become_mpiis():
    """A person standing straight, 100 high: each point against its place by hand."""
    coco = words("""
        50,10 52,8 48,8 54,12 46,12 60,20 40,20 65,35 35,35 66,50 34,50
        55,50 45,50 55,75 45,75 55,95 45,95
    """)
    face = (10 + 8 + 8 + 12 + 12) / 5
    neck, top = 20 + 0.45 * (face - 20), 20 + 1.65 * (face - 20)
    mpii = words(f"""
        45,95 45,75 45,50 55,50 55,75 55,95 50,50 50,20 50,{neck} 50,{top}
        34,50 35,35 40,20 60,20 65,35 66,50
    """)
    found, expected = (torch.tensor([[*map(float, p.split(","))] for p in x]) for x in (coco, mpii))
    assert_close(coco_to_mpii() @ found, expected)
    assert_close(coco_to_mpii().sum(1), torch.ones(16))  # moving the person moves all points alike


class Detector(torch.nn.Module):
    """In place of the detector: two people on the first picture, nobody on the second."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        for image in images:
            assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
        people = torch.arange(2 * 17 * 3, dtype=torch.float).view(2, 17, 3)
        some = {
            "scores": torch.tensor([0.3, 0.9]),
            "keypoints": people,
            "keypoints_scores": torch.linspace(-2, 2, 34).view(2, 17),
        }
        return [some, {name: value[:0] for name, value in some.items()}][: len(images)]


def test_keypoint_rcnn_takes_the_surest_person_or_nobody():
    model = KeypointRCNN(weights=None, min_size=64, max_size=96).eval()
    with torch.inference_mode():  # the network itself, with random weights
        found = model.find([torch.randint(0, 255, (3, 80, 40), dtype=torch.uint8)])
    assert found.shape == (1, 16, 3)
    model.detector = Detector()
    found = model.find([torch.full((3, 8, 8), 255, dtype=torch.uint8)] * 2)
    second = torch.arange(51, 102, dtype=torch.float).view(17, 3)
    sure = torch.linspace(-2, 2, 34).sigmoid()[17:]
    assert_close(found[0, 0], torch.tensor([*second[16, :2], sure[16]]))  # right ankle
    pelvis = [*(second[11, :2] + second[12, :2]) / 2, min(sure[11], sure[12])]
    assert_close(found[0, 6], torch.tensor(pelvis))
    assert (found[1] == 0).all()


class Stub(torch.nn.Module):
    """Finds points that tell the picture; nobody where it is dark; fails at a given call."""

    def __init__(self, fail_at=None):
        super().__init__()
        self.calls, self.fail_at = 0, fail_at

    def find(self, images):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        points = torch.stack([torch.full((16, 3), image.float().mean().item()) for image in images])
        points[points[:, 0, 0] < 60] = 0
        return points


def test_finding_keypoints_resumes_and_fills_in_the_mean_pose(tmp_path):
    table = synthetic("test", count=20)
    table.images[7] = np.zeros((60, 30, 3), np.uint8)  # nobody there
    whole, stub = tmp_path / "whole.npz", Stub()
    assert find_keypoints(stub, table, whole, batch_size=3) == 1 and stub.calls == 7
    with pytest.raises(KeyboardInterrupt):
        find_keypoints(Stub(fail_at=4), table, tmp_path / "k.npz", batch_size=3, source="a")
    assert not (tmp_path / "k.npz").exists() and (tmp_path / "k.npz.part").exists()
    with pytest.raises(ValueError, match="k.npz.part: was begun with other images or weights"):
        find_keypoints(Stub(), table, tmp_path / "k.npz", batch_size=3, source="b")
    stub = Stub()
    find_keypoints(stub, table, tmp_path / "k.npz", batch_size=3, source="a")
    assert stub.calls == 4 and not (tmp_path / "k.npz.part").exists()  # 9 of the 20 were done
    with np.load(whole) as first, np.load(tmp_path / "k.npz") as second:
        assert (first["keypoints"] == second["keypoints"]).all()
        assert first["names"].tolist() == table.names
        points = first["keypoints"]
    brightness = [float(image.mean()) for image in table.images]
    others = [i for i in range(20) if i != 7]
    for i in others:
        assert points[i] == pytest.approx(brightness[i], rel=1e-5)
    mean = [np.mean([(brightness[i] + 0.5) / side for i in others]) for side in (96, 128)]
    expected = [mean[0] * 30 - 0.5, mean[1] * 60 - 0.5]
    assert points[7, 3, :2] == pytest.approx(expected, rel=1e-4)
    assert points[7, :, 2].tolist() == [0] * 16
    assert read_keypoints(whole, table.names[::-1])[12] == pytest.approx(points[7, :, :2])
    with pytest.raises(ValueError, match="whole.npz: is here already"):
        find_keypoints(Stub(), table, whole)
    (tmp_path / "k.npz.part").write_bytes(b"not a part")
    (tmp_path / "k.npz").unlink()
    with pytest.raises(ValueError, match="k.npz.part: not a part of a keypoint file"):
        find_keypoints(Stub(), table, tmp_path / "k.npz")


def test_fig_a9a_average_image(tmp_path):
    table = synthetic("test", count=5, size=(64, 48))
    mean = np.mean([image.astype(float) for image in table.images], 0)
    assert np.abs(data.average_image(table.images, (64, 48)) - mean).max() <= 0.5001
    assert "the mean of 9 images" in succeed(
        f"data.py average --images 3 --size 32 24 --out {tmp_path}/new/average.png"
    )
    assert Image.open(tmp_path / "new" / "average.png").size == (24, 32)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["keypoints", "--out", "k.npz"], "--weights: give the pose network's"),
        (
            words("keypoints --out k.npz --images 2 --weights nowhere.pth"),
            "nowhere.pth: no such file, expected a state dict",
        ),
        (words("average --data nowhere --out a.png"), "nowhere/annotation.mat: no such file"),
        (words("average --out a.png --size 0 4"), "--size 0 4"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(arguments, message):
    assert message in refuse("data.py", *arguments)
