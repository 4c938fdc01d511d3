"""Each published layout, from small files and from the real annotations; shared attributes."""

import functools
import itertools
import json

import conftest
import numpy as np
import pytest
import torch
from conftest import REAL, SMALL, cells, random_images, refuse, savemat, succeed, words, write_csv
from PIL import Image

import data
from data import Pedestrians, Split, load_split, shared_attributes
from evaluate import load_model

COLOURS = words("Black Blue Brown Green Grey Orange Pink Purple Red White Yellow Other")
UPAR = words("""
    Age-Young Age-Adult Age-Old Gender-Female Hair-Length-Short Hair-Length-Long Hair-Length-Bald
    UpperBody-Length-Short""")
UPAR += [f"UpperBody-Color-{colour}" for colour in COLOURS] + ["LowerBody-Length-Short"]
UPAR += [f"LowerBody-Color-{colour}" for colour in COLOURS]
UPAR += words("""
    LowerBody-Type-Trousers&Jeans LowerBody-Type-Skirt&Dress Accessory-Backpack Accessory-Bag
    Accessory-Glasses-Normal Accessory-Glasses-Sun Accessory-Hat""")
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
CLASSES = words("null accessories boots dress glasses hair hat jeans shoes shorts skin skirt")
CLASSES += words("sunglasses t-shirt tie")
PCS = words("Hat Boots Glasses Skirt Jeans Dress Shorts Sunglasses T-shirt")
NAMES = {"pa100k": conftest.ATTRIBUTES, "rap1": RAP1, "peta": PETA, "upar": UPAR, "pcs": PCS}


def groups_of(split, attributes):
    group = dict(zip(split.attributes, split.groups, strict=True))
    return [group[attribute] for attribute in words(attributes)]


def assert_holds(split, attributes, names, labels):
    assert split.attributes == attributes
    assert split.names == names
    assert (split.labels == labels).all()


def independent(file):
    """A real annotation file, read without the reader's simplifications."""
    if not (REAL / file).is_file():
        pytest.skip("needs the real annotations in the folder SSPNET_DATA")
    return pytest.importorskip("scipy.io").loadmat(REAL / file)


@pytest.mark.parametrize("images", ["data", "release_data/release_data"])
def test_pa100k_layouts(tmp_path, images):
    truth = conftest.write_pa100k(tmp_path, images)
    (names, labels), (more, others) = truth["train"], truth["val"]
    truth["trainval"] = names + more, [*labels, *others]
    for part, (names, labels) in truth.items():
        split = load_split("pa100k", tmp_path, part)
        assert_holds(split, conftest.ATTRIBUTES, names, labels)
        assert split.groups == conftest.PA100K
        assert split.images == [tmp_path / images / name for name in names]


def test_missing_files_are_named_before_training(tmp_path):
    options = ["--data", tmp_path, *SMALL, "--out", "run"]
    assert "annotation.mat" in refuse("train.py", *options)
    conftest.write_pa100k(tmp_path)
    (tmp_path / "data" / "000003.jpg").unlink()
    assert "000003.jpg" in refuse("train.py", *options)
    assert not (tmp_path / "run").exists()


def test_real_pa100k_annotation():
    mat = independent("pa100k/annotation.mat")
    attributes = [cell[0][0] for cell in mat["attributes"]]
    parts = "train", "val", "test"
    names = [cell[0][0] for part in parts for cell in mat[f"{part}_images_name"]]
    assert len(names) == 100000
    labels = np.concatenate([mat[f"{part}_label"] for part in parts])
    assert_holds(data.pa100k(REAL / "pa100k", parts), attributes, names, labels)


def write_rap1(folder):
    rng = np.random.default_rng(0)
    names = [f"CAM{i:02d}_line1.png" for i in range(10)]
    label = rng.integers(0, 3, (10, 60)).astype(np.int32)  # 2: unsure
    orders = [(rng.permutation(10) + 1).astype(np.uint16) for _ in range(5)]
    parts = [{"train_index": o[None, :8], "test_index": o[None, 8:]} for o in orders]
    content = {"imagesname": cells(names), "label": label, "partion": cells(parts)}
    content["attribute_eng"] = cells(RAP1 + [f"more{i}" for i in range(9)])
    savemat(folder / "RAP_annotation" / "RAP_annotation.mat", {"RAP_annotation": content})
    random_images(folder / "RAP_dataset", names)
    return names, label, orders


@pytest.mark.parametrize("partition", [None, 1, 4])
def test_rap1_layout(tmp_path, partition):
    names, label, orders = write_rap1(tmp_path)
    order = orders[(partition or 1) - 1].astype(int) - 1
    rows_of = {"train": order[:8], "trainval": order[:8], "test": order[8:], "all": order}
    for part, rows in rows_of.items():
        split = load_split("rap1", tmp_path, part, partition=partition)
        assert_holds(split, RAP1, [names[i] for i in rows], label[rows, :51] == 1)
        assert split.images == [tmp_path / "RAP_dataset" / name for name in split.names]
    some = "hs-Hat ub-TShirt attach-Backpack attach-Box lb-Jeans lb-ShortSkirt lb-Dress Female"
    assert groups_of(split, some) == words("head torso torso all bottom bottom all all")
    assert [split.groups.count(group) for group in data.GROUPS] == [6, 10, 10, 25]
    with pytest.raises(ValueError, match="no validation split"):
        load_split("rap1", tmp_path, "val")
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=f"partition {wrong}: expected 1 to 5"):
            load_split("rap1", tmp_path, "test", partition=wrong)


def test_peta_layout(tmp_path):
    rng = np.random.default_rng(0)
    columns = [np.arange(1, 11)[:, None], np.full((10, 3), 7), rng.integers(0, 2, (10, 40))]
    orders = [rng.permutation(10) + 1 for _ in range(5)]
    parts = [{"train": o[:5, None], "val": o[5:7, None], "test": o[7:, None]} for o in orders]
    content, attributes = np.concatenate(columns, 1), cells(PETA + [f"more{i}" for i in range(5)])
    peta = {"data": content, "attribute": attributes, "partion_attribute": cells(parts)}
    savemat(tmp_path / "PETA.mat", {"peta": peta})
    random_images(tmp_path / "images", [f"{i:05d}.png" for i in range(1, 11)])
    runs = {"train": slice(5), "val": slice(5, 7), "test": slice(7, 10), "trainval": slice(7)}
    for (part, run), partition in itertools.product({**runs, "all": slice(10)}.items(), (1, 5)):
        numbers = orders[partition - 1][run]
        split = load_split("peta", tmp_path, part, partition=partition)
        names = [f"{i:05d}.png" for i in numbers]
        assert_holds(split, PETA, names, content[numbers - 1, 4:39])
        assert split.images[0].parent == tmp_path / "images"
    some = "accessoryNothing hairLong upperBodyLogo carryingBackpack carryingOther lowerBodyShorts"
    assert groups_of(split, some) == words("head head torso torso all bottom")
    assert groups_of(split, "footwearShoes personalMale") == ["bottom", "all"]


def test_real_rap1_annotation(monkeypatch):
    monkeypatch.setattr(data, "read_mat", functools.cache(data.read_mat))  # it takes seconds
    rap = independent("rap1/RAP_annotation/RAP_annotation.mat")["RAP_annotation"][0, 0]
    attributes = [cell[0] for cell in rap["attribute_eng"][:51, 0]]
    for partition in range(1, 6):
        for part, count in (("train", 33268), ("test", 8317)):
            rows = rap["partion"][partition - 1, 0][0, 0][f"{part}_index"].ravel().astype(int) - 1
            assert len(rows) == count
            names = [rap["imagesname"][i, 0][0] for i in rows]
            split = data.rap1(REAL / "rap1", (part,), partition)
            assert_holds(split, attributes, names, rap["label"][rows, :51] == 1)


def test_real_peta_annotation():
    peta = independent("peta/PETA.mat")["peta"][0, 0]
    attributes = [cell[0] for cell in peta["attribute"][:35, 0]]
    for partition in range(1, 6):
        for part, count in (("train", 9500), ("val", 1900), ("test", 7600)):
            rows = peta["partion_attribute"][partition - 1, 0][0, 0][part].ravel().astype(int) - 1
            assert len(rows) == count
            names = [f"{number:05d}.png" for number in peta["data"][rows, 0]]
            split = data.peta(REAL / "peta", (part,), partition)
            assert_holds(split, attributes, names, peta["data"][rows, 4:39])


def upar_content():
    """As published: nine partitions, the test images of each apart by sub-dataset."""
    rng, partition = np.random.default_rng(0), {"train": [], "val": [], "test": []}
    folders = "PA100k", "RAP2", "Market1501"
    names = [f"{folder}/images/{i:03d}.jpg" for folder in folders for i in range(4)]
    for _ in range(9):
        order = rng.permutation(12).tolist()
        partition["train"].append(order[:5])
        partition["val"].append(order[5:8])
        partition["test"].append([order[8:9], order[9:12]])
    label = rng.integers(0, 2, (12, 40)).tolist()
    return {"image_name": names, "label": label, "attr_name": UPAR, "partition": partition}


def test_upar_layout(tmp_path):
    content = upar_content()
    names, labels = content["image_name"], np.array(content["label"])
    (tmp_path / "dataset_all.json").write_text(json.dumps(content))
    random_images(tmp_path, names)
    for part, partition in itertools.product(("train", "val", "test"), (None, 1, 9)):
        split = load_split("upar", tmp_path, part, partition=partition)
        rows = content["partition"][part][(partition or 1) - 1]
        rows = sum(rows, []) if part == "test" else rows
        assert_holds(split, UPAR, [names[i] for i in rows], labels[rows])
        assert split.images[0] == tmp_path / split.names[0]
    split = load_split("upar", tmp_path, "all", exclude=["RAP2", "PA100k"])
    assert sorted(split.names) == names[8:]
    with pytest.raises(ValueError, match="exclude"):
        load_split("upar", tmp_path, "all", exclude=["RAP1"])
    with pytest.raises(ValueError, match="no images"):
        load_split("upar", tmp_path, "all", exclude=["RAP2", "PA100k", "Market1501"])
    assert [split.groups.count(group) for group in data.GROUPS] == [6, 14, 14, 6]
    assert groups_of(split, "LowerBody-Type-Skirt&Dress Accessory-Glasses-Sun") == ["all", "head"]


def test_tab09_a_rap1_model_is_measured_without_rap2s_images(tmp_path):
    """Unless it is asked for."""
    write_rap1(tmp_path / "RAP")
    succeed("train.py", "--dataset", "rap1", "--data", tmp_path / "RAP", *SMALL, "--out", "run")
    (tmp_path / "dataset_all.json").write_text(json.dumps(upar_content()))
    random_images(tmp_path, upar_content()["image_name"])
    options = ["--dataset", "upar", "--data", tmp_path, "--split", "all", "--predictions", "p.npz"]
    for more, rap2 in (([], False), (["--exclude"], True)):
        printed = succeed("evaluate.py", "run/best.pt", *options, *more)
        assert any("RAP2" in name for name in np.load("p.npz")["names"]) == rap2
        assert ("RAP2" in printed.splitlines()[0]) != rap2


def random_masks(count, size=(30, 20)):
    """Masks with a few rectangles each."""
    rng, masks = np.random.default_rng(0), np.zeros((count, *size), np.uint8)
    drawn = [CLASSES.index(n) for n in words("hat boots jeans dress shoes hair t-shirt")]
    for mask in masks:
        for number in rng.choice(drawn, 4, replace=False):
            y, x = rng.integers(0, 20), rng.integers(0, 12)
            mask[y : y + rng.integers(2, 8), x : x + rng.integers(2, 8)] = number
    return masks


def write_pcs(folder, layout, masks):
    for i, mask in enumerate(masks, 1):
        if layout == "kaggle":
            random_images(folder / "png_images/IMAGES", [f"img_{i:04d}.png"], mask.shape)
            (folder / "png_masks/MASKS").mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(mask)
            image.putpalette([255] * 768)  # of one colour: its indices count
            image.save(folder / f"png_masks/MASKS/seg_{i:04d}.png")
        else:
            random_images(folder / "photos", [f"{i:04d}.jpg"], mask.shape)
            file = folder / f"annotations/pixel-level/{i:04d}.mat"
            savemat(file, {"groundtruth": mask.astype(float)})
    if layout == "kaggle":
        rows = [f"{c},{name if c else ''}\n" for c, name in enumerate(CLASSES)]
        (folder / "labels.csv").write_text(",label_list\n" + "".join(rows))
    else:
        savemat(folder / "label_list.mat", {"label_list": cells(CLASSES).T})


def assert_boxes(split, i, mask, classes=CLASSES):
    for j, attribute in enumerate(split.attributes):
        ys, xs = np.nonzero(mask == classes.index(attribute.lower()))
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None
        assert split.labels[i, j] == (box is not None)
        assert np.array_equal(split.boxes[i, j], box or [np.nan] * 4, equal_nan=True)


@pytest.mark.parametrize("layout", ["clothing-co-parsing", "kaggle"])
def test_pcs_layouts(tmp_path, layout):
    masks = random_masks(8)
    write_pcs(tmp_path, layout, masks)
    for part in ("test", "all"):
        split = load_split("pcs", tmp_path, part)
        assert split.attributes == PCS
        name = "img_{:04d}.png" if layout == "kaggle" else "{:04d}.jpg"
        assert split.names == [name.format(i) for i in range(1, 9)]
        for i, mask in enumerate(masks):
            assert_boxes(split, i, mask)
    random_images(split.images[1].parent, [split.names[1]], (40, 20))  # not its mask's size
    with pytest.raises(ValueError, match=r"0002\.(png|mat): the mask"):
        load_split("pcs", tmp_path, "test")


def test_real_pcs_masks():
    classes = [name[0] for name in independent("pcs/label_list.mat")["label_list"][0]]
    split = load_split("pcs", REAL / "pcs", "test", keypoints=REAL / "pcs/keypoints.npz")
    assert len(split.names) == 600
    assert np.isfinite(split.boxes[:, :, 0]).sum() == 751
    for i in range(0, 600, 120):
        mat = independent(f"pcs/annotations/pixel-level/{split.names[i][:4]}.mat")
        assert_boxes(split, i, mat["groundtruth"], classes)


@pytest.mark.parametrize("place", ["", "data", "release_data/release_data"])
def test_csv_layout(tmp_path, place):
    rows = "a.png, 1,0", "  ", "b.png,0,1.0"
    write_csv(tmp_path, "path, Hat ,boots", rows, images=tmp_path / place)
    split = load_split("csv", tmp_path, "test")  # PA-100K's attributes need no groups.json
    assert_holds(split, ["Hat", "boots"], ["a.png", "b.png"], [[1, 0], [0, 1]])
    assert split.groups == ["head", "bottom"]
    assert split.images[1] == tmp_path / place / "b.png"
    assert load_split("csv", tmp_path, "all").labels.shape == (6, 2)
    # With and without a byte order mark: the same columns.
    (tmp_path / "val.csv").write_text("path,Hat,boots\na.png,1,0\n", encoding="utf-8")
    assert load_split("csv", tmp_path, "trainval").labels.shape == (3, 2)
    (tmp_path / "val.csv").write_text("")
    with pytest.raises(ValueError, match="val.csv: is empty"):
        load_split("csv", tmp_path, "val")
    (tmp_path / "train.csv").write_text("image,Umbrella\na.png,1\nb.png,0\n")
    (tmp_path / "groups.json").write_text('{"Umbrella": "all"}')
    assert load_split("csv", tmp_path, "train").groups == ["all"]
    (tmp_path / "train.csv").write_text("image,Hat,Umbrella\na.png,1,0\n")
    assert load_split("csv", tmp_path, "train").groups == ["head", "all"]  # Hat is PA-100K's


@pytest.mark.parametrize(
    "change, named",
    [
        ({"header": "path,Umbrella,Hat"}, "groups.json is needed: .*Umbrella"),  # in no group
        ({"header": "path,Umbrella,Hat", "groups": "{}"}, r"/groups\.json: .*Umbrella is in no"),
        ({"groups": '{"Hat": "head", "boots": "feet"}'}, "groups.json.*feet"),
        ({"groups": '{"Hat": "head"'}, "groups.json"),
        ({"groups": "null"}, "groups.json"),
        ({"rows": ()}, "csv train.*no images"),
        ({"header": "path;Hat;boots", "rows": ("a.png;1;0",)}, "train.csv, line 1: .*commas"),
        ({"header": "a.png,1,0"}, "train.csv, line 1: .*'1'"),
        ({"header": "path,Hat,hat"}, "train.csv, line 1: .*'hat'"),
        ({"header": ",path,Hat,boots", "rows": ("0,a.png,1,0",)}, "train.csv, line 2: .*'a.png'"),
        ({"rows": ("a.png,1,0", "b.png,0,2")}, r"train.csv, line 3: .*boots for b\.png"),
        ({"rows": ("a.png,1,0", "", "b.png,0,True")}, "train.csv, line 4: .*'True'"),
        ({"rows": ("a.png,,0",)}, "train.csv, line 2: .*''"),
        ({"rows": ("a.png,1",)}, "train.csv, line 2: 1 labels"),
        ({"rows": ("a.png,1,0,",)}, "train.csv, line 2: 3 labels"),
        ({"rows": (",,",)}, "train.csv, line 2: .*''"),
    ],
)
def test_csv_with_mistakes(tmp_path, change, named):
    write_csv(tmp_path, **change)
    with pytest.raises(ValueError, match=named):
        load_split("csv", tmp_path, "train")


@pytest.mark.parametrize("header", ["path,boots,Hat", "path,Hat,Glasses"])
def test_training_and_validation_must_have_the_same_attributes_in_order(tmp_path, header):
    write_csv(tmp_path)
    (tmp_path / "val.csv").write_text(f"{header}\na.png,1,0\n")
    with pytest.raises(ValueError, match="csv trainval"):
        load_split("csv", tmp_path, "trainval")
    options = ["--dataset", "csv", "--data", tmp_path, *SMALL, "--out", "run"]
    assert "csv val" in refuse("train.py", *options)
    assert not (tmp_path / "run").exists()


def test_evaluation_matches_attributes_by_name(tmp_path):
    write_csv(tmp_path)
    succeed("train.py", "--dataset", "csv", "--data", tmp_path, *SMALL, "--out", "run")
    results = []
    for header, row in (("path,Hat,boots", "a.png,1,0"), ("path,boots,Hat", "a.png,0,1")):
        (tmp_path / "test.csv").write_text(f"{header}\n{row}\nb.png,0,0\n")
        succeed("evaluate.py", "run/best.pt", "--json", "r.json")
        rows = conftest.read_json("r.json")["attributes"]
        results.append({row["attribute"]: row["mA"] for row in rows})
    assert results[0] == results[1]


def test_partition_and_keypoints_are_inherited_however_the_folder_is_spelled(tmp_path):
    names, _, orders = write_rap1(tmp_path / "RAP")
    conftest.write_keypoints(tmp_path / "k.npz", names)
    options = ["--dataset", "rap1", "--data", tmp_path / "RAP", "--partition", "3", "--ple", "K"]
    options += [*SMALL, "--keypoints", tmp_path / "k.npz", "--out", "run"]
    assert "51 attributes" in succeed("train.py", *options)  # without a validation split
    expected = [names[i - 1] for i in orders[2][8:]]
    for more in ([], ["--data", "RAP/"], ["--dataset", "rap1", "--data", "RAP"]):
        succeed("evaluate.py", "run/best.pt", *more, "--predictions", "p.npz")
        assert np.load("p.npz")["names"].tolist() == expected
    write_rap1(tmp_path / "other")  # another folder's keypoints may be of other images
    other = conftest.command("evaluate.py", "run/best.pt", "--data", "other")
    assert other.stderr.count("SimCC finds them") == 1
    # A file that the checkpoint names and that does not fit is said to be the checkpoint's.
    conftest.write_keypoints(tmp_path / "k.npz", names[:1])
    line = refuse("evaluate.py", "run/best.pt")
    assert "k.npz" in line
    assert "checkpoint" in line


def split_of(dataset, count=1):
    labels = np.zeros((count, len(NAMES[dataset])), np.float32)
    known = NAMES[dataset], ["all"] * len(NAMES[dataset]), ["x"] * count, ["x"] * count
    return Split(dataset, *known, labels)


def test_tab07_to_tab10_shared_attributes():
    for trained, tested, expected in (
        ("pa100k", "rap1", "Boots Hat HandBag Glasses Backpack ShortSleeve Female"),
        ("rap1", "pa100k", "Boots Hat HandBag Glasses Backpack ShortSleeve Female"),
        ("rap1", "upar", "Hat Glasses Backpack BaldHead LongHair Female"),
        ("pa100k", "pcs", " ".join(PCS)),
        ("synthetic", "pcs", " ".join(PCS)),
    ):
        known = NAMES["pa100k" if trained == "synthetic" else trained]
        split, outputs = shared_attributes(trained, known, tested, split_of(tested))
        assert split.attributes == words(expected)
        assert len(outputs) == len(split.attributes)
    for text in (data.SHARED, data.PCS_SHARED):  # no row is lost to a misspelt name
        header, *table = [words(line) for line in text.strip().splitlines()]
        for row in table:
            for dataset, cell in list(zip(header, row, strict=True))[1:]:
                assert set(cell.split("|")) <= {*NAMES[dataset], "-"}, (dataset, cell)
    with pytest.raises(ValueError, match="pa100k"):  # nothing in common
        lone = Split("t", ["Umbrella"], ["all"], ["x"], ["x"], [[1]])
        shared_attributes("pa100k", conftest.ATTRIBUTES, "csv", lone)


def test_shared_attributes_join_labels_and_logits():
    rng = np.random.default_rng(0)
    split = split_of("upar", 20)
    split.labels[:] = rng.integers(0, 2, split.labels.shape)
    split.groups = [f"group of {name}" for name in UPAR]
    split.boxes = rng.random((20, 40, 4))
    reduced, outputs = shared_attributes("rap1", RAP1, "upar", split)
    theirs = words("Accessory-Hat Accessory-Glasses-Normal Accessory-Backpack Hair-Length-Bald")
    theirs += words("Hair-Length-Long Gender-Female")
    assert reduced.groups == [f"group of {name}" for name in theirs]
    assert (reduced.boxes == split.boxes[:, [UPAR.index(name) for name in theirs]]).all()
    k = reduced.attributes.index("Glasses")
    glasses = [UPAR.index("Accessory-Glasses-Normal"), UPAR.index("Accessory-Glasses-Sun")]
    assert (reduced.labels[:, k] == split.labels[:, glasses].max(1)).all()
    assert outputs[k] == [RAP1.index("hs-Glasses")]
    _, outputs = shared_attributes("upar", UPAR, "rap1", split_of("rap1"))
    logits = torch.from_numpy(rng.normal(size=(5, 40)))
    joined = data.max_over_outputs(logits, outputs)
    (k,) = [k for k, own in enumerate(outputs) if len(own) == 2]
    assert outputs[k] == glasses
    assert torch.equal(joined[:, k], torch.maximum(*logits[:, glasses].T))
    assert torch.equal(joined[:, 0], logits[:, outputs[0][0]])


def test_tab07_cross_dataset_evaluation(trained, tmp_path):
    _, label, orders = write_rap1(tmp_path)
    options = ["--dataset", "rap1", "--data", tmp_path, "--split", "all", "--json", "r.json"]
    checkpoint = conftest.load(trained["R"])
    scales = [("all", "head", "torso").index(g) if g != "bottom" else 1 for g in conftest.PA100K]
    checkpoint["ema"]["afss._extra_state"] = torch.tensor([*scales, 1])
    torch.save(checkpoint, "R.pt")
    assert "7 of its 26 attributes" in succeed("evaluate.py", "R.pt", *options)
    model, config = load_model("R.pt")
    images = Pedestrians(load_split("rap1", tmp_path, "all"), config["size"])
    with torch.inference_mode():
        predicted = model(data.normalize(torch.stack([images[i][0] for i in range(10)]))) > 0
    theirs = words("shoes-Boots hs-Hat attach-HandBag hs-Glasses attach-Backpack ub-ShortSleeve")
    result = conftest.read_json("r.json")
    for row, their in zip(result["attributes"], [*theirs, "Female"], strict=True):
        our = "boots" if row["attribute"] == "Boots" else row["attribute"]
        assert row["scale"] == f"P{model.afss.scales[config['attributes'].index(our)] + 1}"
        hits = predicted[:, config["attributes"].index(our)].numpy()
        true = label[orders[0] - 1, RAP1.index(their)] == 1
        mA = 50 * (hits[true].mean() + (~hits[~true]).mean())
        assert row["mA"] == pytest.approx(mA, abs=1e-4)
    mean = np.mean([row["mA"] for row in result["attributes"]])
    assert result["mA"] == pytest.approx(mean, abs=1e-4)


def test_tab10_localization_on_pcs_by_a_model_of_another_dataset(trained, tmp_path):
    masks = random_masks(10)
    write_pcs(tmp_path, "kaggle", masks)
    options = ["--dataset", "pcs", "--data", tmp_path]
    more = ["--panels", "2", "--out", "p", "--json", "l.json"]
    succeed("localize.py", trained["R"], *options, *more)
    rows = {row["attribute"]: row["boxes"] for row in conftest.read_json("l.json")["attributes"]}
    drawn = words("Hat Boots Jeans Dress T-shirt")  # of the nine
    expected = {n: sum(CLASSES.index(n.lower()) in mask for mask in masks) for n in drawn}
    assert rows == expected
    assert len(list((tmp_path / "p").iterdir())) == 2
