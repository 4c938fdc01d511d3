"""Images, joint transforms, batches, keypoints and the synthetic set."""

import argparse
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ATTRIBUTES,
    PA100K,
    command,
    person_image,
    refuse,
    succeed,
    words,
    write_keypoints,
)
from PIL import Image, ImageFile
from torch.testing import assert_close

import data
from data import Pedestrians, Split, flip, loader, photo_split, read_image, synthetic


def split_of(labels, names=("0", "1"), **more):
    labels = np.asarray(labels)
    images = [np.full((40, 20, 3), i, np.uint8) for i in range(len(labels))]
    L = labels.shape[1]
    return Split("t", ATTRIBUTES[:L], PA100K[:L], list(names), images, labels, **more)


@pytest.mark.parametrize("labels", [[[0, 1], [1, 0.5]], [[0, 1], [1, np.nan]], np.zeros((3, 2))])
def test_labels_that_are_not_0_or_1_for_each_image_are_refused(labels):
    with pytest.raises(ValueError, match=f"{ATTRIBUTES[1]} for 1|t: labels"):
        split_of(labels)


def test_a_digest_tells_names_labels_and_keypoints():
    pointed = split_of(np.eye(2), keypoints=np.ones((2, 16, 2), np.float32))
    others = split_of(np.ones((2, 2))), split_of(np.eye(2), names="02"), pointed
    first = split_of(np.eye(2)).digest()
    assert split_of(np.eye(2)).digest() == first
    assert len({first, *(other.digest() for other in others)}) == 4


def test_images_of_every_mode_are_read_as_rgb(tmp_path, monkeypatch):
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
        "grey16.png": (Image.fromarray(np.array(grey, np.uint16) * 256 + 7), {}, (100, 100, 100)),
        "turned.png": (rgb.transpose(Image.Transpose.ROTATE_90), {"exif": turned}, (200, 100, 50)),
    }
    for name, (image, options, colour) in kinds.items():
        image.save(tmp_path / name, **options)
        found = read_image(tmp_path / name)
        assert found.dtype == torch.uint8
        assert found.shape == (3, 6, 4), name
        assert found[:, 2, 1].tolist() == pytest.approx(colour, abs=2), name
    turned_jpeg = rgb.transpose(Image.Transpose.ROTATE_90)
    turned_jpeg.save(tmp_path / "turned.jpg", exif=turned)
    turned_jpeg.save(tmp_path / "turned.tif", exif=turned)
    for name in ("turned.jpg", "turned.tif"):
        assert read_image(tmp_path / name).shape == (3, 6, 4), name
    with monkeypatch.context() as patch:  # of no file a pixel is decoded
        patch.setattr(ImageFile.ImageFile, "load_prepare", lambda image: 1 / 0)
        for name in (*kinds, "turned.jpg", "turned.tif"):
            assert data.image_size(tmp_path / name) == (6, 4), name
    seen_by_opencv = np.asarray(rgb)[:, :, ::-1]  # BGR
    assert read_image(seen_by_opencv[:, :, ::-1])[:, 2, 1].tolist() == [200, 100, 50]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(np.asarray(rgb))[:, 2, 1].tolist() == [200, 100, 50]  # read-only
    big_endian = Image.frombytes("I;16B", (2, 1), bytes([100, 7, 200, 7]))
    assert read_image(big_endian)[0].tolist() == [[100, 200]]
    assert read_image(rgb)[:, 2, 1].tolist() == [200, 100, 50]
    assert rgb.getpixel((1, 2)) == (200, 100, 50)  # it is still open


def test_images_that_are_not_of_uint8_and_three_channels_are_refused(tmp_path, monkeypatch):
    """Others gave sure, wrong answers: of a float image 255 is not white."""
    image = torch.zeros(3, 6, 4, dtype=torch.uint8)
    others = [image.float(), image.long(), image.bool(), image[None], image[:1], image[0]]
    others += [image.permute(1, 2, 0), np.zeros((6, 4, 4), np.uint8), np.zeros((6, 4, 3))]
    others += [Image.new("I", (4, 6)), Image.new("F", (4, 6))]
    for other in others:
        with pytest.raises(data.InputError, match="image"):
            read_image(other)
    Image.new("F", (4, 6)).save(tmp_path / "F.tif")
    with pytest.raises(data.InputError, match=r"F\.tif"):
        read_image(tmp_path / "F.tif")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)  # larger ones may be bombs
    rgb = Image.new("RGB", (4, 6))
    rgb.save(tmp_path / "bomb.png")
    for read in (read_image, data.image_size):
        with pytest.raises(data.InputError, match=r"bomb\.png"):
            read(tmp_path / "bomb.png")


def marked(points, H, W):
    """A black image with one white pixel for each point, in its own channel; 16 keypoints."""
    image = torch.zeros(len(points), H, W, dtype=torch.uint8)
    for k, (x, y) in enumerate(points):
        image[k, y, x] = 255
    return image, torch.cat([torch.tensor(points).float(), torch.zeros(16 - len(points), 2)])


def brightest(image):
    """The [x, y] of each channel's brightest pixel."""
    return [[*divmod(channel.argmax().item(), image.shape[2])][::-1] for channel in image]


def test_flip_moves_points_with_the_image_and_swaps_sides():
    image, points = marked([(3, 5), (10, 7), (0, 0)], 20, 12)  # r-ankle, r-knee, r-hip
    mirrored, moved = flip(image, points)
    assert moved[[5, 4, 3]].tolist() == brightest(mirrored)  # what was right is now called left
    assert_close(flip(mirrored, moved)[1], points)
    names = words("r_ankle r_knee r_hip l_hip l_knee l_ankle pelvis thorax neck head")
    names += words("r_wrist r_elbow r_shoulder l_shoulder l_elbow l_wrist")
    swap = {"r": "l", "l": "r"}
    expected = [swap[name[0]] + name[1:] if name[1] == "_" else name for name in names]
    assert [names[k] for k in data.FLIP] == expected


def test_shift_and_resize_move_points_with_the_image():
    for dx, dy in ((0, 0), (20, 20), (10, 10), (3, 17)):
        image, moved = data.shift(*marked([(13, 15), (19, 17), (10, 10)], 40, 30), dx, dy)
        assert image.shape == (3, 40, 30)
        assert moved[:3].tolist() == brightest(image)
    points = [(3, 5), (10, 7), (1, 18)]
    image, moved = data.resize(*marked(points, 20, 12), (60, 60))
    assert image.shape == (3, 60, 60)
    # x3 and x5: centres stay on centres
    assert moved[:3].tolist() == [[5 * x + 2, 3 * y + 1] for x, y in points] == brightest(image)
    stripes = torch.zeros(3, 64, 48, dtype=torch.uint8)
    stripes[:, :, ::2] = 200
    image, _ = data.resize(stripes, torch.zeros(16, 2), (64, 16))
    assert (image[:, :, 2:-2].float() - 100).abs().max() < 20  # means of what it joins


def test_batches_are_loaded_as_their_images_and_device_ask_for(tmp_path, monkeypatch):
    """Files by several processes; under torchrun a process has a GPU of its own; a CPU flushes."""
    Image.new("RGB", (20, 40)).save(tmp_path / "a.png")
    photos, arrays = photo_split([tmp_path], ["Hat"], ["head"]), split_of([[1], [0]])
    for split, workers in ((photos, data.WORKERS), (arrays, 0)):
        images = Pedestrians(split, (64, 48))
        assert loader(images, 2).num_workers == workers
        assert loader(images, 2, workers=1, pin=True).pin_memory
        assert not loader(images, 2).pin_memory
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert data.use_device("cuda") == "cuda:1"
    assert chosen == [1]
    assert not torch.backends.cudnn.benchmark  # data.py's images differ in size
    assert data.use_device("cpu") == "cpu" and torch.tensor(1e-39) * 2 == 0  # flushed to 0
    with pytest.raises(argparse.ArgumentTypeError, match="torchrun"):
        data.use_device("cuda:0")
    for count in (0, 1):  # one too few
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(argparse.ArgumentTypeError, match=f"{count} GPUs"):
            data.use_device("cuda")


def indices(batches, epoch):
    """Each batch's images in this epoch, by their place in the split."""
    data.start_epoch(batches, epoch)
    return [index.tolist() for *_, index in batches]


def test_training_batches_depend_on_seed_and_epoch_alone():
    split = synthetic("train", images=10)

    def epoch_of(workers, epoch, seed=0):
        images = Pedestrians(split, (64, 48), train=True, seed=seed)
        batches = loader(images, 4, workers)
        data.start_epoch(batches, epoch)
        return torch.cat([part.flatten() for batch in batches for part in batch])

    first = epoch_of(0, 3)
    assert torch.equal(first, epoch_of(0, 3))
    batches = loader(Pedestrians(split, (64, 48), train=True), 4, workers=1)
    for epoch in (3, 4):  # the same loader's next epoch
        data.start_epoch(batches, epoch)
        found = torch.cat([part.flatten() for batch in batches for part in batch])
        assert torch.equal(found, epoch_of(0, epoch))
    assert torch.equal(first, epoch_of(2, 3))
    assert not torch.equal(first, epoch_of(0, 4))
    assert not torch.equal(first, epoch_of(0, 3, seed=1))
    orders = []
    for seed in range(3):  # no epoch of one seed has the order of another's
        batches = loader(Pedestrians(split, (64, 48), train=True, seed=seed), 4)
        orders += [str(indices(batches, epoch)) for epoch in range(3)]
    assert len(set(orders)) == 9
    first, second = (Pedestrians(split, (64, 48), train=True, seed=seed) for seed in (0, 1))
    assert not all(torch.equal(first[i][0], second[i][0]) for i in range(3))


def test_augmentation_shifts_up_to_ten_pixels_and_mirrors_half_of_the_images():
    points = np.zeros((1, 16, 2), np.float32)
    points[:, :, 0] = np.arange(16)
    split = Split("t", ["Hat"], ["head"], ["0"], [np.zeros((64, 48, 3), np.uint8)], [[1]], points)
    batches, shifts, mirrored = Pedestrians(split, (64, 48), train=True), [], 0
    for epoch in range(400):
        batches.epoch = epoch
        found = batches[0][2]
        if found[0, 0] > 20:  # mirrored points lie at the right
            mirrored += 1
            found = flip(torch.zeros(3, 64, 48), found)[1]
        shifts.append((found - torch.from_numpy(points[0]))[0].tolist())
    assert np.min(shifts, 0).tolist() == [-10, -10]
    assert np.max(shifts, 0).tolist() == [10, 10]
    assert 150 < mirrored < 250


def test_jitter_changes_colours_by_up_to_40_percent_and_blackens_a_part_of_every_other_image():
    """A grey image shows the brightness alone, a coloured one the saturation, too."""
    values, heights, widths = [], [], []
    for seed in range(400):
        found = data.jitter(
            torch.full((3, 60, 40), 100, dtype=torch.uint8), np.random.default_rng(seed)
        )
        black = (found == 0).all(0)
        values.append(found[:, ~black].unique().item())
        if black.any():
            rows, columns = black.any(1), black.any(0)
            assert torch.equal(black, rows[:, None] & columns)  # a rectangle
            heights.append(rows.sum().item())
            widths.append(columns.sum().item())
    assert (min(values), max(values)) == pytest.approx((60, 140), abs=3)
    assert 150 < len(heights) < 250
    assert (min(heights), max(heights)) == pytest.approx((6, 23), abs=1)
    assert (min(widths), max(widths)) == pytest.approx((4, 15), abs=1)
    orange = torch.tensor([180, 100, 60], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    spans = []
    for seed in range(200):
        colour = data.jitter(orange, np.random.default_rng(seed)).amax((1, 2)).float()
        spans.append(((colour[0] - colour[2]) / colour[1]).item())  # 1.2 before
    assert min(spans) < 0.9
    assert max(spans) > 1.5
    split = split_of(np.zeros((1, 3)), "0")
    split.images = [np.full((64, 48, 3), 100, np.uint8)]
    plain = Pedestrians(split, (64, 48), True, 1)[0][0]
    jittered = Pedestrians(split, (64, 48), True, 1, jittered=True)[0][0]
    assert set(plain.unique().tolist()) <= {0, 100}
    assert not set(jittered.unique().tolist()) <= {0, 100}
    assert torch.equal(jittered, Pedestrians(split, (64, 48), True, 1, jittered=True)[0][0])


def test_an_item_has_the_models_shapes_and_normalize_its_scale():
    image, labels, keypoints, i = Pedestrians(split_of(np.zeros((2, 3))), (64, 48))[1]
    assert [tuple(x.shape) for x in (image, labels, keypoints)] == [(3, 64, 48), (3,), (16, 2)]
    assert i == 1
    assert image.dtype == torch.uint8
    image = data.normalize(image)
    with pytest.raises(ValueError, match="uint8"):
        data.normalize(image)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's
    expected = [(1 / 255 - m) / s for m, s in zip(mean, std, strict=True)]
    assert_close(image.mean((1, 2)), torch.tensor(expected))


def test_shares_of_several_processes_make_up_the_batch_and_validate_each_image_once():
    split = synthetic("train", images=23)
    images = Pedestrians(split, (32, 24), train=True, seed=3)
    shares = [loader(images, 8, rank=rank, ranks=2) for rank in (0, 1)]
    for epoch in (0, 1):
        found = [indices(batches, epoch) for batches in (*shares, loader(images, 8))]
        for a, b, both in zip(*found, strict=True):
            assert len(a) == len(b) == 4
            assert sorted(a + b) == sorted(both)
    images = Pedestrians(split, (32, 24))
    validation = [loader(images, 6, rank=r, ranks=3) for r in range(3)]
    seen = [i for batches in validation for *_, index in batches for i in index.tolist()]
    assert sorted(seen) == list(range(23))


def test_a_keypoint_file_is_read_by_names_and_named_where_it_cannot_be_used(tmp_path):
    images = [np.zeros((40, 20, 3), np.uint8)] * 2
    points = np.random.default_rng(0).random((3, 16, 3)).astype(np.float32)
    np.savez(tmp_path / "k.npz", names=["a", "b", "c"], keypoints=20 * points)
    read = data.read_keypoints(tmp_path / "k.npz", ["c", "a"], images)
    assert (read == 20 * points[[2, 0], :, :2]).all()
    low = points * (19, 10, 1) + (0, 28, 0)  # below what is as high as the images are wide
    np.savez(tmp_path / "k.npz", names=["a", "b", "c"], keypoints=low)
    assert (data.read_keypoints(tmp_path / "k.npz", ["a", "b"], images)[:, :, 1] > 20).all()
    for names, given, said in (
        ("acd", points, "b"),
        ("aba", points, "distinct"),
        ("ab", np.zeros((2, 17, 3)), "16"),  # COCO's
        ("ab", np.full((2, 16, 3), np.nan), "not finite"),
        ("ab", points[:2], "pixel"),  # shares
        ("ab", 50 + np.arange(96).reshape(2, 16, 3), "pixel"),  # all outside
        ("ab", np.full((2, 16, 3), {"a": 1}, object), ""),  # pickled: could run code
    ):
        np.savez(tmp_path / "k.npz", names=[*names], keypoints=given)
        with pytest.raises(ValueError, match=rf"k\.npz: .*{said}"):
            data.read_keypoints(tmp_path / "k.npz", ["a", "b"], images)


def test_a_folders_images_are_those_that_pillow_opens(tmp_path, capsys):
    for name in ("a.tif", "b.gif", "c.JFIF", "d.jpg"):
        image = Image.new("RGB", (10, 20))
        image.save(tmp_path / name, "JPEG" if name == "c.JFIF" else None)
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "e.heic").write_text("which Pillow does not open")
    (tmp_path / "folder").mkdir()
    found = photo_split([tmp_path], ["Hat"], ["head"])
    assert found.names == [str(tmp_path / name) for name in ("a.tif", "b.gif", "c.JFIF", "d.jpg")]
    assert all(read_image(image).shape == (3, 20, 10) for image in found.images)
    assert "3 that are no images by their names, such as e.heic" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert "no images" in refuse("data.py", "empty", "--out", "k.npz")
    for option in ("--split val", "--dataset csv", "--images 4"):
        line = refuse("data.py", tmp_path / "d.jpg", *words(option), "--out", "k.npz")
        assert option.split()[0] in line


def test_photos_of_one_name_in_two_folders_do_not_share_keypoints(tmp_path):
    write_keypoints(tmp_path / "k.npz", ["photo.png"])
    files = [tmp_path / folder / "photo.png" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        Image.new("RGB", (20, 40)).save(file)
    assert photo_split(files[:1], ["Hat"], ["head"], tmp_path / "k.npz").keypoints.min() == 10
    with pytest.raises(ValueError, match=r"k\.npz"):
        photo_split(files, ["Hat"], ["head"], tmp_path / "k.npz")
    assert "same name" in refuse("data.py", *files, "--out", tmp_path / "found.npz")
    assert not (tmp_path / "found.npz").exists()


def test_points_are_found_in_pixels_of_the_image(bright_person):
    points = data.find_points(read_image(person_image((30, 40, 90, 160))))
    assert points.shape == (16, 3)
    assert points[[0, 15], :2].flatten().tolist() == pytest.approx([30, 40, 89, 159], abs=2)
    assert points[:, 2].min() > 0.99
    nobody = data.find_points(torch.zeros(3, 200, 150, dtype=torch.uint8))
    assert nobody[:, 2].max() < 0.05


def test_an_image_is_cropped_where_its_person_is_small_and_seen(bright_person):
    small = read_image(person_image((60, 50, 90, 150)))
    image, points, box = data.look_at(small, crop=True)
    left, top, right, bottom = box
    assert (left, top, right, bottom) == pytest.approx((54.5, 46, 94.5, 155), abs=2)
    assert torch.equal(image, small[:, top:bottom, left:right])
    inside = [60 - left, 50 - top, 89 - left, 149 - top]  # found again, on the crop
    assert points[[0, 15], :2].flatten().tolist() == pytest.approx(inside, abs=1.5)
    whole = 0, 0, 150, 200
    assert data.look_at(small)[2] == whole
    large = read_image(person_image((20, 5, 130, 195)))
    for photo in (large, torch.zeros_like(small)):  # nobody: taken whole
        image, _, box = data.look_at(photo, crop=True)
        assert box == whole
        assert image is photo
    given = torch.tensor([[60.0, 50], [90, 150]]).repeat(8, 1)
    image, points, box = data.look_at(torch.zeros_like(small), given, crop=True)
    assert image.shape[1:] == (box[3] - box[1], box[2] - box[0])
    assert torch.equal(points[:, :2] + torch.tensor(box[:2]), given)
    for beside, box in ((0.0, (0, 0, 1, 1)), (500.0, (149, 199, 150, 200))):  # never empty
        assert data.person_box(torch.full((16, 2), beside), 200, 150) == box


def test_finding_keypoints_goes_on_where_it_stopped_and_keeps_the_rest(monkeypatch, bright_person):
    """After an interrupt, beside other images' points and past a damaged file."""
    for i in range(6):
        Image.fromarray(person_image((60, 50, 90, 150))).save(f"{i}.png")
    Path("3.png").write_bytes(b"damaged")
    write_keypoints("k.npz", ["another.png"])
    seen, limit = [], 5
    find_points = data.find_points

    def interrupted(image):
        seen.append(1)
        if len(seen) == limit:
            raise KeyboardInterrupt
        return find_points(image)

    monkeypatch.setattr(data, "find_points", interrupted)
    options = ["data.py", *(f"{i}.png" for i in range(6)), *words("--out k.npz --workers 0")]
    assert command(*options).returncode == 130  # at 4.png
    with np.load("k.npz") as archive:
        assert archive["names"].tolist() == ["another.png", "0.png", "1.png", "2.png"]
    done = command(*options)
    assert done.returncode == 1
    assert "3.png" in done.stderr
    assert len(seen) == 5 + 3  # 3.png, black in its place, 4.png and 5.png
    with np.load("k.npz") as archive:
        assert len(archive["names"]) == 6
        assert archive["keypoints"][0, 0].tolist() == [10, 10, 10]
        assert archive["keypoints"][5, 0] == pytest.approx([60, 50, 1], abs=1.5)


def test_keypoints_are_saved_every_half_minute(monkeypatch, bright_person):
    """A kill, which nothing can catch, loses what came after."""
    images = [person_image((60, 50, 90, 150))] * 3
    split = Split("t", ["Hat"], ["head"], ["a", "b", "c"], images, [[0]] * 3)
    times = iter(range(0, 10**6, 20))  # each look at the clock is 20 seconds after the last
    monkeypatch.setattr(data.time, "time", lambda: next(times))
    counts = []
    monkeypatch.setattr(data.np, "savez", lambda *_, names, **__: counts.append(len(names)))
    with pytest.raises(OSError):  # nothing was written to take the file's place
        data.write_keypoints("k.npz", split)
    assert counts[0] < 3


def test_crops_are_written_and_their_keypoints_are_in_their_pixels(bright_person, monkeypatch):
    """A photo without room around its person is copied; no photo is written over."""
    look_at = data.look_at
    Image.fromarray(person_image((60, 50, 90, 150))).save("small.png")
    Image.fromarray(person_image((20, 5, 130, 195))).save("large.png")
    options = ["data.py", "small.png", "large.png", *words("--out k.npz --crops")]
    before = {name: Path(name).read_bytes() for name in ("small.png", "large.png")}
    assert "." in refuse(*options, ".")
    assert {name: Path(name).read_bytes() for name in before} == before
    assert "2 images" in succeed(*options, "crops")
    assert Path("crops/large.png").read_bytes() == before["large.png"]
    crop = read_image("crops/small.png")
    assert crop.shape[1] < 120
    split = photo_split(["crops"], ["Hat"], ["head"], "k.npz")
    found = dict(zip([Path(name).name for name in split.names], split.keypoints, strict=True))
    x, y = found["small.png"][0].round().astype(int)
    assert crop[0, y, x] == 255
    shapes = []
    monkeypatch.setattr(data, "look_at", lambda i, *_: shapes.append(i.shape) or look_at(i))
    assert "2 images" in succeed("data.py", *words("--images 2 --split val --out new/k.npz"))
    assert set(shapes) == {(3, 128, 96)}
    drawn = data.load_split("synthetic", split="val", images=2, keypoints="new/k.npz")
    assert drawn.keypoints.shape == (2, 16, 2)


def test_synthetic_is_deterministic_differs_by_split_and_seed_and_scales():
    def drawn(split="val", images=3, **more):
        return np.stack(synthetic(split, images=images, **more).images)

    first = drawn()
    assert (first == drawn()).all()
    assert (first == drawn(images=5)[:3]).all()  # a longer split begins with the shorter one
    for other in (drawn("test"), drawn(seed=1)):
        assert (first != other).any()
    parts = synthetic("train", images=3), synthetic("val", images=3)
    assert synthetic("trainval", images=3).names == parts[0].names + parts[1].names
    small, large = synthetic("train", images=4), synthetic("train", images=4, size=(256, 192))
    assert large.images[0].shape == (256, 192, 3)
    assert (small.labels == large.labels).all()
    assert np.abs(large.keypoints + 0.5 - 2 * (small.keypoints + 0.5)).max() <= 1e-3
    assert np.nanmax(np.abs(large.boxes - 2 * small.boxes)) <= 2


def test_synthetic_boxes_hold_all_that_is_drawn(monkeypatch):
    """Half-open: the last pixel's far edge, rounded outwards."""
    drawn = []
    things = data.Pen.things
    monkeypatch.setattr(data.Pen, "things", lambda *a: drawn.append(things(*a)) or drawn[-1])
    for i in range(5):
        boxes = data.draw_pedestrian(np.random.default_rng(i), (128, 96))[3]
        for name in drawn[-1].keys() & set(ATTRIBUTES) - {"Female"}:
            points = np.clip(drawn[-1][name], 0, (96, 128))
            low, high = boxes[ATTRIBUTES.index(name)].reshape(2, 2)
            assert (np.abs(low - points.min(0) + 0.5) <= 0.5).all()
            assert (np.abs(high - points.max(0) - 0.5) <= 0.5).all()


def test_synthetic_labels_boxes_and_keypoints_are_consistent():
    split = synthetic("train", images=250)
    has = {a: split.labels[:, j] == 1 for j, a in enumerate(ATTRIBUTES)}
    exclusive = "ShortSleeve LongSleeve", "Front Side Back", "AgeOver60 Age18-60 AgeLess18"
    for names in (*exclusive, "Trousers Shorts Skirt&Dress"):
        assert (sum(has[name].astype(int) for name in words(names)) == 1).all()
    assert all(0.02 < has[a].mean() < 0.95 for a in ATTRIBUTES)
    # What often comes together, and what does not.
    for cause, partner, often in (("Backpack", "Hat", True), ("HandBag", "Hat", False)):
        together = has[partner][has[cause]].mean() - has[partner][~has[cause]].mean()
        assert (together > 0.2) == often, cause
    boxed = np.isfinite(split.boxes).all(2)
    assert not (boxed & (split.labels == 0)).any()
    placeless = {"Female", "AgeOver60", "Age18-60", "AgeLess18", "Front", "Side", "Back"}
    for j, a in enumerate(ATTRIBUTES):
        assert boxed[has[a], j].mean() > 0.97 if a not in placeless else not boxed[:, j].any(), a
    left, top, right, bottom = split.boxes[boxed].T
    assert ((left >= 0) & (left < right) & (right <= 96)).all()
    assert ((top >= 0) & (top < bottom) & (bottom <= 128)).all()
    x, y = split.keypoints[:, :, 0], split.keypoints[:, :, 1]
    assert (np.diff(y[:, [9, 8, 7, 6, 0]]) > 0).all()  # head top, neck, thorax, pelvis, ankle
    assert (x[has["Front"], 12] < x[has["Front"], 13]).all()  # right shoulder: left in the image
    assert (x[has["Back"], 12] > x[has["Back"], 13]).all()
    # Things sit where the joints are: hats at the head top, boots below the knees.
    hats, boots = ATTRIBUTES.index("Hat"), ATTRIBUTES.index("boots")
    middle = (split.boxes[..., 1] + split.boxes[..., 3]) / 2
    assert (np.abs(middle[:, hats] - y[:, 9])[boxed[:, hats]] < 12).all()
    assert (middle[:, boots] > y[:, 1])[boxed[:, boots]].all()
