"""Pedestrians with attributes: datasets in one common form, and what turns them into batches.

    Table                every dataset's common form: images, labels, attributes, groups, keypoints, boxes
    synthetic            drawn pedestrians, no download, with keypoints and a box for every drawn attribute
    pa100k               PA-100K in its published layout, with the groups of Tab. A.11
    read_keypoints       a keypoint file (names, keypoints N x 16 x 3) for PLE-K
    Pedestrians          the torch Dataset: joint transforms of image and keypoints

Points and boxes are in image pixels: points (x, y) with pixel centres at whole numbers, boxes (left, top, right,
bottom) half-open, so that right - left is the width.
"""

import colorsys
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as VF
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from sspnet import GROUPS

# Tab. A.11, under the attribute names of PA-100K's annotation file and in its order.
PA100K_GROUPS = {
    "Female": "all", "AgeOver60": "all", "Age18-60": "all", "AgeLess18": "all", "Front": "all", "Side": "all",
    "Back": "all", "Hat": "head", "Glasses": "head", "HandBag": "all", "ShoulderBag": "all", "Backpack": "torso",
    "HoldObjectsInFront": "all", "ShortSleeve": "torso", "LongSleeve": "torso", "UpperStride": "torso",
    "UpperLogo": "torso", "UpperPlaid": "torso", "UpperSplice": "torso", "LowerStripe": "bottom",
    "LowerPattern": "bottom", "LongCoat": "all", "Trousers": "bottom", "Shorts": "bottom", "Skirt&Dress": "all",
    "boots": "bottom",
}
FLIP = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]  # MPII's left and right exchanged
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which the backbones' weights expect


@dataclass
class Table:
    """One split of a dataset.

    Attributes:
        name: the dataset and split, for messages.
        attributes, groups: L names, and the group of each.
        names: N image names, as the annotation and keypoint files spell them.
        images: N paths, or N drawn pictures as (H, W, 3) uint8 arrays.
        labels: (N, L) float32 of 0 and 1.
        keypoints: (N, 16, 2) float32 MPII points, or None.
        boxes: (N, L, 4) float32, NaN where an attribute has no box; or None.
    """

    name: str
    attributes: list
    groups: list
    names: list
    images: list
    labels: np.ndarray
    keypoints: np.ndarray = None
    boxes: np.ndarray = None

    def __post_init__(self):
        if not len(self.names):
            raise ValueError(f"{self.name}: no images, expected at least one")
        if self.labels.shape != (len(self.names), len(self.attributes)) or len(self.images) != len(self.names):
            raise ValueError(f"{self.name}: {len(self.names)} images and {len(self.attributes)} attributes, but "
                             f"labels {list(self.labels.shape)}")
        wrong = np.argwhere((self.labels != 0) & (self.labels != 1))
        if len(wrong):
            i, j = wrong[0]
            raise ValueError(f"{self.name}: label {self.labels[i, j]:g} of {self.attributes[j]} for "
                             f"{self.names[i]}, expected 0 or 1")
        for attribute, group in zip(self.attributes, self.groups):
            if group not in GROUPS:
                raise ValueError(f"{self.name}: attribute {attribute} has group {group}, expected one of {GROUPS}")


def load_table(dataset, data, split, keypoints=None, synthetic_options=None):
    """The `Table` of a split: "train", "val", "test" or "trainval".

    Args:
        dataset: "synthetic" or "pa100k".
        data: the dataset's folder (unused for synthetic).
        keypoints: a keypoint file, see `read_keypoints`.
        synthetic_options: arguments of `synthetic`.
    Raises:
        ValueError, FileNotFoundError: naming the file, the value and what was expected.
    """
    if dataset == "synthetic":
        table = synthetic(split, **(synthetic_options or {}))
    elif dataset == "pa100k":
        table = pa100k(data, split)
    else:
        raise ValueError(f"dataset {dataset!r}: expected synthetic or pa100k")
    return replace(table, keypoints=read_keypoints(keypoints, table.names)) if keypoints else table


# ---- PA-100K ----


def pa100k(folder, split):
    """PA-100K: `annotation.mat` beside the images in `data/` or `release_data/release_data/`; 26 attributes."""
    folder = Path(folder)
    file = folder / "annotation.mat"
    mat = read_mat(file, ("attributes", "train_label", "train_images_name"))
    attributes = [str(row[0][0]) for row in mat["attributes"]]
    parts = ("train", "val") if split == "trainval" else (split,)
    names, labels = [], []
    for part in parts:
        if f"{part}_label" not in mat or f"{part}_images_name" not in mat:
            raise ValueError(f"{file}: no {part}_label and {part}_images_name, expected for split {split}")
        part_names = [str(row[0][0]) for row in mat[f"{part}_images_name"]]
        if mat[f"{part}_label"].shape != (len(part_names), len(attributes)):
            raise ValueError(f"{file}: {part}_label is {list(mat[f'{part}_label'].shape)}, expected "
                             f"[{len(part_names)}, {len(attributes)}]: one row per image, one column per attribute")
        names += part_names
        labels.append(mat[f"{part}_label"])
    places = [folder / "release_data" / "release_data", folder / "data"]
    images = find_images(next((p for p in places if p.is_dir()), places[-1]), names)
    labels = np.concatenate(labels).astype(np.float32)
    return Table(f"pa100k {split} ({file})", attributes, groups_of(attributes, PA100K_GROUPS, file), names, images, labels)


def read_mat(file, expected):
    """A MATLAB file's variables, which must include `expected`."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        from scipy.io import loadmat  # only .mat files need scipy, as in torchvision's own .mat datasets
    except ImportError:
        raise ValueError(f"{file}: reading a .mat file needs scipy: pip install scipy") from None
    try:
        mat = loadmat(file)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(f"{file}: not a readable .mat file ({str(error).splitlines()[0] if str(error) else error!r})") from None
    missing = [key for key in expected if key not in mat]
    if missing:
        raise ValueError(f"{file}: has no variable {missing[0]}, expected {', '.join(expected)}")
    return mat


def groups_of(attributes, table, file):
    """Each attribute's group from a {name: group} table, upper and lower case alike."""
    table = {name.lower(): group for name, group in table.items()}
    for attribute in attributes:
        if attribute.lower() not in table:
            raise ValueError(f"{file}: attribute {attribute} is in none of the groups {', '.join(GROUPS)}")
    return [table[attribute.lower()] for attribute in attributes]


def find_images(folder, names):
    """The paths of the named images, all of which must be there."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder, expected the dataset's images in it")
    there = {path.name for path in folder.iterdir()}  # one listing, not one question per image
    missing = [name for name in names if name not in there]
    if missing:
        raise FileNotFoundError(f"{folder / missing[0]}: no such image ({len(missing)} of {len(names)} are missing)")
    return [folder / name for name in names]


# ---- keypoints ----


def read_keypoints(file, names):
    """The (N, 16, 2) keypoints of the named images from an .npz with `names` (K,) and `keypoints` (K, 16, 3).

    The file's third number per point, its confidence, is not used by PLE-K.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such keypoint file")
    try:
        with np.load(file, allow_pickle=False) as archive:
            known, points = archive["names"], archive["keypoints"]
    except Exception as error:
        raise ValueError(f"{file}: not a keypoint file with names and keypoints ({error})") from None
    if points.shape != (len(known), 16, 3):
        raise ValueError(f"{file}: keypoints are {list(points.shape)}, expected [{len(known)}, 16, 3]")
    row = {str(name): i for i, name in enumerate(known)}
    missing = [name for name in names if name not in row]
    if missing:
        raise ValueError(f"{file}: has no keypoints for image {missing[0]} ({len(missing)} of {len(names)} are missing)")
    points = points[[row[name] for name in names], :, :2].astype(np.float32)
    if not np.isfinite(points).all():
        raise ValueError(f"{file}: keypoints of {names[int(np.argwhere(~np.isfinite(points))[0, 0])]} are not finite")
    return points


# ---- batches ----


def read_image(source):
    """A path or a drawn array -> (3, H, W) uint8 RGB tensor."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source).permute(2, 0, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                return VF.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{source}: no such image") from None
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"{source}: not a readable image ({error})") from None


def normalize(image):
    """(..., 3, H, W) uint8 -> float, by ImageNet's mean and standard deviation."""
    return VF.normalize(VF.to_dtype(image, torch.float32, scale=True), MEAN, STD)


def resize(image, keypoints, size):
    """Image (3, h, w) and keypoints (16, 2) to `size` (H, W), pixel centres kept on pixel centres' scale."""
    scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]])
    return VF.resize(image, list(size), antialias=True), (keypoints + 0.5) * scale - 0.5


def shift(image, keypoints, dx, dy, padding=10):
    """Pads with black, then crops to the old size at (dx, dy), each 0..2 padding."""
    H, W = image.shape[1:]
    padded = VF.pad(image, [padding])
    return VF.crop(padded, dy, dx, H, W), keypoints + padding - torch.tensor([dx, dy], dtype=keypoints.dtype)


def flip(image, keypoints):
    """Mirrors the image and the points, and exchanges left and right joints."""
    mirrored = keypoints[FLIP]
    return VF.horizontal_flip(image), torch.stack([image.shape[2] - 1 - mirrored[:, 0], mirrored[:, 1]], 1)


class Pedestrians(torch.utils.data.Dataset):
    """A `Table` as model input: item i is (image (3, H, W) float, labels (L,), keypoints (16, 2), i).

    In training each image is resized, padded by 10, randomly cropped and flipped (the Strong Baseline's recipe); the
    random numbers depend on (seed, epoch, i) alone, so they are the same for any number of workers and after a
    resume. Keypoints are in pixels of the resized image; zeros where the table has none.
    """

    def __init__(self, table, size, train=False, seed=0):
        self.table, self.size, self.train, self.seed, self.epoch = table, tuple(size), train, seed, 0

    def __len__(self):
        return len(self.table.names)

    def __getitem__(self, i):
        keypoints = torch.zeros(16, 2) if self.table.keypoints is None else torch.from_numpy(self.table.keypoints[i])
        image, keypoints = resize(read_image(self.table.images[i]), keypoints, self.size)
        if self.train:
            random = np.random.default_rng((self.seed, self.epoch, i))
            dx, dy, mirror = random.integers(0, 21), random.integers(0, 21), random.random() < 0.5
            image, keypoints = shift(image, keypoints, int(dx), int(dy))
            if mirror:
                image, keypoints = flip(image, keypoints)
        return normalize(image), torch.from_numpy(self.table.labels[i]), keypoints, i


def loader(table, size, batch_size, train=False, seed=0, workers=0, device="cpu"):
    """A DataLoader over `Pedestrians`; call `start_epoch(loader, epoch)` before each training epoch."""
    return torch.utils.data.DataLoader(
        Pedestrians(table, size, train, seed), batch_size, shuffle=train, drop_last=train and len(table.names) > batch_size,
        num_workers=workers, pin_memory=torch.device(device).type == "cuda", generator=torch.Generator())


def start_epoch(batches, epoch):
    """Sets an epoch's order and augmentation, from the seed and the epoch alone."""
    batches.dataset.epoch = epoch
    batches.generator.manual_seed(batches.dataset.seed * 1_000_003 + epoch)


def command(main):
    """Runs a command's `main`; bad input becomes one line on stderr and exit status 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]  # a loader's worker puts its traceback before the line
        line = lines[-1].removeprefix("ValueError: ").removeprefix("FileNotFoundError: ")
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)


def show_progress(text, done, total, started):
    """One line on stderr with the time left: rewritten on a terminal, about twenty times a run in a log file."""
    left = (time.time() - started) / done * (total - done)
    line = f"{text}  {left / 60:.1f} min left"
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\r", file=sys.stderr, flush=True)
    elif done % max(1, total // 20) == 0:
        print(line, file=sys.stderr, flush=True)


def write_json(file, value):
    """Writes a result as JSON; NaN, an undefined figure, becomes null."""
    def plain(v):
        if isinstance(v, dict):
            return {k: plain(w) for k, w in v.items()}
        if isinstance(v, (list, tuple)):
            return [plain(w) for w in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v
    Path(file).write_text(json.dumps(plain(value), indent=1, ensure_ascii=False) + "\n")


# ---- drawn pedestrians ----

# How often each attribute is drawn: PA-100K's long tail, its rarest raised so that a few hundred images have some.
FREQUENCY = {
    "Hat": 0.10, "Glasses": 0.19, "HandBag": 0.19, "ShoulderBag": 0.16, "Backpack": 0.15, "HoldObjectsInFront": 0.07,
    "ShortSleeve": 0.58, "UpperStride": 0.08, "UpperLogo": 0.15, "UpperPlaid": 0.10, "UpperSplice": 0.08,
    "LowerStripe": 0.07, "LowerPattern": 0.07, "LongCoat": 0.07, "boots": 0.10, "Female": 0.45,
}
SPLIT_SIZES = {"train": 2400, "val": 300, "test": 600}
UPPER, LOWER = ("UpperStride", "UpperLogo", "UpperPlaid", "UpperSplice"), ("LowerStripe", "LowerPattern")


def synthetic(split, seed=0, domain=0, size=(128, 96), count=None):
    """Drawn pedestrians with PA-100K's 26 attributes, 16 MPII keypoints and a box for every drawn attribute.

    Image i of a split depends on (seed, domain, split, i) alone.

    Args:
        split: "train", "val", "test" or "trainval".
        domain: 0 or 1: the second has other backgrounds, colours, light and co-occurrence of attributes.
        size: (H, W) of the pictures.
        count: images per split; `SPLIT_SIZES` by default.
    """
    parts = ("train", "val") if split == "trainval" else (split,)
    if domain not in (0, 1) or not set(parts) <= set(SPLIT_SIZES):
        raise ValueError(f"synthetic: domain {domain}, split {split}: expected domain 0 or 1 and one of train, val, test, trainval")
    attributes, names, drawn = list(PA100K_GROUPS), [], []
    for part in parts:
        for i in range(count or SPLIT_SIZES[part]):
            names.append(f"{part}-{domain}-{i:05d}")
            random = np.random.default_rng((seed, domain, list(SPLIT_SIZES).index(part), i))
            drawn.append(draw_pedestrian(random, domain, size))
    images, labels, keypoints, boxes = zip(*drawn)
    return Table(f"synthetic {split} (seed {seed}, domain {domain})", attributes, list(PA100K_GROUPS.values()), names,
                 list(images), np.stack(labels), np.stack(keypoints), np.stack(boxes))


def draw_labels(random, domain):
    """The set of attribute names of one pedestrian."""
    has = {name for name, share in FREQUENCY.items() if random.random() < share}
    # Co-occurrence, a bias that differs between the domains: cross-domain tests punish those who learn it.
    woman = "Female" in has
    skirt = 0.35 if woman and domain == 0 else 0.15 if woman else 0.01
    if random.random() < 0.5:
        partner = {"Backpack": "Hat", "HandBag": "Glasses"} if domain == 0 else {"HandBag": "Hat", "ShoulderBag": "Glasses"}
        has |= {then for cause, then in partner.items() if cause in has and random.random() < 0.5}
    if woman != (domain == 0) and "HandBag" in has and random.random() < 0.6:
        has.discard("HandBag")
    has.add("LongSleeve" if "ShortSleeve" not in has else "ShortSleeve")
    lower = "Skirt&Dress" if random.random() < skirt else "Shorts" if random.random() < 0.2 else "Trousers"
    has.add(lower)
    if lower != "Trousers":
        has.discard("LowerStripe")
    has.add(str(random.choice(["AgeOver60", "Age18-60", "AgeLess18"], p=[0.08, 0.82, 0.10])))
    has.add(str(random.choice(["Front", "Side", "Back"], p=[0.36, 0.28, 0.36])))
    for name in UPPER[1:]:  # one pattern at a time
        if has & set(UPPER) - {name}:
            has.discard(name)
    if len(has & set(LOWER)) == 2:
        has.discard("LowerPattern")
    if "Back" in has:
        has -= {"Glasses", "HoldObjectsInFront"}
    if "HoldObjectsInFront" in has:
        has -= {"HandBag"}
    return has


class Pen:
    """Draws in picture units (96 x 128 whatever the size) and keeps the box of the attribute being drawn."""

    def __init__(self, size, samples=2):
        self.scale = samples * size[0] / 128
        self.image = Image.new("RGB", (samples * size[1], samples * size[0]))
        self.draw = ImageDraw.Draw(self.image)
        self.boxes, self.names = {}, ()

    def item(self, *names):
        """What is drawn from here on belongs to these attributes."""
        self.names = names

    def polygon(self, points, colour):
        points = np.asarray(points, dtype=float)
        self.draw.polygon([tuple(p) for p in points * self.scale], fill=tuple(int(c) for c in colour))
        for name in self.names:
            low, high = points.min(0), points.max(0)
            if name in self.boxes:
                low, high = np.minimum(low, self.boxes[name][:2]), np.maximum(high, self.boxes[name][2:])
            self.boxes[name] = np.concatenate([low, high])

    def oval(self, x, y, rx, ry, colour, start=0, end=360):
        angle = np.radians(np.linspace(start, end, 20))
        self.polygon(np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1), colour)

    def limb(self, a, b, width_a, width_b, colour):
        """A tapered bar from a to b with round ends."""
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        along = (b - a) / max(np.linalg.norm(b - a), 1e-6)
        across = np.array([-along[1], along[0]])
        self.polygon([a + across * width_a, b + across * width_b, b - across * width_b, a - across * width_a], colour)
        self.oval(*a, width_a, width_a, colour)
        self.oval(*b, width_b, width_b, colour)


def draw_hat(pen, x, y, r, colour, facing=0):
    """On a head centred at (x, y) of radius r: a crown and a brim, towards `facing` (-1, 0, 1)."""
    pen.oval(x, y - 0.35 * r, 1.05 * r, 0.95 * r, colour, 180, 360)
    pen.polygon([(x - (1.5 - 0.4 * facing) * r, y - 0.45 * r), (x + (1.5 + 0.4 * facing) * r, y - 0.45 * r),
                 (x + (1.5 + 0.4 * facing) * r, y - 0.2 * r), (x - (1.5 - 0.4 * facing) * r, y - 0.2 * r)], colour)


def draw_glasses(pen, x, y, r, colour, facing=0):
    for side in ((-0.45, 0.45) if facing == 0 else (0.5 * facing,)):
        pen.oval(x + side * r, y, 0.36 * r, 0.3 * r, colour)
    pen.limb((x - (0.9 if facing <= 0 else 0.1) * r, y), (x + (0.9 if facing >= 0 else 0.1) * r, y), 0.09 * r, 0.09 * r, colour)


def draw_bag(pen, x, y, w, h, colour):
    """A bag hanging from (x, y): handle and body."""
    pen.limb((x, y), (x - 0.6 * w, y + 0.5 * h), 0.6, 0.6, colour)
    pen.limb((x, y), (x + 0.6 * w, y + 0.5 * h), 0.6, 0.6, colour)
    pen.polygon([(x - w, y + 0.5 * h), (x + w, y + 0.5 * h), (x + 1.1 * w, y + 1.5 * h), (x - 1.1 * w, y + 1.5 * h)], colour)


def draw_boot(pen, knee, ankle, width, colour, facing):
    knee, ankle = np.asarray(knee), np.asarray(ankle)
    pen.limb(knee + 0.35 * (ankle - knee), ankle, 1.25 * width, 1.2 * width, colour)
    pen.oval(ankle[0] + facing * width, ankle[1] + width, 2 * width, 1.1 * width, colour)


def draw_background(pen, random, domain, colour):
    """A wall, a floor, clutter, and things out of place: hats low, boots high, bags and glasses on nobody."""
    horizon = random.uniform(50, 110)
    wall, floor = colour(0.25 if domain == 0 else 0.45), colour(0.25)
    pen.polygon([(0, 0), (96, 0), (96, 128), (0, 128)], wall)
    pen.polygon([(0, horizon), (96, horizon), (96, 128), (0, 128)], floor)
    for _ in range(random.integers(2, 6)):
        x, y, w, h = random.uniform(-10, 96), random.uniform(-10, 128), random.uniform(3, 30), random.uniform(3, 40)
        if domain == 0:  # a street: doors, windows, signs
            pen.polygon([(x, y), (x + w, y), (x + w, y + h), (x, y + h)], colour(0.35))
            if random.random() < 0.3:
                for k in np.arange(0, h, 4):
                    pen.polygon([(x, y + k), (x + w, y + k), (x + w, y + k + 1.5), (x, y + k + 1.5)], colour(0.35))
        else:  # a park: foliage and slanted light
            pen.oval(x, y, w / 2, h / 2, colour(0.45))
            pen.limb((x, y), (x + random.uniform(-30, 30), y + h), 1, 1, colour(0.4))
    for _ in range(random.integers(0, 3)):  # other people's parts, at the picture's edges
        x, y, shade = random.choice([random.uniform(-4, 8), random.uniform(88, 100)]), random.uniform(5, 100), colour(0.6)
        pen.limb((x, y), (x + random.uniform(-6, 6), y + 35), 5, 4, shade)
        if random.random() < 0.5:
            pen.oval(x, y - 8, 6, 7, (205, 160, 130))
    for _ in range(random.integers(1, 4)):
        kind, x, facing = random.integers(0, 4), random.uniform(4, 92), int(random.integers(-1, 2))
        if kind == 0:
            draw_hat(pen, x, random.uniform(60, 124), random.uniform(6, 9), colour(0.8), facing)
        elif kind == 1:
            draw_glasses(pen, x, random.uniform(60, 124), random.uniform(6, 9), (20, 20, 25), facing)
        elif kind == 2:
            y = random.uniform(-5, 35)
            draw_boot(pen, (x, y), (x, y + 20), 3, colour(0.6), facing)
        else:
            draw_bag(pen, x, random.uniform(0, 30), random.uniform(4, 7), random.uniform(5, 9), colour(0.8))


def draw_pedestrian(random, domain, size):
    """One picture: (image (H, W, 3) uint8, labels (26,), keypoints (16, 2), boxes (26, 4) with NaN)."""
    has = draw_labels(random, domain)

    def colour(saturation):  # any hue but skin's in domain 0; greens and blues, darker, in domain 1
        hue = random.uniform(0.15, 1.0) if domain == 0 else random.uniform(0.2, 0.7)
        return hsv(hue, saturation * random.uniform(0.5, 1), random.uniform(0.3, 1) ** (1 if domain == 0 else 1.6))

    pen = Pen(size)
    draw_background(pen, random, domain, colour)
    # Pose, in picture units.
    child, side, back = "AgeLess18" in has, "Side" in has, "Back" in has
    facing = int(random.choice([-1, 1])) if side else 0
    tall = random.uniform(100, 120)
    top = random.uniform(0.15, 0.85) * (128 - tall)
    middle = 48 + random.normal(0, 3)
    head = tall * (0.09 if child else 0.068) * random.uniform(0.93, 1.07)  # radius
    woman = "Female" in has
    build = random.uniform(0.85, 1.2)
    shoulder = tall * build * ((0.055 if side else 0.105) if woman else (0.065 if side else 0.13))
    hip = tall * build * (0.05 if side else 0.085 if woman else 0.075)
    lean = random.normal(0, 2) + (facing * 5 if "AgeOver60" in has else 0)
    at = lambda share, dx=0.0: np.array([middle + dx + lean * (1 - share), top + share * tall])
    skull = at(0.0) + [0, 1.15 * head]
    neck_y = (2.3 * head) / tall
    shoulder_y, hip_y = neck_y + 0.045, 0.53 if not child else 0.57
    right = 1 if back else -1  # a facing person's right side is on the picture's left
    joint = {6: at(hip_y), 7: at(shoulder_y), 8: at(neck_y), 9: at(0.0)}
    stride = random.normal(0, 0.2 if side else 0.06)
    for s, (hip_id, knee_id, ankle_id), (arm, elbow, wrist) in ((right, (2, 1, 0), (12, 11, 10)), (-right, (3, 4, 5), (13, 14, 15))):
        sign = s if not side else s * 0.25
        joint[hip_id] = at(hip_y, sign * hip * 0.6)
        swing = stride * s + random.normal(0, 0.04)
        thigh, shin = 0.22 * tall, (0.955 - hip_y) * tall - 0.22 * tall
        joint[knee_id] = joint[hip_id] + thigh * np.array([math.sin(swing), math.cos(swing)])
        bend = swing - abs(random.normal(0, 0.1)) * (facing or random.choice([-1, 1]))
        joint[ankle_id] = joint[knee_id] + shin * np.array([math.sin(bend), math.cos(bend)])
        joint[arm] = at(shoulder_y + 0.015, sign * shoulder * 0.9)
        raise_ = (sign * abs(random.normal(0.15, 0.15))) if not side else random.normal(-stride * s, 0.25)
        joint[elbow] = joint[arm] + 0.165 * tall * np.array([math.sin(raise_), math.cos(raise_)])
        fore = raise_ + (facing * abs(random.normal(0.3, 0.3)) if side else -sign * random.normal(0.1, 0.3))
        if "HoldObjectsInFront" in has:
            fore = facing * 1.5 if side else -s * 1.1
        joint[wrist] = joint[elbow] + 0.15 * tall * np.array([math.sin(fore), math.cos(fore)])
    skin = hsv(random.uniform(0.05, 0.08), random.uniform(0.4, 0.55), random.uniform(0.6, 0.95))
    hair = hsv(0.08, 0.5, random.uniform(0.05, 0.3)) if "AgeOver60" not in has else hsv(0.1, 0.05, random.uniform(0.75, 0.95))
    shirt, cloth, accent, leather = colour(0.9), colour(0.7), colour(0.9), colour(0.8)
    if sum(abs(a - b) for a, b in zip(accent, shirt)) < 150:  # a pattern must differ from what it is on
        accent = tuple(255 - c for c in shirt)
    limb = 0.032 * tall * build

    # Behind the body.
    pack = lambda dx: pen.polygon([at(shoulder_y, dx - 0.8 * shoulder), at(shoulder_y, dx + 0.8 * shoulder),
                                   at(hip_y - 0.06, dx + 0.9 * shoulder), at(hip_y - 0.06, dx - 0.9 * shoulder)], leather)
    if "Backpack" in has and not back:
        pen.item("Backpack")
        pack(-facing * 1.5 * shoulder)
    if woman and random.random() < 0.85 and "AgeOver60" not in has:  # long hair
        pen.item()
        pen.polygon([skull - [head, 0], skull + [head, 0], skull + [1.15 * head, 2.4 * head], skull + [-1.15 * head, 2.4 * head]], hair)
    # Legs, then what covers them.
    lower = next(name for name in ("Trousers", "Shorts", "Skirt&Dress") if name in has)
    legs = ((2, 1, 0), (3, 4, 5))
    for hip_id, knee_id, ankle_id in legs:
        pen.item()
        pen.limb(joint[hip_id], joint[knee_id], 1.35 * limb, limb, skin)
        pen.limb(joint[knee_id], joint[ankle_id], limb, 0.75 * limb, skin)
        pen.oval(joint[ankle_id][0] + facing * limb, joint[ankle_id][1] + limb, 1.5 * limb, 0.9 * limb, (40, 35, 35))
    for hip_id, knee_id, ankle_id in legs:
        pen.item(lower, *(has & {"LowerPattern"}))
        if lower == "Trousers":
            pen.limb(joint[hip_id], joint[knee_id], 1.6 * limb, 1.25 * limb, cloth)
            pen.limb(joint[knee_id], joint[ankle_id], 1.25 * limb, limb, cloth)
            if "LowerStripe" in has:
                pen.item("LowerStripe")
                for a, b in ((hip_id, knee_id), (knee_id, ankle_id)):
                    pen.limb(joint[a], joint[b], 0.35 * limb, 0.35 * limb, tuple(255 - c for c in cloth))
        elif lower == "Shorts":
            pen.limb(joint[hip_id], 0.25 * joint[hip_id] + 0.75 * joint[knee_id], 1.7 * limb, 1.6 * limb, cloth)
        if "boots" in has:
            pen.item("boots")
            draw_boot(pen, joint[knee_id], joint[ankle_id], 1.05 * limb, leather, facing)
    pen.item(lower, *(has & {"LowerPattern"}))
    if lower == "Skirt&Dress":
        pen.polygon([at(hip_y - 0.05, -hip), at(hip_y - 0.05, hip), at(0.74, 1.7 * hip + 1), at(0.74, -1.7 * hip - 1)], cloth)
    if "LowerPattern" in has:
        for hip_id, knee_id, _ in legs:
            for share in np.linspace(0.1, 0.7 if lower == "Shorts" else 0.95, 5):
                pen.oval(*((1 - share) * joint[hip_id] + share * joint[knee_id] + random.normal(0, 0.4, 2)),
                         0.55 * limb, 0.55 * limb, tuple(255 - c for c in cloth))
    # Trunk: a quadrilateral from shoulders to hips with its pattern.
    coat = "LongCoat" in has
    bottom = 0.8 if coat else hip_y + 0.02
    corner = lambda u, v: at(shoulder_y + v * (bottom - shoulder_y), (2 * u - 1) * (shoulder + v * ((1.5 * hip if coat else hip) - shoulder)))
    quad = lambda u0, u1, v0, v1: [corner(u0, v0), corner(u1, v0), corner(u1, v1), corner(u0, v1)]
    pen.item()
    pen.limb(skull, at(shoulder_y), 0.45 * head, 0.45 * head, skin)
    pen.item(*(has & {"LongCoat", "UpperStride", "UpperPlaid", "UpperSplice"}))
    pen.polygon(quad(0, 1, 0, 1), shirt)
    high = 0.55 if coat else 1.0
    if "UpperStride" in has:
        for v in np.arange(0.1, high, 0.2 * high):
            pen.polygon(quad(0, 1, v, v + 0.09 * high), accent)
    if "UpperPlaid" in has:
        for share in np.arange(0.05, 1, 0.24):
            pen.polygon(quad(0, 1, share * high, (share + 0.07) * high), accent)
            pen.polygon(quad(share, min(share + 0.09, 1), 0, high), accent)
    if "UpperSplice" in has:
        pen.polygon(quad(0, 1, 0.5 * high, high) if random.random() < 0.5 else quad(0, 0.5, 0, high), accent)
    if "UpperLogo" in has:
        pen.item("UpperLogo")
        centre, r = corner(random.uniform(0.4, 0.6), random.uniform(0.25, 0.45) * high), random.uniform(2.2, 3.6)
        if random.random() < 0.5:
            pen.oval(*centre, r, r, accent)
        else:
            pen.polygon([centre + [-r, r], centre + [r, r], centre + [0, -r]], accent)
    if "Backpack" in has:
        pen.item("Backpack")
        if back:
            pack(0)
        else:
            for u in ((0.2, 0.8) if not side else (0.5,)):
                pen.polygon(quad(u - 0.08, u + 0.08, 0, 0.6 * high), leather)
    for arm, elbow, wrist in ((12, 11, 10), (13, 14, 15)):
        pen.item()
        pen.limb(joint[arm], joint[elbow], limb, 0.8 * limb, skin)
        pen.limb(joint[elbow], joint[wrist], 0.8 * limb, 0.65 * limb, skin)
        pen.oval(*joint[wrist], 0.9 * limb, 0.9 * limb, skin)
        pen.item("ShortSleeve" if "ShortSleeve" in has else "LongSleeve")
        if "ShortSleeve" in has:
            pen.limb(joint[arm], 0.4 * joint[arm] + 0.6 * joint[elbow], 1.25 * limb, 1.2 * limb, shirt)
        else:
            pen.limb(joint[arm], joint[elbow], 1.25 * limb, 1.05 * limb, shirt)
            pen.limb(joint[elbow], 0.1 * joint[elbow] + 0.9 * joint[wrist], 1.05 * limb, 0.95 * limb, shirt)
    # Carried things.
    hand = int(random.choice([10, 15]))
    if "HandBag" in has:
        pen.item("HandBag")
        draw_bag(pen, *joint[hand], random.uniform(3.5, 6), random.uniform(5, 8), accent if random.random() < 0.5 else leather)
    if "ShoulderBag" in has:
        pen.item("ShoulderBag")
        s = int(random.choice([-1, 1]))
        pen.limb(corner(0.5 - 0.35 * s, 0.02), corner(0.5 + 0.5 * s, 0.95 if not coat else 0.5), 0.8, 0.8, accent)
        x, y = corner(0.5 + 0.55 * s, 0.9 if not coat else 0.5)
        pen.polygon([(x - 5, y - 3), (x + 5, y - 3), (x + 5.5, y + 7), (x - 5.5, y + 7)], accent)
    if "HoldObjectsInFront" in has:
        pen.item("HoldObjectsInFront")
        x, y = (joint[10] + joint[15]) / 2
        w, h = random.uniform(5, 9), random.uniform(4, 7)
        pen.polygon([(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)], colour(0.9))
    # Head: skin, hair, face, glasses, hat.
    pen.item()
    pen.oval(*skull, 0.9 * head, 1.1 * head, skin)
    if back:
        pen.oval(*skull - [0, 0.05 * head], 0.98 * head, 1.1 * head, hair)
    else:
        pen.oval(skull[0] - 0.25 * facing * head, skull[1] - 0.2 * head, 0.98 * head, head, hair, 180 - 40 * (facing == 1), 360 + 40 * (facing == -1))
        for eye in ((-0.4, 0.4) if not side else (0.5 * facing,)):
            pen.oval(skull[0] + eye * head, skull[1] + 0.05 * head, 0.12 * head, 0.12 * head, (30, 20, 20))
        if side:
            pen.oval(skull[0] + 0.95 * facing * head, skull[1] + 0.25 * head, 0.2 * head, 0.2 * head, skin)
    if "Glasses" in has:
        pen.item("Glasses")
        draw_glasses(pen, skull[0], skull[1] + 0.05 * head, head, (20, 20, 25), facing)
    if "Hat" in has:
        pen.item("Hat")
        draw_hat(pen, *skull, head, leather, facing)
    # In front: a pole, a bush, somebody's shoulder.
    pen.item()
    if random.random() < 0.2:
        x, y, w = random.uniform(0, 96), random.uniform(20, 128), random.uniform(2, 7)
        if random.random() < 0.5:
            pen.polygon([(x, y), (x + w, y), (x + w, 128), (x, 128)], colour(0.4))
        else:
            pen.oval(x, y, 2 * w, 1.5 * w, colour(0.6))
    return develop(pen, random, domain, size, has, np.stack([joint[k] for k in range(16)]))


def develop(pen, random, domain, size, has, joints):
    """Blur, contrast, light and noise on the drawn picture; labels, points and boxes in its pixels."""
    image = pen.image.resize((size[1], size[0]), Image.Resampling.BOX)
    unit = size[0] / 128
    image = image.filter(ImageFilter.GaussianBlur(unit * random.uniform(0, 0.7)))
    pixels = np.asarray(image, dtype=np.float32)
    contrast, light = random.uniform(0.7, 1.1), random.normal(0 if domain == 0 else -15, 12)
    pixels = (pixels - 128) * contrast + 128 + light + random.normal(0, random.uniform(1, 6), pixels.shape)
    labels = np.array([name in has for name in PA100K_GROUPS], dtype=np.float32)
    boxes = np.full((len(PA100K_GROUPS), 4), np.nan, dtype=np.float32)
    for j, name in enumerate(PA100K_GROUPS):
        if name in has and name in pen.boxes:
            left, top, right, bottom = pen.boxes[name] * unit
            boxes[j] = [max(0, math.floor(left)), max(0, math.floor(top)), min(size[1], math.ceil(right)), min(size[0], math.ceil(bottom))]
            if boxes[j, 0] >= boxes[j, 2] or boxes[j, 1] >= boxes[j, 3]:
                boxes[j] = np.nan  # drawn beyond the picture's edge
    return pixels.clip(0, 255).astype(np.uint8), labels, (joints * unit - 0.5).astype(np.float32), boxes


def hsv(hue, saturation, value):
    """Hue, saturation and value in [0, 1] -> (r, g, b) in 0..255."""
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(hue, min(saturation, 1), min(value, 1)))
