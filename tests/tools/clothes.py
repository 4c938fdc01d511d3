"""One's own data as the README asks for it: crops of Clothing Co-Parsing's photos, with clothes
that PA-100K has no name for, those on 8% of the photos or more.

    python tests/tools/clothes.py PCS FOLDER --seed 0   # 400 crops to train, 100, 100
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402

CLOTHES = {"belt": "torso", "blazer": "torso", "blouse": "torso", "coat": "all", "scarf": "torso"}
CLOTHES |= {"stockings": "bottom", "suit": "all", "sweater": "torso"}
PARTS = {"train": slice(0, 400), "val": slice(400, 500), "test": slice(500, 600)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    split = data.load_split("pcs", args.photos)
    classes = data.read_mat(args.photos / "label_list.mat")["label_list"].tolist()
    rows = []
    for name, source in zip(split.names, data.progress(split.images, "photo"), strict=True):
        mask = args.photos / "annotations/pixel-level" / f"{Path(name).stem}.mat"
        worn = {classes[n] for n in np.unique(data.read_mat(mask)["groundtruth"])}
        _, _, box = data.look_at(data.read_image(source), crop=True)
        data.write_crop(source, box, args.folder / "images" / name)
        rows.append([f"images/{name}", *(int(cloth in worn) for cloth in CLOTHES)])
    order = np.random.default_rng(args.seed).permutation(len(rows))
    for part, run in PARTS.items():
        with open(args.folder / f"{part}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["path", *CLOTHES])
            writer.writerows(rows[i] for i in order[run])
    (args.folder / "groups.json").write_text(json.dumps(CLOTHES))


if __name__ == "__main__":
    data.command(main)
