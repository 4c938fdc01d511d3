"""Weakly supervised attribute localization, Sec. 3.2.5 and 4.5: Grad-CAM-P, boxes, IoU and its correlation with confidence.

    python localize.py CHECKPOINT                       the test split: IoU and PCC per attribute (Tab. 10), panels (Fig. 7)
    python localize.py CHECKPOINT --dataset pcs --data FOLDER     People Clothing Segmentation (Tab. 10, Fig. 8)
    python localize.py CHECKPOINT photo.jpg folder/     any pictures: attributes with probabilities, panels

    grad_cam_p, grad_cam     response maps of Eq. 13 and of the original Grad-CAM
    heatmaps                 the maps of many attributes of a batch (Eq. 2), from one forward of the backbone
    box_of                   heat map -> box (Eq. 3)
    box_iou, pearson         Tab. 10
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import Table, command, join_columns, loader, read_image, read_keypoints, show_progress, write_json
from evaluate import add_data_arguments, load_model, open_table, settings
from sspnet import enlarge

THRESHOLD = 0.2  # of the map scaled to [0, 1]; the paper gives none, see README.md
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def grad_cam_p(maps, gradients):
    """Eq. 13: ReLU(sum_k da_j/dA^k(x, y) A^k(x, y)), weights per pixel. Two (B, C, H, W) -> (B, H, W)."""
    return (gradients * maps).sum(1).relu()


def grad_cam(maps, gradients):
    """Grad-CAM (Selvaraju et al. 2017): weights per channel, the gradients' means. Two (B, C, H, W) -> (B, H, W)."""
    return (gradients.mean((2, 3), keepdim=True) * maps).sum(1).relu()


def heatmaps(model, images, attributes, keypoints=None, cam=grad_cam_p):
    """A_c(X) of Eq. 2 for several attributes of a batch.

    The backbone and the pyramid run once. For each attribute the gradient of its logit goes back only to the map that
    AFSS chose for it (C5 in the baseline); images do not mix in evaluation mode, so one pass serves the batch.

    Args:
        model: an SSPNet or Baseline in evaluation mode.
        images: (B, 3, H, W).
        attributes: K attribute indices.
        keypoints: (B, 16, 2) in image pixels, for PLE-K.
        cam: `grad_cam_p` or `grad_cam`.
    Returns:
        logits (B, L), and K response maps (B, h, w), not upsampled, in a list.
    """
    with torch.no_grad():
        maps = model.features(images)
    maps = [None if m is None else m.detach().requires_grad_() for m in maps]
    with torch.enable_grad():
        logits = model.attribute_logits(maps, keypoints)
    responses = []
    for attribute in attributes:
        A = maps[model.map_of(attribute)]
        (gradients,) = torch.autograd.grad(logits[attribute].sum(), A, retain_graph=True)
        responses.append(cam(A.detach(), gradients))
    return torch.stack(logits, 1).detach(), responses


def heat_map(response, stride, centred, input_size, image_size):
    """A response map over the image: (h, w) -> (H, W) in [0, 1], all zero where the response is zero or constant.

    Args:
        stride, centred: of the map in the model's input, see `sspnet.enlarge`.
        input_size, image_size: (H, W) of the model's input, and of the image that was resized to it.
    """
    heat = enlarge(response[None, None].float(), input_size, stride, centred)
    if tuple(image_size) != tuple(input_size):
        heat = F.interpolate(heat, size=image_size, mode="bilinear", align_corners=False)
    heat = heat[0, 0] - heat.min()
    return heat / heat.max().clamp(min=1e-20)


def box_of(heat, threshold=THRESHOLD):
    """f_orm of Eq. 3: the outer rectangle of all pixels at or above the threshold.

    (H, W) in [0, 1] -> half-open (left, top, right, bottom) in pixels; None where the map is all zero.
    """
    rows, columns = torch.nonzero(heat >= threshold, as_tuple=True)
    if not len(rows):
        return None
    return (columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1)


def box_iou(a, b):
    """Intersection over union of two half-open boxes (left, top, right, bottom); 0 where either is None."""
    if a is None or b is None:
        return 0.0
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    area = lambda box: (box[2] - box[0]) * (box[3] - box[1])
    return float(width * height / (area(a) + area(b) - width * height))


def pearson(x, y):
    """Pearson's correlation coefficient (Tab. 10); NaN for fewer than two pairs or a constant side."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum()))


def panel(image, tiles, width=144):
    """A picture as in Fig. 7: the input, then per attribute the heat map over it with boxes and a caption.

    Args:
        image: (H, W, 3) uint8.
        tiles: list of (caption, heat (H, W) in [0, 1], box or None, true box or None); ours red, the truth green.
        width: of each tile in pixels.
    """
    H, W = image.shape[:2]
    height, scale = round(width * H / W), width / W
    font = ImageFont.load_default(size=max(9, width // 12))
    line = width // 9
    out = Image.new("RGB", ((width + 4) * (len(tiles) + 1) - 4, height + 2 * line), "white")
    out.paste(Image.fromarray(image).resize((width, height)), (0, 0))
    for i, (caption, heat, box, truth) in enumerate(tiles, 1):
        blend = 0.5 * image + 0.5 * colour_map(np.asarray(heat))
        tile = Image.fromarray(blend.astype(np.uint8)).resize((width, height))
        draw = ImageDraw.Draw(tile)
        for edges, colour in ((truth, (0, 220, 0)), (box, (255, 0, 0))):
            if edges is not None:
                left, top, right, bottom = (v * scale for v in edges)
                draw.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=colour, width=2)
        out.paste(tile, (i * (width + 4), 0))
        ImageDraw.Draw(out).multiline_text((i * (width + 4) + 2, height), caption, fill="black", font=font, spacing=1)
    return out


def colour_map(heat):
    """(H, W) in [0, 1] -> (H, W, 3) in 0..255: blue, cyan, yellow, red."""
    stops = np.array([[0, 0, 128], [0, 96, 255], [64, 255, 192], [255, 224, 0], [255, 0, 0]], dtype=float)
    return np.stack([np.interp(heat, np.linspace(0, 1, len(stops)), stops[:, c]) for c in range(3)], -1)


def pictures(paths, config, keypoints=None):
    """A `Table` of plain image files and folders of them; its labels are zeros, unknown."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such image or folder")
        found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise FileNotFoundError(f"{path}: no images in this folder, expected {', '.join(IMAGE_SUFFIXES)}")
        files += found
    names = [file.name for file in files]
    if config["ple"] == "K" and not keypoints:
        raise ValueError(f"{paths[0]}: PLE-K needs keypoints, give --keypoints FILE")
    points = read_keypoints(keypoints, names) if keypoints else None
    labels = np.zeros((len(files), len(config["attributes"])), np.float32)
    return Table("pictures", config["attributes"], config["groups"], names, files, labels, points)


def chosen_attributes(names, attributes):
    """The indices of named attributes, upper and lower case alike; all where none is named."""
    index = {name.lower(): j for j, name in enumerate(attributes)}
    for name in names or ():
        if name.lower() not in index:
            raise ValueError(f"--attributes {name}: expected some of {', '.join(attributes)}")
    return sorted(index[name.lower()] for name in names) if names else list(range(len(attributes)))


def localize(model, table, columns, batches, attributes, cam=grad_cam_p, threshold=THRESHOLD, device="cpu", panels=0, save_panel=None):
    """Boxes of a table's images, held against its own where it has them.

    Args:
        columns: for each of the table's attributes the model's columns that stand for it; of several, the heat map is
            that of the one with the highest logit on the image.
        attributes: the table's attributes to look at, as indices.
        panels, save_panel: for the first `panels` images, save_panel(i, panel) is called; a panel shows the attributes
            that are predicted or have a true box or, where `attributes` are fewer than all, those.
    Returns:
        Probabilities (N, L), and {attribute index: [(image, iou, probability), ...]} over the images that have a
        true box of the attribute.
    """
    boxed = np.zeros(table.labels.shape, bool) if table.boxes is None else np.isfinite(table.boxes[:, :, 0])  # (N, L)
    probabilities, pairs, started = [], {k: [] for k in attributes}, time.time()
    for images, _, keypoints, index in batches:
        indices = index.tolist()
        wanted = [k for k in attributes if indices[0] < panels or boxed[indices, k].any()]
        own = sorted({j for k in wanted for j in columns[k]})
        logits, responses = heatmaps(model, images.to(device).to(memory_format=torch.channels_last), own, keypoints.to(device), cam)
        logits, responses = logits.float().cpu(), {j: response.cpu() for j, response in zip(own, responses)}
        probability = join_columns(logits, columns).sigmoid()
        probabilities.append(probability)
        for b, i in enumerate(indices):
            shown = {k for k in attributes if i < panels and (len(attributes) < len(columns) or probability[b, k] > 0.5 or boxed[i, k])}
            looked_at = [k for k in wanted if boxed[i, k] or k in shown]
            tiles = []
            image = read_image(table.images[i]) if looked_at or i < panels else None  # (3, H, W), for its size and the panel
            for k in looked_at:
                j = max(columns[k], key=lambda j: logits[b, j])
                heat = heat_map(responses[j][b], model.strides[model.map_of(j)], model.backbone.centred, images.shape[2:], image.shape[1:])
                box, truth = box_of(heat, threshold), table.boxes[i, k].tolist() if boxed[i, k] else None
                caption = f"{table.attributes[k]}\np {probability[b, k]:.2f}"
                if truth:
                    pairs[k].append((i, box_iou(box, truth), probability[b, k].item()))
                    caption += f"  IoU {pairs[k][-1][1]:.2f}"
                if k in shown:
                    tiles.append((caption, heat, box, truth))
            if i < panels:
                save_panel(i, panel(image.permute(1, 2, 0).numpy(), tiles))
        show_progress(f"{indices[-1] + 1}/{len(table.names)} images", indices[-1] + 1, len(table.names), started)
    return torch.cat(probabilities), pairs


def tabulate(table, pairs):
    """Tab. 10: per attribute the number of boxes, mean IoU and Pearson's correlation of IoU and probability."""
    rows = []
    for j, found in pairs.items():
        if found:
            _, ious, confidences = zip(*found)
            rows.append({"attribute": table.attributes[j], "boxes": len(found), "IoU": float(np.mean(ious)), "PCC": pearson(ious, confidences)})
    pccs = [row["PCC"] for row in rows if row["PCC"] == row["PCC"]]
    average = {"IoU": float(np.mean([row["IoU"] for row in rows])), "PCC": float(np.mean(pccs)) if pccs else float("nan")}
    lines = [f"{'attribute':20} {'boxes':>6} {'IoU':>6} {'PCC':>6}"]
    lines += [f"{row['attribute']:20} {row['boxes']:6} {row['IoU']:6.3f} {row['PCC']:6.2f}" for row in rows]
    lines.append(f"{'average':20} {sum(row['boxes'] for row in rows):6} {average['IoU']:6.3f} {average['PCC']:6.2f}")
    return {"attributes": rows, "average": average}, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoint", help="best.pt or last.pt of a training")
    add_data_arguments(parser)
    add("paths", nargs="*", help="images or folders of images; default: a dataset's split")
    add("--attributes", nargs="+", metavar="NAME", help="default: in panels those predicted, in the table all with boxes")
    add("--cam", default="grad-cam-p", choices=["grad-cam-p", "grad-cam"])
    add("--threshold", type=float, default=THRESHOLD, help="of the heat map scaled to [0, 1]")
    add("--panels", type=int, help="how many images to draw panels of; default 20, all of the named pictures")
    add("--out", help="folder for the panels; default: panels/ beside the checkpoint")
    add("--json", help="write the result to this file as well")
    args = parser.parse_intermixed_args()  # options may stand before the paths
    if not 0 < args.threshold <= 1:
        parser.error(f"--threshold {args.threshold}: expected more than 0, at most 1")
    model, config = load_model(args.checkpoint, args.device)
    table, columns = open_table(args, config) if not args.paths else (
        pictures(args.paths, config, args.keypoints), [[j] for j in range(len(config["attributes"]))])
    attributes = chosen_attributes(args.attributes, table.attributes)
    panels = args.panels if args.panels is not None else len(table.names) if args.paths else 20
    out = Path(args.out or Path(args.checkpoint).parent / "panels")
    if panels:
        out.mkdir(parents=True, exist_ok=True)
    stems = [Path(name).stem for name in table.names]

    def save_panel(i, picture):
        picture.save(out / (f"{stems[i]}.png" if stems.count(stems[i]) == 1 else f"{i}-{stems[i]}.png"))

    batches = loader(table, config["size"], args.batch_size, workers=args.workers, device=args.device)
    probabilities, pairs = localize(
        model, table, columns, batches, attributes, grad_cam if args.cam == "grad-cam" else grad_cam_p, args.threshold, args.device,
        panels, save_panel)
    result = {"checkpoint": args.checkpoint, "config": settings(config), "cam": args.cam, "threshold": args.threshold}
    if args.paths:
        result["images"] = {}
        for file, row in zip(table.images, probabilities):
            found = {table.attributes[j]: row[j].item() for j in attributes if row[j] > 0.5 or args.attributes}
            result["images"][str(file)] = found
            print(f"{file}: " + ", ".join(f"{name} {p:.2f}" for name, p in sorted(found.items(), key=lambda item: -item[1])))
    if any(pairs.values()):
        scores, lines = tabulate(table, pairs)
        result.update(split=table.name, **scores)
        print(f"{table.name}, {args.cam}, threshold {args.threshold}", *lines, sep="\n")
    if panels:
        print(f"{min(panels, len(table.names))} panels in {out}")
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    command(main)
