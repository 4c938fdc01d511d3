"""Recognition metrics: Eq. 14's mean accuracy and the instance metrics of Sec. 4.1, over a split.

    python evaluate.py runs/synthetic-S/best.pt
    python evaluate.py CHECKPOINT --dataset pa100k --data FOLDER --split test --json FILE
    python evaluate.py CHECKPOINT --dataset rap1 --data FOLDER       a model of another dataset: the shared attributes (Tab. 7-9)
    python evaluate.py --compare A.json B.json ...                   results side by side, with the difference to the first
    python evaluate.py --profile                                     parameters, GFLOPs and speed (Tab. 3)

Also holds what every user of a checkpoint needs: `build_model`, `load_model`, `predict`.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from data import PA100K_GROUPS, PARTS, add_dataset_arguments, command, join_columns, load_table, loader, shared_attributes, show_progress, write_json
from sspnet import GROUPS, SCALES, Baseline, SSPNet, label_counts, mean_accuracy

METRICS = ("mA", "Accu", "Prec", "Rec", "F1")
SOURCE = ("dataset", "data", "keypoints", "partition", "exclude", "domain")  # where images come from, in arguments and configs


def metrics(logits, labels):
    """The paper's five metrics, in percent, at threshold 0.5 on the probability.

    mA is the mean over attributes of Eq. 14's label mA, without the attributes that lack positives or negatives.
    Accu, Prec and Rec are means over images of |both| / |either|, |both| / |predicted| and |both| / |true|, 0 where
    nothing is counted; F1 is that of the mean Prec and mean Rec, as the field computes it.

    Args:
        logits, labels: (N, L).
    Returns:
        dict of the five floats, "label_mA": L floats (NaN where undefined), "undefined": how many are.
    """
    label_mA = 100 * mean_accuracy(label_counts(logits, labels))  # (L,)
    predicted, true = (logits > 0).float(), (labels > 0.5).float()
    both, predictions, positives = ((predicted * true).sum(1).double(), predicted.sum(1).double(), true.sum(1).double())  # (N,)
    accu = (both / (predictions + positives - both).clamp(min=1)).mean()
    prec = (both / predictions.clamp(min=1)).mean()
    rec = (both / positives.clamp(min=1)).mean()
    f1 = 2 * prec * rec / (prec + rec).clamp(min=1e-20)
    values = (label_mA.nanmean(), 100 * accu, 100 * prec, 100 * rec, 100 * f1)
    return dict(zip(METRICS, (v.item() for v in values)), label_mA=label_mA.tolist(), undefined=int(label_mA.isnan().sum()))


def group_means(values, groups):
    """The mean over each group's attributes, undefined ones left out: {group: float} for groups that have any."""
    values = torch.as_tensor(values)
    return {g: values[[j for j, name in enumerate(groups) if name == g]].nanmean().item() for g in GROUPS if g in groups}


def autocast(device, amp):
    """The context for automatic mixed precision: amp is None, "bf16" or "fp16"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


@torch.inference_mode()
def predict(model, batches, device="cpu", amp=None, progress=False):
    """Runs the model in evaluation mode over a loader: logits (N, L) and labels (N, L), in the loader's order."""
    model.eval()
    logits, labels, started = [], [], time.time()
    for step, (images, truth, keypoints, _) in enumerate(batches):
        images = images.to(device, non_blocking=True).to(memory_format=torch.channels_last)
        with autocast(device, amp):
            logits.append(model(images, keypoints.to(device, non_blocking=True)).float())
        labels.append(truth)
        if progress:
            show_progress(f"batch {step + 1}/{len(batches)}", step + 1, len(batches), started)
    return torch.cat(logits).cpu(), torch.cat(labels)


def build_model(config, weights=None):
    """The model that a training's config describes, with the backbone's `weights` (see `Backbone`)."""
    if config["ple"] == "none":
        return Baseline(config["groups"], config["backbone"], weights)
    return SSPNet(config["groups"], config["ple"], config["backbone"], weights, config["afss"], config["M"],
                  config["ratio"], config["offsets"], config["prior"], config["channels"])


def model_name(ple):
    """What people call the model with the given PLE."""
    return "baseline" if ple == "none" else f"SSPNet-{ple}"


def settings(config):
    """A config without its lists of attributes and groups, for results."""
    return {k: v for k, v in config.items() if k not in ("attributes", "groups")}


def read_checkpoint(file):
    """A checkpoint's dict; nothing in the file is executed."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which are refused below or not at all
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip reader and the restricted unpickler raise many kinds
        reason = str(error).strip().splitlines()
        raise ValueError(f"{file}: not a readable checkpoint ({reason[0] if reason else error!r})") from None
    if not isinstance(checkpoint, dict) or not {"config", "ema"} <= checkpoint.keys():
        raise ValueError(f"{file}: not a checkpoint of train.py, expected config and ema in it")
    return checkpoint


def load_model(file, device="cpu"):
    """The trained model (its averaged weights) in evaluation mode, and its config."""
    checkpoint = read_checkpoint(file)
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["ema"])
    except KeyError as error:
        raise ValueError(f"{file}: its config has no {error}") from None
    except (RuntimeError, TypeError, ValueError) as error:  # load_state_dict's first line is a heading, its second the first difference
        raise ValueError(f"{file}: {' '.join(line.strip() for line in str(error).splitlines()[:2])}") from None
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["config"]


def add_data_arguments(parser, split="test"):
    """The arguments with which a command names a split and a device; what is left out comes from the checkpoint."""
    add_dataset_arguments(parser)
    parser.add_argument("--split", default=split, choices=PARTS)
    parser.add_argument("--keypoints", help="keypoint file (.npz) for PLE-K")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def open_table(args, config):
    """The table of the split that the arguments ask for, with the model's columns for each of its attributes.

    The dataset that the model was trained on, and its files, unless the arguments name another; of another dataset the
    shared attributes (see `shared_attributes`).
    """
    source = {key: getattr(args, key) for key in SOURCE}
    source["dataset"] = source["dataset"] or config["dataset"]
    if source["dataset"] == config["dataset"]:  # another dataset's files are not to be found at the trained one's place
        source = {key: config.get(key) if value is None else value for key, value in source.items()}
    table = open_dataset(config["ple"], source, args.split, config["size"], args.images)
    return shared_attributes(config["dataset"], config["attributes"], source["dataset"], table)


def open_dataset(ple, source, split, size, images=None):
    """The table of a split for a model with the given PLE; `source` has the keys `SOURCE`."""
    drawing = {"size": size, "domain": source["domain"] or 0, "count": images} if source["dataset"] == "synthetic" else {}
    table = load_table(**{key: source[key] for key in SOURCE if key != "domain"}, split=split, **drawing)
    if ple == "K" and table.keypoints is None:
        raise ValueError(f"{table.name}: PLE-K needs keypoints, give --keypoints FILE")
    return table


def report(table, logits, labels, scales=None):
    """The metrics of a split as a dict for JSON, and as lines for people."""
    result = metrics(logits, labels)
    label_mA = result.pop("label_mA")
    positives = labels.sum(0).int().tolist()
    rows = [{"attribute": a, "group": g, "mA": m, "positives": p, "scale": scales[j] if scales else None}
            for j, (a, g, m, p) in enumerate(zip(table.attributes, table.groups, label_mA, positives))]
    result.update(split=table.name, images=len(labels), groups=group_means(label_mA, table.groups), attributes=rows)
    lines = [f"{table.name}: {len(labels)} images", "", f"{'attribute':20} {'group':7} {'mA':>6} {'positives':>9}  scale"]
    for row in rows:
        mA = "undefined" if row["mA"] != row["mA"] else f"{row['mA']:.2f}"
        lines.append(f"{row['attribute']:20} {row['group']:7} {mA:>6} {row['positives']:9}  {row['scale'] or '-'}")
    lines += ["", "  ".join(f"{g} {m:.2f}" for g, m in result["groups"].items())]
    lines.append("  ".join(f"{name} {result[name]:.2f}" for name in METRICS))
    if result["undefined"]:
        lines.append(f"{result['undefined']} attributes have no positives or no negatives here: undefined, left out of mA")
    return result, lines


def compare(files):
    """Results of evaluate.py or localize.py side by side, as in Tab. 7 and 10: lines for people.

    A column per configuration: the mean over its files (its seeds) with their standard deviation, and in brackets the
    difference to the first column. Rows: the attributes that all files have, the groups, the totals.
    """
    columns = {}
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            result = json.loads(Path(file).read_text())
            config = {"ple": result["config"]["ple"], **{k: v for k, v in result["config"].items() if k != "seed" and v is not None}, "on": result["split"]}
            measures = [m for m in ("mA", "IoU", "PCC") if m in result["attributes"][0]]
            totals = {m: result.get("average", result)[m] for m in (METRICS if measures == ["mA"] else measures)}
            figures = {(row["attribute"], m): row[m] for row in result["attributes"] for m in measures}
            figures.update({(f"group {group}", "mA"): v for group, v in result.get("groups", {}).items()})
            figures.update({("average" if len(measures) > 1 or m == "mA" else "", m): v for m, v in totals.items()})
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a result of evaluate.py or localize.py --json ({error!r})") from None
        columns.setdefault(json.dumps(config, sort_keys=True), (config, []))[1].append(figures)
    columns = list(columns.values())
    differing = [k for k in {k: None for config, _ in columns for k in config} if len({json.dumps(config.get(k)) for config, _ in columns}) > 1]

    def heading(config):
        """What tells the configuration from the others; of a switch, only that it is off; of the baseline, nothing it does not have."""
        absent = ("afss", "M", "ratio", "offsets", "prior") if config["ple"] == "none" else ()
        words = [model_name(v) if k == "ple" else f"no {k}" if v is False else f"{k} {v}" for k, v in config.items()
                 if k in differing and k not in absent and v is not True]
        return " ".join(words) or model_name(config["ple"])

    heads = [heading(config) for config, _ in columns]
    width = max(26, *(len(head) + 2 for head in heads))
    shared = [key for key in columns[0][1][0] if all(key in figures for _, runs in columns for figures in runs)]
    lines, first = [f"{'':28}" + "".join(f"{head:>{width}}" for head in heads)], {}
    for name, measure in shared:
        line, digits = f"{name:20} {measure:7}", 2 if measure in METRICS else 3
        for config, runs in columns:
            values = [figures[name, measure] for figures in runs if figures[name, measure] is not None]  # null: undefined
            mean = statistics.mean(values) if values else float("nan")
            cell = f"{mean:.{digits}f}" + (f"±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")
            cell += f" ({mean - first[name, measure]:+.{digits}f})" if (name, measure) in first else ""
            first.setdefault((name, measure), mean)
            line += f"{cell:>{width}}"
        lines.append(line)
    return lines + [f"{'runs':28}" + "".join(f"{len(runs):{width}}" for _, runs in columns)]


# Tab. 3: millions of parameters, GFLOPs, images/s.
TAB_3 = {
    ("none", "resnet50"): (23.56, 2.69, 24), ("none", "swin_s"): (48.86, 7.74, 15), ("R", "resnet50"): (24.73, 2.92, 23),
    ("K", "resnet50"): (26.27, 3.31, 19), ("S", "resnet50"): (26.30, 3.32, 21), ("R", "swin_s"): (49.96, 8.13, 15),
    ("K", "swin_s"): (52.43, 8.65, 11), ("S", "swin_s"): (52.44, 8.65, 12),
}
TAB_3_SCALES = {"head": 0, "torso": 1, "bottom": 1, "all": 2}  # what AFSS chose in the paper (Sec. 4.2)
JOINT_HEIGHTS = [.92, .74, .54, .54, .74, .92, .54, .22, .17, .05, .5, .38, .23, .23, .38, .5]  # of a standing person's MPII points


def profile(device, models=TAB_3, batches=(1, 32), size=(256, 192), rounds=5):
    """Tab. 3's efficiency columns for PA-100K's 26 attributes and the scales that the paper found, from random weights.

    Params in millions; GFLOPs as multiply-adds in convolutions and matrix products, by torch's own counter, at `size` and at
    256x128; images/s in inference, by batch size: the median of `rounds` timings.
    """
    groups, rows = list(PA100K_GROUPS.values()), []
    for done, (ple, backbone) in enumerate(models):
        config = {"ple": ple, "groups": groups, "backbone": backbone, "afss": "group", "M": 3, "ratio": 0.75, "offsets": True, "prior": True, "channels": 256}
        model = build_model(config).to(device, memory_format=torch.channels_last).eval()
        if ple != "none":
            model.afss.selection.copy_(torch.tensor([TAB_3_SCALES[g] for g in groups]))
        row = {"ple": ple, "backbone": backbone, "params": sum(p.numel() for p in model.parameters()) / 1e6, "paper": models[ple, backbone]}

        def inputs(batch, H, W):
            points = torch.tensor([[0.5 * W, share * H] for share in JOINT_HEIGHTS])
            return torch.randn(batch, 3, H, W, device=device).to(memory_format=torch.channels_last), points.expand(batch, 16, 2).to(device)

        with torch.inference_mode():
            for H, W in (size, (256, 128)):
                images, points = inputs(1, H, W)
                with FlopCounterMode(display=False) as counter:
                    model.classify(model.features(images), points)  # the whole maps, however much of them is needed
                row[f"gflops_{H}x{W}"] = counter.get_total_flops() / 2e9
            for batch in batches:
                images, points = inputs(batch, *size)
                seconds = []
                for _ in range(rounds + 1):
                    started = time.perf_counter()
                    model(images, points).cpu()  # waits for the device
                    seconds.append(time.perf_counter() - started)
                row[f"images_per_second_{batch}"] = batch / statistics.median(seconds[1:])
        rows.append(row)
        print(f"{done + 1}/{len(models)} models", end="\r", file=sys.stderr)
    keys = [key for key in rows[0] if key not in ("ple", "backbone", "params", "paper")]
    lines = [f"{'':22}{'params (paper)':>20}" + "".join(f"{key.replace('_', ' '):>24}" for key in keys) + "   paper: GFLOPs, images/s"]
    for row in rows:
        name = f"{model_name(row['ple'])} {row['backbone']}"
        parameters = f"{row['params']:.2f} ({row['paper'][0]:.2f})"
        lines.append(f"{name:22}{parameters:>20}" + "".join(f"{row[key]:24.2f}" for key in keys) + f"   {row['paper'][1]:.2f}, {row['paper'][2]}")
    return rows, lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="best.pt or last.pt of a training")
    add_data_arguments(parser)
    parser.add_argument("--json", help="write the result to this file as well")
    parser.add_argument("--compare", nargs="+", metavar="JSON", help="compare results written by --json, here or of localize.py")
    parser.add_argument("--profile", action="store_true", help="parameters, GFLOPs and speed of the models of Tab. 3")
    args = parser.parse_args()
    if sum((args.checkpoint is not None, args.compare is not None, args.profile)) != 1:
        parser.error("expected a checkpoint, or --compare with results, or --profile")
    if args.compare:
        return print("\n".join(compare(args.compare)))
    if args.profile:
        where = torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
        rows, lines = profile(args.device)
        print(f"{where}, torch {torch.__version__}, float32", *lines, sep="\n")
        return args.json and write_json(args.json, {"device": where, "torch": torch.__version__, "rows": rows})
    model, config = load_model(args.checkpoint, args.device)
    table, columns = open_table(args, config)
    batches = loader(table, config["size"], args.batch_size, workers=args.workers, device=args.device)
    scales = [SCALES[s] for s in model.afss.scales()] if isinstance(model, SSPNet) else None
    logits, labels = predict(model, batches, args.device, progress=True)
    result, lines = report(table, join_columns(logits, columns), labels, scales and ["+".join(sorted({scales[j] for j in own})) for own in columns])
    if len(columns) < len(config["attributes"]):
        print(f"trained on {config['dataset']}, which shares {len(columns)} of its {len(config['attributes'])} attributes; the average is mA")
    print("\n".join(lines))
    if args.json:
        write_json(args.json, {"checkpoint": args.checkpoint, "config": settings(config), **result})


if __name__ == "__main__":
    command(main)
