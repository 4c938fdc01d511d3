"""Images, joint transforms, batches, keypoints and the drawn pedestrians."""

import numpy as np
import pytest
import torch
from conftest import ATTRIBUTES, PA100K, refuse, succeed, words, write_keypoints
from PIL import Image
from torch.testing import assert_close

import data
from data import (
    FLIP,
    Pedestrians,
    Split,
    coco_to_mpii,
    find_keypoints,
    flip,
    load_split,
    loader,
    photo_split,
    read_image,
    read_keypoints,
    resize,
    shift,
    synthetic,
)

# ---- Splits


def split_of(labels, **more):
    N, L = labels.shape
    names = [f"{i}" for i in range(N)]
    images = [np.full((40, 20, 3), i, np.uint8) for i in range(N)]
    return Split("t", ATTRIBUTES[:L], PA100K[:L], names, images, labels, **more)


@pytest.mark.parametrize("label", [-1, 2, 0.5, np.nan])
def test_a_label_that_is_not_0_or_1_is_refused(label):
    with pytest.raises(ValueError, match=f"{ATTRIBUTES[1]} for 1"):
        split_of(np.array([[0, 1], [1, label]]))


def test_labels_and_names_of_different_numbers_are_refused():
    known = ["Hat"], ["head"], ["x", "y"], ["x", "y"]
    with pytest.raises(ValueError, match="t: labels"):
        Split("t", *known, np.zeros((3, 1)))


def test_a_digest_tells_names_labels_and_keypoints():
    first = split_of(np.eye(2)).digest()
    renamed = split_of(np.eye(2))
    renamed.names = ["0", "2"]
    pointed = split_of(np.eye(2), keypoints=np.ones((2, 16, 2), np.float32))
    assert split_of(np.eye(2)).digest() == first
    assert len({first, split_of(np.ones((2, 2))).digest(), renamed.digest(), pointed.digest()}) == 4


# ---- Images


def test_images_of_every_mode_are_read_as_rgb(tmp_path):
    colours = np.zeros((6, 4, 3), np.uint8)
    colours[..., 0], colours[2, 1] = 40, (200, 100, 50)
    rgb, turned = Image.fromarray(colours), Image.Exif()
    turned[0x0112] = 6  # stored lying, shown standing
    grey = Image.fromarray(colours[..., 1])
    kinds = {
        "palette.png": (rgb.quantize(4), {}, (200, 100, 50)),
        "alpha.png": (rgb.convert("RGBA"), {}, (200, 100, 50)),
        "cmyk.tif": (rgb.convert("CMYK"), {}, (200, 100, 50)),
        "grey.png": (grey, {}, (100, 100, 100)),
        "grey16.png": (Image.fromarray(np.array(grey, np.uint16) * 257), {}, (100, 100, 100)),
        "turned.png": (rgb.transpose(Image.Transpose.ROTATE_90), {"exif": turned}, (200, 100, 50)),
    }
    for name, (image, options, colour) in kinds.items():
        image.save(tmp_path / name, **options)
        found = read_image(tmp_path / name)
        assert found.dtype == torch.uint8
        assert found.shape == (3, 6, 4), name
        assert found[:, 2, 1].tolist() == pytest.approx(colour, abs=2), name


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(ValueError, match="bad.jpg"):
        read_image(tmp_path / "bad.jpg")


# ---- Joint transforms


def marked(points, H, W):
    """A black image with one white pixel at each of the points, one channel per point."""
    image = torch.zeros(len(points), H, W, dtype=torch.uint8)
    for k, (x, y) in enumerate(points):
        image[k, y, x] = 255
    return image


def brightest(image):
    """The (x, y) of each channel's brightest pixel."""
    return [divmod(channel.argmax().item(), image.shape[2])[::-1] for channel in image]


def sixteen(points):
    """Three points as the first of 16 keypoints."""
    return torch.cat([torch.tensor(points, dtype=torch.float32), torch.zeros(13, 2)])


def test_flip_moves_points_with_the_image_and_swaps_sides():
    points = [(3, 5), (10, 7), (0, 0)]  # r-ankle, r-knee, r-hip
    image, moved = flip(marked(points, 20, 12), sixteen(points))
    at = brightest(image)
    for k, left in enumerate((5, 4, 3)):  # what was right is now called left
        assert moved[left].tolist() == list(at[k])
    again = flip(*flip(marked(points, 20, 12), sixteen(points)))
    assert_close(again[1], sixteen(points))
    names = words("r_ankle r_knee r_hip l_hip l_knee l_ankle pelvis thorax neck head")
    names += words("r_wrist r_elbow r_shoulder l_shoulder l_elbow l_wrist")
    swap = {"r": "l", "l": "r"}
    assert [names[k] for k in FLIP] == [swap[n[0]] + n[1:] if n[1] == "_" else n for n in names]


def test_shift_moves_points_with_the_image():
    points = [(13, 15), (19, 17), (10, 10)]
    for dx, dy in ((0, 0), (20, 20), (10, 10), (3, 17)):
        image, moved = shift(marked(points, 40, 30), sixteen(points), dx, dy)
        assert image.shape == (3, 40, 30)
        assert [tuple(p) for p in moved[:3].tolist()] == brightest(image)


def test_resize_moves_points_with_the_image():
    points = [(3, 5), (10, 7), (1, 18)]
    # x3 and x5: centres stay on centres
    image, moved = resize(marked(points, 20, 12), sixteen(points), (60, 60))
    assert image.shape == (3, 60, 60)
    for (x, y), (u, v) in zip(points, moved[:3].tolist(), strict=True):
        assert (u, v) == (5 * x + 2, 3 * y + 1)
    assert [tuple(p) for p in moved[:3].tolist()] == brightest(image)


# ---- Batches


def epoch_of(split, workers, epoch, seed=0):
    batches = loader(split, (64, 48), 4, train=True, seed=seed, workers=workers)
    data.start_epoch(batches, epoch)
    return [torch.cat([part.flatten().float() for part in batch]) for batch in batches]


def test_training_batches_depend_on_seed_and_epoch_alone():
    split = synthetic("train", images=10)
    first = epoch_of(split, 0, 3)
    for again in (epoch_of(split, 0, 3), epoch_of(split, 2, 3)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (epoch_of(split, 0, 4), epoch_of(split, 0, 3, seed=1)):
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own():
    batches, orders = loader(synthetic("train", images=12), (32, 24), 4, train=True), []
    for epoch in range(2):
        data.start_epoch(batches, epoch)
        orders.append([i for *_, index in batches for i in index.tolist()])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))


def test_augmentation_shifts_up_to_ten_pixels_and_mirrors_half_of_the_images():
    """By the keypoints, which move with the image."""
    points = np.zeros((1, 16, 2), np.float32)
    points[:, :, 0] = np.arange(16)
    split = Split("t", ["Hat"], ["head"], ["0"], [np.zeros((64, 48, 3), np.uint8)], [[1]], points)
    batches, shifts, mirrored = Pedestrians(split, (64, 48), train=True), [], 0
    for epoch in range(400):
        batches.epoch = epoch
        found = batches[0][2]
        flipped = found[0, 0] > 20  # mirrored points lie at the right
        mirrored += int(flipped)
        back = flip(torch.zeros(3, 64, 48), found)[1] if flipped else found
        shifts.append((back - torch.from_numpy(points[0]))[0].tolist())
    low, high = np.min(shifts, 0), np.max(shifts, 0)
    assert low.tolist() == [-10, -10]
    assert high.tolist() == [10, 10]
    assert 150 < mirrored < 250


def test_an_item_has_the_models_shapes_and_normalization():
    image, labels, keypoints, i = Pedestrians(split_of(np.zeros((2, 3))), (64, 48))[1]
    assert [tuple(x.shape) for x in (image, labels, keypoints)] == [(3, 64, 48), (3,), (16, 2)]
    assert i == 1
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    expected = [(1 / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    assert_close(image.mean((1, 2)), torch.tensor(expected))


def test_shares_of_several_processes_make_up_the_batch_and_validate_each_image_once():
    split = synthetic("train", images=23)

    def epoch(batches):
        return [index.tolist() for *_, index in batches]

    common = {"size": (32, 24), "batch_size": 8, "train": True, "seed": 3}
    shares = [loader(split, **common, rank=r, ranks=2) for r in range(2)]
    whole = loader(split, **common)
    for number in (0, 1):
        for batches in (*shares, whole):
            data.start_epoch(batches, number)
        for a, b, both in zip(epoch(shares[0]), epoch(shares[1]), epoch(whole), strict=True):
            assert len(a) == len(b) == 4
            assert sorted(a + b) == sorted(both)
    validation = [loader(split, (32, 24), 6, rank=r, ranks=3) for r in range(3)]
    seen = [i for batches in validation for batch in epoch(batches) for i in batch]
    assert sorted(seen) == list(range(23))


# ---- Keypoints


def test_keypoint_file(tmp_path):
    points = np.random.default_rng(0).random((3, 16, 3)).astype(np.float32)
    np.savez(tmp_path / "k.npz", names=["a", "b", "c"], keypoints=points)
    assert (read_keypoints(tmp_path / "k.npz", ["c", "a"]) == points[[2, 0], :, :2]).all()


@pytest.mark.parametrize(
    "names, points",
    [
        (["a", "c", "d"], np.zeros((3, 16, 3))),  # b is missing
        (["a", "b", "a"], np.zeros((3, 16, 3))),  # twice
        (["a", "b"], np.zeros((2, 17, 3))),  # COCO's
        (["a", "b"], np.full((2, 16, 3), np.nan)),
        (["a", "b"], np.full((2, 16, 3), {"a": 1}, object)),  # pickled: could run code
    ],
)
def test_a_keypoint_file_that_cannot_be_used_is_named(tmp_path, names, points):
    np.savez(tmp_path / "k.npz", names=names, keypoints=points)
    with pytest.raises(ValueError, match=r"k\.npz"):
        read_keypoints(tmp_path / "k.npz", ["a", "b"])


def test_photos_of_one_name_in_two_folders_do_not_share_keypoints(tmp_path):
    write_keypoints(tmp_path / "k.npz", ["photo.png"])
    files = [tmp_path / folder / "photo.png" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        Image.new("RGB", (10, 20)).save(file)
    assert photo_split(files[:1], ["Hat"], ["head"], tmp_path / "k.npz").keypoints.min() == 10
    assert photo_split(files, ["Hat"], ["head"]).images == files
    with pytest.raises(ValueError, match=r"k\.npz"):
        photo_split(files, ["Hat"], ["head"], tmp_path / "k.npz")
    out = tmp_path / "found.npz"
    assert "same name" in refuse("data.py", *files, "--out", out)
    assert not out.exists()


def test_keypoint_rcnn_points_become_mpiis():
    """A person standing straight, 100 high: each point against its place by hand."""
    coco = words("50,10 52,8 48,8 54,12 46,12 60,20 40,20 65,35 35,35 66,50 34,50")
    coco += words("55,50 45,50 55,75 45,75 55,95 45,95")
    face = (10 + 8 + 8 + 12 + 12) / 5
    neck, top = 20 + 0.45 * (face - 20), 20 + 1.65 * (face - 20)
    mpii = words(f"45,95 45,75 45,50 55,50 55,75 55,95 50,50 50,20 50,{neck} 50,{top}")
    mpii += words("34,50 35,35 40,20 60,20 65,35 66,50")
    found, expected = (torch.tensor([[*map(float, p.split(","))] for p in x]) for x in (coco, mpii))
    assert_close(coco_to_mpii() @ found, expected)
    assert_close(coco_to_mpii().sum(1), torch.ones(16))  # moving the person moves all points alike


class Detector(torch.nn.Module):
    """In the detector's place: finds COCO's points at (k, 2 k) of each image but the black."""

    def forward(self, images):
        (image,) = images
        assert image.dtype == torch.float32
        assert image.max() <= 1
        k = torch.arange(17.0)
        people = torch.stack([k, 2 * k, torch.ones(17)], 1).repeat(2, 1, 1)
        people[1] += 100  # a second person, less sure
        count = 2 if image.max() > 0 else 0
        return [{"scores": torch.tensor([0.9, 0.3])[:count], "keypoints": people[:count]}]


def test_finding_keypoints_takes_the_surest_person_and_fills_in_the_mean_pose():
    images = [np.full((40, 20, 3), 200, np.uint8), np.zeros((80, 60, 3), np.uint8)]
    points = find_keypoints(Detector(), images)
    assert points.shape == (2, 16, 3)
    assert points[0, 0] == pytest.approx([16, 32, 0.9])  # right ankle
    assert points[0, 6] == pytest.approx([11.5, 23, 0.9])  # pelvis
    assert (points[1, :, 2] == 0).all()
    x, y = (16 + 0.5) / 20 * 60 - 0.5, (32 + 0.5) / 40 * 80 - 0.5
    assert points[1, 0, :2] == pytest.approx([x, y])
    with pytest.raises(ValueError, match="nobody"):
        find_keypoints(Detector(), images[1:])


def test_the_keypoint_command_writes_a_file_that_training_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "keypointrcnn_resnet50_fpn", lambda **_: Detector())
    printed = succeed("data.py", "--images", "2", "--split", "val", "--out", tmp_path / "new/k.npz")
    assert "2 images" in printed
    found = load_split("synthetic", split="val", images=2, keypoints=tmp_path / "new/k.npz")
    assert found.keypoints[1, 0].tolist() == [16, 32]


# ---- Drawn pedestrians


def test_synthetic_is_deterministic_and_splits_seeds_and_domains_differ():
    first, again = synthetic("val", images=3), synthetic("val", images=3)
    assert all((a == b).all() for a, b in zip(first.images, again.images, strict=True))
    assert first.digest() == again.digest()
    others = {"split": "test"}, {"split": "val", "domain": 1}, {"split": "val", "seed": 1}
    for other in (synthetic(images=3, **arguments) for arguments in others):
        assert not all((a == b).all() for a, b in zip(first.images, other.images, strict=True))
    more = synthetic("val", images=5)  # a longer split begins with the shorter one
    assert all((a == b).all() for a, b in zip(first.images, more.images[:3], strict=True))
    both = synthetic("trainval", images=3)
    assert both.names == synthetic("train", images=3).names + first.names


@pytest.mark.parametrize("domain", [0, 1])
def test_synthetic_labels_boxes_and_keypoints_are_consistent(domain):
    split = synthetic("train", domain=domain, images=400)
    has = {a: split.labels[:, j] == 1 for j, a in enumerate(ATTRIBUTES)}
    for exclusive in (
        ("ShortSleeve", "LongSleeve"),
        ("Front", "Side", "Back"),
        ("AgeOver60", "Age18-60", "AgeLess18"),
        ("Trousers", "Shorts", "Skirt&Dress"),
    ):
        assert (sum(has[a].astype(int) for a in exclusive) == 1).all()
    assert all(0.02 < has[a].mean() < 0.95 for a in ATTRIBUTES)
    boxed = np.isfinite(split.boxes).all(2)
    assert not (boxed & (split.labels == 0)).any()
    placeless = {"Female", "AgeOver60", "Age18-60", "AgeLess18", "Front", "Side", "Back"}
    for j, a in enumerate(ATTRIBUTES):
        assert boxed[has[a], j].mean() > 0.97 if a not in placeless else not boxed[:, j].any(), a
    left, top, right, bottom = split.boxes[boxed].T
    assert ((left >= 0) & (left < right) & (right <= 96)).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= 128)).all()
    x, y = split.keypoints[:, :, 0], split.keypoints[:, :, 1]
    assert (y[:, 9] < y[:, 8]).all()
    assert (y[:, 8] < y[:, 7]).all()
    assert (y[:, 6] < y[:, 0]).all()
    assert (x[has["Front"], 12] < x[has["Front"], 13]).all()  # right shoulder: left in the image
    assert (x[has["Back"], 12] > x[has["Back"], 13]).all()
    # Things sit where the joints are: hats at the head top, boots below the knees.
    hats, boots = ATTRIBUTES.index("Hat"), ATTRIBUTES.index("boots")
    middle = (split.boxes[..., 1] + split.boxes[..., 3]) / 2
    assert (np.abs(middle[:, hats] - y[:, 9])[boxed[:, hats]] < 12).all()
    assert (middle[:, boots] > y[:, 1])[boxed[:, boots]].all()


def test_synthetic_size_scales_images_points_and_boxes():
    small, large = synthetic("train", images=4), synthetic("train", images=4, size=(256, 192))
    assert large.images[0].shape == (256, 192, 3)
    assert (small.labels == large.labels).all()
    assert np.abs(large.keypoints + 0.5 - 2 * (small.keypoints + 0.5)).max() <= 1e-3
    assert np.nanmax(np.abs(large.boxes - 2 * small.boxes)) <= 2
