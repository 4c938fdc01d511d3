"""Draws where the three variants look (the paper's Fig. 4), by the published weights.

python tests/tools/looks.py    # writes .pictures/looks.png
"""

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
from sspnet import KEYPOINT_GROUPS, OffsetSampling, bilinear_sample, prior_region  # noqa: E402

PERSON = ROOT / ".pictures/people/090014.jpg"
HEIGHT = 420  # of a tile in pixels
TITLE = 30
COLOURS = {"head": "#e66100", "torso": "#00a0b0", "bottom": "#a040ff", "all": "#1a8f3c"}


class Picture:
    """The person under a title. Points are in pixels of a map of this stride, whose pixel k is
    centred on pixel stride k of the model's input of this size (see `sspnet.upsample`)."""

    def __init__(self, size, title, stride):
        with Image.open(PERSON) as photo:
            width = round(HEIGHT * photo.width / photo.height)
            enlarged = photo.resize((width, HEIGHT), Image.Resampling.BICUBIC)
        self.scale = width / size[1], HEIGHT / size[0]
        self.image = Image.new("RGB", (width, HEIGHT + TITLE), "white")
        self.image.paste(enlarged, (0, TITLE))
        self.pen = ImageDraw.Draw(self.image, "RGBA")
        self.pen.text((2, 2), title, "black", ImageFont.load_default(size=19))
        self.stride = stride

    def place(self, point):
        x, y = [self.stride * value + 0.5 for value in point.tolist()]
        return x * self.scale[0], y * self.scale[1] + TITLE

    def mark(self, point, half, colour, square=False):
        x, y = self.place(point)
        draw = self.pen.rectangle if square else self.pen.ellipse
        draw((x - half, y - half, x + half, y + half), fill=colour, outline="black")

    def offset_points(self, sample, x, point, colour):
        """The offset points of a point, squares whose area is their weight."""
        reference = bilinear_sample(x, point.view(1, 1, 2))[0, 0]
        predicted = sample.predict(reference)
        moved = point + predicted[: 2 * sample.M].view(sample.M, 2)
        weights = predicted[2 * sample.M :].softmax(0)
        for end in moved:
            self.pen.line([self.place(point), self.place(end)], colour, 3)
        for end, weight in zip(moved, weights.tolist(), strict=True):
            self.mark(end, 10 * weight**0.5, colour, square=True)
        self.mark(point, 5, "white")


def rows_of_R(image):
    picture = Picture(image.shape[1:], "R: rows", 1)
    font = ImageFont.load_default(size=13)
    step = picture.image.width // 4
    for k, (group, colour) in enumerate(COLOURS.items()):
        top, bottom = prior_region(group, HEIGHT)
        box = k * step + 2, top + TITLE + 1, (k + 1) * step - 2, bottom + TITLE - 1
        picture.pen.rectangle(box, fill=f"{colour}60", outline=colour, width=3)
        picture.pen.text((box[0] + 4, (box[1] + box[3]) // 2), group, "white", font)
    return picture.image


def points_of_K(image):
    picture = Picture(image.shape[1:], "K: keypoints", 1)
    points = data.find_points(image)[:, :2]
    for group in ("torso", "bottom", "head"):  # a point of two groups has the later one's colour
        for n in KEYPOINT_GROUPS[group]:
            picture.mark(points[n], 6, COLOURS[group])
    return picture.image


def grid_of_S(model, image, sample, title):
    """The grids of two groups, and the offset points of some of their points."""
    s = model.map_of(0)
    x = model.features(data.normalize(image[None]))[s]
    picture = Picture(image.shape[1:], title, model.strides[s])
    for group, chosen in (("head", (6, 12)), ("bottom", (2, 8, 13))):
        grid = model.ple.points(group, *x.shape[2:]).flatten(0, 1)
        for point in grid:
            picture.mark(point, 4, "white")
        for n in chosen:
            picture.offset_points(sample, x, grid[n], COLOURS[group])
    return picture.image


@torch.no_grad()
def main():
    model, config = evaluate.load_model(ROOT / ".weights/pa100k-S.pt")
    image, _ = data.resize(data.read_image(PERSON), torch.zeros(16, 2), config["size"])
    untrained = OffsetSampling(config["channels"], config["M"])
    tiles = [
        rows_of_R(image),
        points_of_K(image),
        grid_of_S(model, image, untrained, "S: grid, at first"),
        grid_of_S(model, image, model.ple.sample, "S: trained"),
    ]
    width = sum(tile.width + 12 for tile in tiles) - 12
    out = Image.new("RGB", (width, tiles[0].height), "white")
    left = 0
    for tile in tiles:
        out.paste(tile, (left, 0))
        left += tile.width + 12
    out.save(ROOT / ".pictures/looks.png")


if __name__ == "__main__":
    data.command(main)
