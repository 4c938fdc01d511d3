"""Keypoints for PLE-K by SimCC, the paper's pose model, where you have trained weights of it.

    python tests/simcc.py simcc.pth --dataset pa100k --data FOLDER --out keypoints.npz

SimCC (Li et al., ECCV 2022) with ResNet50 for MPII's 16 points and without deconvolutions, under
mmpose's names. No checkpoint of it is published; data.py finds keypoints without one. The checks
at the end run with the other tests.
"""

import math
import sys
from pathlib import Path

import torch
import torchvision.transforms.v2.functional as VF
from torch import nn
from torchvision.models import resnet50

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
from sspnet import load_weights  # noqa: E402


class SimCC(nn.Module):
    """A point's x and y are classified apart, each into 512 bins of half a pixel of the input."""

    def __init__(self):
        super().__init__()
        self.backbone = resnet50()
        self.backbone.avgpool = self.backbone.fc = nn.Identity()
        self.head = nn.Module()
        self.head.final_layer = nn.Conv2d(2048, 16, 1)
        self.head.mlp_head_x = nn.Linear(64, 512)
        self.head.mlp_head_y = nn.Linear(64, 512)

    def forward(self, images):
        """(B, 3, 256, 256) -> (B, 16, 3): x, y in pixels, and the smaller of their shares."""
        x = self.backbone(images).unflatten(1, (2048, 8, 8))
        x = self.head.final_layer(x).flatten(2)  # (B, 16, 64)
        share_x, bin_x = self.head.mlp_head_x(x).softmax(2).max(2)
        share_y, bin_y = self.head.mlp_head_y(x).softmax(2).max(2)
        return torch.stack([bin_x / 2, bin_y / 2, torch.minimum(share_x, share_y)], 2)


def square_place(H, W):
    """The side, left and top margin of an image's square: 1.25 times its longer side, centred."""
    side = math.ceil(1.25 * max(H, W))
    return side, (side - W) // 2, (side - H) // 2


def to_square(image):
    """(3, H, W) -> (3, 256, 256): the whole image in the middle of a black square."""
    H, W = image.shape[1:]
    side, left, top = square_place(H, W)
    padded = VF.pad(image, [left, top, side - W - left, side - H - top])
    return VF.resize(padded, [256, 256], antialias=True)


def from_square(points, H, W):
    """Points (..., 3) from the square's pixels to the image's; the third number is kept."""
    side, left, top = square_place(H, W)
    places = (points[..., :2] + 0.5) * side / 256 - 0.5 - torch.tensor([left, top])
    return torch.cat([places, points[..., 2:]], -1)


@torch.inference_mode()
def main():
    parser = data.make_parser(__doc__)
    parser.add_argument("weights", help="SimCC's state dict")
    data.add_dataset_arguments(parser)
    parser.add_argument("--split", default="all", choices=data.PARTS, help="default: all")
    parser.add_argument("--out", required=True, help="the keypoint file (.npz) to write")
    args = parser.parse_args()
    args.dataset = args.dataset or ("pa100k" if args.data else "synthetic")
    split = data.open_split({**vars(args), "ple": None, "size": (128, 96)}, args.split)
    model, points = SimCC().eval(), []
    load_weights(model, args.weights)
    for source in data.progress(split.images, "image"):
        image = data.read_image(source)
        found = model(data.normalize(to_square(image)[None]))[0]
        points.append(from_square(found, *image.shape[1:]))
    data.write_npz(args.out, names=split.names, keypoints=torch.stack(points).numpy())


def test_a_points_place_comes_back_from_the_square():
    for H, W in ((160, 64), (90, 151)):
        image = torch.zeros(3, H, W, dtype=torch.uint8)
        image[:, H // 3 - 2 : H // 3 + 3, W // 2 - 2 : W // 2 + 3] = 255
        crop = to_square(image)[0].double()
        y, x = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
        middle = torch.stack([(crop * x).sum(), (crop * y).sum(), crop.sum()]) / crop.sum()
        found = from_square(middle, H, W)
        assert (found[:2] - torch.tensor([W // 2, H // 3])).abs().max() < 0.1


def test_a_keypoint_file_is_written(tmp_path, monkeypatch):
    torch.save(SimCC().state_dict(), tmp_path / "simcc.pth")
    options = ["--images", "1", "--split", "test", "--out", str(tmp_path / "k.npz")]
    monkeypatch.setattr("sys.argv", ["simcc.py", str(tmp_path / "simcc.pth"), *options])
    main()
    assert data.read_keypoints(tmp_path / "k.npz", ["test-0-00000"]).shape == (1, 16, 2)


if __name__ == "__main__":
    data.command(main)
