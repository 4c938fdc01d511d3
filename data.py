"""Pedestrians with attributes: datasets in one common form, and what turns them into batches.

    Split                every dataset's common form: images, labels, attributes, groups, keypoints, boxes
    load_split           a split of any dataset, by name
    pa100k, rap1, peta, upar, pcs, csv_table    the readers, each in the layout in which its dataset is published
    SHARED, PCS_SHARED   which attributes of two datasets mean the same (Tab. 7-10)
    SimCC                the pose network that finds PLE-K's keypoints, and torchvision's Keypoint R-CNN in its place
    Pedestrians          the torch Dataset: joint transforms of image and keypoints
    synthetic            drawn pedestrians, no download, with keypoints and a box for every drawn attribute

    python data.py keypoints --dataset pa100k --data FOLDER --weights FILE --out keypoints.npz
    python data.py average --dataset pa100k --data FOLDER --out average.png       (Fig. A.9a)

Points and boxes are in image pixels: points (x, y) with pixel centres at whole numbers, boxes (left, top, right,
bottom) half-open, so that right - left is the width.
"""

import argparse
import codecs
import collections
import colorsys
import csv
import ctypes
import hashlib
import json
import math
import os
import pickle
import sys
import time
import warnings
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

# Tab. A.11, under the attribute names of PA-100K's annotation file and in its order.
PA100K_GROUPS = {
    "Female": "all", "AgeOver60": "all", "Age18-60": "all", "AgeLess18": "all", "Front": "all", "Side": "all",
    "Back": "all", "Hat": "head", "Glasses": "head", "HandBag": "all", "ShoulderBag": "all", "Backpack": "torso",
    "HoldObjectsInFront": "all", "ShortSleeve": "torso", "LongSleeve": "torso", "UpperStride": "torso",
    "UpperLogo": "torso", "UpperPlaid": "torso", "UpperSplice": "torso", "LowerStripe": "bottom",
    "LowerPattern": "bottom", "LongCoat": "all", "Trousers": "bottom", "Shorts": "bottom", "Skirt&Dress": "all",
    "boots": "bottom",
}
# The other datasets' groups, by analogy. A name may be a pattern; the first that fits counts.
RAP1_GROUPS = {
    "hs-*": "head", "ub-*": "torso", "attach*-Backpack": "torso", "lb-Dress": "all", "lb-*": "bottom", "shoes-*": "bottom",
    "Female": "all", "Age*": "all", "Body*": "all", "Customer": "all", "Clerk": "all", "attach*-*": "all", "action-*": "all",
}
PETA_GROUPS = {
    "accessory*": "head", "hair*": "head", "upperBody*": "torso", "carryingBackpack": "torso", "lowerBody*": "bottom",
    "footwear*": "bottom", "personal*": "all", "carrying*": "all",
}
UPAR_GROUPS = {
    "Hair-*": "head", "Accessory-Hat": "head", "Accessory-Glasses-*": "head", "UpperBody-*": "torso", "Accessory-Backpack": "torso",
    "LowerBody-*Skirt&Dress": "all", "LowerBody-*": "bottom", "Age-*": "all", "Gender-*": "all", "Accessory-Bag": "all",
}
# PCS: a class of the masks is an attribute. Not among them: null, skin and hair, which are on everybody.
PCS_TABLE_10 = ("Hat", "Boots", "Glasses", "Skirt", "Jeans", "Dress", "Shorts", "Sunglasses", "T-shirt")
PCS_GROUPS = {name.capitalize(): group for group, names in {
    "head": "hat glasses sunglasses earrings",
    "torso": "t-shirt shirt blouse sweater sweatshirt hoodie jumper cardigan vest top jacket blazer cape bra scarf tie necklace belt",
    "bottom": "skirt jeans pants shorts leggings tights stockings socks panties boots shoes sandals loafers heels pumps flats "
              "wedges clogs sneakers",
    "all": "dress coat suit romper bodysuit swimwear intimate bag purse wallet accessories bracelet ring gloves watch",
}.items() for name in names.split()}
# Attributes of two datasets that mean the same (Tab. 7-9), "|" for either of two. PETA has no boots among its 35, and its
# personalMale is Female's opposite.
SHARED = {
    "Boots": {"pa100k": "boots", "rap1": "shoes-Boots"},
    "Hat": {"pa100k": "Hat", "rap1": "hs-Hat", "peta": "accessoryHat", "upar": "Accessory-Hat"},
    "HandBag": {"pa100k": "HandBag", "rap1": "attach-HandBag"},
    "Glasses": {"pa100k": "Glasses", "rap1": "hs-Glasses", "upar": "Accessory-Glasses-Normal|Accessory-Glasses-Sun"},
    "Sunglasses": {"peta": "accessorySunglasses", "upar": "Accessory-Glasses-Sun"},
    "Backpack": {"pa100k": "Backpack", "rap1": "attach-Backpack", "peta": "carryingBackpack", "upar": "Accessory-Backpack"},
    "ShortSleeve": {"pa100k": "ShortSleeve", "rap1": "ub-ShortSleeve", "peta": "upperBodyShortSleeve"},
    "BaldHead": {"rap1": "hs-BaldHead", "upar": "Hair-Length-Bald"},
    "LongHair": {"rap1": "hs-LongHair", "peta": "hairLong", "upar": "Hair-Length-Long"},
    "Female": {"pa100k": "Female", "rap1": "Female", "upar": "Gender-Female"},
}
# What stands in for a PCS class in a model of another dataset (Tab. 10): the nearest attribute that covers the thing.
PCS_SHARED = {
    "Hat": {"pcs": "Hat", "pa100k": "Hat", "rap1": "hs-Hat", "peta": "accessoryHat", "upar": "Accessory-Hat"},
    "Boots": {"pcs": "Boots", "pa100k": "boots", "rap1": "shoes-Boots"},
    "Glasses": {"pcs": "Glasses", "pa100k": "Glasses", "rap1": "hs-Glasses", "upar": "Accessory-Glasses-Normal"},
    "Skirt": {"pcs": "Skirt", "pa100k": "Skirt&Dress", "rap1": "lb-Skirt|lb-ShortSkirt", "peta": "lowerBodyShortSkirt",
              "upar": "LowerBody-Type-Skirt&Dress"},
    "Jeans": {"pcs": "Jeans", "pa100k": "Trousers", "rap1": "lb-Jeans", "peta": "lowerBodyJeans", "upar": "LowerBody-Type-Trousers&Jeans"},
    "Dress": {"pcs": "Dress", "pa100k": "Skirt&Dress", "rap1": "lb-Dress", "upar": "LowerBody-Type-Skirt&Dress"},
    "Shorts": {"pcs": "Shorts", "pa100k": "Shorts", "peta": "lowerBodyShorts"},
    "Sunglasses": {"pcs": "Sunglasses", "pa100k": "Glasses", "rap1": "hs-Glasses", "peta": "accessorySunglasses", "upar": "Accessory-Glasses-Sun"},
    "T-shirt": {"pcs": "T-shirt", "pa100k": "ShortSleeve", "rap1": "ub-TShirt", "peta": "upperBodyTshirt"},
}
DATASETS = ("synthetic", "pa100k", "rap1", "peta", "upar", "pcs", "csv")
PARTS = {"train": ("train",), "val": ("val",), "test": ("test",), "trainval": ("train", "val"), "all": ("train", "val", "test")}
WITHOUT_VALIDATION = ("rap1", "pcs")  # their "trainval" is "train"
DATA_KEYS = ("dataset", "data", "keypoints", "partition", "exclude", "domain")  # of a split's source
FLIP = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]  # MPII's left and right exchanged
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which the backbones' weights expect


@dataclass
class Split:
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


def load_split(dataset, data=None, split="test", keypoints=None, partition=None, exclude=None, **drawing):
    """The `Split` of a split: "train", "val", "test", "trainval" or "all".

    Args:
        dataset: one of `DATASETS`.
        data: the dataset's folder; for pa100k, rap1, peta and upar also the field's `dataset_all.pkl`, its pictures beside it.
        keypoints: a keypoint file, see `read_keypoints`.
        partition: which of rap1's or peta's five, from 1 (the default).
        exclude: parts of upar to leave out, by the first folder of their images.
        drawing: arguments of `synthetic`.
    Raises:
        ValueError, FileNotFoundError: naming the file, the value and what was expected.
    """
    if dataset not in DATASETS or split not in PARTS:
        raise ValueError(f"dataset {dataset!r}, split {split!r}: expected one of {', '.join(DATASETS)} and of {', '.join(PARTS)}")
    if dataset == "synthetic" and data is not None:
        raise ValueError(f"--data {data}: the synthetic set is drawn, give --dataset to read a folder")
    if dataset != "synthetic" and data is None:
        raise ValueError(f"dataset {dataset}: give its folder with --data")
    pickled = dataset == "upar" or Path(data or "").suffix == ".pkl"
    if partition is not None and dataset not in ("rap1", "peta"):
        raise ValueError(f"--partition {partition}: {dataset} has no partitions, rap1 and peta have")
    partition = 1 if partition is None else partition
    if exclude and dataset != "upar":
        raise ValueError(f"--exclude {' '.join(exclude)}: {dataset} is not made of other datasets, upar is")
    if dataset == "synthetic":
        table = synthetic(split, **drawing)
    else:
        try:
            if pickled:
                table = dataset_pickle(Path(data), dataset, split, partition, exclude)
            elif dataset in ("rap1", "peta"):
                table = {"rap1": rap1, "peta": peta}[dataset](Path(data), split, partition)
            else:
                table = {"pa100k": pa100k, "pcs": pcs, "csv": csv_table}[dataset](Path(data), split)
        except (AttributeError, IndexError, KeyError, TypeError) as error:  # readable, but nothing like the published file
            raise ValueError(f"{data}: not laid out as {dataset} is published ({error!r})") from None
        check_images(table.images)
    return replace(table, keypoints=read_keypoints(keypoints, table.names)) if keypoints else table


def open_split(config, split):
    """The split of a config with the keys `DATA_KEYS`, "ple", "size" and "images" (or None)."""
    drawing = {}
    if config["dataset"] == "synthetic":
        drawing = {"size": config["size"], "domain": config["domain"] or 0, "count": config["images"]}
    elif config["images"] is not None or config["domain"] is not None:
        raise ValueError(f"--images and --domain: the synthetic set is drawn with them, {config['dataset']} is not")
    opened = load_split(config["dataset"], config["data"], split, config["keypoints"], config["partition"], config["exclude"], **drawing)
    if config["ple"] == "K" and opened.keypoints is None:
        raise ValueError(f"{opened.name}: PLE-K needs keypoints, give --keypoints FILE")
    return opened


def digest(names):
    """A short fingerprint of image names in their order."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def parts_of(split, published, file):
    """The published parts that make up a split."""
    parts = [part for part in PARTS[split] if part in published]
    if not parts:
        raise ValueError(f"{file}: has no {split} split, expected one of {', '.join(published)}"
                         + ("; train with --train-split trainval" if split == "val" else ""))
    return parts


def groups_of(attributes, table, file):
    """Each attribute's group from a {name or pattern: group} table, upper and lower case alike."""
    table = {name.lower(): group for name, group in table.items()}
    groups = []
    for attribute in attributes:
        name = attribute.lower()
        fitting = [name] if name in table else [pattern for pattern in table if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(f"{file}: attribute {attribute} is in none of the groups {', '.join(GROUPS)}")
        groups.append(table[fitting[0]])
    return groups


def image_folder(folder, places, name):
    """Of the places where a dataset's pictures may lie, the one that has the picture `name`; else the first that is there."""
    there = [folder / place for place in places if (folder / place).is_dir()]
    return next((place for place in there if (place / name).is_file()), there[0] if there else folder / places[0])


def check_images(images):
    """All images must be there. One listing of each folder, not one question per image."""
    there, missing = {}, []
    for image in images:
        if image.parent not in there:
            if not image.parent.is_dir():
                raise FileNotFoundError(f"{image.parent}: no such folder, expected the dataset's images in it")
            there[image.parent] = {entry.name for entry in os.scandir(image.parent)}
        if image.name not in there[image.parent]:
            missing.append(image)
    if missing:
        raise FileNotFoundError(f"{missing[0]}: no such image ({len(missing)} of {len(images)} are missing)")


# ---- the published .mat files ----

PLACES = {"pa100k": ("release_data/release_data", "data"), "rap1": ("RAP_dataset",), "peta": ("images",), "upar": ("", "data")}


def read_mat(file, expected):
    """A MATLAB file's variables, which must include `expected`: structs as dicts, cells as arrays, both without empty axes."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        from scipy.io import loadmat  # only .mat files need scipy, as in torchvision's own .mat datasets
    except ImportError:
        raise ValueError(f"{file}: reading a .mat file needs scipy: pip install scipy") from None
    try:
        mat = loadmat(file, simplify_cells=True)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise ValueError(f"{file}: not a readable .mat file ({str(error).splitlines()[0] if str(error) else error!r})") from None
    return require(mat, expected, file)


def require(mapping, keys, file):
    """The mapping, which must be one and have the keys."""
    missing = [key for key in keys if not isinstance(mapping, dict) or key not in mapping]
    if missing:
        raise ValueError(f"{file}: has no {missing[0]}, expected {', '.join(keys)}")
    return mapping


def strings(values):
    return [str(value) for value in np.atleast_1d(values)]


def pick(partitions, number, parts, count, first, file):
    """The rows (0-based) of the parts of partition `number` (1-based), whose own counting starts at `first`."""
    partitions = [partitions] if isinstance(partitions, dict) else list(partitions)
    if not 1 <= number <= len(partitions):
        raise ValueError(f"{file}: --partition {number}, expected 1 to {len(partitions)}")
    chosen = require(partitions[number - 1], parts, file)
    rows = np.concatenate([np.atleast_1d(chosen[part]).astype(np.int64).ravel() for part in parts]) - first
    if len(rows) and not 0 <= rows.min() <= rows.max() < count:
        raise ValueError(f"{file}: partition {number} names image {rows.max() + first}, expected {first} to {count - 1 + first}")
    return rows


def labels_of(labels, names, attributes, file, what):
    """Labels as (N, L) float32; MATLAB's squeezed arrays get their axis back."""
    labels = np.asarray(labels)
    if labels.ndim < 2 and labels.size == len(names) * len(attributes):
        labels = labels.reshape(len(names), len(attributes))
    if labels.shape != (len(names), len(attributes)):
        raise ValueError(f"{file}: {what} is {list(labels.shape)}, expected [{len(names)}, {len(attributes)}]: one row per image, "
                         "one column per attribute")
    return labels.astype(np.float32)


def pa100k(folder, split):
    """PA-100K: `annotation.mat`, images in `data/` or `release_data/release_data/`; 26 attributes."""
    file = folder / "annotation.mat"
    mat = read_mat(file, ("attributes", *(f"{part}_{what}" for part in PARTS["all"] for what in ("label", "images_name"))))
    attributes, names, labels = strings(mat["attributes"]), [], []
    for part in PARTS[split]:
        part_names = strings(mat[f"{part}_images_name"])
        names += part_names
        labels.append(labels_of(mat[f"{part}_label"], part_names, attributes, file, f"{part}_label"))
    place = image_folder(folder, PLACES["pa100k"], names[0] if names else "")
    return Split(f"pa100k {split} ({file})", attributes, groups_of(attributes, PA100K_GROUPS, file), names,
                 [place / name for name in names], np.concatenate(labels))


def rap1(folder, split, partition=1):
    """RAP v1: `RAP_annotation/RAP_annotation.mat`, images in `RAP_dataset/`; 51 attributes, five partitions, no validation."""
    file = folder / "RAP_annotation" / "RAP_annotation.mat"
    rap = require(read_mat(file, ("RAP_annotation",))["RAP_annotation"], ("imagesname", "label", "attribute_eng", "partion"), file)
    names, attributes = strings(rap["imagesname"]), strings(rap["attribute_eng"])
    labels = labels_of(rap["label"], names, attributes, file, "label")[:, :51]
    labels[labels == 2] = 0  # unsure counts as absent, as the field does
    parts = [f"{part}_index" for part in parts_of(split, ("train", "test"), file)]
    rows = pick(rap["partion"], partition, parts, len(names), 1, file)
    names = [names[i] for i in rows]
    return Split(f"rap1 {split}, partition {partition} ({file})", attributes[:51], groups_of(attributes[:51], RAP1_GROUPS, file), names,
                 [folder / "RAP_dataset" / name for name in names], labels[rows])


def peta(folder, split, partition=1):
    """PETA: `PETA.mat`, images in `images/`; the 35 attributes that the field uses, five partitions."""
    file = folder / "PETA.mat"
    mat = require(read_mat(file, ("peta",))["peta"], ("data", "attribute", "partion_attribute"), file)
    names = [f"{i + 1:05d}.png" for i in range(len(mat["data"]))]
    attributes = strings(mat["attribute"])
    labels = labels_of(mat["data"][:, 4:], names, attributes, file, "data without its first four columns")
    rows = pick(mat["partion_attribute"], partition, PARTS[split], len(names), 1, file)
    names = [names[i] for i in rows]
    return Split(f"peta {split}, partition {partition} ({file})", attributes[:35], groups_of(attributes[:35], PETA_GROUPS, file), names,
                 [folder / "images" / name for name in names], labels[rows, :35])


# ---- the field's dataset_all.pkl ----


EXPECTED_IN_PICKLE = "expected dicts, lists, strings, numbers and numpy arrays alone"


class EasyDict(dict):
    """Stands in for easydict's, a dict whose keys are attributes too."""


class PlainUnpickler(pickle.Unpickler):
    """Reads dict-likes, lists, strings, numbers and numpy arrays; anything else that a pickle names is refused, not called."""

    plain = {
        "easydict.EasyDict": EasyDict, "builtins.dict": dict, "builtins.list": list, "collections.OrderedDict": collections.OrderedDict,
        "numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype,
        # What numpy pickles its arrays and numbers with, asked of numpy: their place moves between its versions.
        "multiarray._reconstruct": np.zeros(1).__reduce__()[0], "multiarray.scalar": np.float64(0).__reduce__()[0],
        "numeric._frombuffer": np.zeros(1).__reduce_ex__(5)[0],
        # What protocols 0 to 2 make dict-likes and bytes with, each held to that one use.
        "copyreg._reconstructor": lambda kind, base, content: {EasyDict: EasyDict, dict: dict}[kind](content),
        "_codecs.encode": lambda text, encoding: text.encode({"latin1": "latin1", "latin-1": "latin1"}[encoding]),
    }

    def find_class(self, module, name):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # Python 2's names
        known = f"{module.removeprefix('numpy.core.').removeprefix('numpy._core.')}.{name}"
        if known not in self.plain:
            raise pickle.UnpicklingError(f"it names {module}.{name}, {EXPECTED_IN_PICKLE}")
        return self.plain[known]


def check_plain(value):
    """Refuses what a pickle can hold without naming it: sets, bytes."""
    if isinstance(value, (dict, list, tuple)) or isinstance(value, np.ndarray) and value.dtype == object:
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plain(part)
    elif not isinstance(value, (str, int, float, np.ndarray, np.generic, type(None))):
        raise pickle.UnpicklingError(f"it holds {type(value).__name__}, {EXPECTED_IN_PICKLE}")


def dataset_pickle(file, dataset, split, partition=1, exclude=None):
    """The field's `dataset_all.pkl` of pa100k, rap1, peta or upar: image_name, label, attr_name, partition, perhaps label_idx.eval.

    UPAR is published this way, and so are the splits of PETA and RAP that share no person between train and test.
    """
    file = file / "dataset_all.pkl" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with open(file, "rb") as opened:
            content = PlainUnpickler(opened, encoding="latin1").load()
        check_plain(content)
        require(content, ("image_name", "label", "attr_name", "partition"), file)
        names, attributes = strings(content["image_name"]), strings(content["attr_name"])
        labels = labels_of(np.asarray(content["label"], np.float32), names, attributes, file, "label")
        labels[labels == 2] = 0  # RAP's unsure
        columns = np.asarray((content.get("label_idx") or {}).get("eval", range(len(attributes))), np.int64)
        attributes, labels = [attributes[j] for j in columns], labels[:, columns]
        parts = content["partition"]
        if "train" not in parts and "trainval" in parts:
            parts = {"train": parts["trainval"], **parts}
        rows = []
        for part in parts_of(split, [part for part in PARTS["all"] if part in parts], file):
            given = parts[part]
            runs = list(given) if np.ndim(given[0]) else [given]  # PETA and RAP have five, the others one
            rows.append(pick([{part: run} for run in runs], partition, [part], len(names), 0, file))
    except Exception as error:  # a damaged pickle raises nearly anything
        if str(file) in str(error):
            raise
        raise ValueError(f"{file}: not a readable dataset pickle ({error or type(error).__name__})") from None
    rows = np.concatenate(rows)
    if exclude:
        owner = [name.split("/")[0].lower() for name in names]
        unknown = [name for name in exclude if name.lower() not in owner]
        if unknown:
            raise ValueError(f"--exclude {unknown[0]}: {file} has images of {', '.join(sorted({name.split('/')[0] for name in names}))}")
        rows = rows[[owner[i] not in {name.lower() for name in exclude} for i in rows]]
    names = [names[i] for i in rows]
    place = image_folder(file.parent, PLACES[dataset], names[0] if names else "")
    groups = {"pa100k": PA100K_GROUPS, "rap1": RAP1_GROUPS, "peta": PETA_GROUPS, "upar": UPAR_GROUPS}[dataset]
    return Split(f"{dataset} {split} ({file})", attributes, groups_of(attributes, groups, file), names,
                 [place / name for name in names], labels[rows])


# ---- People Clothing Segmentation ----


def pcs(folder, split):
    """PCS: photos with a mask of clothing classes; an attribute is a class that occurs, its box encloses the class's pixels.

    Two layouts: Clothing Co-Parsing's (`photos/0001.jpg`, `annotations/pixel-level/0001.mat`, `label_list.mat`) and Kaggle's
    (`png_images/IMAGES/img_0001.png`, `png_masks/MASKS/seg_0001.png`, `labels.csv`). Attributes are those of Tab. 10 and
    the further classes on at least 50 photos. No split is published: every fifth photo is "test", the others "train".
    """
    if (folder / "png_masks").is_dir():
        file = folder / "labels.csv"
        masks = sorted((folder / "png_masks" / "MASKS").glob("seg_*.png"))
        photos = [folder / "png_images" / "IMAGES" / mask.name.replace("seg_", "img_") for mask in masks]
        names = {int(row[0]): row[1] for row in read_csv(file)[1:] if row[0].isdigit() and len(row) > 1}
        classes = [names.get(i) or "null" for i in range(max(names, default=-1) + 1)]
    else:
        file = folder / "label_list.mat"
        masks = sorted((folder / "annotations" / "pixel-level").glob("*.mat"))
        photos = [folder / "photos" / f"{mask.stem}.jpg" for mask in masks]
        classes = strings(read_mat(file, ("label_list",))["label_list"])
    if not masks:
        raise FileNotFoundError(f"{folder}: no masks, expected annotations/pixel-level/*.mat or png_masks/MASKS/seg_*.png in it")
    check_images(photos)
    boxes = np.full((len(masks), len(classes), 4), np.nan, np.float32)
    for i, (mask_file, photo) in enumerate(zip(masks, photos)):
        mask, size = read_mask(mask_file), image_size(photo)
        if mask.shape != size:
            raise ValueError(f"{mask_file}: the mask is {mask.shape[0]}x{mask.shape[1]}, expected its photo's {size[0]}x{size[1]}")
        if mask.max() >= len(classes):
            raise ValueError(f"{mask_file}: class {mask.max()} in the mask, expected 0 to {len(classes) - 1} ({file})")
        for c in np.unique(mask):
            rows, columns = np.flatnonzero((mask == c).any(1)), np.flatnonzero((mask == c).any(0))
            boxes[i, c] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    known = [c.capitalize() for c in classes]
    frequent = [known[c] for c in np.flatnonzero(np.isfinite(boxes[:, :, 0]).sum(0) >= 50) if known[c] in PCS_GROUPS]
    attributes = [*PCS_TABLE_10, *(name for name in frequent if name not in PCS_TABLE_10)]
    missing = [name for name in attributes if name not in known]
    if missing:
        raise ValueError(f"{file}: has no class {missing[0].lower()}, expected those of Tab. 10")
    parts = parts_of(split, ("train", "test"), folder)
    rows = [i for i in range(len(photos)) if ("test" if i % 5 == 4 else "train") in parts]
    boxes = boxes[rows][:, [known.index(name) for name in attributes]]
    return Split(f"pcs {split} ({folder})", attributes, groups_of(attributes, PCS_GROUPS, file), [photos[i].name for i in rows],
                 [photos[i] for i in rows], np.isfinite(boxes[:, :, 0]).astype(np.float32), boxes=boxes)


def read_mask(file):
    """(H, W) integer classes from a `.mat` with `groundtruth`, or a picture whose values are the classes."""
    if file.suffix == ".mat":
        mask = np.asarray(read_mat(file, ("groundtruth",))["groundtruth"])
    else:
        try:
            with Image.open(file) as image:
                mask = np.asarray(image)
        except Exception as error:  # Pillow raises many kinds for a damaged file
            raise ValueError(f"{file}: not a readable mask ({error})") from None
        mask = mask[:, :, 0] if mask.ndim == 3 else mask  # grey stored as colour: all channels alike
    if mask.ndim != 2 or not mask.size or (mask != mask.astype(np.int64)).any() or mask.min() < 0:
        raise ValueError(f"{file}: not a mask of classes, expected whole numbers in two dimensions")
    return mask.astype(np.int64)


def image_size(source):
    """(H, W) as `read_image` will give them, of a drawn array or from a file's header alone."""
    if isinstance(source, np.ndarray):
        return source.shape[:2]
    with Image.open(source) as image:
        turned = image.getexif().get(0x0112, 1) >= 5
        return image.size if turned else image.size[::-1]


# ---- a user's own data ----


def csv_table(folder, split):
    """`train.csv`, `val.csv`, `test.csv`: after a header, an image's path, then 0 or 1 per attribute.

    `groups.json` puts every attribute into a group, {"Hat": "head", ...}; PA-100K's names need none. The CSV releases of
    PA-100K, whose paths leave out the folder `data/`, are read as they are.
    """
    names, labels, attributes = [], [], None
    for part in PARTS[split]:
        file = folder / f"{part}.csv"
        header, *rows = read_csv(file)
        if len(header) < 2 or len(set(header)) < len(header):
            raise ValueError(f"{file}: its header is {', '.join(header)}, expected the image and at least one attribute, each once")
        if header[1:] != (attributes or header[1:]):
            raise ValueError(f"{file}: its attributes are not those of {PARTS[split][0]}.csv")
        attributes = header[1:]
        for line, row in enumerate(rows, 2):
            wrong = [value for value in row[1:] if value not in ("0", "1", "0.0", "1.0")]
            if len(row) != len(header) or wrong:
                raise ValueError(f"{file}: line {line} ({row[0]}) has " + (f"the label {wrong[0]!r}, expected 0 or 1" if wrong else
                                                                         f"{len(row)} columns, expected {len(header)}"))
            names.append(row[0])
            labels.append(row[1:])
    file = folder / "groups.json"
    groups = PA100K_GROUPS
    if file.is_file():
        try:
            groups = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file}: not JSON ({error})") from None
        if not isinstance(groups, dict) or not all(isinstance(group, str) for group in groups.values()):
            raise ValueError(f'{file}: expected {{"attribute": "group", ...}} with the groups {", ".join(GROUPS)}')
    place = image_folder(folder, ("", "data", "release_data/release_data"), names[0] if names else "")
    return Split(f"csv {split} ({folder})", attributes, groups_of(attributes, groups, file), names, [place / name for name in names],
                 np.array(labels, np.float32).reshape(len(names), len(attributes)))


def read_csv(file):
    """A CSV file's rows as lists of stripped strings, without empty lines."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with open(file, newline="", encoding="utf-8-sig") as opened:
            rows = [[value.strip() for value in row] for row in csv.reader(opened) if row]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a CSV file ({error})") from None
    if not rows:
        raise ValueError(f"{file}: empty, expected a header")
    return rows


# ---- the same attributes in two datasets ----


def shared_attributes(trained_on, model_attributes, tested_on, table):
    """A table reduced to the attributes that a model of another dataset knows, and the model's columns for each.

    Args:
        trained_on, model_attributes: the model's dataset and attribute names.
        tested_on: the table's dataset.
    Returns:
        The reduced `Split`, and for each of its attributes a list of column indices of the model's output: it is there if
        any of them is (see `max_over_outputs`). The whole table and single columns where both have the same attributes.
    """
    if model_attributes == table.attributes:
        return table, [[j] for j in range(len(model_attributes))]
    alike = {"synthetic": "pa100k"}  # drawn with PA-100K's attributes
    trained, tested = (alike.get(name, name) for name in (trained_on, tested_on))
    if trained == tested or "csv" in (trained, tested):
        rows = [(name, name, name) for name in table.attributes]
    else:
        rows = PCS_SHARED if "pcs" in (trained, tested) else SHARED
        rows = [(name, row[trained], row[tested]) for name, row in rows.items() if trained in row and tested in row]
    index = lambda names, of: [{a.lower(): j for j, a in enumerate(of)}.get(name.lower()) for name in names.split("|")]
    rows = [(name, index(ours, model_attributes), index(theirs, table.attributes)) for name, ours, theirs in rows]
    rows = [row for row in rows if None not in row[1] + row[2]]
    if not rows:
        raise ValueError(f"{table.name}: shares no attribute with the model, which was trained on {trained_on}")
    names, ours, theirs = zip(*rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of an all-NaN box, an attribute without one
        boxes = None if table.boxes is None else np.stack([np.concatenate([
            np.nanmin(table.boxes[:, j, :2], 1), np.nanmax(table.boxes[:, j, 2:], 1)], 1) for j in theirs], 1)
    reduced = replace(table, attributes=list(names), groups=[table.groups[j[0]] for j in theirs], boxes=boxes,
                      labels=np.stack([table.labels[:, j].max(1) for j in theirs], 1))
    return reduced, list(ours)


def max_over_outputs(logits, columns):
    """(N, L) logits of a model -> (N, K): each of the K lists of columns by its highest logit."""
    return torch.stack([logits[:, j].amax(1) for j in columns], 1)


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


class SimCC(nn.Module):
    """SimCC (Li et al., ECCV 2022) with ResNet50 for MPII's 16 points, under its public checkpoint's names.

    A point's x and its y are classified apart, each into 512 bins of half a pixel of the 256x256 input.
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
        """Logits of x and of y (B, 16, 512) -> (B, 16, 3): x, y in pixels of the input, the smaller of the two's probabilities."""
        (px, bx), (py, by) = (logits.softmax(2).max(2) for logits in (x, y))
        return torch.stack([bx / 2, by / 2, torch.minimum(px, py)], 2)

    def find(self, images):
        """List of (3, H, W) uint8 pictures of one person each -> (N, 16, 3): x, y in each picture's pixels, confidence."""
        device = self.head.final_layer.weight.device
        crops = torch.stack([square(image, self.size) for image in images]).to(device)
        points = self.decode(*self(normalize(crops))).cpu()
        return torch.stack([from_square(p, image.shape[1:], self.size) for p, image in zip(points, images)])


def square_place(image_size, size):
    """Where the picture (H, W) lies in its square: pixels of the picture per pixel of the crop, left and top margin.

    The square is 1.25 times the longer side, as the checkpoint's training framed people.
    """
    H, W = image_size
    side = math.ceil(1.25 * max(H, W))
    return side / size, (side - W) // 2, (side - H) // 2


def square(image, size):
    """(3, H, W) -> (3, size, size): the whole picture in the middle of a black square, its aspect kept."""
    H, W = image.shape[1:]
    scale, left, top = square_place((H, W), size)
    side = round(scale * size)
    return VF.resize(VF.pad(image, [left, top, side - W - left, side - H - top]), [size, size], antialias=True)


def from_square(points, image_size, size):
    """Points (..., 2 or 3) in pixels of the crop -> in pixels of the picture; a third number is kept."""
    scale, left, top = square_place(image_size, size)
    return torch.cat([(points[..., :2] + 0.5) * scale - 0.5 - torch.tensor([left, top]), points[..., 2:]], -1)


def coco_to_mpii():
    """(16, 17): MPII's points as means of COCO's 17. Those that COCO lacks are laid on the line from the shoulders' middle,
    the thorax, to the face's, in an adult's proportions: upper neck at 0.45 of that way, head top at 1.65."""
    matrix = torch.zeros(16, 17)
    for mpii, coco in {0: 16, 1: 14, 2: 12, 3: 11, 4: 13, 5: 15, 10: 10, 11: 8, 12: 6, 13: 5, 14: 7, 15: 9}.items():
        matrix[mpii, coco] = 1
    pelvis, thorax, face = (matrix.new_zeros(17).index_fill(0, torch.tensor(at), 1 / len(at)) for at in ([11, 12], [5, 6], [0, 1, 2, 3, 4]))
    matrix[6], matrix[7] = pelvis, thorax
    matrix[8], matrix[9] = thorax + 0.45 * (face - thorax), thorax + 1.65 * (face - thorax)
    return matrix


class KeypointRCNN(nn.Module):
    """torchvision's Keypoint R-CNN, for users without the SimCC checkpoint: `find` as in `SimCC`, of the best-scored person.

    Args:
        options: of `keypointrcnn_resnet50_fpn`.
    """

    def __init__(self, **options):
        super().__init__()
        self.detector = torchvision.models.detection.keypointrcnn_resnet50_fpn(weights_backbone=None, **options)

    def find(self, images):
        device, matrix = next(self.parameters()).device, coco_to_mpii()
        found = self.detector([VF.to_dtype(image.to(device), torch.float32, scale=True) for image in images])
        points = torch.zeros(len(images), 16, 3)  # confidence 0: nobody there
        for i, person in enumerate(found):
            if len(person["scores"]):
                best = person["scores"].argmax()
                coco, sure = person["keypoints"][best, :, :2].cpu(), person["keypoints_scores"][best].sigmoid().cpu()
                points[i] = torch.cat([matrix @ coco, torch.where(matrix != 0, sure, 1).amin(1, keepdim=True)], 1)
        return points


def pose_model(name, weights):
    """The pose network "simcc" or "keypointrcnn" in evaluation mode, with a state dict's weights.

    Args:
        weights: a file; for keypointrcnn "coco" fetches torchvision's.
    """
    if name == "keypointrcnn" and weights == "coco":
        try:
            return KeypointRCNN(weights="COCO_V1").eval()
        except OSError as error:
            raise ValueError(f"--weights coco: torchvision could not fetch them ({error}); give --weights FILE") from None
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file, expected a state dict" + (", or coco" if name == "keypointrcnn" else ""))
    model = SimCC() if name == "simcc" else KeypointRCNN(weights=None)
    load_weights(model if name == "simcc" else model.detector, weights)
    return model.eval()


IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def photo_split(paths, attributes, groups, keypoints=None):
    """A `Split` of image files and folders of them; its labels are zeros, unknown."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such image or folder")
        found = [path]
        if path.is_dir():
            inside = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
            found = [p for p in inside if p.suffix.lower() in IMAGE_SUFFIXES]
        if not found:
            raise FileNotFoundError(f"{path}: no images in this folder, expected {', '.join(IMAGE_SUFFIXES)}")
        files += found
    names = [file.name for file in files]
    points = read_keypoints(keypoints, names) if keypoints else None
    labels = np.zeros((len(files), len(attributes)), np.float32)
    return Split("photos", attributes, groups, names, files, labels, points)


class Pictures(torch.utils.data.Dataset):
    """The pictures alone of some of a table's rows, in their own sizes."""

    def __init__(self, table, rows):
        self.split, self.rows = table, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return read_image(self.split.images[self.rows[i]])


def pictures_of(table, rows, batch_size, workers):
    """A loader of lists of (3, H, W) uint8 pictures."""
    return torch.utils.data.DataLoader(Pictures(table, rows), batch_size, num_workers=workers, collate_fn=list)


@torch.inference_mode()
def find_keypoints(model, table, out, batch_size=32, workers=0, source=""):
    """Runs a pose network over a table's images and writes a keypoint file, see `read_keypoints`.

    Every 20 batches, and where it is interrupted, the points so far go to `out`.part, from which the next call goes on. An
    image without a person gets the mean pose of the others, by shares of its height and width, and confidence 0.

    Args:
        source: what made the points; a part that something else made is refused.
    """
    out = Path(out)
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise ValueError(f"{out}: is here already, give another --out")
    N, started = len(table.names), time.time()
    points, sizes, done = torch.zeros(N, 16, 3), torch.ones(N, 2), 0
    if part.exists():
        points, sizes, done = read_part(part, table, source)
    before, step = done, 0
    try:
        for step, images in enumerate(pictures_of(table, range(done, N), batch_size, workers), 1):
            found = model.find(images)
            points[done : done + len(images)] = found
            sizes[done : done + len(images)] = torch.tensor([[image.shape[2], image.shape[1]] for image in images])
            done += len(images)
            show_progress(f"{done}/{N} images", done - before, N - before, started)
            if step % 20 == 0:
                write_npz(part, names=table.names, keypoints=points, sizes=sizes, done=done, source=source)
    finally:
        if before < done < N:
            write_npz(part, names=table.names, keypoints=points, sizes=sizes, done=done, source=source)
    nobody = (points[:, :, 2] == 0).all(1)
    if nobody.all():
        raise ValueError(f"{table.name}: nobody was found on any image")
    mean = ((points[:, :, :2] + 0.5) / sizes[:, None])[~nobody].mean(0)  # (16, 2), shares of width and height
    points[nobody, :, :2] = mean * sizes[nobody, None] - 0.5
    write_npz(out, names=table.names, keypoints=points)
    part.unlink(missing_ok=True)
    return int(nobody.sum())


def read_part(part, table, source):
    """Points, sizes and number of images done from an interrupted `find_keypoints`."""
    try:
        with np.load(part, allow_pickle=False) as archive:
            made = archive["names"].tolist(), str(archive["source"])
            points, sizes, done = torch.from_numpy(archive["keypoints"]), torch.from_numpy(archive["sizes"]), int(archive["done"])
    except Exception as error:
        raise ValueError(f"{part}: not a part of a keypoint file ({error}); remove it to begin anew") from None
    if made != (table.names, source):
        raise ValueError(f"{part}: was begun with other images or weights; remove it to begin anew")
    return points, sizes, done


def write_npz(file, **arrays):
    """np.savez, through a temporary file so that `file` is always whole."""
    file = Path(file)
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "wb") as opened:
        np.savez(opened, **{name: np.asarray(value) for name, value in arrays.items()})
    os.replace(temporary, file)


# ---- batches ----


def read_image(source):
    """A path or a drawn array -> (3, H, W) uint8 RGB tensor."""
    if isinstance(source, np.ndarray):
        return torch.from_numpy(source).permute(2, 0, 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                image = ImageOps.exif_transpose(image)  # of an animation, the first picture
                if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
                    image = Image.fromarray((np.asarray(image, np.float32) / 257).round().clip(0, 255).astype(np.uint8))
                return VF.pil_to_tensor(image.convert("RGB"))
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
    """A `Split` as model input: item i is (image (3, H, W) float, labels (L,), keypoints (16, 2), i).

    In training each image is resized, padded by 10, randomly cropped and flipped (the Strong Baseline's recipe); the
    random numbers depend on (seed, epoch, i) alone, so they are the same for any number of workers and after a
    resume. Keypoints are in pixels of the resized image; zeros where the table has none.
    """

    def __init__(self, table, size, train=False, seed=0):
        self.split, self.size, self.train, self.seed, self.epoch = table, tuple(size), train, seed, 0

    def __len__(self):
        return len(self.split.names)

    def __getitem__(self, i):
        keypoints = torch.zeros(16, 2) if self.split.keypoints is None else torch.from_numpy(self.split.keypoints[i])
        image, keypoints = resize(read_image(self.split.images[i]), keypoints, self.size)
        if self.train:
            random = np.random.default_rng((self.seed, self.epoch, i))
            dx, dy, mirror = random.integers(0, 21), random.integers(0, 21), random.random() < 0.5
            image, keypoints = shift(image, keypoints, int(dx), int(dy))
            if mirror:
                image, keypoints = flip(image, keypoints)
        return normalize(image), torch.from_numpy(self.split.labels[i]), keypoints, i


def loader(table, size, batch_size, train=False, seed=0, workers=0, device="cpu", rank=0, ranks=1):
    """A DataLoader over `Pedestrians`; call `start_epoch(loader, epoch)` before each training epoch.

    Of several processes ("ranks") each gets its share: in training of every batch, so that the shares of all make up the batch
    that one process would get; else every ranks-th image, each image once.
    """
    dataset = Pedestrians(table, size, train, seed)
    if train:
        sampler = torch.utils.data.DistributedSampler(dataset, ranks, rank, seed=seed * 1_000_003, drop_last=ranks > 1)
    else:
        sampler = range(rank, len(dataset), ranks)
    return torch.utils.data.DataLoader(
        dataset, batch_size // ranks, sampler=sampler, drop_last=train and len(table.names) > batch_size, num_workers=workers,
        pin_memory=torch.device(device).type == "cuda", generator=torch.Generator())


def start_epoch(batches, epoch):
    """Sets an epoch's order and augmentation, from the seed and the epoch alone."""
    batches.dataset.epoch = epoch
    batches.sampler.set_epoch(epoch)


def add_dataset_arguments(parser):
    """The arguments with which a command names a dataset."""
    add = parser.add_argument
    add("--dataset", choices=DATASETS)
    add("--data", help="the dataset's folder, or its dataset_all.pkl")
    add("--partition", type=int, metavar="1..5", help="of rap1 and peta; default 1")
    add("--exclude", nargs="+", metavar="PART", help="parts of upar to leave out, by the first folder of their images")
    add("--domain", type=int, choices=[0, 1], help="the synthetic set's domain; default 0")
    add("--images", type=int, help="images per split of the synthetic set")
    add("--keypoints", help="keypoint file (.npz) for PLE-K")


def check_arguments(args, parser):
    """Stops at an argument that is out of range."""
    for name, low in (("batch_size", 1), ("workers", 0), ("images", 1)):
        value = getattr(args, name)
        if value is not None and value < low:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {low}")


def set_up_device(name):
    """Checks a --device and makes it torch's; returns its full name, such as "cuda:0"."""
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu":
        return name
    index = index or os.environ.get("LOCAL_RANK", "0")
    if kind != "cuda" or not index.isdigit() or int(index) >= count:
        raise ValueError(f"--device {name}: expected cpu, or cuda with one of {count} devices")
    torch.cuda.set_device(int(index))  # kernels and collectives go to the current device
    torch.backends.cudnn.benchmark = True  # all inputs have one size
    torch.set_float32_matmul_precision("high")  # TF32 for float32
    return f"cuda:{index}"


def command(main):
    """Runs a command's `main`; bad input becomes one line on stderr and exit status 2."""
    keep_freed_memory()
    try:
        main()
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines() or [repr(error)]  # a loader's worker puts its traceback before the line
        line = lines[-1].removeprefix("ValueError: ").removeprefix("FileNotFoundError: ")
        print(f"{Path(sys.argv[0]).name}: {line}", file=sys.stderr)
        sys.exit(2)


def keep_freed_memory():
    """Has Linux's C library keep freed memory for the next step: by default it returns each large tensor's to the system and
    fetches it anew, zeroed page by page, which takes a fifth of a CPU training step."""
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option:
        set_option(mmap_max, 0)
        set_option(trim_threshold, -1)


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
    text = json.dumps(plain(value), indent=1) + "\n"  # ASCII, whatever names and locale are
    temporary = Path(f"{file}.tmp")
    temporary.write_text(text, encoding="ascii")
    os.replace(temporary, file)


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
        split: "train", "val", "test", "trainval" or "all".
        domain: 0 or 1: the second has other backgrounds, colours, light and co-occurrence of attributes.
        size: (H, W) of the pictures.
        count: images per split; `SPLIT_SIZES` by default.
    """
    if domain not in (0, 1) or split not in PARTS:
        raise ValueError(f"synthetic: domain {domain}, split {split}: expected domain 0 or 1 and one of {', '.join(PARTS)}")
    attributes, names, drawn = list(PA100K_GROUPS), [], []
    for part in PARTS[split]:
        for i in range(count or SPLIT_SIZES[part]):
            names.append(f"{part}-{domain}-{i:05d}")
            random = np.random.default_rng((seed, domain, list(SPLIT_SIZES).index(part), i))
            drawn.append(draw_pedestrian(random, domain, size))
    images, labels, keypoints, boxes = zip(*drawn)
    return Split(f"synthetic {split} (seed {seed}, domain {domain})", attributes, list(PA100K_GROUPS.values()), names,
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


# ---- commands ----


def average_image(table, size, workers=0):
    """Fig. A.9a: the mean of all images of a table, resized to (H, W) -> (H, W, 3) uint8."""
    total, started = torch.zeros(3, *size, dtype=torch.float64), time.time()
    batches = pictures_of(table, range(len(table.names)), 32, workers)
    for step, images in enumerate(batches, 1):
        for image in images:
            total += VF.resize(image, list(size), antialias=True)
        show_progress(f"batch {step}/{len(batches)}", step, len(batches), started)
    return (total / len(table.names)).round().to(torch.uint8).permute(1, 2, 0).numpy()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=["keypoints", "average"])
    add_dataset_arguments(parser)
    add("--split", default="all", choices=PARTS)
    add("--out", required=True, help="the keypoint file (.npz) or the picture (.png) to write")
    add("--model", default="simcc", choices=["simcc", "keypointrcnn"], help="the pose network")
    add("--weights", help="the pose network's: a file with its state dict, or coco for torchvision's Keypoint R-CNN")
    add("--size", type=int, nargs=2, metavar=("H", "W"), default=(256, 192), help="of the average image")
    add("--batch-size", type=int, default=32)
    add("--workers", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if min(*args.size, args.batch_size) < 1:
        parser.error(f"--size {args.size[0]} {args.size[1]}, --batch-size {args.batch_size}: expected at least 1")
    if args.command == "keypoints" and not args.weights:
        parser.error("--weights: give the pose network's")
    table = load_split(args.dataset or ("pa100k" if args.data else "synthetic"), args.data, args.split, None, args.partition, args.exclude,
                       domain=args.domain or 0, count=args.images)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if args.command == "average":
        Image.fromarray(average_image(table, args.size, args.workers)).save(args.out)
        print(f"{args.out}: the mean of {len(table.names)} images of {table.name}")
    else:
        model = pose_model(args.model, args.weights).to(args.device)
        nobody = find_keypoints(model, table, args.out, args.batch_size, args.workers, f"{args.model} {args.weights}")
        print(f"{args.out}: 16 points on each of {len(table.names)} images of {table.name}; nobody found on {nobody}")


if __name__ == "__main__":
    command(main)
