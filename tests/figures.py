"""The README's first picture: where models look for an attribute, on average over real images.

    python tests/pretrained.py figures runs/none-0/best.pt runs/R-0/best.pt runs/K-0/best.pt \
        runs/S-0/best.pt --data PA100K --keypoints keypoints.npz --out .pictures/heat-maps.png

Of each model (column) and attribute (row) the mean heat map over all test images that have the
attribute, laid over the mean of these images: nobody can be recognized, nothing is picked by hand.
Prints how often a heat map's maximum lies in the outer twelfth of the image. With --split val it
reads the validation split; --out may be left out.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as VF
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
from localize import colour_map, response_maps, to_image  # noqa: E402

ROWS = ("Hat", "Backpack", "Skirt&Dress", "boots")
TILE, MARGIN, FONT = (200, 150), 120, 26  # a tile's height and width, the rows' names, in pixels


def in_outer_twelfth(heat):
    """Whether the maximum of (H, W) lies within a twelfth of the width or height of an edge."""
    y, x = divmod(heat.argmax().item(), heat.shape[1])
    places = (y + 0.5) / heat.shape[0], (x + 0.5) / heat.shape[1]
    return any(min(place, 1 - place) < 1 / 12 for place in places)


def mean_maps(model, config, split):
    """For each of `ROWS`: the mean heat map (H, W), how many are not constant, and how many of
    these have their maximum in the outer twelfth."""
    size, found = tuple(config["size"]), {}
    for name in ROWS:
        j = config["attributes"].index(name)
        stride = model.strides[model.map_of(j)]
        rows = np.flatnonzero(split.labels[:, j])
        subset = torch.utils.data.Subset(data.Pedestrians(split, size), rows.tolist())
        batches = data.progress(torch.utils.data.DataLoader(subset, 32), f"{config['ple']} {name}")
        total, count, outer = torch.zeros(size), 0, 0
        for images, _, keypoints, _ in batches:
            (responses,) = response_maps(model, images, [j], keypoints)[1]
            for response in responses:
                heat = to_image(response, stride, model.patches, size, size)
                if heat.max() > 0:
                    total, count = total + heat, count + 1
                    outer += in_outer_twelfth(heat)
        found[name] = total / max(count, 1), count, outer
    return found


def mean_image(split, name):
    """(H, W, 3) uint8: the mean of the images that have the attribute."""
    rows = np.flatnonzero(split.labels[:, split.attributes.index(name)])
    total = sum(VF.resize(data.read_image(split.images[i]), list(TILE)).float() for i in rows)
    return (total / len(rows)).permute(1, 2, 0).round().byte().numpy()


def draw(columns, split, file):
    """A column of mean images, then one for each of {model's name: its `mean_maps`}."""
    (height, width), top, font = TILE, FONT + 14, ImageFont.load_default(size=FONT)
    size = MARGIN + (1 + len(columns)) * (width + 4), top + len(ROWS) * (height + 4)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    images = {name: mean_image(split, name) for name in ROWS}
    for x, title in enumerate(("mean image", *columns)):
        left = MARGIN + x * (width + 4)
        pen.text((left + width / 2, 4), title.removeprefix("SSPNet-"), "black", font, anchor="ma")
        for y, name in enumerate(ROWS):
            tile = images[name]
            if title in columns:
                heat = columns[title][name][0]
                heat = VF.resize((heat / heat.max().clamp(min=1e-20))[None], list(TILE))[0]
                tile = (0.5 * tile + 0.5 * colour_map(heat.numpy())).astype(np.uint8)
            picture.paste(Image.fromarray(tile), (left, top + y * (height + 4)))
    for y, name in enumerate(ROWS):
        middle = top + y * (height + 4) + height / 2
        pen.text((4, middle), name.replace("&", " &\n"), "black", font, anchor="lm")
    with data.written_whole(file) as path:
        picture.save(path, "PNG")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--out")
    evaluate.add_data_arguments(parser)
    args, columns = parser.parse_args(), {}
    for file in args.checkpoints:
        model, config = evaluate.load_model(file)
        split, _ = evaluate.open_evaluation(args, config)
        found = mean_maps(model, config, split)
        shares = [
            f"{name} {outer / count:.3f} of {count}" for name, (_, count, outer) in found.items()
        ]
        print(f"{file}: maxima in the outer twelfth: {', '.join(shares)}", flush=True)
        columns[evaluate.model_name(config["ple"])] = found
    if args.out:
        draw(columns, split, args.out)
