"""Results side by side: the mean and spread over seeds, and the difference to the first.

    python evaluate.py runs/S-0/best.pt --predictions S-0.npz          # and so for each model
    python tests/compare.py 'none-*.npz' 'R-*.npz' 'S-*.npz'
    python tests/compare.py 'none-*.json' 'S-*.json'                   # localize.py's --json: IoU

Each argument is a file, or a pattern in quotes for the files of one model's seeds. mA and F1 are in
percent, IoU (at the first threshold) from 0 to 1. Brackets hold the 95% interval of a difference,
by a paired bootstrap over images and seeds together: each draw takes the same images for all
models, and for each some of its seeds.
"""

import argparse
import glob
import json

import numpy as np

GROUPS = ("head", "torso", "bottom", "all")


def open_predictions(file):
    """Images and attributes of an .npz; headings; a function from images' weights to figures."""
    archive = np.load(file)
    labels, groups = archive["labels"].astype(float), archive["groups"]
    predicted = (archive["probabilities"] > 0.5).astype(float)
    hits, rejections = labels * predicted, (1 - labels) * (1 - predicted)
    precs = hits.sum(1) / np.maximum(predicted.sum(1), 1)
    recs = hits.sum(1) / np.maximum(labels.sum(1), 1)

    def figures(weights):
        TP, P = weights @ hits, weights @ labels
        TN, N = weights @ rejections, weights.sum() - P
        label_mA = 50 * (TP / P + TN / N)  # NaN without positives or negatives: left out of means
        prec, rec = weights @ precs / weights.sum(), weights @ recs / weights.sum()
        by_group = [np.nanmean(label_mA[groups == g]) for g in GROUPS if g in groups]
        return np.array([np.nanmean(label_mA), 200 * prec * rec / (prec + rec), *by_group])

    same = archive["names"].tolist(), archive["attributes"].tolist()
    return same, ["mA", "F1", *(g for g in GROUPS if g in groups)], figures


def open_boxes(file):
    """The same of a .json of localize.py: the mean over attributes of the mean IoU."""
    with open(file) as opened:
        records = [record for record in json.load(opened)["records"] if "IoU" in record]
    images, attributes = (sorted({r[key] for r in records}) for key in ("image", "attribute"))
    has, ious = np.zeros((2, len(images), len(attributes)))
    for record in records:
        place = images.index(record["image"]), attributes.index(record["attribute"])
        has[place], ious[place] = 1, record["IoU"][0]

    def figures(weights):
        return np.array([np.nanmean(weights @ ious / (weights @ has))])

    return (images, attributes), ["IoU"], figures


def compare(patterns, draws=1000):
    """A line for each pattern, under a heading."""
    models = []
    for pattern in patterns:
        opener = open_boxes if pattern.endswith(".json") else open_predictions
        models.append([opener(file) for file in sorted(glob.glob(pattern))])
        if any(file[0] != models[0][0][0] for file in models[-1]) or not models[-1]:
            raise SystemExit(f"compare.py: {pattern}: no file, or of other images or attributes")
    (images, _), heads, _ = models[0][0]
    digits, rng, samples = 3 if heads == ["IoU"] else 2, np.random.default_rng(0), []

    def of_seeds(seeds, weights):
        return np.array([figures(weights) for _, _, figures in seeds])

    with np.errstate(invalid="ignore"):  # 0 / 0 of what is undefined
        values = [of_seeds(seeds, np.ones(len(images))) for seeds in models]
        for _ in range(draws if len(models) > 1 else 0):
            weights = np.bincount(rng.integers(0, len(images), len(images)), minlength=len(images))
            drawn = [rng.integers(0, len(seeds), len(seeds)) for seeds in models]
            pairs = zip(models, drawn, strict=True)
            samples.append([of_seeds(seeds, weights)[chosen].mean(0) for seeds, chosen in pairs])
    lines = [f"{'':24} seeds" + "".join(f"{head:>40}" for head in heads)]
    for k, (pattern, value) in enumerate(zip(patterns, values, strict=True)):
        cells = [f"{mean:.{digits}f}" for mean in value.mean(0)]
        if len(value) > 1:
            pairs = zip(cells, value.std(0, ddof=1), strict=True)
            cells = [f"{cell} ± {spread:.{digits}f}" for cell, spread in pairs]
        if k > 0:
            difference = value.mean(0) - values[0].mean(0)
            found = np.array(samples)  # (draws, models, figures)
            low, high = np.percentile(found[:, k] - found[:, 0], [2.5, 97.5], axis=0)
            for j, ends in enumerate(zip(difference, low, high, strict=True)):
                cells[j] += " {0:+.{3}f} [{1:+.{3}f}, {2:+.{3}f}]".format(*ends, digits)
        lines.append(f"{pattern:24} {len(value):5}" + "".join(f"{cell:>40}" for cell in cells))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="files of evaluate.py or localize.py")
    print("\n".join(compare(parser.parse_args().results)))
