"""Datasets, joint transforms and the drawn pedestrians."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from conftest import words
from PIL import Image, ImageDraw
from torch.testing import assert_close

import data
from data import (
    FLIP,
    PA100K_GROUPS,
    Pedestrians,
    Split,
    flip,
    load_split,
    loader,
    photo_split,
    read_keypoints,
    resize,
    shift,
    synthetic,
)

SLICE = Path(__file__).parents[2] / "shared" / "data" / "pa100k-slice"
ATTRIBUTES = list(PA100K_GROUPS)


# ---- PA-100K ----


def write_pa100k(folder, images="data", counts=(4, 2, 2), attributes=ATTRIBUTES, change=None):
    """A few pictures and an annotation.mat in PA-100K's layout; returns what was written."""
    scipy_io = pytest.importorskip("scipy.io", reason="writing .mat files needs scipy")
    random = np.random.default_rng(0)
    (folder / images).mkdir(parents=True)

    def column(names):
        return np.array([[np.array([n])] for n in names] + [[None]], dtype=object)[:-1]

    mat, truth, number = {"attributes": column(attributes)}, {}, 0
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        names = [f"{number + i + 1:06d}.jpg" for i in range(count)]
        number += count
        labels = random.integers(0, 2, (count, len(attributes)), dtype=np.uint8)
        for name in names:
            pixels = random.integers(0, 255, (40, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / images / name)
        mat.update({f"{split}_images_name": column(names), f"{split}_label": labels})
        truth[split] = names, labels
    if change:
        change(mat)
    scipy_io.savemat(folder / "annotation.mat", mat)
    return truth


@pytest.mark.parametrize("images", ["data", "release_data/release_data"])
def test_pa100k_layouts(tmp_path, images):
    truth = write_pa100k(tmp_path, images)
    for split, (names, labels) in truth.items():
        table = load_split("pa100k", tmp_path, split)
        assert table.names == names and table.attributes == ATTRIBUTES
        assert table.groups == list(PA100K_GROUPS.values())
        assert [p.parent for p in table.images] == [tmp_path / images] * len(names)
        assert (table.labels == labels).all() and table.labels.dtype == np.float32
    both = load_split("pa100k", tmp_path, "trainval")
    assert both.names == truth["train"][0] + truth["val"][0]
    assert (both.labels == np.concatenate([truth["train"][1], truth["val"][1]])).all()


def spoil_label(mat):
    mat["train_label"][1, 0] = 3


def spoil_counts(mat):
    mat["train_label"] = mat["train_label"][:-1]


def spoil_attribute(mat):
    mat["attributes"][0, 0] = np.array(["Umbrella"])


def spoil_split(mat):
    mat["train_images_name"] = np.empty((0, 1), object)
    mat["train_label"] = np.zeros((0, 26), np.uint8)


def spoil_variable(mat):
    del mat["attributes"]


@pytest.mark.parametrize(
    "change, message",
    [
        (spoil_label, "label 3 of Female for 000002.jpg, expected 0 or 1"),
        (spoil_counts, r"labels are \[3, 26\], expected \[4, 26\]"),
        (spoil_attribute, "attribute Umbrella is in none of the groups"),
        (spoil_split, "no images"),
        (spoil_variable, r"not laid out as pa100k is published \(KeyError: 'attributes'\)"),
    ],
)
def test_pa100k_with_a_wrong_annotation(tmp_path, change, message):
    write_pa100k(tmp_path, change=change)
    with pytest.raises(ValueError, match=message) as error:
        load_split("pa100k", tmp_path, "train")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_pa100k_with_missing_files(tmp_path):
    write_pa100k(tmp_path)
    (tmp_path / "data" / "000003.jpg").unlink()
    expected = r"000003.jpg: no such image \(1 of 4 are missing\)"
    with pytest.raises(FileNotFoundError, match=expected):
        load_split("pa100k", tmp_path, "train")
    (tmp_path / "annotation.mat").write_bytes((tmp_path / "annotation.mat").read_bytes()[:300])
    with pytest.raises(ValueError, match="annotation.mat: not a readable .mat file"):
        load_split("pa100k", tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="nowhere/annotation.mat: no such file"):
        load_split("pa100k", tmp_path / "nowhere", "train")


def test_without_scipy_a_mat_file_names_the_install_command(tmp_path, monkeypatch):
    (tmp_path / "annotation.mat").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    expected = "annotation.mat: reading a .mat file needs scipy: pip install scipy"
    with pytest.raises(ValueError, match=expected):
        load_split("pa100k", tmp_path, "train")


def test_unreadable_images_are_named(tmp_path):
    write_pa100k(tmp_path)
    table = load_split("pa100k", tmp_path, "train")
    table.images[1].write_bytes(b"not a picture")
    with pytest.raises(ValueError, match="000002.jpg: not a readable image"):
        Pedestrians(table, (32, 24))[1]
    with pytest.raises(ValueError, match="000002.jpg: not a readable image"):
        list(loader(table, (32, 24), 4, workers=1))


@pytest.mark.skipif(not SLICE.is_dir(), reason="needs the PA-100K slice beside the project")
def test_pa100k_slice_is_read_as_scipy_reads_it():
    scipy_io = pytest.importorskip("scipy.io", reason="reading .mat files needs scipy")
    mat = scipy_io.loadmat(SLICE / "annotation.mat")
    for split, count in (("train", 1200), ("val", 200), ("test", 200)):
        table = load_split("pa100k", SLICE, split, keypoints=SLICE / "keypoints.npz")
        assert len(table.names) == count and (table.labels == mat[f"{split}_label"]).all()
        assert table.names == [n.item().item() for n in mat[f"{split}_images_name"]]
        image, labels, keypoints, _ = Pedestrians(table, (128, 96))[count - 1]
        assert image.shape == (3, 128, 96) and keypoints.shape == (16, 2)
        # People fill the crops: the mean head top is in the upper fifth, ankles in the lower third.
        some = range(0, count, 10)
        heights = [Image.open(table.images[i]).height for i in some]
        share = np.mean(table.keypoints[some, :, 1] / np.array(heights)[:, None], 0)
        assert share[9] < 0.2 and share[0] > 0.67 and share[5] > 0.67


# ---- tables and keypoint files ----


def table_of(labels, **kw):
    N, L = labels.shape
    groups, names = list(PA100K_GROUPS.values())[:L], [f"{i}" for i in range(N)]
    images = [np.full((40, 20, 3), i, np.uint8) for i in range(N)]
    return Split("t", ATTRIBUTES[:L], groups, names, images, labels.astype(np.float32), **kw)


def test_split_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="t: no images"):
        table_of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="label -1 of Female for 0"):
        table_of(np.array([[-1, 0]]))
    with pytest.raises(ValueError, match="label nan of AgeOver60"):
        table_of(np.array([[0, np.nan]]))
    with pytest.raises(ValueError, match="t: a is in group feet, not in head, torso, bottom, all"):
        Split("t", ["a"], ["feet"], ["x"], ["x"], np.zeros((1, 1)))


def test_keypoint_file(tmp_path):
    points = np.random.default_rng(0).random((3, 16, 3)).astype(np.float32)
    np.savez(tmp_path / "k.npz", names=["a", "b", "c"], keypoints=points)
    assert (read_keypoints(tmp_path / "k.npz", ["c", "a"]) == points[[2, 0], :, :2]).all()
    np.savez(tmp_path / "pickled.npz", names=np.array([{"a": 1}], dtype=object), keypoints=points)
    with pytest.raises(ValueError, match="pickled.npz: not a file of names and keypoints"):
        read_keypoints(tmp_path / "pickled.npz", ["a"])
    with pytest.raises(FileNotFoundError, match="none.npz"):
        read_keypoints(tmp_path / "none.npz", ["a"])


def test_photos_of_one_name_in_two_folders_do_not_share_keypoints(tmp_path):
    np.savez(tmp_path / "k.npz", names=["photo.png"], keypoints=np.ones((1, 16, 3)))
    files = [tmp_path / folder / "photo.png" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        Image.new("RGB", (10, 20)).save(file)
    assert photo_split(files[:1], ["Hat"], ["head"], tmp_path / "k.npz").keypoints.min() == 1
    assert photo_split(files, ["Hat"], ["head"]).images == files
    with pytest.raises(ValueError, match=r"k\.npz: tells images by their names, and two have"):
        photo_split(files, ["Hat"], ["head"], tmp_path / "k.npz")


@pytest.mark.parametrize(
    "names, change, message",
    [
        ("a c e", None, r"has no keypoints for image b \(1 of 2 are missing\)"),
        ("a", None, r"keypoints are \[3, 16, 3\], expected \[1, 16, 3\]"),
        ("a b a", None, "an image name occurs twice"),
        ("a b c", "x", "not a file of names and keypoints"),
        ("a b c", np.nan, "keypoints of b are not finite"),
        ("a b c", {"a": 1}, "not a file of names and keypoints"),
    ],
)
def test_a_keypoint_file_that_cannot_be_used_is_named(tmp_path, names, change, message):
    points = np.zeros((3, 16, 3)).astype(type(change) if isinstance(change, str | dict) else float)
    points[1, 2] = 0 if change is None else change
    np.savez(tmp_path / "k.npz", names=names.split(), keypoints=points)
    with pytest.raises(ValueError, match=f"k.npz: {message}"):
        read_keypoints(tmp_path / "k.npz", ["a", "b"])


# ---- joint transforms ----


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
    assert_close(again[0], marked(points, 20, 12))
    assert_close(again[1], sixteen(points))
    names = words("""
        r_ankle r_knee r_hip l_hip l_knee l_ankle pelvis thorax neck head
        r_wrist r_elbow r_shoulder l_shoulder l_elbow l_wrist
    """)
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


# ---- Pedestrians and loaders ----


def epoch_of(workers, epoch, seed=0, table=None):
    table = table or synthetic("train", count=10)
    batches = loader(table, (64, 48), 4, train=True, seed=seed, workers=workers)
    data.start_epoch(batches, epoch)
    return [torch.cat([part.flatten().float() for part in batch]) for batch in batches]


def test_training_batches_depend_on_seed_and_epoch_alone():
    table = synthetic("train", count=10)
    first = epoch_of(0, 3, table=table)
    for again in (epoch_of(0, 3, table=table), epoch_of(2, 3, table=table)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (epoch_of(0, 4, table=table), epoch_of(0, 3, seed=1, table=table)):
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_each_epoch_has_its_own_order():
    batches, orders = loader(synthetic("train", count=12), (32, 24), 4, train=True), []
    for epoch in range(2):
        data.start_epoch(batches, epoch)
        orders.append([i for *_, index in batches for i in index.tolist()])
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(12))


def test_an_item_has_the_models_shapes_and_normalization():
    table = table_of(np.zeros((2, 3)))
    image, labels, keypoints, i = Pedestrians(table, (64, 48))[1]
    assert [tuple(x.shape) for x in (image, labels, keypoints)] == [(3, 64, 48), (3,), (16, 2)]
    assert i == 1
    expected = [(1 / 255 - m) / s for m, s in zip(data.MEAN, data.STD, strict=True)]
    assert_close(image.mean((1, 2)), torch.tensor(expected))


# ---- drawn pedestrians ----


DRAWN = {  # hashes of what twenty images of each domain consist of
    0: "d9934642ce6199494f2194d3d6d15632",
    1: "479bd60ad96262ae3d108b82bd593a40",
}
PIXELS = {  # of their pixels; versions of Pillow differ in one of a hundred thousand
    ("10.1.0", 0): "c4011843775b644223c7b3b4035c7e1c",
    ("10.1.0", 1): "8cca74ede103704db74af9c15d9e232f",
    ("13.0.0", 0): "40ccca0defe9431154c281b951cc2fa3",
    ("13.0.0", 1): "98516c98139df4afa0dfa42e5804961d",
}


@pytest.mark.parametrize("domain", [0, 1])
def test_the_drawing_is_equal_to_the_byte_to_what_results_were_run_on(domain, monkeypatch):
    """Polygons with their colours, labels, points and boxes; pixels where Pillow's are known."""
    drawn, pixels, polygon = hashlib.sha256(), hashlib.sha256(), ImageDraw.ImageDraw.polygon

    def record(pen, corners, fill):
        drawn.update(np.rint(1000 * np.asarray(corners)).astype("<i8").tobytes() + bytes(fill))
        polygon(pen, corners, fill=fill)

    monkeypatch.setattr(ImageDraw.ImageDraw, "polygon", record)
    split = synthetic("train", domain=domain, count=20)
    drawn.update(split.labels.tobytes() + split.boxes.tobytes())
    drawn.update(np.rint(1000 * split.keypoints).astype("<i8").tobytes())
    for image in split.images:
        pixels.update(image.tobytes())
    assert drawn.hexdigest()[:32] == DRAWN[domain]
    if (PIL.__version__, domain) in PIXELS:
        assert pixels.hexdigest()[:32] == PIXELS[PIL.__version__, domain]


def test_synthetic_is_deterministic_and_splits_and_domains_differ():
    first, again = synthetic("val", count=3), synthetic("val", count=3)
    assert all((a == b).all() for a, b in zip(first.images, again.images, strict=True))
    assert (first.labels == again.labels).all() and (first.keypoints == again.keypoints).all()
    others = {"split": "test"}, {"split": "val", "domain": 1}, {"split": "val", "seed": 1}
    for other in (synthetic(count=3, **arguments) for arguments in others):
        assert not all((a == b).all() for a, b in zip(first.images, other.images, strict=True))
    more = synthetic("val", count=5)  # a longer split begins with the shorter one
    assert all((a == b).all() for a, b in zip(first.images, more.images[:3], strict=True))
    both = synthetic("trainval", count=3)
    assert both.names == synthetic("train", count=3).names + first.names
    named = load_split("synthetic", split="val", domain=1, images=3)
    assert named.names == synthetic("val", count=3, domain=1).names
    with pytest.raises(ValueError, match="domain 2"):
        synthetic("train", domain=2)


@pytest.mark.parametrize("domain", [0, 1])
def test_synthetic_labels_boxes_and_keypoints_are_consistent(domain):
    table = synthetic("train", domain=domain, count=400)
    has = {a: table.labels[:, j] == 1 for j, a in enumerate(ATTRIBUTES)}
    for exclusive in (
        ("ShortSleeve", "LongSleeve"),
        ("Front", "Side", "Back"),
        ("AgeOver60", "Age18-60", "AgeLess18"),
        ("Trousers", "Shorts", "Skirt&Dress"),
    ):
        assert (sum(has[a].astype(int) for a in exclusive) == 1).all()
    assert all(0.02 < has[a].mean() < 0.95 for a in ATTRIBUTES)
    boxed = np.isfinite(table.boxes).all(2)
    assert not (boxed & (table.labels == 0)).any()
    placeless = {"Female", "AgeOver60", "Age18-60", "AgeLess18", "Front", "Side", "Back"}
    for j, a in enumerate(ATTRIBUTES):
        assert boxed[has[a], j].mean() > 0.97 if a not in placeless else not boxed[:, j].any()
    left, top, right, bottom = table.boxes[boxed].T
    assert ((left >= 0) & (left < right) & (right <= 96)).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= 128)).all()
    y = table.keypoints[:, :, 1]
    assert (y[:, 9] < y[:, 8]).all() and (y[:, 8] < y[:, 7]).all() and (y[:, 6] < y[:, 0]).all()
    front, back = has["Front"], has["Back"]
    x = table.keypoints[:, :, 0]
    assert (x[front, 12] < x[front, 13]).all()  # right shoulder: picture's left in front
    assert (x[back, 12] > x[back, 13]).all()
    # Items sit where the joints are: hats at the head top, boots below the knees.
    hats, boots = ATTRIBUTES.index("Hat"), ATTRIBUTES.index("boots")

    def middle(j):
        return (table.boxes[boxed[:, j], j, 1] + table.boxes[boxed[:, j], j, 3]) / 2

    assert (np.abs(middle(hats) - y[boxed[:, hats], 9]) < 12).all()
    assert (middle(boots) > y[boxed[:, boots], 1]).all()


def test_synthetic_items_are_visible_in_their_boxes():
    """Drawing an attribute changes the picture inside its box, and hardly outside: checked on the
    hat."""
    j = ATTRIBUTES.index("Hat")
    table = synthetic("train", count=60)
    inside = []
    for i in np.nonzero(table.labels[:, j])[0]:
        left, top, right, bottom = table.boxes[i, j].astype(int)
        hat = table.images[i][top:bottom, left:right].reshape(-1, 3).astype(float)
        middle = (left + right) // 2
        skin = table.images[i][bottom + 2 : bottom + 5, middle - 2 : middle + 2]
        inside.append(np.abs(hat.mean(0) - skin.mean((0, 1))).sum())
    assert len(inside) >= 3 and np.median(inside) > 30


def test_synthetic_size_scales_picture_points_and_boxes():
    small, large = synthetic("train", count=4), synthetic("train", count=4, size=(256, 192))
    assert large.images[0].shape == (256, 192, 3) and (small.labels == large.labels).all()
    assert np.abs(large.keypoints + 0.5 - 2 * (small.keypoints + 0.5)).max() <= 1e-3
    assert np.nanmax(np.abs(large.boxes - 2 * small.boxes)) <= 2
