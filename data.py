"""Pedestrians with attributes: datasets in one common form, and what turns them into batches.

    Split                one split of any dataset: images, labels, attributes, groups, keypoints
    Pedestrians, loader  the torch Dataset with its joint transforms, and batches
    load_split           a split by its dataset's name; one reader for each published layout
    shared_attributes    the attributes that two datasets have in common (Tab. 7-10)
    SimCC, KeypointRCNN  the pose networks that find PLE-K's keypoints
    synthetic            drawn pedestrians with labels, keypoints and boxes; no download

    python data.py keypoints --dataset pa100k --data FOLDER --model keypointrcnn --weights coco \\
        --out keypoints.npz                       the same for images: keypoints photo.jpg folder/
    python data.py average --dataset pa100k --data FOLDER --out average.png      (Fig. A.9a)

Points are (x, y) in pixels, pixel centres at integers; boxes are half-open (left, top, right,
bottom), so that right - left is the width.
"""

import argparse
import colorsys
import csv
import ctypes
import hashlib
import json
import math
import os
import pickle
import re
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
import torchvision
import torchvision.transforms.v2.functional as VF
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from torch import nn

from sspnet import GROUPS, load_weights

DATASETS = ("synthetic", "pa100k", "rap1", "peta", "upar", "pcs", "csv")
PARTS = {part: (part,) for part in ("train", "val", "test")}
PARTS.update(trainval=("train", "val"), all=("train", "val", "test"))
WITHOUT_VALIDATION = ("rap1", "pcs")  # their "trainval" is "train"
OPTIONS = {  # which datasets have them
    "data": DATASETS[1:],
    "partition": ("rap1", "peta", "upar"),
    "exclude": ("upar",),
    "domain": ("synthetic",),
    "images": ("synthetic",),
}
DATA_KEYS = ("dataset", "data", "keypoints", "partition", "exclude", "domain")  # name a source
FLIP = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]  # MPII's left and right exchanged
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, as the backbones expect
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


# ---- The common form of a split


@dataclass
class Split:
    """One split of a dataset.

    Attributes:
        name: dataset and split, for messages.
        attributes, groups: L attribute names and the group of each.
        names: N image names, as annotations and keypoint files spell them.
        images: N paths, or N drawn images as (H, W, 3) uint8 arrays.
        labels: (N, L) float32 of 0 and 1.
        keypoints: (N, 16, 2) float32 MPII points, or None.
        boxes: (N, L, 4) float32, NaN where an attribute has no box; or None.

    Raises:
        ValueError: naming the first thing that is wrong.
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
        self.labels = np.asarray(self.labels, np.float32)
        N, L = len(self.names), len(self.attributes)
        if self.labels.shape != (N, L) or len(self.images) != N:
            shape = list(self.labels.shape)
            raise ValueError(f"{self.name}: labels are {shape}, expected [{N}, {L}]")
        for i, j in np.argwhere(~np.isin(self.labels, (0, 1)))[:1]:
            what = f"label {self.labels[i, j]:g} of {self.attributes[j]} for {self.names[i]}"
            raise ValueError(f"{self.name}: {what}, expected 0 or 1")
        if len({attribute.lower() for attribute in self.attributes}) < L:
            raise ValueError(f"{self.name}: two of its attributes have the same name")
        for attribute, group in zip(self.attributes, self.groups, strict=True):
            if group not in GROUPS:
                expected = ", ".join(GROUPS)
                raise ValueError(f"{self.name}: {attribute} is in group {group}, not in {expected}")

    def subset(self, indices):
        """The same split with some of its images."""
        arrays = {"labels": self.labels[indices]}
        for field in ("keypoints", "boxes"):
            if getattr(self, field) is not None:
                arrays[field] = getattr(self, field)[indices]
        names = [self.names[i] for i in indices]
        return replace(self, names=names, images=[self.images[i] for i in indices], **arrays)


def load_split(dataset, data=None, split="test", keypoints=None, size=(128, 96), **options):
    """A split, one of `PARTS`, of one of `DATASETS`.

    Args:
        data: the dataset's folder; for pa100k, rap1, peta and upar also the field's
            `dataset_all.pkl` with its images beside it.
        keypoints: a keypoint file, see `read_keypoints`.
        size: (H, W) of the synthetic set's images.
        options: what some datasets have, see `OPTIONS`; None counts as not given.
            partition: of rap1 and peta 1 to 5, of upar 1 to 9; 1 by default.
            exclude: parts of upar to leave out, by the first folder of their images.
            domain, images: of the synthetic set, see `synthetic`, where images is its count.

    Raises:
        ValueError, FileNotFoundError: naming the file, the value and what was expected.
    """
    options = {k: v for k, v in {"data": data, **options}.items() if v is not None}
    for name, value in options.items():
        if dataset not in OPTIONS[name]:
            having = ", ".join(OPTIONS[name])
            raise ValueError(f"--{name} {value}: {dataset} has none, expected {having}")
    if dataset == "synthetic":
        domain = options.get("domain", 0)
        loaded = synthetic(split, domain=domain, size=size, count=options.get("images"))
    elif data is None:
        raise ValueError(f"dataset {dataset}: give its folder with --data")
    else:
        loaded = read_split(dataset, Path(data), split, options.get("partition", 1))
    if "exclude" in options:
        loaded = without_parts(loaded, options["exclude"])
    if "data" in options:
        check_images(loaded.images)
    if keypoints:
        loaded = replace(loaded, keypoints=read_keypoints(keypoints, loaded.names))
    return loaded


def read_split(dataset, data, split, partition):
    """What the dataset's reader reads; any error of it in one line that names the file or folder.

    A reader of `READERS` takes (folder, parts of the split, partition, dataset).
    """
    pickled = dataset == "upar" or data.suffix == ".pkl"
    if pickled and dataset not in PUBLISHED:
        raise ValueError(f"{data}: {dataset} is not read from a pickle")
    if pickled:
        data = existing(data / "dataset_all.pkl" if data.is_dir() else data)
    reader = read_pickled if pickled else READERS[dataset]
    try:
        loaded = reader(data, PARTS[split], partition, dataset)
    except (ValueError, OSError) as error:
        if str(data) in str(error):
            raise
        raise ValueError(f"{data}: {error}") from None
    except Exception as error:  # readable, but nothing like what is published
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"{data}: not laid out as {dataset} is published ({reason})") from None
    which = f", partition {partition}" if dataset in OPTIONS["partition"] else ""
    loaded.name = f"{dataset} {split}{which} ({data})"
    return loaded


def open_split(config, split):
    """The split for a config with the keys `DATA_KEYS`, "ple", "size" and "images"."""
    source = {key: config[key] for key in (*DATA_KEYS, "size", "images")}
    opened = load_split(split=split, **source)
    if config["ple"] == "K" and opened.keypoints is None:
        raise ValueError(f"{opened.name}: PLE-K needs keypoints, give --keypoints FILE")
    return opened


def check_images(images):
    """All images must be there."""
    missing = [image for image in images if not image.is_file()]
    if missing:
        count = f"{len(missing)} of {len(images)} are missing"
        raise FileNotFoundError(f"{missing[0]}: no such image ({count})")


def photo_split(paths, attributes, groups, keypoints=None):
    """A `Split` of image files and folders of them; its labels are zeros, unknown."""
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
            found = [p for p in inside if p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES]
            if not found:
                expected = ", ".join(IMAGE_SUFFIXES)
                raise FileNotFoundError(f"{path}: no images in this folder, expected {expected}")
        else:
            existing(path, "image or folder")
        files += found
    names = [file.name for file in files]
    if keypoints and len(set(names)) < len(names):  # one would get the other's points
        raise ValueError(f"{keypoints}: tells images by their names, and two have the same")
    points = read_keypoints(keypoints, names) if keypoints else None
    labels = np.zeros((len(files), len(attributes)))
    return Split("photos", attributes, groups, names, files, labels, points)


def existing(file, what="file"):
    """The path as it is; a named pipe, which would wait for ever, is no file."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such {what}")
    return Path(file)


def digest(names):
    """A short fingerprint of image names in their order."""
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


# ---- Batches


@contextmanager
def opened_image(file):
    """Pillow's image of a file; whatever goes wrong with it becomes a ValueError with its name."""
    existing(file, "image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file) as image:
                yield image
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ValueError(f"{file}: not a readable image ({error})") from None


def read_image(source):
    """A path or a drawn array -> (3, H, W) uint8 RGB tensor."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source).permute(2, 0, 1)
    with opened_image(source) as image:
        image = ImageOps.exif_transpose(image)  # of an animation, the first image
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
            grey = (np.asarray(image, np.float32) / 257).round().clip(0, 255)
            image = Image.fromarray(grey.astype(np.uint8))
        return VF.pil_to_tensor(image.convert("RGB"))


def image_size(source):
    """(H, W) as `read_image` will give them, from a file's header alone."""
    if isinstance(source, np.ndarray):
        return source.shape[:2]
    with opened_image(source) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return image.size if turned else image.size[::-1]


def normalize(image):
    """(..., 3, H, W) uint8 -> float, by ImageNet's mean and standard deviation."""
    return VF.normalize(VF.to_dtype(image, torch.float32, scale=True), MEAN, STD)


def resize(image, keypoints, size):
    """Image (3, h, w) and keypoints (16, 2) to `size` (H, W)."""
    scale = torch.tensor([size[1] / image.shape[2], size[0] / image.shape[1]])
    return VF.resize(image, list(size), antialias=True), (keypoints + 0.5) * scale - 0.5


def shift(image, keypoints, dx, dy, padding=10):
    """Pads with black, then crops to the old size at (dx, dy), each 0..2 padding."""
    H, W = image.shape[1:]
    cropped = VF.crop(VF.pad(image, [padding]), dy, dx, H, W)
    return cropped, keypoints + padding - torch.tensor([dx, dy], dtype=keypoints.dtype)


def flip(image, keypoints):
    """Mirrors the image and the points, and exchanges left and right joints."""
    x, y = keypoints[FLIP].unbind(1)
    return VF.horizontal_flip(image), torch.stack([image.shape[2] - 1 - x, y], 1)


class Pedestrians(torch.utils.data.Dataset):
    """A `Split` as model input: item i is (image (3, H, W) float, labels (L,), keypoints, i).

    In training each image is resized, padded by 10, randomly cropped and flipped (the Strong
    Baseline's recipe). The random numbers depend on (seed, epoch, i) alone, so they are the same
    for any number of workers and after a resume. Keypoints (16, 2) are in pixels of the resized
    image; zeros where the split has none.
    """

    def __init__(self, split, size, train=False, seed=0):
        self.split, self.size, self.train = split, tuple(size), train
        self.seed, self.epoch = seed, 0

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, i):
        keypoints = torch.zeros(16, 2)
        if self.split.keypoints is not None:
            keypoints = torch.from_numpy(self.split.keypoints[i])
        image, keypoints = resize(read_image(self.split.images[i]), keypoints, self.size)
        if self.train:
            rng = np.random.default_rng((self.seed, self.epoch, i))
            dx, dy, mirror = rng.integers(0, 21), rng.integers(0, 21), rng.random() < 0.5
            image, keypoints = shift(image, keypoints, int(dx), int(dy))
            if mirror:
                image, keypoints = flip(image, keypoints)
        return normalize(image), torch.from_numpy(self.split.labels[i]), keypoints, i


def loader(split, size, batch_size, train=False, seed=0, workers=0, device="cpu", rank=0, ranks=1):
    """A DataLoader over `Pedestrians`; call `start_epoch(loader, epoch)` before training epochs.

    Of several processes ("ranks") each gets its share: in training of every batch, so that the
    shares make up the batch of one process; else every ranks-th image, each image once.
    """
    dataset = Pedestrians(split, size, train, seed)
    sampler = range(rank, len(dataset), ranks)
    if train:
        sampler = torch.utils.data.DistributedSampler(
            dataset, ranks, rank, seed=seed * 1_000_003, drop_last=ranks > 1
        )
    return torch.utils.data.DataLoader(
        dataset,
        batch_size // ranks,
        sampler=sampler,
        drop_last=train and len(dataset) > batch_size,
        num_workers=workers,
        pin_memory=torch.device(device).type == "cuda",
        generator=torch.Generator(),
    )


def start_epoch(batches, epoch):
    """Sets an epoch's order and augmentation, from the seed and the epoch alone."""
    batches.dataset.epoch = epoch
    batches.sampler.set_epoch(epoch)


# ---- Readers: (folder, parts of the split, partition, dataset) -> Split


def parse_pairs(text):
    """ "name:value name:value" -> {name: value}."""
    return dict(pair.split(":") for pair in text.split())


# The groups of attributes, by name or pattern; of several patterns that fit the first counts.
# Tab. A.11, under the names of PA-100K's annotation file and in its order:
PA100K_GROUPS = parse_pairs("""
    Female:all AgeOver60:all Age18-60:all AgeLess18:all Front:all Side:all Back:all Hat:head
    Glasses:head HandBag:all ShoulderBag:all Backpack:torso HoldObjectsInFront:all
    ShortSleeve:torso LongSleeve:torso UpperStride:torso UpperLogo:torso UpperPlaid:torso
    UpperSplice:torso LowerStripe:bottom LowerPattern:bottom LongCoat:all Trousers:bottom
    Shorts:bottom Skirt&Dress:all boots:bottom
""")
# The other datasets' by analogy:
RAP1_GROUPS = parse_pairs("""
    hs-*:head ub-*:torso attach*-Backpack:torso lb-Dress:all lb-*:bottom shoes-*:bottom Female:all
    Age*:all Body*:all Customer:all Clerk:all Employee:all attach*-*:all action-*:all
""")
PETA_GROUPS = parse_pairs("""
    accessory*:head hair*:head upperBody*:torso carryingBackpack:torso lowerBody*:bottom
    footwear*:bottom personal*:all carrying*:all
""")
UPAR_GROUPS = parse_pairs("""
    Hair-*:head Accessory-Hat:head Accessory-Glasses-*:head UpperBody-*:torso
    Accessory-Backpack:torso LowerBody-*Skirt&Dress:all LowerBody-*:bottom Age-*:all Gender-*:all
    Accessory-Bag:all
""")
# Not among them: null, skin and hair, which are on everybody.
PCS_GROUPS = parse_pairs("""
    Hat:head Glasses:head Sunglasses:head Earrings:head T-shirt:torso Shirt:torso Blouse:torso
    Sweater:torso Sweatshirt:torso Hoodie:torso Jumper:torso Cardigan:torso Vest:torso Top:torso
    Jacket:torso Blazer:torso Cape:torso Bra:torso Scarf:torso Tie:torso Necklace:torso Belt:torso
    Skirt:bottom Jeans:bottom Pants:bottom Shorts:bottom Leggings:bottom Tights:bottom
    Stockings:bottom Socks:bottom Panties:bottom Boots:bottom Shoes:bottom Sandals:bottom
    Loafers:bottom Heels:bottom Pumps:bottom Flats:bottom Wedges:bottom Clogs:bottom
    Sneakers:bottom Dress:all Coat:all Suit:all Romper:all Bodysuit:all Swimwear:all Intimate:all
    Bag:all Purse:all Wallet:all Accessories:all Bracelet:all Ring:all Gloves:all Watch:all
""")
PUBLISHED = {  # groups of attributes, and where images may lie
    "pa100k": (PA100K_GROUPS, ("release_data/release_data", "data")),
    "rap1": (RAP1_GROUPS, ("RAP_dataset",)),
    "peta": (PETA_GROUPS, ("images",)),
    "upar": (UPAR_GROUPS, ("", "data")),
}


def groups_of(attributes, table, where):
    """Each attribute's group by a table of names and patterns; its name goes before patterns."""
    table = {pattern.lower(): group for pattern, group in table.items()}
    groups = []
    for attribute in attributes:
        name = attribute.lower()
        fitting = [name] if name in table else [p for p in table if fnmatchcase(name, p)]
        if not fitting:
            expected = ", ".join(GROUPS)
            raise ValueError(f"{where}: attribute {attribute} is in none of the groups {expected}")
        groups.append(table[fitting[0]])
    return groups


def image_folder(folder, places, name):
    """The place that has the image `name`; else the first that is there."""
    there = [folder / place for place in places if (folder / place).is_dir()]
    having = [place for place in there if (place / name).is_file()]
    return (having or there or [folder / places[0]])[0]


def read_mat(file):
    """A MATLAB file's variables: structs as dicts, cells as arrays, without empty axes."""
    existing(file)
    try:
        from scipy.io import loadmat  # only .mat files need scipy
    except ImportError:
        raise ValueError(f"{file}: reading a .mat file needs scipy: pip install scipy") from None
    try:
        return loadmat(file, simplify_cells=True)
    except Exception as error:  # scipy raises many kinds for a damaged file
        reason = (str(error) or repr(error)).splitlines()[0]
        raise ValueError(f"{file}: not a readable .mat file ({reason})") from None


def strings(values):
    return [str(value) for value in np.atleast_1d(values)]


def labels_of(labels, names, attributes):
    """Labels as (N, L); MATLAB's squeezed arrays get their axis back."""
    labels, shape = np.asarray(labels), (len(names), len(attributes))
    if labels.ndim < 2 and labels.size == shape[0] * shape[1]:
        labels = labels.reshape(shape)
    if labels.shape != shape:
        raise ValueError(f"labels are {list(labels.shape)}, expected {list(shape)}")
    return labels.astype(np.float32)


def pick(published, number, parts, count, first):
    """The image indices, from 0, of a split's parts in partition `number` (from 1).

    published: {part: partitions}; these are a list with one element per partition, its images'
    numbers, which count from `first`, or a list of such lists (one per sub-dataset). Where there
    is one partition alone, it may stand there itself.
    """
    picked = []
    for part in parts_there(parts, published):
        partitions = published[part]
        if np.isscalar(partitions[0]):
            partitions = [partitions]
        if not 1 <= number <= len(partitions):
            raise ValueError(f"--partition {number}: expected 1 to {len(partitions)}")
        chosen = partitions[number - 1]
        for run in [chosen] if np.isscalar(chosen[0]) else chosen:
            picked.append(np.ravel(run))
            if picked[-1].dtype.kind not in "iu":  # a mask would become numbers beside numbers
                raise ValueError(f"partition {number}, {part}: expected image numbers")
    indices = np.concatenate([run.astype(np.int64) for run in picked]) - first
    if len(indices) and not 0 <= indices.min() <= indices.max() < count:
        worst = indices.max() + first
        expected = f"{first} to {count - 1 + first}"
        raise ValueError(f"partition {number} names image {worst}, expected {expected}")
    return indices


def parts_there(parts, published):
    """Those of a split's parts that the dataset has."""
    found = [part for part in parts if part in published]
    if not found:
        hint = "; train with --train-split trainval" if parts == ("val",) else ""
        names = ", ".join(published)
        raise ValueError(f"has no {parts[0]} split, expected one of {names}{hint}")
    return found


def split_of(dataset, file, folder, attributes, names, labels):
    """All images of an annotation file as a `Split`; labels (N, L), or more columns."""
    table, places = PUBLISHED[dataset]
    place = image_folder(folder, places, (names or [""])[0])
    images, groups = [place / name for name in names], groups_of(attributes, table, file)
    return Split(str(file), attributes, groups, names, images, labels[:, : len(attributes)])


def pa100k(folder, parts, partition, dataset):
    """`annotation.mat`, images in `data/` or `release_data/release_data/`; 26 attributes."""
    file = folder / "annotation.mat"
    mat = read_mat(file)
    attributes, names, labels = strings(mat["attributes"]), [], []
    for part in parts:
        part_names = strings(mat[f"{part}_images_name"])
        labels.append(labels_of(mat[f"{part}_label"], part_names, attributes))
        names += part_names
    return split_of(dataset, file, folder, attributes, names, np.concatenate(labels))


def rap1(folder, parts, partition, dataset):
    """`RAP_annotation/RAP_annotation.mat`, images in `RAP_dataset/`; 51 attributes."""
    file = folder / "RAP_annotation" / "RAP_annotation.mat"
    rap = read_mat(file)["RAP_annotation"]
    names, attributes = strings(rap["imagesname"]), strings(rap["attribute_eng"])
    labels = labels_of(rap["label"], names, attributes)
    labels[labels == 2] = 0  # unsure counts as absent, as the field does
    given = np.atleast_1d(rap["partion"])
    partitions = {part: [p[f"{part}_index"] for p in given] for part in ("train", "test")}
    whole = split_of(dataset, file, folder, attributes[:51], names, labels)
    return whole.subset(pick(partitions, partition, parts, len(names), first=1))


def peta(folder, parts, partition, dataset):
    """`PETA.mat`, images in `images/`; the 35 attributes that the field uses."""
    file = folder / "PETA.mat"
    mat = read_mat(file)["peta"]
    names = [f"{i + 1:05d}.png" for i in range(len(mat["data"]))]
    attributes = strings(mat["attribute"])
    labels = labels_of(mat["data"][:, 4:], names, attributes)
    given = np.atleast_1d(mat["partion_attribute"])
    partitions = {part: [p[part] for p in given] for part in PARTS["all"]}
    whole = split_of(dataset, file, folder, attributes[:35], names, labels)
    return whole.subset(pick(partitions, partition, parts, len(names), first=1))


# ---- The field's dataset_all.pkl: a pickle, read without running anything on its word


class Named(dict):
    """What a pickle says of an object: its arguments, state and items; nothing is called."""

    state = None

    def __new__(cls, *arguments):
        named = super().__new__(cls)
        named.arguments = arguments
        return named

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        self.state = state

    def resolve(self):
        """The dict, range or array that it stands for."""
        kind, arguments = type(self).__name__, self.arguments
        if kind in ("EasyDict", "OrderedDict", "_reconstructor"):
            parts = [part for part in (*arguments, self) if isinstance(part, dict)]
            return {key: value for part in parts for key, value in part.items()}
        if kind in ("range", "xrange"):  # protocols 0 to 2 call it so
            return range(*arguments)
        if kind == "_reconstruct":
            return plain_array(*self.state[1:])
        if kind == "_frombuffer":  # protocol 5
            content, dtype, shape, order = arguments
            return plain_array(shape, dtype, order == "F", content)
        if kind == "scalar":
            return plain_array((), arguments[0], False, arguments[1])
        raise ValueError(f"it holds {kind}, expected plain data alone")


class PlainUnpickler(pickle.Unpickler):
    """Whatever a pickle names becomes a `Named` of that name, or is refused."""

    known = """
        easydict.EasyDict collections.OrderedDict builtins.dict builtins.range builtins.xrange
        numpy.ndarray numpy.dtype multiarray._reconstruct multiarray.scalar numeric._frombuffer
        copyreg._reconstructor
    """

    def find_class(self, module, name):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        module = module.removeprefix("numpy.core.").removeprefix("numpy._core.")
        if (module, name) == ("_codecs", "encode"):
            return str.encode  # how protocols 0 to 2 write bytes
        if f"{module}.{name}" not in self.known.split():
            raise ValueError(f"it names {module}.{name}, expected plain data alone")
        return type(name, (Named,), {})


def plain(value, seen, depth=0):
    """What was unpickled as dicts, lists, numbers, text and arrays.

    seen: a list of one number, the size so far; a nest of references would unfold to billions.
    """
    scalar = str, int, float, type(None)
    if isinstance(value, scalar):
        return value
    if isinstance(value, Named):
        value = value.resolve()
    seen[0] += 1 + (value.nbytes // 64 if isinstance(value, np.ndarray) else len(value))
    if seen[0] > 3_000_000 or depth > 20:
        raise ValueError("it unfolds to over three million values, or is nested more than 20 deep")
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        value = value.ravel().tolist()
    if isinstance(value, np.ndarray):
        return value.item() if value.ndim == 0 else value
    if isinstance(value, dict):
        return {str(k): plain(v, seen, depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple | range):
        return [v if isinstance(v, scalar) else plain(v, seen, depth + 1) for v in value]
    raise ValueError(f"it holds {type(value).__name__}, expected plain data alone")


def plain_array(shape, dtype, fortran, content):
    """The array of what a pickle says of one; objects are in a list, all else in raw bytes."""
    name, order = str(dtype.arguments[0]), (dtype.state or "==")[1]
    if name in ("O", "O8"):
        array = np.empty(len(content), object)
        array[:] = list(content)
    else:
        known = re.fullmatch(r"b1|[iu][1248]|f[248]|[SU]\d{1,4}", name)
        if not known or order not in ("<", ">", "=", "|"):
            raise ValueError(f"dtype {name[:20]}: expected numbers or text")
        raw = content.encode("latin1") if isinstance(content, str) else bytes(content)
        array = np.frombuffer(raw, np.dtype(order.replace("|", "=") + name))
    if len(array) != math.prod(shape):
        raise ValueError(f"an array of {len(array)} values, expected the shape {shape}")
    return array.reshape(shape, order="F" if fortran else "C")


def read_pickled(file, parts, partition, dataset):
    """`dataset_all.pkl`: image_name, label, attr_name, partition, perhaps label_idx.eval.

    UPAR is published this way, and so are the splits of PETA and RAP that share no person between
    train and test (RAP's is of RAP v2).
    """
    try:
        with open(file, "rb") as opened:
            content = plain(PlainUnpickler(opened, encoding="latin1").load(), [0])
        names, attributes = strings(content["image_name"]), strings(content["attr_name"])
        labels = labels_of(np.asarray(content["label"], np.float32), names, attributes)
        columns = content.get("label_idx", {}).get("eval", range(len(attributes)))
        columns = np.asarray(columns, np.int64)
        labels, attributes = labels[:, columns], [attributes[j] for j in columns]
        labels[labels == 2] = 0  # RAP's unsure
        attributes = ["Female" if name == "Femal" else name for name in attributes]  # RAP v2's
        published = dict(content["partition"])
        if "trainval" in published:
            published.setdefault("train", published.pop("trainval"))
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{file}: not a readable dataset pickle ({reason})") from None
    whole = split_of(dataset, file, file.parent, attributes, names, labels)
    return whole.subset(pick(published, partition, parts, len(names), first=0))


def without_parts(split, exclude):
    """The split without images whose first folder is named."""
    parts = [name.split("/")[0].lower() for name in split.names]
    for name in exclude:
        if name.lower() not in parts:
            found = ", ".join(sorted(set(parts)))
            raise ValueError(f"--exclude {name}: {split.name} has images of {found}")
    excluded = {name.lower() for name in exclude}
    return split.subset([i for i, part in enumerate(parts) if part not in excluded])


# ---- People Clothing Segmentation: an attribute is a class of the masks


def pcs(folder, parts, partition, dataset):
    """Photos with a mask of clothing classes; the box of a class encloses its pixels.

    Two layouts: Clothing Co-Parsing's (`photos/0001.jpg`, `annotations/pixel-level/0001.mat`,
    `label_list.mat`) and Kaggle's (`png_images/IMAGES/img_0001.png`, `png_masks/MASKS/
    seg_0001.png`, `labels.csv`). Attributes: Tab. 10's and the other classes on at least 50
    photos. No split is published: every fifth photo is "test", the others "train".
    """
    if (folder / "png_masks").is_dir():
        file = folder / "labels.csv"
        masks = sorted((folder / "png_masks" / "MASKS").glob("seg_*.png"))
        photos = [
            folder / "png_images" / "IMAGES" / mask.name.replace("seg_", "img_") for mask in masks
        ]
        rows = [row for _, row in read_csv(file)[1:]]
        known = {int(row[0]): row[1] for row in rows if len(row) > 1 and row[0].isdigit()}
        if max(known, default=0) > 1000:
            raise ValueError(f"{file}: class {max(known)}, expected at most 1000")
        classes = [known.get(i) or "null" for i in range(max(known, default=-1) + 1)]
    else:
        file = folder / "label_list.mat"
        masks = sorted((folder / "annotations" / "pixel-level").glob("*.mat"))
        photos = [folder / "photos" / f"{mask.stem}.jpg" for mask in masks]
        classes = strings(read_mat(file)["label_list"])
    if not masks:
        expected = "annotations/pixel-level/*.mat or png_masks/MASKS/seg_*.png"
        raise FileNotFoundError(f"{folder}: no masks, expected {expected} in it")
    classes = [name.capitalize() for name in classes]
    boxes = np.stack([mask_boxes(*pair, classes) for pair in zip(masks, photos, strict=True)])
    counts = np.isfinite(boxes[:, :, 0]).sum(0)
    frequent = [classes[c] for c in np.flatnonzero(counts >= 50) if classes[c] in PCS_GROUPS]
    attributes = list(dict.fromkeys([*PCS_SHARED, *frequent]))
    missing = [name for name in attributes if name not in classes]
    if missing:
        raise ValueError(f"{file}: has no class {missing[0].lower()}, expected those of Tab. 10")
    wanted = parts_there(parts, ("train", "test"))
    indices = [i for i in range(len(masks)) if ("test" if i % 5 == 4 else "train") in wanted]
    boxes = boxes[:, [classes.index(name) for name in attributes]]
    labels = np.isfinite(boxes[:, :, 0])
    groups = [PCS_GROUPS[name] for name in attributes]
    names = [photo.name for photo in photos]
    whole = Split(str(folder), attributes, groups, names, photos, labels, boxes=boxes)
    return whole.subset(indices)


def mask_boxes(mask_file, photo, classes):
    """The box of each class on a photo, (classes, 4), NaN where it does not occur."""
    mask, size = read_mask(mask_file), image_size(photo)
    if mask.shape != size:
        found, expected = (f"{height}x{width}" for height, width in (mask.shape, size))
        raise ValueError(f"{mask_file}: the mask is {found}, expected its photo's {expected}")
    if mask.max() >= len(classes):
        expected = f"0 to {len(classes) - 1}"
        raise ValueError(f"{mask_file}: class {mask.max()} in the mask, expected {expected}")
    boxes = np.full((len(classes), 4), np.nan, np.float32)
    for c in np.unique(mask):
        rows, columns = np.flatnonzero((mask == c).any(1)), np.flatnonzero((mask == c).any(0))
        boxes[c] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def read_mask(file):
    """(H, W) integer classes from a `.mat` with `groundtruth`, or an image of the classes."""
    if file.suffix == ".mat":
        mask = np.asarray(read_mat(file).get("groundtruth"))
    else:
        with opened_image(file) as image:
            mask = np.asarray(image)
        mask = mask[:, :, 0] if mask.ndim == 3 else mask  # grey stored as colour
    if mask.ndim != 2 or not mask.size or mask.dtype.kind not in "biuf":
        raise ValueError(f"{file}: not a mask, expected classes in two dimensions")
    if (mask != mask.astype(np.int64)).any() or mask.min() < 0:
        raise ValueError(f"{file}: not a mask of classes, expected whole numbers")
    return mask.astype(np.int64)


# ---- A user's own data


def csv_split(folder, parts, partition, dataset):
    """`train.csv`, `val.csv`, `test.csv`: after a header, an image's path, then 0s and 1s.

    `groups.json` puts every attribute into a group, {"Hat": "head", ...}; PA-100K's names need
    none. PA-100K's own CSV releases, whose paths leave out `data/`, are read as they are.
    """
    names, labels = [], []
    reference = folder / "train.csv"
    reference = reference if reference.is_file() else folder / f"{parts[0]}.csv"
    attributes = read_csv(reference)[0][1][1:]
    for part in parts:
        file = folder / f"{part}.csv"
        (_, header), *rows = read_csv(file)
        if len(header) < 2 or len(set(header)) < len(header):
            found = ", ".join(header)
            raise ValueError(f"{file}: its header is {found}, expected image and attributes, once")
        if header[1:] != attributes:
            raise ValueError(f"{file}: its attributes are not those of {reference.name}, in order")
        for line, row in rows:
            where = f"{file}: line {line} ({row[0][:60]}) has"
            wrong = [value for value in row[1:] if value not in ("0", "1", "0.0", "1.0")]
            if len(row) != len(header):
                raise ValueError(f"{where} {len(row)} columns, expected {len(header)}")
            if wrong:
                raise ValueError(f"{where} the label {wrong[0]!r}, expected 0 or 1")
            names.append(row[0])
            labels.append(row[1:])
    place = image_folder(folder, ("", "data", "release_data/release_data"), (names or [""])[0])
    images = [place / name for name in names]
    labels = np.array(labels, np.float32).reshape(len(names), len(attributes))
    groups = groups_of(attributes, *csv_groups(folder))
    return Split(str(folder), attributes, groups, names, images, labels)


def csv_groups(folder):
    """The (name, group) pairs of `groups.json`, or PA-100K's, and where they are from."""
    file = folder / "groups.json"
    if not file.exists():
        return PA100K_GROUPS, f"{folder}: no groups.json, PA-100K's groups are taken"
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({str(error)[:100]})") from None
    if not isinstance(groups, dict) or not all(isinstance(g, str) for g in groups.values()):
        expected = f'{{"attribute": "group", ...}} with the groups {", ".join(GROUPS)}'
        raise ValueError(f"{file}: expected {expected}")
    return groups, file


def read_csv(file):
    """A CSV file's rows as (line number, stripped strings), without empty lines."""
    rows, line = [], 1
    try:
        with open(existing(file), newline="", encoding="utf-8-sig") as opened:
            reader = csv.reader(opened, strict=True)
            for values in reader:
                if values:
                    rows.append((line, [value.strip() for value in values]))
                line = reader.line_num + 1
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"line {line}: a quote opened there?"
        raise ValueError(f"{file}: not a CSV file ({error}; {where})") from None
    if not rows:
        raise ValueError(f"{file}: empty, expected a header")
    return rows


READERS = {"pa100k": pa100k, "rap1": rap1, "peta": peta, "pcs": pcs, "csv": csv_split}


# ---- The same attributes in two datasets


def parse_shared(text):
    """A table of names as {row: {dataset: name}}; "-" where a dataset has none."""
    (_, *datasets), *rows = [line.split() for line in text.strip().splitlines()]
    table = {}
    for name, *cells in rows:
        pairs = zip(datasets, cells, strict=True)
        table[name] = {dataset: cell for dataset, cell in pairs if cell != "-"}
    return table


# Attributes that mean the same (Tab. 7-9); "a|b" where either of two does. PETA has no boots among
# its 35, and its personalMale is Female's opposite.
SHARED = parse_shared("""
name         pa100k       rap1            peta                  upar
Boots        boots        shoes-Boots     -                     -
Hat          Hat          hs-Hat          accessoryHat          Accessory-Hat
HandBag      HandBag      attach-HandBag  -                     -
Glasses      Glasses      hs-Glasses      -        Accessory-Glasses-Normal|Accessory-Glasses-Sun
Sunglasses   -            -               accessorySunglasses   Accessory-Glasses-Sun
Backpack     Backpack     attach-Backpack carryingBackpack      Accessory-Backpack
ShortSleeve  ShortSleeve  ub-ShortSleeve  upperBodyShortSleeve  -
BaldHead     -            hs-BaldHead     -                     Hair-Length-Bald
LongHair     -            hs-LongHair     hairLong              Hair-Length-Long
Female       Female       Female          -                     Gender-Female
""")
# What stands in for a PCS class in a model of another dataset (Tab. 10): the nearest attribute that
# covers the thing.
PCS_SHARED = parse_shared("""
name        pcs         pa100k       rap1                     peta     upar
Hat         Hat         Hat          hs-Hat                   accessoryHat         Accessory-Hat
Boots       Boots       boots        shoes-Boots              -                    -
Glasses     Glasses     Glasses      hs-Glasses               -        Accessory-Glasses-Normal
Skirt       Skirt       Skirt&Dress  lb-Skirt|lb-ShortSkirt   lowerBodyShortSkirt \
 LowerBody-Type-Skirt&Dress
Jeans       Jeans       Trousers     lb-Jeans                 lowerBodyJeans \
 LowerBody-Type-Trousers&Jeans
Dress       Dress       Skirt&Dress  lb-Dress                 -        LowerBody-Type-Skirt&Dress
Shorts      Shorts      Shorts       -                        lowerBodyShorts      -
Sunglasses  Sunglasses  Glasses      hs-Glasses    accessorySunglasses    Accessory-Glasses-Sun
T-shirt     T-shirt     ShortSleeve  ub-TShirt                upperBodyTshirt      -
""")


def shared_attributes(trained_on, model_attributes, tested_on, split):
    """A split reduced to the attributes that a model of another dataset knows.

    Args:
        trained_on, model_attributes: the model's dataset and attribute names.
        tested_on: the split's dataset.
    Returns:
        The reduced `Split`, and for each of its attributes the indices of the model's outputs: it
        is there if any of them is, see `max_over_outputs`.
    """
    if model_attributes == split.attributes:
        return split, [[j] for j in range(len(model_attributes))]
    alike = {"synthetic": "pa100k"}  # drawn with PA-100K's attributes
    trained, tested = alike.get(trained_on, trained_on), alike.get(tested_on, tested_on)
    table = PCS_SHARED if "pcs" in (trained, tested) else SHARED
    if trained == tested or "csv" in (trained, tested):
        table = {name: {trained: name, tested: name} for name in split.attributes}
    rows = []
    for name, row in table.items():
        if trained in row and tested in row:
            ours = indices_of(row[trained], model_attributes)
            theirs = indices_of(row[tested], split.attributes)
            if None not in ours + theirs:  # "a|b" needs both
                rows.append((name, ours, theirs))
    if not rows:
        raise ValueError(f"{split.name}: shares no attribute with a model of {trained_on}")
    names, outputs, sources = zip(*rows, strict=True)
    labels = np.stack([split.labels[:, j].max(1) for j in sources], 1)
    groups = [split.groups[j[0]] for j in sources]
    boxes = None
    if split.boxes is not None:
        boxes = np.stack([enclosing(split.boxes[:, j]) for j in sources], 1)
    reduced = replace(split, attributes=list(names), groups=groups, labels=labels, boxes=boxes)
    return reduced, list(outputs)


def indices_of(names, attributes):
    """The index of each of the names "a|b", None where it is not among the attributes."""
    places = {attribute.lower(): j for j, attribute in enumerate(attributes)}
    return [places.get(name.lower()) for name in names.split("|")]


def enclosing(boxes):
    """(N, n, 4) -> (N, 4): the rectangle around each image's boxes; NaN where it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of images without a box
        return np.concatenate([np.nanmin(boxes[:, :, :2], 1), np.nanmax(boxes[:, :, 2:], 1)], 1)


def max_over_outputs(logits, output_indices):
    """(N, L) logits of a model -> (N, K): of each list of outputs the highest logit."""
    return torch.stack([logits[:, j].amax(1) for j in output_indices], 1)


# ---- Keypoints


def read_keypoints(file, names):
    """The (N, 16, 2) keypoints of the named images.

    The file is an .npz with `names` (K,) and `keypoints` (K, 16, 3): x, y in image pixels and a
    confidence, which PLE-K does not use; in MPII order.
    """
    existing(file, "keypoint file")
    try:
        with np.load(file, allow_pickle=False) as archive:
            known = strings(archive["names"])
            points = archive["keypoints"].astype(np.float32)
    except Exception as error:  # zip, numpy and the conversion raise many kinds
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{file}: not a file of names and keypoints ({reason})") from None
    if points.shape != (len(known), 16, 3):
        expected = [len(known), 16, 3]
        raise ValueError(f"{file}: keypoints are {list(points.shape)}, expected {expected}")
    row = {name: i for i, name in enumerate(known)}
    if len(row) < len(known):
        raise ValueError(f"{file}: an image name occurs twice")
    missing = [name for name in names if name not in row]
    if missing:
        count = f"{len(missing)} of {len(names)} are missing"
        raise ValueError(f"{file}: has no keypoints for image {missing[0]} ({count})")
    points = points[[row[name] for name in names], :, :2]
    for i in np.flatnonzero(~np.isfinite(points).all((1, 2)))[:1]:
        raise ValueError(f"{file}: keypoints of {names[i]} are not finite")
    return points


class SimCC(nn.Module):
    """SimCC (Li et al., ECCV 2022) with ResNet50 for MPII's 16 points, under its own names.

    A point's x and its y are classified apart, each into 512 bins of half a pixel of the 256x256
    input.
    """

    size = 256

    def __init__(self):
        super().__init__()
        self.backbone = torchvision.models.resnet50()
        self.backbone.avgpool = self.backbone.fc = nn.Identity()
        self.head = nn.Module()
        self.head.final_layer = nn.Conv2d(2048, 16, 1)
        self.head.mlp_head_x = nn.Linear(64, 512)
        self.head.mlp_head_y = nn.Linear(64, 512)

    def forward(self, images):
        """(B, 3, 256, 256), normalized by ImageNet -> logits of x and of y, each (B, 16, 512)."""
        x = self.backbone(images).unflatten(1, (2048, 8, 8))
        x = self.head.final_layer(x).flatten(2)  # (B, 16, 64)
        return self.head.mlp_head_x(x), self.head.mlp_head_y(x)

    @staticmethod
    def decode(x, y):
        """Logits of x and y (B, 16, 512) -> (B, 16, 3): x, y in input pixels, and the smaller of
        their probabilities."""
        px, bin_x = x.softmax(2).max(2)
        py, bin_y = y.softmax(2).max(2)
        return torch.stack([bin_x / 2, bin_y / 2, torch.minimum(px, py)], 2)

    def find(self, images):
        """N images (3, H, W) uint8 of one person each -> (N, 16, 3) in each image's pixels."""
        crops = torch.stack([square(image, self.size) for image in images])
        crops = crops.to(self.head.final_layer.weight.device)
        points = self.decode(*self(normalize(crops))).cpu()
        pairs = zip(points, images, strict=True)
        return torch.stack([from_square(p, image.shape[1:], self.size) for p, image in pairs])


def square_place(image_size, size):
    """Where an image (H, W) lies in its square: image pixels per crop pixel, left and top margin.

    The square is 1.25 times the longer side, as SimCC's training framed people.
    """
    H, W = image_size
    side = math.ceil(1.25 * max(H, W))
    return side / size, (side - W) // 2, (side - H) // 2


def square(image, size):
    """(3, H, W) -> (3, size, size): the whole image in the middle of a black square."""
    H, W = image.shape[1:]
    scale, left, top = square_place((H, W), size)
    side = round(scale * size)
    padded = VF.pad(image, [left, top, side - W - left, side - H - top])
    return VF.resize(padded, [size, size], antialias=True)


def from_square(points, image_size, size):
    """Points (..., 2 or 3) from crop pixels to image pixels; a third number is kept."""
    scale, left, top = square_place(image_size, size)
    places = (points[..., :2] + 0.5) * scale - 0.5 - torch.tensor([left, top])
    return torch.cat([places, points[..., 2:]], -1)


def coco_to_mpii():
    """(16, 17): MPII's points as means of COCO's 17.

    Those that COCO lacks lie on the line from the shoulders' middle, the thorax, to the face's, in
    an adult's proportions: upper neck at 0.45 of that way, head top at 1.65.
    """
    matrix = torch.zeros(16, 17)
    mpii, coco = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15], [16, 14, 12, 11, 13, 15, 10, 8, 6, 5]
    matrix[mpii, [*coco, 7, 9]] = 1
    matrix[6, [11, 12]] = 1 / 2  # pelvis
    matrix[7, [5, 6]] = 1 / 2  # thorax
    face = torch.zeros(17)
    face[:5] = 1 / 5
    matrix[8] = matrix[7] + 0.45 * (face - matrix[7])
    matrix[9] = matrix[7] + 1.65 * (face - matrix[7])
    return matrix


class KeypointRCNN(nn.Module):
    """torchvision's Keypoint R-CNN: `find` as in `SimCC`, of the best-scored person.

    Args:
        options: of `keypointrcnn_resnet50_fpn`.
    """

    def __init__(self, **options):
        super().__init__()
        build = torchvision.models.detection.keypointrcnn_resnet50_fpn
        self.detector = build(weights_backbone=None, **options)

    def find(self, images):
        device, matrix = next(self.parameters()).device, coco_to_mpii()
        inputs = [VF.to_dtype(image.to(device), torch.float32, scale=True) for image in images]
        points = torch.zeros(len(images), 16, 3)  # confidence 0: nobody there
        for i, person in enumerate(self.detector(inputs)):
            if len(person["scores"]):
                best = person["scores"].argmax()
                coco = person["keypoints"][best, :, :2].cpu()
                sure = person["keypoints_scores"][best].sigmoid().cpu()
                sure = torch.where(matrix != 0, sure, 1).amin(1, keepdim=True)
                points[i] = torch.cat([matrix @ coco, sure], 1)
        return points


def pose_model(name, weights):
    """The pose network "simcc" or "keypointrcnn" in evaluation mode, with a state dict's weights.

    weights: a file; for keypointrcnn "coco" fetches torchvision's.
    """
    if name == "keypointrcnn" and weights == "coco":
        try:
            return KeypointRCNN(weights="COCO_V1").eval()
        except OSError as error:
            reason = f"torchvision could not fetch them ({error})"
            raise ValueError(f"--weights coco: {reason}; give --weights FILE") from None
    if not Path(weights).is_file():
        hint = ", or coco" if name == "keypointrcnn" else ""
        raise FileNotFoundError(f"{weights}: no such file, expected a state dict{hint}")
    model = SimCC() if name == "simcc" else KeypointRCNN(weights=None)
    load_weights(model if name == "simcc" else model.detector, weights)
    return model.eval()


def read_images(sources):
    """A list of (3, H, W) uint8 images in their own sizes."""
    return [read_image(source) for source in sources]


@torch.inference_mode()
def find_keypoints(model, split, out, batch_size=32, workers=0, source=""):
    """Runs a pose network over a split's images and writes a keypoint file.

    Every 20 batches, and where it is interrupted, the points so far go to `out`.part, from which
    the next call continues. An image without a person gets the mean pose of the others, as shares
    of height and width, and confidence 0. Returns how many those are.

    source: what made the points; a part that something else made is refused.
    """
    out = Path(out)
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise ValueError(f"{out}: is here already, give another --out")
    if len(set(split.names)) < len(split.names):
        raise ValueError(f"{split.name}: two images have the same name")
    points = read_part(part, split, source) if part.exists() else []  # each (16, 3)
    before, N, started = len(points), len(split.names), time.time()
    common = {"num_workers": workers, "collate_fn": read_images}
    batches = torch.utils.data.DataLoader(split.images[before:], batch_size, **common)
    try:
        for step, images in enumerate(batches, 1):
            points += list(model.find(images))
            show_progress(f"{len(points)}/{N} images", len(points) - before, N - before, started)
            if step % 20 == 0:
                write_npz(part, names=split.names, source=source, keypoints=torch.stack(points))
    finally:
        if before < len(points) < N:
            write_npz(part, names=split.names, source=source, keypoints=torch.stack(points))
    points = torch.stack(points)
    nobody = (points[:, :, 2] == 0).all(1)
    if nobody.all():
        raise ValueError(f"{split.name}: nobody was found on any image")
    if nobody.any():  # only then are the images' sizes needed
        sizes = torch.tensor([image_size(image)[::-1] for image in split.images])  # (N, 2)
        mean = ((points[:, :, :2] + 0.5) / sizes[:, None])[~nobody].mean(0)  # (16, 2)
        points[nobody, :, :2] = mean * sizes[nobody, None] - 0.5
    write_npz(out, names=split.names, keypoints=points)
    part.unlink(missing_ok=True)
    return int(nobody.sum())


def read_part(part, split, source):
    """The points that an interrupted `find_keypoints` has found, a list of (16, 3)."""
    try:
        with np.load(part, allow_pickle=False) as archive:
            made = archive["names"].tolist(), str(archive["source"])
            points = list(torch.from_numpy(archive["keypoints"]).reshape(-1, 16, 3))
    except Exception as error:
        reason = f"not a part of a keypoint file ({error})"
        raise ValueError(f"{part}: {reason}; remove it to begin anew") from None
    if made != (split.names, source) or len(points) > len(split.names):
        raise ValueError(f"{part}: was begun with other images or weights; remove it to begin anew")
    return points


# ---- What the commands share


# Warnings of torch about what is done here on purpose.
EXPECTED_WARNINGS = (
    "`broadcast_buffers` is deprecated",  # torch 2.6 knows it under this name alone
    "Detected call of `lr_scheduler.step",  # fp16 may skip the first optimizer step
    "This DataLoader will create",  # as many workers as the user asks for
)


def add_dataset_arguments(parser):
    """The arguments with which a command names a dataset."""
    add = parser.add_argument
    add("--dataset", choices=DATASETS, help="which dataset to read (README.md, Data)")
    add("--data", help="the dataset's folder, or its dataset_all.pkl")
    add("--keypoints", help="the file of keypoints (.npz) that PLE-K reads")
    add("--partition", type=int, help="1 to 5 of rap1 and peta, 1 to 9 of upar (default 1)")
    add("--exclude", nargs="+", metavar="PART", help="parts of upar to leave out, such as RAP2")
    add("--domain", type=int, choices=[0, 1], help="the synthetic set's domain (default 0)")
    add("--images", type=int, help="how many images the synthetic set draws for each split")


def add_loading_arguments(parser):
    """The arguments that say how a command reads images, and where it computes."""
    add, device = parser.add_argument, "cuda" if torch.cuda.is_available() else "cpu"
    add("--batch-size", type=int, default=32, help="images per batch (default 32)")
    add("--workers", type=int, default=0, help="processes that load images (default 0: none)")
    add("--device", default=device, help="cpu, cuda or cuda:N (default here: %(default)s)")


def check_lowest(args, **lowest):
    """Refuses a number below what is given for it; each command's loader, too, has such numbers."""
    for name, low in {"batch_size": 1, "workers": 0, "images": 1, **lowest}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {low}")


def set_up_device(name):
    """Checks a --device and makes it torch's; returns its full name, such as "cuda:0"."""
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return name
    index = os.environ.get("LOCAL_RANK") or index or "0"
    if kind != "cuda" or not index.isdigit() or int(index) >= count:
        raise ValueError(f"--device {name}: expected cpu, or cuda with one of {count} devices")
    torch.cuda.set_device(int(index))  # kernels and collectives go to the current device
    torch.backends.cudnn.benchmark = True  # all inputs have one size
    torch.set_float32_matmul_precision("high")  # TF32 for float32
    return f"cuda:{index}"


def command(main):
    """Runs a command's `main`; bad input becomes one line on stderr and exit status 2."""
    keep_freed_memory()
    for text in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=text)
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]  # a worker's traceback goes before
        line = lines[-1].removeprefix("ValueError: ").removeprefix("FileNotFoundError: ")
        alone = not torch.distributed.is_initialized()  # before, all processes fail alike
        if not alone or os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory():
    """Has Linux's C library keep freed memory, which saves a fifth of a CPU training step: else it
    fetches each large tensor's anew from the system, zeroed page by page."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        library.mallopt(-1, -1)  # M_TRIM_THRESHOLD


def show_progress(text, done, total, started):
    """One line on stderr with the time left: rewritten on a terminal, else every ten seconds."""
    left = (time.time() - started) / done * (total - done)
    line = f"{text}  {left / 60:.1f} min left"
    if sys.stderr.isatty():
        print(f"\r{line}\033[K", end="\r", file=sys.stderr, flush=True)
    elif done == total or time.time() - show_progress.shown > 10:
        print(line, file=sys.stderr, flush=True)
        show_progress.shown = time.time()


show_progress.shown = 0.0


@contextmanager
def replacing(file):
    """A temporary path that replaces `file` in the end, so that `file` is always whole."""
    temporary = Path(f"{file}.tmp")
    yield temporary
    os.replace(temporary, file)


def write_json(file, value):
    """Writes a result as JSON; NaN, an undefined figure, becomes null. ASCII in any locale."""
    finite = json.loads(json.dumps(value), parse_constant=lambda _: None)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(finite, indent=1) + "\n", encoding="ascii")


def write_npz(file, **arrays):
    """np.savez of whatever numpy takes."""
    with replacing(file) as temporary, open(temporary, "wb") as opened:
        np.savez(opened, **{name: np.asarray(value) for name, value in arrays.items()})


def average_image(images, size, workers=0):
    """Fig. A.9a: the mean of images, each resized to (H, W) -> (H, W, 3) uint8."""
    total, started = torch.zeros(3, *size, dtype=torch.float64), time.time()
    common = {"num_workers": workers, "collate_fn": read_images}
    for done, (image,) in enumerate(torch.utils.data.DataLoader(images, 1, **common), 1):
        total += VF.resize(image, list(size), antialias=True)
        show_progress(f"{done}/{len(images)} images", done, len(images), started)
    return (total / len(images)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("command", choices=["keypoints", "average"], help="what to make of the images")
    add("paths", nargs="*", help="images or folders of them (default: a dataset's split)")
    add_dataset_arguments(parser)
    add("--split", default="all", choices=PARTS, help="which split to read (default: all)")
    add("--out", required=True, help="the keypoint file (.npz) or the image (.png) to write")
    add("--model", default="simcc", choices=["simcc", "keypointrcnn"], help="the pose network")
    add("--weights", help="its state dict file; coco downloads those of keypointrcnn")
    size = {"type": int, "nargs": 2, "metavar": ("H", "W"), "default": (256, 192)}
    add("--size", **size, help="size of the average image (default 256 192)")
    add_loading_arguments(parser)
    args = parser.parse_intermixed_args()
    check_lowest(args)
    if min(args.size) < 1:
        raise ValueError(f"--size {args.size[0]} {args.size[1]}: expected at least 1")
    if args.command == "keypoints" and not args.weights:
        raise ValueError("--weights: give the pose network's")
    args.device = set_up_device(args.device)
    if args.paths:
        split = photo_split(args.paths, ["unknown"], ["all"])
    else:
        config = {key: getattr(args, key) for key in (*DATA_KEYS, "images")}
        config["dataset"] = args.dataset or ("pa100k" if args.data else "synthetic")
        split = open_split({**config, "ple": None, "size": (128, 96)}, args.split)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    what = f"{len(split.names)} images of {split.name}"
    if args.command == "average":
        average = Image.fromarray(average_image(split.images, args.size, args.workers))
        with replacing(args.out) as temporary:
            average.save(temporary, "PNG")
        print(f"{args.out}: the mean of {what}")
    else:
        model = pose_model(args.model, args.weights).to(args.device)
        source = f"{args.model} {args.weights}"
        nobody = find_keypoints(model, split, args.out, args.batch_size, args.workers, source)
        print(f"{args.out}: 16 points on each of {what}; nobody found on {nobody}")


# ---- Drawn pedestrians, in units of an image of 128 x 96 whatever its size

# How often each attribute is drawn: PA-100K's long tail, its rarest raised so that a few hundred
# images have some. The order is that of the random numbers.
FREQUENCY = parse_pairs("""
    Hat:0.10 Glasses:0.19 HandBag:0.19 ShoulderBag:0.16 Backpack:0.15 HoldObjectsInFront:0.07
    ShortSleeve:0.58 UpperStride:0.08 UpperLogo:0.15 UpperPlaid:0.10 UpperSplice:0.08
    LowerStripe:0.07 LowerPattern:0.07 LongCoat:0.07 boots:0.10 Female:0.45
""")
SPLIT_SIZES = {"train": 2400, "val": 300, "test": 600}
UPPER = ["UpperStride", "UpperLogo", "UpperPlaid", "UpperSplice"]
LEGS, ARMS = ((2, 1, 0), (3, 4, 5)), ((12, 11, 10), (13, 14, 15))  # MPII, from the trunk outwards
SKIN_EDGE, SHOE, GLASS, PUPIL = (205, 160, 130), (40, 35, 35), (20, 20, 25), (30, 20, 20)


def synthetic(split, seed=0, domain=0, size=(128, 96), count=None):
    """Drawn pedestrians with PA-100K's 26 attributes, 16 MPII keypoints and a box for each thing.

    Image i of a part depends on (seed, domain, part, i) alone.

    Args:
        split: one of `PARTS`.
        domain: 0, or 1 with other backgrounds, colours, light and co-occurrence of attributes.
        size: (H, W) of the images.
        count: images per part; `SPLIT_SIZES` by default.
    """
    if domain not in (0, 1):
        raise ValueError(f"domain {domain}: expected 0 or 1")
    names, drawn = [], []
    for part in PARTS[split]:
        for i in range(count or SPLIT_SIZES[part]):
            names.append(f"{part}-{domain}-{i:05d}")
            rng = np.random.default_rng((seed, domain, list(SPLIT_SIZES).index(part), i))
            drawn.append(draw_pedestrian(rng, domain, size))
    images, labels, keypoints, boxes = zip(*drawn, strict=True)
    name = f"synthetic {split} (seed {seed}, domain {domain})"
    known = list(PA100K_GROUPS), list(PA100K_GROUPS.values()), names, list(images)
    return Split(name, *known, np.stack(labels), np.stack(keypoints), np.stack(boxes))


def draw_labels(rng, domain):
    """The set of attribute names of one pedestrian."""
    has = {name for name, share in FREQUENCY.items() if rng.random() < float(share)}
    # Co-occurrence differs between the domains, so that tests across them punish who learns it.
    woman = "Female" in has
    skirt = 0.01
    if woman:
        skirt = 0.35 if domain == 0 else 0.15
    if rng.random() < 0.5:
        partners = {"Backpack": "Hat", "HandBag": "Glasses"}
        if domain == 1:
            partners = {"HandBag": "Hat", "ShoulderBag": "Glasses"}
        has |= {b for a, b in partners.items() if a in has and rng.random() < 0.5}
    if woman != (domain == 0) and "HandBag" in has and rng.random() < 0.6:
        has.discard("HandBag")
    has.add("LongSleeve" if "ShortSleeve" not in has else "ShortSleeve")
    lower = "Skirt&Dress" if rng.random() < skirt else None
    lower = lower or ("Shorts" if rng.random() < 0.2 else "Trousers")
    has.add(lower)
    if lower != "Trousers":
        has.discard("LowerStripe")
    has.add(str(rng.choice(["AgeOver60", "Age18-60", "AgeLess18"], p=[0.08, 0.82, 0.10])))
    has.add(str(rng.choice(["Front", "Side", "Back"], p=[0.36, 0.28, 0.36])))
    for name in UPPER[1:]:  # one pattern at a time
        if has & set(UPPER) - {name}:
            has.discard(name)
    if {"LowerStripe", "LowerPattern"} <= has:
        has.discard("LowerPattern")
    if "Back" in has:
        has -= {"Glasses", "HoldObjectsInFront"}
    if "HoldObjectsInFront" in has:
        has -= {"HandBag"}
    return has


class Pen:
    """Draws polygons and keeps the boxes of the attributes that they belong to."""

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
        corners = [tuple(p) for p in points * self.scale]
        self.draw.polygon(corners, fill=tuple(int(c) for c in colour))
        for name in self.names:
            low, high = points.min(0), points.max(0)
            if name in self.boxes:
                low = np.minimum(low, self.boxes[name][:2])
                high = np.maximum(high, self.boxes[name][2:])
            self.boxes[name] = np.concatenate([low, high])

    def rectangle(self, left, top, right, bottom, colour):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def oval(self, x, y, rx, ry, colour, start=0, end=360):
        angle = np.radians(np.linspace(start, end, 20))
        self.polygon(np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], 1), colour)

    def limb(self, a, b, width_a, width_b, colour):
        """A tapered bar from a to b with round ends."""
        a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
        along = (b - a) / max(np.linalg.norm(b - a), 1e-6)
        across = np.array([-along[1], along[0]])
        corners = a + across * width_a, b + across * width_b
        self.polygon([*corners, b - across * width_b, a - across * width_a], colour)
        self.oval(*a, width_a, width_a, colour)
        self.oval(*b, width_b, width_b, colour)


def draw_hat(pen, x, y, r, colour, facing=0):
    """On a head centred at (x, y) of radius r: a crown and a brim, towards `facing` (-1, 0, 1)."""
    pen.oval(x, y - 0.35 * r, 1.05 * r, 0.95 * r, colour, 180, 360)
    left, right = x - (1.5 - 0.4 * facing) * r, x + (1.5 + 0.4 * facing) * r
    pen.rectangle(left, y - 0.45 * r, right, y - 0.2 * r, colour)


def draw_glasses(pen, x, y, r, facing=0):
    for side in (-0.45, 0.45) if facing == 0 else (0.5 * facing,):
        pen.oval(x + side * r, y, 0.36 * r, 0.3 * r, GLASS)
    left, right = 0.9 if facing <= 0 else 0.1, 0.9 if facing >= 0 else 0.1
    pen.limb((x - left * r, y), (x + right * r, y), 0.09 * r, 0.09 * r, GLASS)


def draw_bag(pen, x, y, w, h, colour):
    """A bag hanging from (x, y): handle and body."""
    pen.limb((x, y), (x - 0.6 * w, y + 0.5 * h), 0.6, 0.6, colour)
    pen.limb((x, y), (x + 0.6 * w, y + 0.5 * h), 0.6, 0.6, colour)
    top, bottom = y + 0.5 * h, y + 1.5 * h
    corners = [(x - w, top), (x + w, top), (x + 1.1 * w, bottom), (x - 1.1 * w, bottom)]
    pen.polygon(corners, colour)


def draw_boot(pen, knee, ankle, width, colour, facing):
    knee, ankle = np.asarray(knee), np.asarray(ankle)
    pen.limb(knee + 0.35 * (ankle - knee), ankle, 1.25 * width, 1.2 * width, colour)
    pen.oval(ankle[0] + facing * width, ankle[1] + width, 2 * width, 1.1 * width, colour)


def hsv(hue, saturation, value):
    """Hue, saturation and value in [0, 1] -> (r, g, b) in 0..255."""
    rgb = colorsys.hsv_to_rgb(hue, min(saturation, 1), min(value, 1))
    return tuple(int(255 * c) for c in rgb)


def draw_background(pen, rng, domain, colour):
    """A wall, a floor, clutter, other people's parts, and things out of place."""
    horizon = rng.uniform(50, 110)
    wall, floor = colour(0.25 if domain == 0 else 0.45), colour(0.25)
    pen.rectangle(0, 0, 96, 128, wall)
    pen.rectangle(0, horizon, 96, 128, floor)
    for _ in range(rng.integers(2, 6)):
        x, y, w, h = (rng.uniform(*span) for span in ((-10, 96), (-10, 128), (3, 30), (3, 40)))
        if domain == 0:  # a street: doors, windows, signs
            pen.rectangle(x, y, x + w, y + h, colour(0.35))
            if rng.random() < 0.3:
                for k in np.arange(0, h, 4):
                    pen.rectangle(x, y + k, x + w, y + k + 1.5, colour(0.35))
        else:  # a park: foliage and slanted light
            pen.oval(x, y, w / 2, h / 2, colour(0.45))
            pen.limb((x, y), (x + rng.uniform(-30, 30), y + h), 1, 1, colour(0.4))
    for _ in range(rng.integers(0, 3)):  # other people's parts, at the image's edges
        x = rng.choice([rng.uniform(-4, 8), rng.uniform(88, 100)])
        y, shade = rng.uniform(5, 100), colour(0.6)
        pen.limb((x, y), (x + rng.uniform(-6, 6), y + 35), 5, 4, shade)
        if rng.random() < 0.5:
            pen.oval(x, y - 8, 6, 7, SKIN_EDGE)
    for _ in range(rng.integers(1, 4)):  # hats low, boots high, bags and glasses on nobody
        kind, x, facing = rng.integers(0, 4), rng.uniform(4, 92), int(rng.integers(-1, 2))
        if kind == 0:
            y, r = rng.uniform(60, 124), rng.uniform(6, 9)
            draw_hat(pen, x, y, r, colour(0.8), facing)
        elif kind == 1:
            draw_glasses(pen, x, rng.uniform(60, 124), rng.uniform(6, 9), facing)
        elif kind == 2:
            y = rng.uniform(-5, 35)
            draw_boot(pen, (x, y), (x, y + 20), 3, colour(0.6), facing)
        else:
            y, w, h = rng.uniform(0, 30), rng.uniform(4, 7), rng.uniform(5, 9)
            draw_bag(pen, x, y, w, h, colour(0.8))


class Body:
    """A pedestrian's pose, proportions and colours; lengths in drawing units."""

    def __init__(self, rng, has, colour):
        self.has, self.woman = has, "Female" in has
        self.side, self.back = "Side" in has, "Back" in has
        child = "AgeLess18" in has
        self.facing = int(rng.choice([-1, 1])) if self.side else 0
        self.tall = rng.uniform(100, 120)
        self.top = rng.uniform(0.15, 0.85) * (128 - self.tall)
        self.middle = 48 + rng.normal(0, 3)
        share = 0.09 if child else 0.068
        self.head = self.tall * share * rng.uniform(0.93, 1.07)  # radius
        build = rng.uniform(0.85, 1.2)
        wide = 0.055 if self.side else 0.105
        if not self.woman:
            wide = 0.065 if self.side else 0.13
        self.shoulder = self.tall * build * wide
        wide = 0.085 if self.woman else 0.075
        self.hip = self.tall * build * (0.05 if self.side else wide)
        self.lean = rng.normal(0, 2) + (self.facing * 5 if "AgeOver60" in has else 0)
        self.limb = 0.032 * self.tall * build
        self.skull = self.at(0.0) + [0, 1.15 * self.head]
        neck_y = (2.3 * self.head) / self.tall
        self.shoulder_y, self.hip_y = neck_y + 0.045, 0.57 if child else 0.53
        self.joint = {6: self.at(self.hip_y), 7: self.at(self.shoulder_y)}
        self.joint.update({8: self.at(neck_y), 9: self.at(0.0)})
        self.pose_limbs(rng)
        self.choose_colours(rng, colour)
        self.coat = "LongCoat" in has
        self.bottom = 0.8 if self.coat else self.hip_y + 0.02  # of the trunk's clothes

    def at(self, share, dx=0.0):
        """The point at a share of the body's height, dx from its middle line."""
        x = self.middle + dx + self.lean * (1 - share)
        return np.array([x, self.top + share * self.tall])

    def pose_limbs(self, rng):
        right = 1 if self.back else -1  # a facing person's right is on the image's left
        stride = rng.normal(0, 0.2 if self.side else 0.06)
        joint, tall, facing = self.joint, self.tall, self.facing
        thigh, shin = 0.22 * tall, (0.955 - self.hip_y) * tall - 0.22 * tall
        for s, leg, arm in zip((right, -right), LEGS, ARMS, strict=True):
            (hip, knee, ankle), (shoulder, elbow, wrist) = leg, arm
            sign = s if not self.side else s * 0.25
            joint[hip] = self.at(self.hip_y, sign * self.hip * 0.6)
            swing = stride * s + rng.normal(0, 0.04)
            joint[knee] = joint[hip] + thigh * np.array([math.sin(swing), math.cos(swing)])
            bend = swing - abs(rng.normal(0, 0.1)) * (facing or rng.choice([-1, 1]))
            joint[ankle] = joint[knee] + shin * np.array([math.sin(bend), math.cos(bend)])
            joint[shoulder] = self.at(self.shoulder_y + 0.015, sign * self.shoulder * 0.9)
            if self.side:
                lift = rng.normal(-stride * s, 0.25)
                fore = lift + facing * abs(rng.normal(0.3, 0.3))
            else:
                lift = sign * abs(rng.normal(0.15, 0.15))
                fore = lift + -sign * rng.normal(0.1, 0.3)
            upper = np.array([math.sin(lift), math.cos(lift)])
            joint[elbow] = joint[shoulder] + 0.165 * tall * upper
            if "HoldObjectsInFront" in self.has:
                fore = facing * 1.5 if self.side else -s * 1.1
            joint[wrist] = joint[elbow] + 0.15 * tall * np.array([math.sin(fore), math.cos(fore)])

    def choose_colours(self, rng, colour):
        hue, saturation, value = (rng.uniform(*r) for r in ((0.05, 0.08), (0.4, 0.55), (0.6, 0.95)))
        self.skin = hsv(hue, saturation, value)
        if "AgeOver60" in self.has:
            self.hair = hsv(0.1, 0.05, rng.uniform(0.75, 0.95))
        else:
            self.hair = hsv(0.08, 0.5, rng.uniform(0.05, 0.3))
        self.shirt, self.cloth, self.accent, self.leather = map(colour, (0.9, 0.7, 0.9, 0.8))
        self.contrast = tuple(255 - c for c in self.cloth)
        distance = sum(abs(a - b) for a, b in zip(self.accent, self.shirt, strict=True))
        if distance < 150:  # a pattern must differ from what it is on
            self.accent = tuple(255 - c for c in self.shirt)

    def corner(self, u, v):
        """The point at (u, v) in [0, 1] of the trunk's clothes, from shoulders to their end."""
        wide = 1.5 * self.hip if self.coat else self.hip
        share = self.shoulder_y + v * (self.bottom - self.shoulder_y)
        return self.at(share, (2 * u - 1) * (self.shoulder + v * (wide - self.shoulder)))

    def quad(self, u0, u1, v0, v1):
        corners = (u0, v0), (u1, v0), (u1, v1), (u0, v1)
        return [self.corner(u, v) for u, v in corners]


def draw_pack(pen, body, dx):
    w, top, bottom = body.shoulder, body.shoulder_y, body.hip_y - 0.06
    corners = (
        (top, dx - 0.8 * w),
        (top, dx + 0.8 * w),
        (bottom, dx + 0.9 * w),
        (bottom, dx - 0.9 * w),
    )
    pen.polygon([body.at(*corner) for corner in corners], body.leather)


def draw_behind(pen, body, rng):
    """What the body covers: a backpack seen from the front, long hair."""
    if "Backpack" in body.has and not body.back:
        pen.item("Backpack")
        draw_pack(pen, body, -body.facing * 1.5 * body.shoulder)
    if body.woman and rng.random() < 0.85 and "AgeOver60" not in body.has:
        pen.item()
        head, skull = body.head, body.skull
        low = [1.15 * head, 2.4 * head], [-1.15 * head, 2.4 * head]
        corners = [skull - [head, 0], skull + [head, 0], *(skull + corner for corner in low)]
        pen.polygon(corners, body.hair)


def draw_legs(pen, body, rng):
    """Legs and shoes, then trousers, shorts or a skirt with their patterns, then boots."""
    has, joint, limb, cloth = body.has, body.joint, body.limb, body.cloth
    lower = next(name for name in ("Trousers", "Shorts", "Skirt&Dress") if name in has)
    pattern = has & {"LowerPattern"}
    for hip, knee, ankle in LEGS:
        pen.item()
        pen.limb(joint[hip], joint[knee], 1.35 * limb, limb, body.skin)
        pen.limb(joint[knee], joint[ankle], limb, 0.75 * limb, body.skin)
        x, y = joint[ankle][0] + body.facing * limb, joint[ankle][1] + limb
        pen.oval(x, y, 1.5 * limb, 0.9 * limb, SHOE)
    for hip, knee, ankle in LEGS:
        pen.item(lower, *pattern)
        if lower == "Trousers":
            pen.limb(joint[hip], joint[knee], 1.6 * limb, 1.25 * limb, cloth)
            pen.limb(joint[knee], joint[ankle], 1.25 * limb, limb, cloth)
            if "LowerStripe" in has:
                pen.item("LowerStripe")
                for a, b in ((hip, knee), (knee, ankle)):
                    pen.limb(joint[a], joint[b], 0.35 * limb, 0.35 * limb, body.contrast)
        elif lower == "Shorts":
            end = 0.25 * joint[hip] + 0.75 * joint[knee]
            pen.limb(joint[hip], end, 1.7 * limb, 1.6 * limb, cloth)
        if "boots" in has:
            pen.item("boots")
            draw_boot(pen, joint[knee], joint[ankle], 1.05 * limb, body.leather, body.facing)
    pen.item(lower, *pattern)
    if lower == "Skirt&Dress":
        top, wide = body.hip_y - 0.05, 1.7 * body.hip + 1
        corners = (top, -body.hip), (top, body.hip), (0.74, wide), (0.74, -wide)
        pen.polygon([body.at(*corner) for corner in corners], cloth)
    if pattern:
        for hip, knee, _ in LEGS:
            for share in np.linspace(0.1, 0.7 if lower == "Shorts" else 0.95, 5):
                dot = (1 - share) * joint[hip] + share * joint[knee] + rng.normal(0, 0.4, 2)
                pen.oval(*dot, 0.55 * limb, 0.55 * limb, body.contrast)


def draw_trunk(pen, body, rng):
    """Neck and upper clothes with their pattern, and a backpack's straps or the backpack."""
    has, quad, accent = body.has, body.quad, body.accent
    pen.item()
    neck = 0.45 * body.head
    pen.limb(body.skull, body.at(body.shoulder_y), neck, neck, body.skin)
    pen.item(*(has & {"LongCoat", "UpperStride", "UpperPlaid", "UpperSplice"}))
    pen.polygon(quad(0, 1, 0, 1), body.shirt)
    high = 0.55 if body.coat else 1.0
    if "UpperStride" in has:
        for v in np.arange(0.1, high, 0.2 * high):
            pen.polygon(quad(0, 1, v, v + 0.09 * high), accent)
    if "UpperPlaid" in has:
        for share in np.arange(0.05, 1, 0.24):
            pen.polygon(quad(0, 1, share * high, (share + 0.07) * high), accent)
            pen.polygon(quad(share, min(share + 0.09, 1), 0, high), accent)
    if "UpperSplice" in has:
        half = (0, 1, 0.5 * high, high) if rng.random() < 0.5 else (0, 0.5, 0, high)
        pen.polygon(quad(*half), accent)
    if "UpperLogo" in has:
        pen.item("UpperLogo")
        centre = body.corner(rng.uniform(0.4, 0.6), rng.uniform(0.25, 0.45) * high)
        r = rng.uniform(2.2, 3.6)
        if rng.random() < 0.5:
            pen.oval(*centre, r, r, accent)
        else:
            pen.polygon([centre + [-r, r], centre + [r, r], centre + [0, -r]], accent)
    if "Backpack" in has:
        pen.item("Backpack")
        if body.back:
            draw_pack(pen, body, 0)
        else:
            for u in (0.5,) if body.side else (0.2, 0.8):
                pen.polygon(quad(u - 0.08, u + 0.08, 0, 0.6 * high), body.leather)


def draw_arms(pen, body):
    """Arms and hands, then sleeves."""
    joint, limb, skin, shirt = body.joint, body.limb, body.skin, body.shirt
    short = "ShortSleeve" in body.has
    for shoulder, elbow, wrist in ARMS:
        pen.item()
        pen.limb(joint[shoulder], joint[elbow], limb, 0.8 * limb, skin)
        pen.limb(joint[elbow], joint[wrist], 0.8 * limb, 0.65 * limb, skin)
        pen.oval(*joint[wrist], 0.9 * limb, 0.9 * limb, skin)
        pen.item("ShortSleeve" if short else "LongSleeve")
        if short:
            end = 0.4 * joint[shoulder] + 0.6 * joint[elbow]
            pen.limb(joint[shoulder], end, 1.25 * limb, 1.2 * limb, shirt)
        else:
            pen.limb(joint[shoulder], joint[elbow], 1.25 * limb, 1.05 * limb, shirt)
            end = 0.1 * joint[elbow] + 0.9 * joint[wrist]
            pen.limb(joint[elbow], end, 1.05 * limb, 0.95 * limb, shirt)


def draw_carried(pen, body, rng, colour):
    """A handbag, a shoulder bag, something held in front."""
    has, joint, accent = body.has, body.joint, body.accent
    hand = int(rng.choice([10, 15]))
    if "HandBag" in has:
        pen.item("HandBag")
        w, h = rng.uniform(3.5, 6), rng.uniform(5, 8)
        draw_bag(pen, *joint[hand], w, h, accent if rng.random() < 0.5 else body.leather)
    if "ShoulderBag" in has:
        pen.item("ShoulderBag")
        s = int(rng.choice([-1, 1]))
        end = body.corner(0.5 + 0.5 * s, 0.5 if body.coat else 0.95)
        pen.limb(body.corner(0.5 - 0.35 * s, 0.02), end, 0.8, 0.8, accent)
        x, y = body.corner(0.5 + 0.55 * s, 0.5 if body.coat else 0.9)
        pen.polygon([(x - 5, y - 3), (x + 5, y - 3), (x + 5.5, y + 7), (x - 5.5, y + 7)], accent)
    if "HoldObjectsInFront" in has:
        pen.item("HoldObjectsInFront")
        x, y = (joint[10] + joint[15]) / 2
        w, h = rng.uniform(5, 9), rng.uniform(4, 7)
        pen.rectangle(x - w, y - h, x + w, y + h, colour(0.9))


def draw_head(pen, body):
    """Skin, hair, face, glasses, hat."""
    (x, y), head, facing = body.skull, body.head, body.facing
    pen.item()
    pen.oval(x, y, 0.9 * head, 1.1 * head, body.skin)
    if body.back:
        pen.oval(x, y - 0.05 * head, 0.98 * head, 1.1 * head, body.hair)
    else:
        start, end = 180 - 40 * (facing == 1), 360 + 40 * (facing == -1)
        crown = x - 0.25 * facing * head, y - 0.2 * head
        pen.oval(*crown, 0.98 * head, head, body.hair, start, end)
        for eye in (0.5 * facing,) if body.side else (-0.4, 0.4):
            pen.oval(x + eye * head, y + 0.05 * head, 0.12 * head, 0.12 * head, PUPIL)
        if body.side:
            nose = x + 0.95 * facing * head, y + 0.25 * head
            pen.oval(*nose, 0.2 * head, 0.2 * head, body.skin)
    if "Glasses" in body.has:
        pen.item("Glasses")
        draw_glasses(pen, x, y + 0.05 * head, head, facing)
    if "Hat" in body.has:
        pen.item("Hat")
        draw_hat(pen, x, y, head, body.leather, facing)


def draw_in_front(pen, rng, colour):
    """Now and then a pole, a bush, somebody's shoulder."""
    pen.item()
    if rng.random() < 0.2:
        x, y, w = rng.uniform(0, 96), rng.uniform(20, 128), rng.uniform(2, 7)
        if rng.random() < 0.5:
            pen.rectangle(x, y, x + w, 128, colour(0.4))
        else:
            pen.oval(x, y, 2 * w, 1.5 * w, colour(0.6))


def draw_pedestrian(rng, domain, size):
    """One image: (pixels (H, W, 3), labels (26,), keypoints (16, 2), boxes (26, 4) with NaN)."""
    has = draw_labels(rng, domain)

    def colour(saturation):  # any hue but skin's in domain 0; greens and blues, darker, in 1
        hue = rng.uniform(0.15, 1.0) if domain == 0 else rng.uniform(0.2, 0.7)
        saturation = saturation * rng.uniform(0.5, 1)
        return hsv(hue, saturation, rng.uniform(0.3, 1) ** (1 if domain == 0 else 1.6))

    pen = Pen(size)
    draw_background(pen, rng, domain, colour)
    body = Body(rng, has, colour)
    draw_behind(pen, body, rng)
    draw_legs(pen, body, rng)
    draw_trunk(pen, body, rng)
    draw_arms(pen, body)
    draw_carried(pen, body, rng, colour)
    draw_head(pen, body)
    draw_in_front(pen, rng, colour)
    return develop(pen, rng, domain, size, has, np.stack([body.joint[k] for k in range(16)]))


def develop(pen, rng, domain, size, has, joints):
    """Blur, contrast, light and noise; labels, points and boxes in the image's pixels."""
    image = pen.image.resize((size[1], size[0]), Image.Resampling.BOX)
    unit = size[0] / 128
    image = image.filter(ImageFilter.GaussianBlur(unit * rng.uniform(0, 0.7)))
    pixels = np.asarray(image, dtype=np.float32)
    contrast, light = rng.uniform(0.7, 1.1), rng.normal(0 if domain == 0 else -15, 12)
    noise = rng.normal(0, rng.uniform(1, 6), pixels.shape)
    pixels = (pixels - 128) * contrast + 128 + light + noise
    labels = np.array([name in has for name in PA100K_GROUPS], dtype=np.float32)
    boxes = np.full((len(PA100K_GROUPS), 4), np.nan, dtype=np.float32)
    for j, name in enumerate(PA100K_GROUPS):
        if name in has and name in pen.boxes:
            left, top, right, bottom = pen.boxes[name] * unit
            left, top = max(0, math.floor(left)), max(0, math.floor(top))
            right, bottom = min(size[1], math.ceil(right)), min(size[0], math.ceil(bottom))
            if left < right and top < bottom:  # else it was drawn beyond the image's edge
                boxes[j] = left, top, right, bottom
    keypoints = (joints * unit - 0.5).astype(np.float32)
    return pixels.clip(0, 255).astype(np.uint8), labels, keypoints, boxes


if __name__ == "__main__":
    command(main)
