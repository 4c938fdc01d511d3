"""Weakly supervised attribute localization (Sec. 3.2.5 and 4.5).

    grad_cam_p, grad_cam     response maps: Eq. 13, and the original Grad-CAM
    response_maps            the maps of many attributes of a batch, Eq. 2
    to_image                 a response map, laid over the image
    heatmap_to_box           f_orm of Eq. 3
    box_iou, pearson         Tab. 10

    python localize.py CHECKPOINT                     the test split: IoU and PCC (Tab. 10), panels
    python localize.py CHECKPOINT --dataset pcs --data FOLDER     People Clothing Segmentation
    python localize.py CHECKPOINT photo.jpg folder/   any images: probabilities, boxes, panels
    python localize.py BASE.pt R.pt K.pt S.pt --attributes Hat    models side by side (Fig. 7, 8)

Boxes are half-open (left, top, right, bottom) in image pixels.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import data
import evaluate
from sspnet import upsample

THRESHOLD = 0.2  # of the heat map scaled to [0, 1]; the paper gives none, see README.md
LONGEST_SIDE = 1024  # of a heat map: larger images are localized on a map of this size
TILE = 144  # width of a panel's tiles in pixels; they are at most four times as high


# ---- Response maps (Sec. 3.2.5, Eq. 2 and 13)


def grad_cam_p(maps, gradients):
    """Eq. 13: ReLU(sum_k da_j/dA^k(x, y) A^k(x, y)), one weight per pixel and channel.

    maps A and gradients da_j/dA, both (B, C, H, W) -> (B, H, W). Known elsewhere as HiResCAM
    (Draelos and Carin, arXiv 2011.08891).
    """
    return (gradients * maps).sum(1).relu()


def grad_cam(maps, gradients):
    """Grad-CAM (Selvaraju et al. 2017): one weight per channel, the mean of its gradients."""
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * maps).sum(1).relu()


def response_maps(model, images, attributes, keypoints=None, cam=grad_cam_p):
    """A_c(X) of Eq. 2 for several attributes c of a batch.

    The backbone and the pyramid run once. From each attribute's logit the gradient goes back to the
    map that AFSS chose for it (C5 in the baseline). Images do not mix in evaluation mode, so that
    one pass serves the whole batch.

    Args:
        model: an SSPNet or a Baseline in evaluation mode.
        images: (B, 3, H, W).
        attributes: attribute indices.
        keypoints: (B, 16, 2) in image pixels, for PLE-K.
        cam: `grad_cam_p` or `grad_cam`.
    Returns:
        Logits (B, L), and for each of the attributes its response map (B, h, w) at the map's size.
    """
    with torch.no_grad():
        maps = model.features(images)
    maps = [None if A is None else A.detach().requires_grad_() for A in maps]
    with torch.enable_grad():
        logits = model.attribute_logits(maps, keypoints)
    responses = []
    for j in attributes:
        A = maps[model.map_of(j)]
        (gradients,) = torch.autograd.grad(logits[j].sum(), A, retain_graph=True)
        responses.append(cam(A.detach(), gradients))
    return torch.stack(logits, 1).detach(), responses


def to_image(response, stride, patches, input_size, image_size):
    """A response map laid over the image: (h, w) -> (H, W) in [0, 1], zero where it is constant.

    Args:
        stride, patches: of the map in the model's input, see `sspnet.upsample`.
        input_size, image_size: (H, W) of the model's input and of the image resized to it.
    """
    if response.min() == response.max():
        return torch.zeros(image_size)
    heat = upsample(response[None, None].float(), input_size, stride, patches)
    if tuple(image_size) != tuple(input_size):
        heat = F.interpolate(heat, size=image_size, mode="bilinear", align_corners=False)
    heat = heat[0, 0] - heat.min()
    return heat / heat.max().clamp(min=1e-20)


# ---- Boxes (Eq. 3) and their measures (Sec. 4.5, Tab. 10)


def heatmap_to_box(heat, threshold=THRESHOLD):
    """f_orm of Eq. 3: the outer rectangle of all pixels at or above the threshold.

    heat (H, W) in [0, 1] -> (left, top, right, bottom), or None where no pixel is.
    """
    rows, columns = torch.nonzero(heat >= threshold, as_tuple=True)
    if not len(rows):
        return None
    left, right = columns.min().item(), columns.max().item() + 1
    top, bottom = rows.min().item(), rows.max().item() + 1
    return left, top, right, bottom


def box_iou(a, b):
    """Intersection over union of two boxes; 0 where either is None."""
    if a is None or b is None:
        return 0.0
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    intersection = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return float(intersection / (area_a + area_b - intersection))


def pearson(x, y):
    """Pearson's correlation coefficient (PCC); NaN for under two pairs or a constant side."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])


# ---- Boxes of a split


def heat_size(image_size):
    """The (H, W) on which an image is localized: its own, or that of `LONGEST_SIDE`."""
    scale = min(1, LONGEST_SIDE / max(image_size))
    return tuple(max(1, round(scale * n)) for n in image_size)


def to_host(model, attributes, responses):
    """Response maps as {attribute: (B, h, w) on the CPU}, with one copy for each scale."""
    found = {}
    for s in range(len(model.strides)):
        here = {j: A for j, A in zip(attributes, responses, strict=True) if model.map_of(j) == s}
        if here:
            found.update(zip(here, torch.stack(list(here.values())).cpu(), strict=True))
    return found


def find_boxes(model, split, output_indices, batches, wanted, args, panels=()):
    """Looks at every image and attribute that has a true box, is predicted, or was asked for.

    Args:
        output_indices: for each attribute of the split the model's outputs that stand for it; of
            several, the one with the highest logit on the image gives the heat map.
        wanted: indices of the split's attributes.
        args: `device`, `cam`, `threshold` (a list) and `attributes` (the names asked for) count.
        panels: indices of the images whose heat maps are kept, at a panel's size.
    Returns:
        Probabilities (N, L), and one record per image and attribute looked at.
    """
    cam = {"grad-cam": grad_cam, "grad-cam-p": grad_cam_p}[args.cam]
    own = sorted({j for k in wanted for j in output_indices[k]})
    probabilities, records, started = [], [], time.time()
    for images, _, keypoints, index in batches:
        images = images.to(args.device, memory_format=torch.channels_last)
        logits, responses = response_maps(model, images, own, keypoints.to(args.device), cam)
        logits, responses = logits.float().cpu(), to_host(model, own, responses)
        probability = data.max_over_outputs(logits, output_indices).sigmoid()
        probabilities.append(probability)
        for b, i in enumerate(index.tolist()):
            size = data.image_size(split.images[i])
            for k in wanted:
                truth = true_box(split, i, k)
                if truth is None and probability[b, k] <= 0.5 and not args.attributes:
                    continue
                j = output_indices[k][logits[b, output_indices[k]].argmax()]
                place = model.strides[model.map_of(j)], model.patches, images.shape[2:]
                heat = to_image(responses[j][b], *place, heat_size(size))
                record = make_record(heat, size, truth, args.threshold)
                record.update(image=i, attribute=k, probability=probability[b, k].item())
                if i in panels:
                    tile = F.interpolate(heat[None, None], tile_size(size), mode="bilinear")
                    record["heat"] = tile[0, 0].numpy()
                records.append(record)
        done = index[-1].item() + 1
        data.show_progress(f"{done}/{len(split.names)} images", done, len(split.names), started)
    return torch.cat(probabilities), records


def true_box(split, i, k):
    """The true box of an image and attribute as a list, or None."""
    if split.boxes is None or not np.isfinite(split.boxes[i, k, 0]):
        return None
    return split.boxes[i, k].tolist()


def make_record(heat, size, truth, thresholds):
    """A heat map's box at each threshold, in image pixels, and their IoU with the true box."""
    ratios = [size[1] / heat.shape[1], size[0] / heat.shape[0]] * 2
    record = {"boxes": [], "true_box": truth}
    for threshold in thresholds:
        box = heatmap_to_box(heat, threshold)
        if box is not None:
            box = [v * ratio for v, ratio in zip(box, ratios, strict=True)]
        record["boxes"].append(box)
    if truth is not None:
        record["IoU"] = [box_iou(box, truth) for box in record["boxes"]]
    return record


def tabulate(split, records, thresholds):
    """Tab. 10: per attribute the boxes, mean IoU and PCC of IoU and probability, for people too.

    At the first threshold; the mean IoU over attributes at each of them.
    """
    rows, by_threshold = [], []
    for k in sorted({r["attribute"] for r in records if "IoU" in r}):
        found = [r for r in records if r["attribute"] == k and "IoU" in r]
        ious = np.array([r["IoU"] for r in found])  # (boxes, thresholds)
        pcc = pearson(ious[:, 0], [r["probability"] for r in found])
        iou = float(ious[:, 0].mean())
        named = {"attribute": split.attributes[k], "boxes": len(found)}
        rows.append({**named, "IoU": iou, "PCC": pcc})
        by_threshold.append(ious.mean(0))
    by_threshold = np.mean(by_threshold, 0).tolist()
    pccs = [row["PCC"] for row in rows if not np.isnan(row["PCC"])]
    average = {"IoU": by_threshold[0], "PCC": float(np.mean(pccs)) if pccs else float("nan")}
    total = {"attribute": "average", "boxes": sum(row["boxes"] for row in rows), **average}
    lines = [f"{'attribute':20} {'boxes':>6} {'IoU':>6} {'PCC':>6}"]
    for row in (*rows, total):
        start = f"{row['attribute']:20} {row['boxes']:6}"
        lines.append(f"{start} {row['IoU']:6.3f} {row['PCC']:6.2f}")
    if len(thresholds) > 1:
        pairs = zip(thresholds, by_threshold, strict=True)
        lines.append("mean IoU by threshold: " + "  ".join(f"{t:g}: {v:.3f}" for t, v in pairs))
    scores = {"attributes": rows, "average": average, "IoU_by_threshold": by_threshold}
    return scores, lines


# ---- Panels (Fig. 7 and 8)


def tile_size(image_size):
    """The (H, W) of an image's tiles."""
    scale = min(TILE / image_size[1], 4 * TILE / image_size[0])
    return tuple(max(1, round(scale * n)) for n in image_size)


def colour_map(heat):
    """(H, W) in [0, 1] -> (H, W, 3) in 0..255: blue, cyan, yellow, red."""
    stops = np.array([[0, 0, 128], [0, 96, 255], [64, 255, 192], [255, 224, 0], [255, 0, 0]])
    places = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(heat, places, stops[:, c]) for c in range(3)], -1)


def panel(image, rows):
    """A picture as in Fig. 7: in each row the image, then heat maps over it with their boxes.

    Args:
        image: (3, H, W) uint8.
        rows: lists of (caption, record); a record has "heat" at `tile_size`, "boxes", of which the
            first is drawn in red, and "true_box", drawn in green.
    """
    size = image.shape[1:]
    height, width = tile_size(size)
    small = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((width, height))
    font, line = ImageFont.load_default(size=TILE // 12), TILE // 9
    step_x, step_y = TILE + 4, height + 2 * line
    columns = 1 + max((len(row) for row in rows), default=0)
    out = Image.new("RGB", (step_x * columns - 4, step_y * max(1, len(rows))), "white")
    for y, row in enumerate(rows or [[]]):
        out.paste(small, (0, y * step_y))
        for x, (caption, record) in enumerate(row, 1):
            blend = 0.5 * np.asarray(small) + 0.5 * colour_map(record["heat"])
            tile = Image.fromarray(blend.astype(np.uint8))
            draw = ImageDraw.Draw(tile)
            outlines = (record["true_box"], (0, 220, 0)), (record["boxes"][0], (255, 0, 0))
            for box, colour in outlines:
                if box is not None:
                    left, right = box[0] * width / size[1], box[2] * width / size[1] - 1
                    top, bottom = box[1] * height / size[0], box[3] * height / size[0] - 1
                    edges = [left, top, max(left, right), max(top, bottom)]
                    draw.rectangle(edges, outline=colour, width=2)
            out.paste(tile, (x * step_x, y * step_y))
            place = (x * step_x + 2, y * step_y + height)
            ImageDraw.Draw(out).multiline_text(place, caption, fill="black", font=font, spacing=1)
    return out


def panel_rows(i, splits, names, all_records):
    """The tiles of image i: of one model its attributes in a row, of several a row per attribute,
    with a tile per model."""
    by_attribute = {}
    runs = zip(splits, names, all_records, strict=True)
    for split, name, records in runs:
        for record in (r for r in records if r["image"] == i):
            attribute = split.attributes[record["attribute"]]
            title = attribute if len(splits) == 1 else f"{name} {attribute}"
            caption = f"{title}\np {record['probability']:.2f}"
            if "IoU" in record:
                caption += f"  IoU {record['IoU'][0]:.2f}"
            by_attribute.setdefault(attribute, []).append((caption, record))
    if len(splits) > 1:
        return list(by_attribute.values())
    return [[tile for tiles in by_attribute.values() for tile in tiles]]


def panel_files(names):
    """A file name for each image, no two alike."""
    files, taken = [], set()
    for i, name in enumerate(names):
        stem = Path(name).stem
        while stem in taken:
            stem = f"{i}-{stem}"
        taken.add(stem)
        files.append(f"{stem}.png")
    return files


# ---- The command


def chosen_attributes(names, attributes):
    """The indices of named attributes, upper and lower case alike; all where none is named."""
    index = {name.lower(): j for j, name in enumerate(attributes)}
    for name in names or ():
        if name.lower() not in index:
            raise ValueError(f"--attributes {name}: expected some of {', '.join(attributes)}")
    return sorted({index[name.lower()] for name in names}) if names else list(index.values())


def open_images(args, config, paths):
    """The photos at `paths`, or the split that the arguments ask for, with output indices."""
    if not paths:
        return evaluate.open_evaluation(args, config)
    split = data.photo_split(paths, config["attributes"], config["groups"], args.keypoints)
    if config["ple"] == "K" and split.keypoints is None:
        raise ValueError(f"{paths[0]}: PLE-K needs keypoints, give --keypoints FILE")
    return split, [[j] for j in range(len(config["attributes"]))]


def describe(config, split, probabilities, records, args, paths):
    """The result of one model as a dict for JSON, and its lines for people."""
    result = {"config": evaluate.settings(config), "cam": args.cam, "thresholds": args.threshold}
    result.update(split=split.name, **evaluate.provenance())
    lines = []
    if paths:
        wanted = chosen_attributes(args.attributes, split.attributes)
        for file, row in zip(split.images, probabilities, strict=True):
            found = [j for j in wanted if row[j] > 0.5 or args.attributes]
            found.sort(key=lambda j: -row[j])
            text = ", ".join(f"{split.attributes[j]} {row[j]:.2f}" for j in found)
            lines.append(f"{file}: {text}")
    if any("IoU" in record for record in records):
        scores, table = tabulate(split, records, args.threshold)
        result.update(scores)
        lines += [f"{split.name}, {args.cam}, threshold {args.threshold[0]:g}", *table]
    result["records"] = []
    for record in records:
        named = {"image": split.names[record["image"]]}
        named["attribute"] = split.attributes[record["attribute"]]
        kept = {k: v for k, v in record.items() if k not in ("heat", "image", "attribute")}
        result["records"].append({**named, **kept})
    return result, lines


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help="checkpoints (.pt), then images or folders")
    evaluate.add_data_arguments(parser)
    wanted = "attributes to look at (default: those that are predicted or have a true box)"
    add("--attributes", nargs="+", metavar="NAME", help=wanted)
    cams = ["grad-cam-p", "grad-cam"]
    add("--cam", default=cams[0], choices=cams, help="Eq. 13 (default), or the original Grad-CAM")
    share = f"share of the heat map's maximum at which a box begins (default {THRESHOLD})"
    add("--threshold", type=float, nargs="+", default=[THRESHOLD], help=share)
    add("--panels", type=int, help="how many images to draw (default: 20, or all that are named)")
    add("--out", help="folder for the panels (default: panels/ beside the first checkpoint)")
    add("--json", help="write boxes and scores to this file as well")
    args = parser.parse_intermixed_args()  # options may stand before the paths
    data.check_lowest(args, panels=0)
    for threshold in args.threshold:
        if not 0 < threshold <= 1:
            raise ValueError(f"--threshold {threshold}: expected more than 0, at most 1")
    args.checkpoints = [name for name in args.inputs if name.endswith(".pt")]
    args.paths = [name for name in args.inputs if not name.endswith(".pt")]
    if not args.checkpoints:
        raise ValueError(f"{args.inputs[0]}: expected a checkpoint, whose name ends in .pt")
    return args


def images_to_draw(split, wanted, args):
    """The indices of the images that get a panel: where attributes are named, those that have
    them."""
    count = args.panels
    if count is None:
        count = len(split.names) if args.paths else 20
    candidates = range(len(split.names))
    if args.attributes and split.boxes is not None:
        has = np.isfinite(split.boxes[:, wanted, 0]).any(1)
        candidates = np.flatnonzero(has).tolist()
    return list(candidates)[:count]


def main():
    args = parse_arguments()
    args.device = data.set_up_device(args.device)
    splits, names, all_records, results, panels = [], [], [], [], None
    for file in args.checkpoints:
        model, config = evaluate.load_model(file, args.device)
        split, output_indices = open_images(args, config, args.paths)
        if splits and split.names != splits[0].names:
            raise ValueError(f"{file}: sees other images than {args.checkpoints[0]}")
        wanted = chosen_attributes(args.attributes, split.attributes)
        panels = images_to_draw(split, wanted, args) if panels is None else panels
        workers = {"workers": args.workers, "device": args.device}
        batches = data.loader(split, config["size"], args.batch_size, **workers)
        found = find_boxes(model, split, output_indices, batches, wanted, args, set(panels))
        result, lines = describe(config, split, *found, args, args.paths)
        print("\n".join([f"{file}:", *lines] if len(args.checkpoints) > 1 else lines))
        results.append({"checkpoint": file, **result})
        splits.append(split)
        names.append(evaluate.model_name(config["ple"]))
        all_records.append(found[1])
    if panels:
        out = Path(args.out or Path(args.checkpoints[0]).parent / "panels")
        out.mkdir(parents=True, exist_ok=True)
        files = panel_files(splits[0].names)
        for i in panels:
            image = data.read_image(splits[0].images[i])
            panel(image, panel_rows(i, splits, names, all_records)).save(out / files[i])
        print(f"{len(panels)} panels in {out}")
    if args.json:
        data.write_json(args.json, results[0] if len(results) == 1 else results)


if __name__ == "__main__":
    data.command(main)
