"""Recognition metrics (Sec. 4.1): Eq. 14's mean accuracy and the instance metrics, over a split.

    python evaluate.py runs/synthetic-S/best.pt
    python evaluate.py CHECKPOINT --dataset pa100k --data FOLDER --split test --json FILE
    python evaluate.py CHECKPOINT --dataset rap1 --data FOLDER    on another dataset (Tab. 7-9)
    python evaluate.py --compare A.json B.json ...                results side by side

Also holds what every user of a checkpoint needs: `load_model`, `predict`.
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torchvision

import data
from sspnet import GROUPS, SCALES, SSPNet, build_model, label_counts, mean_accuracy

METRICS = ("mA", "Accu", "Prec", "Rec", "F1")
MEASURES = ("mA", "IoU", "PCC")  # of an attribute, in results of evaluate.py and localize.py
FORMAT = 2  # of checkpoints; 1 had AFSS's choice in a tensor and two layers that predict offsets


def metrics(logits, labels):
    """The paper's five metrics, in percent, at threshold 0.5 on the probability.

    mA is the mean over attributes of Eq. 14's label mA, without attributes that lack positives or
    negatives. Accu, Prec and Rec are means over images of |both| / |either|, |both| / |predicted|
    and |both| / |true|, 0 where nothing is counted; F1 is that of the mean Prec and the mean Rec,
    as the field computes it.

    Args:
        logits, labels: (N, L).
    Returns:
        A dict of the five floats, "undefined": the number of attributes without a label mA, and
        "label_mA", "TP/P", "TN/N": L floats each, NaN where undefined.
    """
    counts = label_counts(logits, labels)
    TP, P, TN, N = counts
    label_mA = 100 * mean_accuracy(counts)  # (L,)
    predicted, true = (logits > 0).float(), (labels > 0.5).float()
    both = (predicted * true).sum(1).double()  # (N,)
    either = torch.maximum(predicted, true).sum(1)
    accu = (both / either.clamp(min=1)).mean()
    prec = (both / predicted.sum(1).clamp(min=1)).mean()
    rec = (both / true.sum(1).clamp(min=1)).mean()
    f1 = 2 * prec * rec / (prec + rec).clamp(min=1e-20)
    values = torch.stack([label_mA.nanmean(), 100 * accu, 100 * prec, 100 * rec, 100 * f1])
    return {
        **dict(zip(METRICS, values.tolist(), strict=True)),
        "undefined": int(label_mA.isnan().sum()),
        "label_mA": label_mA.tolist(),
        "TP/P": (100 * TP / P).tolist(),
        "TN/N": (100 * TN / N).tolist(),
    }


def group_means(values, groups):
    """The mean over each group's attributes, without undefined ones: {group: float}."""
    values = torch.as_tensor(values)
    means = {}
    for group in (g for g in GROUPS if g in groups):
        members = [j for j, g in enumerate(groups) if g == group]
        means[group] = values[members].nanmean().item()
    return means


def autocast(device, amp):
    """The context for automatic mixed precision: amp is None, "bf16" or "fp16"."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp)
    return torch.autocast(torch.device(device).type, dtype) if dtype else nullcontext()


@torch.inference_mode()
def predict(model, batches, device="cpu", amp=None, progress=False):
    """Logits (N, L) and labels (N, L) of a loader, in its order, from the model in evaluation."""
    model.eval()
    logits, labels, started = [], [], time.time()
    for step, (images, truth, keypoints, _) in enumerate(batches, 1):
        images = images.to(device, non_blocking=True, memory_format=torch.channels_last)
        keypoints = keypoints.to(device, non_blocking=True)
        with autocast(device, amp):
            logits.append(model(images, keypoints).float())
        labels.append(truth)
        if progress:
            data.show_progress(f"batch {step}/{len(batches)}", step, len(batches), started)
    return torch.cat(logits).cpu(), torch.cat(labels)


# ---- Checkpoints


def model_name(ple):
    """What people call the model with the given PLE."""
    return "baseline" if ple == "none" else f"SSPNet-{ple}"


def provenance():
    """What made a file: the command, the versions of what it ran on, and of a checkpoint's form."""
    versions = {"torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}
    return {"command": " ".join(sys.argv), "format": FORMAT, **versions}


def settings(config):
    """A config without what follows from the dataset, for results."""
    return {k: v for k, v in config.items() if k not in ("attributes", "groups", "digest")}


def check_config(config, file):
    """Refuses a config that does not describe a model and its dataset."""
    kinds = {"ple": str, "dataset": str, "backbone": str, "afss": str, "M": int, "ratio": float}
    kinds.update(offsets=bool, prior=bool, channels=int, size=list, attributes=list, groups=list)
    for key, kind in kinds.items():
        if not isinstance(config, dict) or not isinstance(config.get(key), kind):
            raise ValueError(f"{file}: its config has no {key!r}, expected a {kind.__name__}")
    sizes = [config["M"], config["channels"], *config["size"]]
    if len(sizes) != 4 or not all(isinstance(n, int) and 1 <= n <= 4096 for n in sizes):
        raise ValueError(f"{file}: its M, channels and size are {sizes}, expected 1 to 4096")
    if len(config["attributes"]) != len(config["groups"]):
        raise ValueError(f"{file}: its attributes and groups differ in number")


def read_checkpoint(file):
    """A checkpoint of train.py as a dict; nothing in the file is executed."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles, which are refused or harmless
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # the zip reader and the restricted unpickler raise many kinds
        raise ValueError(f"{file}: not a readable checkpoint") from None
    if not isinstance(checkpoint, dict) or not {"config", "ema"} <= checkpoint.keys():
        raise ValueError(f"{file}: not a checkpoint of train.py, expected config and ema in it")
    if checkpoint.get("format") != FORMAT:
        found = checkpoint.get("format", 1)
        raise ValueError(
            f"{file}: written by another version of this code (format {found}, expected {FORMAT}): "
            "train again"
        )
    check_config(checkpoint["config"], file)
    return checkpoint


def load_model(file, device="cpu"):
    """The trained model (its averaged weights) in evaluation mode, and its config."""
    checkpoint = read_checkpoint(file)
    try:
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["ema"])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        # load_state_dict's first line is a heading, its second the first difference
        lines = [line.strip() for line in str(error).splitlines()[:2]]
        raise ValueError(f"{file}: {' '.join(lines)}") from None
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not tensor.isfinite().all():
            raise ValueError(f"{file}: {name} has values that are not finite")
    return model.to(device, memory_format=torch.channels_last).eval(), checkpoint["config"]


def add_data_arguments(parser):
    """What names a split and a device; what is left out comes from the checkpoint."""
    data.add_dataset_arguments(parser)
    parser.add_argument("--split", default="test", choices=data.PARTS, help="default: test")
    data.add_loading_arguments(parser)


def open_evaluation(args, config):
    """The split that the arguments ask for, with the model's output indices for each attribute.

    By default the dataset that the model was trained on, with its files. Of another dataset the
    shared attributes, see `data.shared_attributes`.
    """
    source = {key: getattr(args, key) for key in data.DATA_KEYS}
    source["dataset"] = source["dataset"] or config["dataset"]
    same = source["dataset"] == config["dataset"] and source["data"] in (None, config.get("data"))
    if same:  # another folder has other keypoints, even where the names are alike
        source = {k: config.get(k) if value is None else value for k, value in source.items()}
    source.update(ple=config["ple"], size=config["size"], images=args.images)
    split = data.open_split(source, args.split)
    known = config["dataset"], config["attributes"]
    return data.shared_attributes(*known, source["dataset"], split)


# ---- Results


def report(split, logits, labels, scales=None):
    """The metrics of a split as a dict for JSON, and as lines for people.

    scales: the name of each attribute's scale, or None.
    """
    result = metrics(logits, labels)
    rows = []
    for j, attribute in enumerate(split.attributes):
        row = {"attribute": attribute, "group": split.groups[j], "mA": result["label_mA"][j]}
        row.update({key: result[key][j] for key in ("TP/P", "TN/N")})
        row.update(positives=int(labels[:, j].sum()), scale=scales[j] if scales else None)
        rows.append(row)
    result["groups"] = group_means(result["label_mA"], split.groups)
    for key in ("label_mA", "TP/P", "TN/N"):
        del result[key]
    result.update(split=split.name, images=len(labels), attributes=rows)
    lines = [f"{split.name}: {len(labels)} images", ""]
    lines.append(f"{'attribute':20} {'group':7} {'mA':>9} {'positives':>9}  scale")
    for row in rows:
        mA = "undefined" if math.isnan(row["mA"]) else f"{row['mA']:.2f}"
        start = f"{row['attribute']:20} {row['group']:7} {mA:>9}"
        lines.append(f"{start} {row['positives']:9}  {row['scale'] or '-'}")
    lines += ["", "  ".join(f"{group} {mA:.2f}" for group, mA in result["groups"].items())]
    lines.append("  ".join(f"{name} {result[name]:.2f}" for name in METRICS))
    if result["undefined"]:
        lines.append(
            f"{result['undefined']} attributes have no positives or no negatives here: undefined, "
            "left out of mA"
        )
    return result, lines


def read_result(file):
    """A result of --json: its config without the seed, and {(row, measure): figure or None}."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        result = json.loads(Path(file).read_text(encoding="utf-8"))
        config = {k: v for k, v in result["config"].items() if k != "seed" and v is not None}
        config = {"ple": config["ple"], **config, "on": result["split"]}
        measures = [m for m in MEASURES if m in result["attributes"][0]]
        figures = {(row["attribute"], m): row[m] for row in result["attributes"] for m in measures}
        for group, mA in result.get("groups", {}).items():
            figures[f"group {group}", "mA"] = mA
        totals = result.get("average", result)
        for m in METRICS if measures == ["mA"] else measures:
            figures["average" if m in MEASURES else "", m] = totals[m]
        if not all(v is None or math.isfinite(v) for v in figures.values()):
            raise ValueError("a figure is not finite")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error)[:80]}"
        raise ValueError(
            f"{file}: not a result of evaluate.py or localize.py --json ({reason})"
        ) from None
    return config, figures


def heading(config, differing):
    """What tells a configuration from the others; of a switch, only that it is off."""
    absent = ("afss", "M", "ratio", "offsets", "prior") if config["ple"] == "none" else ()
    words = []
    for key in differing:
        value = config.get(key)
        if key in absent or value is True or value is None:
            continue
        word = f"no {key}" if value is False else f"{key} {value}"
        words.append(model_name(value) if key == "ple" else word)
    return " ".join(words) or model_name(config["ple"])


def compare(files):
    """Results of evaluate.py or localize.py side by side, as in Tab. 7 and 10: lines for people.

    A column per configuration: the mean over its files (its seeds) with their standard deviation,
    and in brackets the difference to the first column. Rows: what all files have.
    """
    columns = {}  # config as text -> (config, the figures of each file)
    for file in files:
        config, figures = read_result(file)
        key = json.dumps(config, sort_keys=True)
        columns.setdefault(key, (config, []))[1].append(figures)
    columns = list(columns.values())
    keys = dict.fromkeys(key for config, _ in columns for key in config)
    differing = []
    for key in keys:
        if len({json.dumps(config.get(key)) for config, _ in columns}) > 1:
            differing.append(key)
    runs = [figures for _, many in columns for figures in many]
    shared = [key for key in runs[0] if all(key in figures for figures in runs)]
    if not shared:
        raise ValueError(f"{', '.join(map(str, files))}: these results have no figure in common")
    heads = [heading(config, differing) for config, _ in columns]
    width = max(26, *(len(head) + 2 for head in heads))
    lines = [f"{'':28}" + "".join(f"{head:>{width}}" for head in heads)]
    for name, measure in shared:
        digits = 2 if measure in METRICS else 3
        cells, first = [], None
        for _, many in columns:
            values = [f[name, measure] for f in many if f[name, measure] is not None]
            mean = statistics.mean(values) if values else math.nan  # null: undefined
            cell = f"{mean:.{digits}f}"
            if len(values) > 1:
                cell += f"±{statistics.stdev(values):.{digits}f}"
            if first is not None:
                cell += f" ({mean - first:+.{digits}f})"
            first = mean if first is None else first
            cells.append(f"{cell:>{width}}")
        lines.append(f"{name:20} {measure:7}" + "".join(cells))
    return [*lines, f"{'runs':28}" + "".join(f"{len(many):{width}}" for _, many in columns)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", help="the best.pt or last.pt of a training")
    add_data_arguments(parser)
    add("--json", help="write the result to this file as well")
    add("--predictions", metavar="NPZ", help="write labels and probabilities to this file")
    add("--compare", nargs="+", metavar="JSON", help="print results of --json side by side")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.compare is None):
        parser.error("expected a checkpoint, or --compare with results")
    if args.compare:
        print("\n".join(compare(args.compare)))
        return
    data.check_lowest(args)
    args.device = data.set_up_device(args.device)
    model, config = load_model(args.checkpoint, args.device)
    split, output_indices = open_evaluation(args, config)
    workers = {"workers": args.workers, "device": args.device}
    batches = data.loader(split, config["size"], args.batch_size, **workers)
    logits, labels = predict(model, batches, args.device, progress=True)
    logits, scales = data.max_over_outputs(logits, output_indices), None
    if isinstance(model, SSPNet):
        chosen = [sorted({SCALES[model.afss.scales[j]] for j in own}) for own in output_indices]
        scales = ["+".join(names) for names in chosen]
    result, lines = report(split, logits, labels, scales)
    if len(output_indices) < len(config["attributes"]):
        shares = f"{len(output_indices)} of its {len(config['attributes'])} attributes"
        print(f"trained on {config['dataset']}, which shares {shares}; the average is mA")
    print("\n".join(lines))
    if args.predictions:
        known = {"names": split.names, "attributes": split.attributes, "labels": labels}
        data.write_npz(Path(args.predictions), **known, probabilities=logits.sigmoid())
    if args.json:
        about = {"checkpoint": args.checkpoint, "config": settings(config), **provenance()}
        data.write_json(args.json, {**about, **result})


if __name__ == "__main__":
    data.command(main)
