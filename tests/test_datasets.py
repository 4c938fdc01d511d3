"""Each published dataset layout, from small files in that layout and from the real annotations;
attributes in common."""

import itertools
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, command, refuse, succeed, words
from PIL import Image
from test_data import write_pa100k

import data
from data import load_split, shared_attributes

REAL = Path(__file__).parents[2] / "shared" / "data"
UPAR = words("""
    Age-Young Age-Adult Age-Old Gender-Female Hair-Length-Short Hair-Length-Long
    Hair-Length-Bald UpperBody-Length-Short UpperBody-Color-Black UpperBody-Color-Blue
    UpperBody-Color-Brown UpperBody-Color-Green UpperBody-Color-Grey UpperBody-Color-Orange
    UpperBody-Color-Pink UpperBody-Color-Purple UpperBody-Color-Red UpperBody-Color-White
    UpperBody-Color-Yellow UpperBody-Color-Other LowerBody-Length-Short LowerBody-Color-Black
    LowerBody-Color-Blue LowerBody-Color-Brown LowerBody-Color-Green LowerBody-Color-Grey
    LowerBody-Color-Orange LowerBody-Color-Pink LowerBody-Color-Purple LowerBody-Color-Red
    LowerBody-Color-White LowerBody-Color-Yellow LowerBody-Color-Other
    LowerBody-Type-Trousers&Jeans LowerBody-Type-Skirt&Dress Accessory-Backpack Accessory-Bag
    Accessory-Glasses-Normal Accessory-Glasses-Sun Accessory-Hat
""")
RAP1 = words("""
    Female AgeLess16 Age17-30 Age31-45 BodyFat BodyNormal BodyThin Customer Clerk hs-BaldHead
    hs-LongHair hs-BlackHair hs-Hat hs-Glasses hs-Muffler ub-Shirt ub-Sweater ub-Vest ub-TShirt
    ub-Cotton ub-Jacket ub-SuitUp ub-Tight ub-ShortSleeve lb-LongTrousers lb-Skirt lb-ShortSkirt
    lb-Dress lb-Jeans lb-TightTrousers shoes-Leather shoes-Sport shoes-Boots shoes-Cloth
    shoes-Casual attach-Backpack attach-SingleShoulderBag attach-HandBag attach-Box
    attach-PlasticBag attach-PaperBag attach-HandTrunk attach-Other action-Calling
    action-Talking action-Gathering action-Holding action-Pusing action-Pulling
    action-CarrybyArm action-CarrybyHand
""")
PETA = words("""
    personalLess30 personalLess45 personalLess60 personalLarger60 carryingBackpack carryingOther
    lowerBodyCasual upperBodyCasual lowerBodyFormal upperBodyFormal accessoryHat upperBodyJacket
    lowerBodyJeans footwearLeatherShoes upperBodyLogo hairLong personalMale carryingMessengerBag
    accessoryMuffler accessoryNothing carryingNothing upperBodyPlaid carryingPlasticBags
    footwearSandals footwearShoes lowerBodyShorts upperBodyShortSleeve lowerBodyShortSkirt
    footwearSneaker upperBodyThinStripes accessorySunglasses lowerBodyTrousers upperBodyTshirt
    upperBodyOther upperBodyVNeck
""")
CLASSES = words("""
    null accessories bag belt blazer blouse bodysuit boots bra bracelet cape cardigan clogs coat
    dress earrings flats glasses gloves hair hat heels hoodie intimate jacket jeans jumper
    leggings loafers necklace panties pants pumps purse ring romper sandals scarf shirt shoes
    shorts skin skirt sneakers socks stockings suit sunglasses sweater sweatshirt swimwear
    t-shirt tie tights top vest wallet watch wedges
""")


def random_pictures(folder, names, size=(24, 16)):
    random = np.random.default_rng(1)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (*size, 3), dtype=np.uint8)).save(folder / name)


def cells(values):
    """A MATLAB column of cells."""
    column = np.empty((len(values), 1), object)
    column[:, 0] = values
    return column


def savemat(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("scipy.io", reason="writing .mat files needs scipy").savemat(file, content)


# ---- RAP v1 and PETA ----


def write_rap1(folder, change=None):
    random = np.random.default_rng(0)
    names = [f"CAM{i:02d}_line1.png" for i in range(10)]
    label = random.integers(0, 3, (10, 60)).astype(np.int32)  # 2: unsure
    orders = [(random.permutation(10) + 1).astype(np.uint16) for _ in range(5)]
    content = {
        "imagesname": cells(names),
        "label": label,
        "attribute_eng": cells(RAP1 + [f"more{i}" for i in range(9)]),
        "partion": cells([{"train_index": o[None, :8], "test_index": o[None, 8:]} for o in orders]),
    }
    if change:
        change(content)
    savemat(folder / "RAP_annotation" / "RAP_annotation.mat", {"RAP_annotation": content})
    random_pictures(folder / "RAP_dataset", names)
    return names, label, orders


@pytest.mark.parametrize("partition", [None, 1, 4])
def test_rap1_layout(tmp_path, partition):
    names, label, orders = write_rap1(tmp_path)
    order = orders[(partition or 1) - 1].astype(int) - 1
    rows_of = {"train": order[:8], "trainval": order[:8], "test": order[8:], "all": order}
    for split, rows in rows_of.items():
        table = load_split("rap1", tmp_path, split, partition=partition)
        assert table.attributes == RAP1 and table.names == [names[i] for i in rows]
        assert table.images == [tmp_path / "RAP_dataset" / names[i] for i in rows]
        assert (table.labels == (label[rows, :51] == 1)).all()
    expected = "has no val split, expected one of train, test; train with --train-split trainval"
    with pytest.raises(ValueError, match=expected):
        load_split("rap1", tmp_path, "val")
    group = dict(zip(table.attributes, table.groups, strict=True))
    some = words("""
        hs-Hat ub-TShirt attach-Backpack attach-Box lb-Jeans lb-ShortSkirt lb-Dress shoes-Boots
        Female action-Calling
    """)
    expected = words("head torso torso all bottom bottom all bottom all all")
    assert [group[a] for a in some] == expected
    assert [table.groups.count(g) for g in ("head", "torso", "bottom", "all")] == [6, 10, 10, 25]


def write_peta(folder, change=None):
    random = np.random.default_rng(0)
    peta = {
        "data": np.concatenate(
            [np.arange(1, 11)[:, None], np.full((10, 3), 7), random.integers(0, 2, (10, 40))], 1
        ).astype(np.uint16),
        "attribute": cells(PETA + [f"more{i}" for i in range(5)]),
        "selected_attribute": np.arange(5, 40)[None].astype(np.uint8),
    }
    orders = [random.permutation(10) + 1 for _ in range(5)]
    peta["partion_attribute"] = cells(
        [{"train": o[:5, None], "val": o[5:7, None], "test": o[7:, None]} for o in orders]
    )
    if change:
        change(peta)
    savemat(folder / "PETA.mat", {"peta": peta})
    random_pictures(folder / "images", [f"{i:05d}.png" for i in range(1, 11)])
    return peta["data"], orders


@pytest.mark.parametrize("partition", [1, 5])
def test_peta_layout(tmp_path, partition):
    content, orders = write_peta(tmp_path)
    order = orders[partition - 1]
    numbers_of = {"train": order[:5], "val": order[5:7], "test": order[7:]}
    numbers_of.update(trainval=order[:7], all=order)
    for split, numbers in numbers_of.items():
        table = load_split("peta", tmp_path, split, partition=partition)
        assert table.attributes == PETA and table.names == [f"{i:05d}.png" for i in numbers]
        assert (table.labels == content[numbers - 1, 4:39]).all()
        assert table.images[0].parent == tmp_path / "images"
    group = dict(zip(table.attributes, table.groups, strict=True))
    some = words("""
        accessoryNothing hairLong upperBodyLogo carryingBackpack carryingOther lowerBodyShorts
        footwearShoes personalMale
    """)
    assert [group[a] for a in some] == words("head head torso torso all bottom bottom all")


def independent(file):
    """A real annotation file, read without the reader's simplifications."""
    if not file.is_file():
        pytest.skip("needs the real annotation files beside the project")
    return pytest.importorskip("scipy.io", reason="reading .mat files needs scipy").loadmat(file)


def test_real_rap1_annotation():
    rap = independent(REAL / "rap1/RAP_annotation/RAP_annotation.mat")["RAP_annotation"][0, 0]
    attributes = [cell[0] for cell in rap["attribute_eng"][:51, 0]]
    for partition in range(1, 6):
        for split, count in (("train", 33268), ("test", 8317)):
            table = data.rap1(REAL / "rap1", (split,), partition, "rap1")
            rows = rap["partion"][partition - 1, 0][0, 0][f"{split}_index"].ravel().astype(int) - 1
            assert table.labels.shape == (count, 51) and table.attributes == attributes
            assert table.names == [rap["imagesname"][i, 0][0] for i in rows]
            for j in range(51):
                assert table.labels[:, j].sum() == sum(rap["label"][rows, j] == 1)


def test_real_peta_annotation():
    peta = independent(REAL / "peta/PETA.mat")["peta"][0, 0]
    attributes = [cell[0] for cell in peta["attribute"][:35, 0]]
    for partition in range(1, 6):
        for split, count in (("train", 9500), ("val", 1900), ("test", 7600)):
            table = data.peta(REAL / "peta", (split,), partition, "peta")
            rows = peta["partion_attribute"][partition - 1, 0][0, 0][split].ravel().astype(int) - 1
            assert table.labels.shape == (count, 35) and table.attributes == attributes
            assert [int(name[:5]) for name in table.names] == peta["data"][rows, 0].tolist()
            for j in range(35):
                assert table.labels[:, j].sum() == peta["data"][rows, 4 + j].astype(int).sum()


def test_real_pa100k_annotation():
    mat = independent(REAL / "pa100k/annotation.mat")
    attributes = [cell[0][0] for cell in mat["attributes"]]
    for split, count in (("train", 80000), ("val", 10000), ("test", 10000)):
        table = data.pa100k(REAL / "pa100k", (split,), 1, "pa100k")
        assert table.labels.shape == (count, 26) and table.attributes == attributes
        assert table.names == [cell[0][0] for cell in mat[f"{split}_images_name"]]
        for j in range(26):
            assert table.labels[:, j].sum() == mat[f"{split}_label"][:, j].astype(int).sum()


# ---- the field's pickle ----


def write_pickle(file, content, protocol=4):
    """Pickles nested dicts as easydict's EasyDict, as the published files are, without easydict."""
    module = types.ModuleType("easydict")
    module.EasyDict = type("EasyDict", (dict,), {"__module__": "easydict"})

    def easy(value):
        if not isinstance(value, dict):
            return value
        made = module.EasyDict({k: easy(v) for k, v in value.items()})
        made.__dict__.update(made)  # its keys are attributes too
        return made

    sys.modules["easydict"] = module
    try:
        file.write_bytes(pickle.dumps(easy(content), protocol=protocol))
    finally:
        del sys.modules["easydict"]


def upar_content():
    random = np.random.default_rng(0)
    names = [
        f"{part}/images/{i:03d}.jpg" for part in ("PA100k", "RAP2", "Market1501") for i in range(4)
    ]
    return {
        "description": "upar",
        "image_name": names,
        "label": random.integers(0, 2, (12, 40)),
        "attr_name": UPAR,
        "label_idx": {"eval": list(range(40))},
        "partition": upar_partitions(random),
    }


def upar_partitions(random):
    """As published: nine partitions, the test images of each apart by sub-dataset."""
    partition = {"train": [], "val": [], "test": []}
    for _ in range(9):
        order = random.permutation(12)
        partition["train"].append(order[:5])
        partition["val"].append(order[5:8])
        partition["test"].append([order[8:9], order[9:12]])
    return partition


@pytest.mark.parametrize("protocol", range(6))
def test_upar_layout(tmp_path, protocol):
    content = upar_content()
    if protocol % 2:
        content["label"] = np.asfortranarray(content["label"])
    write_pickle(tmp_path / "dataset_all.pkl", content, protocol)
    random_pictures(tmp_path, content["image_name"])
    for split, partition in itertools.product(("train", "val", "test"), (None, 1, 9)):
        table = load_split("upar", tmp_path, split, partition=partition)
        rows = content["partition"][split][(partition or 1) - 1]
        rows = np.concatenate(rows) if split == "test" else rows
        assert table.attributes == UPAR and table.names == [content["image_name"][i] for i in rows]
        assert (table.labels == content["label"][rows]).all()
        assert table.images[0] == tmp_path / table.names[0]
    assert len(load_split("upar", tmp_path, "all").names) == 12
    table = load_split("upar", tmp_path / "dataset_all.pkl", "all", exclude=["rap2", "PA100k"])
    assert len(table.names) == 4 and all(name.startswith("Market1501/") for name in table.names)
    for number in (0, 10):
        with pytest.raises(
            ValueError, match=f"dataset_all.pkl: --partition {number}: expected 1 to 9"
        ):
            load_split("upar", tmp_path, "test", partition=number)
    expected = "--exclude rap1: .* has images of market1501, pa100k, rap2"
    with pytest.raises(ValueError, match=expected):
        load_split("upar", tmp_path, "all", exclude=["rap1"])
    assert [table.groups.count(g) for g in ("head", "torso", "bottom", "all")] == [6, 14, 14, 6]
    assert table.groups[UPAR.index("LowerBody-Type-Skirt&Dress")] == "all"
    assert table.groups[UPAR.index("Accessory-Glasses-Sun")] == "head"


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_splits_of_the_other_datasets(tmp_path, protocol):
    """Their attributes in another order and more of them than are evaluated, five partitions or
    one, RAP's unsure labels."""
    random = np.random.default_rng(0)
    label = random.integers(0, 3, (9, 105))
    content = {
        "image_name": [f"{i:05d}.png" for i in range(1, 10)],
        "label": label,
        "label_idx": {"eval": list(range(34, -1, -1)), "extra": range(79, 105)},
        "attr_name": PETA + [f"colour{i}" for i in range(70)],
        "partition": {
            "train": [np.arange(5), np.arange(4, 9)],
            "val": [np.array([5, 6]), np.array([0, 1])],
            "test": [np.array([7, 8]), np.array([2, 3])],
        },
    }
    write_pickle(tmp_path / "dataset_zs_run0.pkl", content, protocol)
    random_pictures(tmp_path / "images", content["image_name"])
    table = load_split("peta", tmp_path / "dataset_zs_run0.pkl", "test", partition=2)
    assert table.names == ["00003.png", "00004.png"] and table.attributes == PETA[::-1]
    assert (table.labels == (label[2:4, 34::-1] == 1)).all()
    for name in ("train", "trainval"):
        content["partition"] = {name: np.arange(5), "test": np.arange(5, 9)}
        write_pickle(tmp_path / "dataset_zs_run0.pkl", content)
        for split in ("train", "trainval"):
            assert len(load_split("peta", tmp_path / "dataset_zs_run0.pkl", split).names) == 5
    with pytest.raises(ValueError, match="run0.pkl: --partition 2: expected 1 to 1"):
        load_split("peta", tmp_path / "dataset_zs_run0.pkl", "test", partition=2)


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "bad, named",
    [
        (
            lambda marker: Call(os.system, f"touch {marker}"),
            "it names posix.system, expected plain data",
        ),
        (lambda marker: Call(eval, f"open({str(marker)!r}, 'w')"), "it names builtins.eval"),
        (
            lambda marker: {"image_name": ["a"], "label": Call(np.load, str(marker))},
            "it names numpy",
        ),
        (lambda marker: Call(open, str(marker), "w"), "io.open"),
        (lambda marker: {"image_name": {"a set"}}, "it names builtins.set|it holds set"),
        (lambda marker: {**upar_content(), "more": [{"deep": b"bytes"}]}, "it holds bytes"),
        (lambda marker: ["a", "list"], "not a readable dataset pickle"),
        (lambda marker: {**upar_content(), "label": "none"}, "could not convert|not a readable"),
        (
            lambda marker: {**upar_content(), "partition": {"test": np.array([5, 12])}},
            "names image 12, expected 0 to 11",
        ),
        (
            lambda marker: {**upar_content(), "partition": {"test": np.array([True, False] * 6)}},
            "partition 1, test: expected image numbers",
        ),
        (
            lambda marker: {
                **upar_content(),
                "partition": {"test": [[np.arange(2), np.array([True, False] * 6)]]},
            },
            "partition 1, test: expected image numbers",
        ),
        (
            lambda marker: {**upar_content(), "partition": {"test": 5}},
            "not laid out as upar is published",
        ),
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_nothing_is_executed(tmp_path, bad, named):
    for protocol in (0, 2, 5):
        (tmp_path / "dataset_all.pkl").write_bytes(pickle.dumps(bad(tmp_path / "marker"), protocol))
        with pytest.raises(ValueError, match=named) as error:
            load_split("upar", tmp_path, "test")
        assert "dataset_all.pkl" in str(error.value) and "\n" not in str(error.value)
        assert not (tmp_path / "marker").exists()


def test_rap_v2s_attributes_of_the_zero_shot_split(tmp_path):
    """54 attributes, among them `Employee` and the misspelt `Femal`, which is Female in another
    dataset's terms."""
    names = ["Femal" if name == "Female" else name for name in RAP1]
    names += ["Employee", "hs-Beard", "ub-Other"]
    content = {
        "image_name": [f"{i}.png" for i in range(4)],
        "label": np.ones((4, 54)),
        "attr_name": names,
        "partition": {"train": [np.array([0, 1])], "test": [np.array([2, 3])]},
        "label_idx": {"eval": list(range(54))},
    }
    write_pickle(tmp_path / "dataset_all.pkl", content)
    random_pictures(tmp_path / "RAP_dataset", content["image_name"])
    split = load_split("rap1", tmp_path / "dataset_all.pkl", "test")
    assert len(split.attributes) == 54 and split.groups[split.attributes.index("Employee")] == "all"
    assert "Female" in shared_attributes("pa100k", NAMES["pa100k"], "rap1", split)[0].attributes


class State:
    """Pickles as `call` (a function and its arguments) with a state, whatever it is."""

    def __init__(self, call, state=None):
        self.call, self.state = call, state

    def __reduce__(self):
        return (*self.call, self.state) if self.state is not None else self.call


RECONSTRUCT, SCALAR = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
F8, EMPTY = np.dtype("f8"), (np.ndarray, (0,), b"b")
FIELDS = 3, "|", None, ("a",), {"a": (F8, 10**9)}, 8, 1, 16
FORGED_V8 = State((np.dtype, ("V8", False, True)), FIELDS)
FORGED_F8 = State((np.dtype, ("f8", False, True)), (3, "<", None, None, None, 10**9, 1, 63))
STATELESS = State((np.dtype, ("f8", False, True)), "state")


@pytest.mark.parametrize(
    "forged",
    [
        State((np.ndarray, ((3,), np.dtype("O"), b"x" * 24))),
        State((np.ndarray, ((10**9,),))),
        State((RECONSTRUCT, EMPTY), (1, (3,), np.dtype("O"), False, b"x" * 24)),
        State((RECONSTRUCT, EMPTY), (1, (3,), np.dtype("O"), False, 7)),
        State((RECONSTRUCT, EMPTY), (1, (10**12,), F8, False, b"x" * 24)),
        State((RECONSTRUCT, EMPTY), (1, (-3,), F8, False, b"x" * 24)),
        State((RECONSTRUCT, EMPTY), (1, (3,), F8, False, b"x" * 8)),
        State((RECONSTRUCT, EMPTY), (1,)),
        State((RECONSTRUCT, EMPTY), (1, (3,), FORGED_V8, False, b"x" * 24)),
        State((RECONSTRUCT, EMPTY), (1, (3,), FORGED_F8, False, b"x" * 9)),
        State((RECONSTRUCT, EMPTY), (1, (1,), STATELESS, False, b"x" * 8)),
        State((SCALAR, (np.dtype("O"), b"x" * 8))),
        State((SCALAR, (F8, b"x"))),
    ],
)
def test_a_pickle_that_forges_numpy_states_reads_no_memory(tmp_path, forged):
    """Dtypes, shapes and states that numpy itself would take on the file's word, some of them to a
    segmentation fault."""
    for protocol in (2, 4):
        (tmp_path / "dataset_all.pkl").write_bytes(
            pickle.dumps({**upar_content(), "label": forged}, protocol)
        )
        with pytest.raises(
            ValueError,
            match="dataset_all.pkl: not a readable dataset pickle",
        ):
            load_split("upar", tmp_path, "test")


def test_a_pickle_with_a_nest_of_references_is_refused_at_once(tmp_path):
    nest = ["x"]
    for _ in range(10):
        nest = [nest] * 10
    circle = [1]
    circle.append(circle)
    deep = []
    for _ in range(50):
        deep = [deep]
    wide = [[range(999_999)] * 1000] * 1000
    for value in (nest, circle, deep, wide):
        (tmp_path / "dataset_all.pkl").write_bytes(pickle.dumps({**upar_content(), "more": value}))
        with pytest.raises(ValueError, match="over three million values, or is nested more than"):
            load_split("upar", tmp_path, "test")


def test_a_pickle_cut_anywhere_is_one_line(tmp_path):
    write_pickle(tmp_path / "whole.pkl", upar_content())
    whole = (tmp_path / "whole.pkl").read_bytes()
    for end in range(0, len(whole) - 1, 97):
        (tmp_path / "dataset_all.pkl").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="dataset_all.pkl") as error:
            load_split("upar", tmp_path, "test")
        assert "\n" not in str(error.value)


# ---- People Clothing Segmentation ----


def random_masks(count, size=(30, 20)):
    """Masks with a few rectangles each, and for every class its box by a loop over pixels."""
    random, masks, boxes = np.random.default_rng(0), [], []
    for _ in range(count):
        mask = np.zeros(size, np.uint8)
        drawn = [CLASSES.index(n) for n in words("hat boots jeans dress shoes hair t-shirt")]
        for c in random.choice(drawn, 4, replace=False):
            y, x = random.integers(0, 20), random.integers(0, 12)
            mask[y : y + random.integers(2, 8), x : x + random.integers(2, 8)] = c
        found = {}
        for y in range(size[0]):
            for x in range(size[1]):
                left, top, right, bottom = found.get(int(mask[y, x]), [x, y, x, y])
                low, high = [min(left, x), min(top, y)], [max(right, x + 1), max(bottom, y + 1)]
                found[int(mask[y, x])] = low + high
        masks.append(mask)
        boxes.append(found)
    return masks, boxes


def write_pcs(folder, layout, masks):
    names = []
    for i, mask in enumerate(masks, 1):
        if layout == "kaggle":
            names.append(f"img_{i:04d}.png")
            random_pictures(folder / "png_images" / "IMAGES", names[-1:], mask.shape)
            (folder / "png_masks" / "MASKS").mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "png_masks" / "MASKS" / f"seg_{i:04d}.png")
        else:
            names.append(f"{i:04d}.jpg")
            random_pictures(folder / "photos", names[-1:], mask.shape)
            file = folder / "annotations" / "pixel-level" / f"{i:04d}.mat"
            savemat(file, {"groundtruth": mask.astype(float)})
    if layout == "kaggle":
        rows = [f"{c},{name if c else ''}\n" for c, name in enumerate(CLASSES)]
        (folder / "labels.csv").write_text(",label_list\n" + "".join(rows))
    else:
        savemat(folder / "label_list.mat", {"label_list": cells(CLASSES).T})
    return names


@pytest.mark.parametrize("layout", ["clothing-co-parsing", "kaggle"])
def test_pcs_layouts(tmp_path, layout):
    masks, boxes = random_masks(60)
    names = write_pcs(tmp_path, layout, masks)
    expected = set(data.PCS_SHARED)
    for c, name in enumerate(CLASSES):
        if sum(c in found for found in boxes) >= 50 and name not in ("null", "hair", "skin"):
            expected.add(name.capitalize())
    test = range(4, 60, 5)
    rows_of = {"train": [i for i in range(60) if i not in test], "test": test, "all": range(60)}
    for split, rows in rows_of.items():
        table = load_split("pcs", tmp_path, split)
        assert sorted(table.attributes) == sorted(expected)
        assert table.names == [names[i] for i in rows]
        for row, i in enumerate(rows):
            for j, attribute in enumerate(table.attributes):
                box = boxes[i].get(CLASSES.index(attribute.lower()))
                assert table.labels[row, j] == (box is not None)
                wanted = box or [np.nan] * 4
                assert np.array_equal(table.boxes[row, j], wanted, equal_nan=True)


def test_pcs_takes_further_classes_from_fifty_photos_on(tmp_path):
    mask = np.full((6, 4), CLASSES.index("shoes"), np.uint8)
    mask[0] = CLASSES.index("skin")
    write_pcs(tmp_path, "kaggle", [mask] * 49)
    assert load_split("pcs", tmp_path, "train").attributes == list(data.PCS_SHARED)
    write_pcs(tmp_path, "kaggle", [mask] * 50)
    table = load_split("pcs", tmp_path, "train")
    assert table.attributes == [*data.PCS_SHARED, "Shoes"] and table.groups[-1] == "bottom"
    assert not table.labels[:, :9].any() and table.labels[:, 9].all()
    expected = words("head bottom head bottom bottom all bottom head torso")
    assert table.groups[:9] == expected
    classes = {name.capitalize() for name in CLASSES}
    assert set(data.PCS_GROUPS) == classes - {"Null", "Skin", "Hair"}


def test_a_photo_turned_by_its_camera_has_its_masks_size(tmp_path):
    masks, _ = random_masks(50)
    write_pcs(tmp_path, "clothing-co-parsing", masks)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, shown standing
    lying = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    lying.save(tmp_path / "photos" / "0001.jpg", exif=exif)
    table = load_split("pcs", tmp_path, "train")
    assert data.read_image(table.images[0]).shape == (3, 30, 20)


@pytest.mark.skipif(not (REAL / "pcs").is_dir(), reason="needs the real photos beside the project")
def test_real_pcs_photos():
    loadmat = pytest.importorskip("scipy.io", reason="reading .mat files needs scipy").loadmat
    table = load_split("pcs", REAL / "pcs", "test", keypoints=REAL / "pcs" / "keypoints.npz")
    classes = [cell[0] for cell in loadmat(REAL / "pcs/label_list.mat")["label_list"][0]]
    assert len(table.names) == 120 and len(table.attributes) == 23
    for i in range(0, 120, 12):
        file = REAL / "pcs/annotations/pixel-level" / f"{table.names[i][:4]}.mat"
        mask = loadmat(file)["groundtruth"]
        for j, attribute in enumerate(table.attributes):
            rows, columns = np.nonzero(mask == classes.index(attribute.lower()))
            assert table.labels[i, j] == (len(rows) > 0)
            if len(rows):
                end = [columns.max() + 1, rows.max() + 1]
                assert table.boxes[i, j].tolist() == [columns.min(), rows.min(), *end]


# ---- a user's own data ----


def write_csv(
    folder, header="path,Hat,boots", rows=("a.png,1,0", "b.png,0,1"), groups=None, place=""
):
    for part in ("train", "val", "test"):
        (folder / f"{part}.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    random_pictures(folder / place, ["a.png", "b.png"])
    if groups is not None:
        (folder / "groups.json").write_text(groups)


@pytest.mark.parametrize("place", ["", "data"])
def test_csv_layout(tmp_path, place):
    write_csv(tmp_path, place=place)
    table = load_split("csv", tmp_path, "test")
    assert table.attributes == ["Hat", "boots"] and table.groups == ["head", "bottom"]
    assert table.images[1] == tmp_path / place / "b.png"
    assert table.labels.tolist() == [[1, 0], [0, 1]]
    assert load_split("csv", tmp_path, "all").labels.shape == (6, 2)
    write_csv(tmp_path, "image,Umbrella", ("a.png,1", "b.png,0"), '{"Umbrella": "all"}', place)
    assert load_split("csv", tmp_path, "train").groups == ["all"]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"header": "path,Umbrella,Hat"},
            "no groups.json, PA-100K's groups are taken: attribute Umbrella is in none",
        ),
        ({"header": "path,Hat,hat"}, "two of its attributes have the same name"),
        ({"rows": ("a.png,1,0", '"b.png,0,1', "c.png,1,1")}, "train.csv: .*line 3"),
        ({"groups": "[" * 2000}, "groups.json: not JSON"),
        ({"groups": '{"Hat": "head"}'}, "groups.json: attribute boots is in none of the groups"),
        ({"groups": '{"Hat": "head", "boots": "feet"}'}, "boots is in group feet, not in head"),
        ({"groups": '{"Hat": '}, "groups.json: not JSON"),
        ({"groups": '["Hat"]'}, r'groups.json: expected \{"attribute": "group"'),
        (
            {"rows": ("a.png,1,0", "b.png,0,2")},
            r"train.csv: line 3 \(b.png\) has the label '2', expected 0 or 1",
        ),
        ({"rows": ("a.png,1",)}, r"train.csv: line 2 \(a.png\) has 2 columns, expected 3"),
        ({"rows": ()}, "no images"),
        ({"header": "path,Hat,Hat"}, "train.csv: its header is path, Hat, Hat, expected"),
        ({"rows": ("a.png,1,0", "c.png,0,1")}, r"c.png: no such image \(1 of 2 are missing\)"),
    ],
)
def test_csv_with_mistakes(tmp_path, change, message):
    write_csv(tmp_path, **change)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load_split("csv", tmp_path, "train")
    assert "\n" not in str(error.value)


def test_csv_splits_must_agree(tmp_path):
    """Also where a split is read alone, as evaluation does."""
    write_csv(tmp_path)
    (tmp_path / "test.csv").write_text("path,boots,Hat\na.png,1,0\n")
    expected = "test.csv: its attributes are not those of train.csv, in order"
    with pytest.raises(ValueError, match=expected):
        load_split("csv", tmp_path, "test")
    (tmp_path / "val.csv").write_text("path,boots,Hat\na.png,1,0\n")
    with pytest.raises(ValueError, match="val.csv: its attributes are not those of train.csv"):
        load_split("csv", tmp_path, "trainval")
    (tmp_path / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match="val.csv: no such file"):
        load_split("csv", tmp_path, "val")


# ---- errors, as a user sees them ----


def cut(file, end=700):
    file.write_bytes(file.read_bytes()[:end])


def evil_pickle(folder):
    evil = Call(os.system, f"touch {folder / 'marker'}")
    (folder / "dataset_all.pkl").write_bytes(pickle.dumps(evil))
    return ["--dataset", "upar"]


def truncated_mat(folder):
    write_rap1(folder)
    cut(folder / "RAP_annotation" / "RAP_annotation.mat")
    return ["--dataset", "rap1"]


def wrong_mat(folder):
    write_peta(folder)
    (folder / "PETA.mat").rename(folder / "annotation.mat")
    return ["--dataset", "pa100k"]


def wrong_struct(folder):
    savemat(folder / "PETA.mat", {"peta": np.zeros(3)})
    return ["--dataset", "peta"]


def wrong_shape(folder):
    peta = {"data": np.zeros(3), "attribute": cells(PETA), "partion_attribute": 1}
    savemat(folder / "PETA.mat", {"peta": peta})
    return ["--dataset", "peta"]


def wrong_mask(folder):
    write_pcs(folder, "clothing-co-parsing", random_masks(3)[0])
    random_pictures(folder / "photos", ["0002.jpg"], (40, 20))
    return ["--dataset", "pcs"]


def unknown_class(folder):
    write_pcs(folder, "kaggle", [np.full((6, 4), 77, np.uint8)])
    return ["--dataset", "pcs"]


def without_keypoints(folder):
    write_peta(folder)
    np.savez(folder / "k.npz", names=np.array(["00001.png"]), keypoints=np.zeros((1, 16, 3)))
    return words(f"--dataset peta --ple K --keypoints {folder}/k.npz")


def partition(number, name="rap1"):
    def write(folder):
        {"rap1": write_rap1, "peta": write_peta, "pa100k": write_pa100k}[name](folder)
        return words(f"--dataset {name} --partition {number}")

    return write


def index_out_of_range(folder):
    def change(peta):
        peta["partion_attribute"][0, 0]["train"][0] = 11

    write_peta(folder, change)
    return ["--dataset", "peta"]


def unknown_attribute(folder):
    def change(content):
        content["attribute_eng"][50, 0] = "Umbrella"

    write_rap1(folder, change)
    return ["--dataset", "rap1"]


@pytest.mark.parametrize(
    "prepare, message",
    [
        (
            evil_pickle,
            "dataset_all.pkl: not a readable dataset pickle (it names posix.system, expected",
        ),
        (truncated_mat, "RAP_annotation.mat: not a readable .mat file"),
        (wrong_mat, "not laid out as pa100k is published (KeyError: 'attributes')"),
        (wrong_struct, "not laid out as peta is published"),
        (wrong_shape, "not laid out as peta is published"),
        (wrong_mask, "0002.mat: the mask is 30x20, expected its photo's 40x20"),
        (unknown_class, "seg_0001.png: class 77 in the mask, expected 0 to 58"),
        (without_keypoints, "k.npz: has no keypoints for image"),
        (partition(6), "--partition 6: expected 1 to 5"),
        (partition(0), "--partition 0: expected 1 to 5"),
        (partition(1, "pa100k"), "--partition 1: pa100k has none, expected rap1, peta, upar"),
        (index_out_of_range, "partition 1 names image 11, expected 1 to 10"),
        (unknown_attribute, "RAP_annotation.mat: attribute Umbrella is in none of the groups"),
    ],
)
def test_bad_datasets_are_one_line_and_exit_status_2(tmp_path, prepare, message):
    assert message in refuse(
        f"train.py --data {tmp_path}", *prepare(tmp_path), f"--weights none --out {tmp_path}/run"
    )
    assert not (tmp_path / "run").exists() and not (tmp_path / "marker").exists()


def test_rap1_trains_without_a_validation_split(tmp_path):
    write_rap1(tmp_path)
    done = command(
        f"train.py --dataset rap1 --data {tmp_path}",
        *TINY[2:],
        "--epochs 1 --backbone resnet18 --weights none --partition 2 --ple R --out",
        f"{tmp_path}/run",
    )
    assert done.returncode == 0 and "51 attributes" in done.stdout, done.stderr
    # the same partition's test split
    assert "rap1 test, partition 2" in succeed(f"evaluate.py {tmp_path}/run/best.pt")


# ---- the same attributes in two datasets (Tab. 7-10) ----

NAMES = {
    "pa100k": list(data.PA100K_GROUPS),
    "rap1": RAP1,
    "peta": PETA,
    "upar": UPAR,
    "pcs": list(data.PCS_GROUPS),
}


def empty_table(dataset, count=1):
    labels = np.zeros((count, len(NAMES[dataset])), np.float32)
    return data.Split(
        dataset, NAMES[dataset], ["all"] * len(NAMES[dataset]), ["x"] * count, ["x"] * count, labels
    )


def test_tab07_to_tab10_shared_attributes():
    for trained, tested, expected in (
        ("pa100k", "rap1", "Boots Hat HandBag Glasses Backpack ShortSleeve Female"),
        ("rap1", "pa100k", "Boots Hat HandBag Glasses Backpack ShortSleeve Female"),
        ("rap1", "upar", "Hat Glasses Backpack BaldHead LongHair Female"),
        ("pa100k", "pcs", "Hat Boots Glasses Skirt Jeans Dress Shorts Sunglasses T-shirt"),
    ):
        table, columns = shared_attributes(trained, NAMES[trained], tested, empty_table(tested))
        assert table.attributes == expected.split() and len(columns) == len(table.attributes)
    for rows in (data.SHARED, data.PCS_SHARED):  # no row is lost to a misspelt name
        for name, row in rows.items():
            for dataset, names in row.items():
                assert set(names.split("|")) <= set(NAMES[dataset]), (name, dataset)


def test_shared_attributes_join_labels_boxes_and_logits():
    random = np.random.default_rng(0)
    table = empty_table("upar", 20)
    table.labels[:] = random.integers(0, 2, table.labels.shape)
    table.boxes = random.uniform(0, 9, (*table.labels.shape, 4)).astype(np.float32)
    table.boxes[table.labels == 0] = np.nan
    reduced, columns = shared_attributes("rap1", RAP1, "upar", table)
    k = reduced.attributes.index("Glasses")
    glasses = [UPAR.index("Accessory-Glasses-Normal"), UPAR.index("Accessory-Glasses-Sun")]
    for i in range(20):
        both = [j for j in glasses if table.labels[i, j]]
        assert reduced.labels[i, k] == bool(both)
        if both:
            low, high = table.boxes[i, both, :2].min(0), table.boxes[i, both, 2:].max(0)
            assert (reduced.boxes[i, k] == [*low, *high]).all()
        else:
            assert np.isnan(reduced.boxes[i, k]).all()
    assert columns[k] == [RAP1.index("hs-Glasses")]
    _, columns = shared_attributes("upar", UPAR, "rap1", empty_table("rap1"))
    logits = torch.from_numpy(random.normal(size=(5, 40)))
    joined = data.max_over_outputs(logits, columns)
    (k,) = [k for k, own in enumerate(columns) if len(own) == 2]
    assert columns[k] == glasses
    for i in range(5):
        assert joined[i, k] == max(logits[i, columns[k][0]], logits[i, columns[k][1]])
        assert joined[i, 0] == logits[i, columns[0][0]]


def test_the_same_attributes_in_another_order_are_matched_by_name():
    table = empty_table("pa100k")
    table.attributes = table.attributes[::-1]
    reduced, columns = shared_attributes("pa100k", NAMES["pa100k"], "pa100k", table)
    assert reduced.attributes == table.attributes and columns == [[j] for j in range(25, -1, -1)]
    table.attributes = ["Umbrella"]
    table.labels = table.labels[:, :1]
    table.groups = ["all"]
    with pytest.raises(ValueError, match="shares no attribute with a model of pa100k"):
        shared_attributes("pa100k", NAMES["pa100k"], "csv", table)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of the synthetic set, whose attributes are PA-100K's."""
    out = tmp_path_factory.mktemp("runs")
    succeed("train.py", *TINY, f"--epochs 1 --ple R --out {out}")
    return out / "best.pt"


def test_tab07_cross_dataset_evaluation(trained, tmp_path):
    _, label, orders = write_rap1(tmp_path)
    assert "shares 7 of its 26 attributes" in succeed(
        f"evaluate.py {trained} --dataset rap1 --data {tmp_path} --split all --json",
        f"{tmp_path}/r.json",
    )
    result = json.loads((tmp_path / "r.json").read_text())
    shared = [row["attribute"] for row in result["attributes"]]
    assert shared == words("Boots Hat HandBag Glasses Backpack ShortSleeve Female")
    # Against a prediction of the same images by hand.
    from evaluate import load_model

    model, config = load_model(trained)
    table = load_split("rap1", tmp_path, "all")
    images = torch.stack([data.Pedestrians(table, config["size"])[i][0] for i in range(10)])
    with torch.inference_mode():
        predicted = model(images) > 0
    theirs = words("""
        shoes-Boots hs-Hat attach-HandBag hs-Glasses attach-Backpack ub-ShortSleeve Female
    """)
    for row, their in zip(result["attributes"], theirs, strict=True):
        our = "boots" if row["attribute"] == "Boots" else row["attribute"]
        hits = predicted[:, config["attributes"].index(our)].numpy()
        true = label[orders[0] - 1, RAP1.index(their)] == 1
        mA = 50 * (hits[true].mean() + (~hits[~true]).mean())
        assert row["mA"] == pytest.approx(mA, abs=1e-4)
    mean = np.mean([row["mA"] for row in result["attributes"]])
    assert result["mA"] == pytest.approx(mean, abs=1e-4)


def test_tab10_localization_on_pcs_by_a_model_of_another_dataset(trained, tmp_path):
    masks, boxes = random_masks(10)
    write_pcs(tmp_path, "kaggle", masks)
    succeed(
        f"localize.py {trained} --dataset pcs --data {tmp_path} --split all --panels 2",
        f"--out {tmp_path}/p --json {tmp_path}/l.json",
    )
    result = json.loads((tmp_path / "l.json").read_text())
    rows = {row["attribute"]: row for row in result["attributes"]}
    drawn = words("Hat Boots Jeans Dress T-shirt")  # of Tab. 10's nine
    assert set(rows) == set(drawn)
    for name, row in rows.items():
        assert row["boxes"] == sum(CLASSES.index(name.lower()) in found for found in boxes)
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["img_0001.png", "img_0002.png"]
    assert "Jeans" not in succeed(
        f"localize.py {trained} --dataset pcs --data {tmp_path} --attributes Hat", "--panels 0"
    )
