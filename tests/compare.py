"""Results side by side: the mean and spread over seeds, and the difference to the first.

    python evaluate.py runs/S-0/best.pt --predictions S-0.npz          # and so for each model
    python tests/compare.py 'none-*.npz' 'R-*.npz' 'S-*.npz'
    python tests/compare.py 'none-*.json' 'S-*.json'                   # localize.py's --json: IoU

Each argument is a file, or a pattern in quotes for the files of one model's seeds. mA and F1 are in
percent, IoU and PCC are those of true boxes, IoU at each threshold, PCC at the first; "p > 0.5":
of the boxes whose attribute is predicted. Brackets hold the 95% interval of a difference, over
images (a paired bootstrap) and seeds together; where each model has one seed, over images alone.
"""

import argparse
import glob
import json
import warnings

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
    """The same of a .json of localize.py: means over attributes."""
    with open(file) as opened:
        content = json.load(opened)
    records = [record for record in content["records"] if "IoU" in record]
    images, attributes = (sorted({r[key] for r in records}) for key in ("image", "attribute"))
    image_of = np.array([images.index(record["image"]) for record in records])
    attribute_of = np.array([attributes.index(record["attribute"]) for record in records])
    ious = np.array([record["IoU"] for record in records])  # (boxes, thresholds)
    p = np.array([record["probability"] for record in records])

    def figures(weights):
        columns = []
        for counted in (p >= 0, p > 0.5):
            rows = []
            for k in range(len(attributes)):
                own = counted & (attribute_of == k)
                rows.append(box_figures(weights[image_of[own]], ious[own], p[own]))
            columns.append(np.nanmean(rows, 0))
        return np.concatenate(columns)

    heads = [*(f"IoU at {t:g}" for t in content["thresholds"]), "PCC"]
    return (images, attributes), heads + [f"{head}, p > 0.5" for head in heads], figures


def box_figures(weights, ious, p):
    """Weighted means of IoU at each threshold, weighted PCC of the first with the probability."""
    means = weights @ ious / weights.sum()
    x, y = ious[:, 0] - means[0], p - weights @ p / weights.sum()
    variances = (weights @ x**2) * (weights @ y**2)
    pcc = weights @ (x * y) / np.sqrt(variances) if variances > 1e-12 else np.nan
    return [*means, pcc]


# The 97.5% quantiles of Student's t for 1 to 10 degrees of freedom; above, the last is too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(ours, base, image_deviation):
    """The difference of two models' means, from (seeds,) numbers of each, with its 95% interval.

    Its error has two parts: that of images, by its standard deviation, and that of seeds, of which
    there are few: their variance is pooled and calls for Student's t. The quantile is the mean of
    the normal one and Student's, weighed by the parts' variances (Cochran's way).
    """
    difference, freedom = np.mean(ours) - np.mean(base), len(ours) + len(base) - 2
    image_variance, seed_variance, student = image_deviation**2, 0.0, 1.96
    if freedom:
        squares = sum(((values - np.mean(values)) ** 2).sum() for values in (ours, base))
        seed_variance = squares / freedom * (1 / len(ours) + 1 / len(base))
        student = T[min(freedom, len(T)) - 1]
    variance = image_variance + seed_variance
    quantile = (1.96 * image_variance + student * seed_variance) / max(variance, 1e-30)
    half = quantile * variance**0.5
    return difference, difference - half, difference + half


def compare(patterns, draws=1000):
    """A line for each pattern, under a heading."""
    models = []
    for pattern in patterns:
        opener = open_boxes if pattern.endswith(".json") else open_predictions
        models.append([opener(file) for file in sorted(glob.glob(pattern))])
        if any(file[0] != models[0][0][0] for file in models[-1]) or not models[-1]:
            raise SystemExit(f"compare.py: {pattern}: no file, or of other images or attributes")
    (images, _), heads, _ = models[0][0]
    digits, rng, samples = 3 if heads[0].startswith("IoU") else 2, np.random.default_rng(0), []

    def of_seeds(seeds, weights):
        return np.array([figures(weights) for _, _, figures in seeds])

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # means of what is undefined
        values = [of_seeds(seeds, np.ones(len(images))) for seeds in models]
        for _ in range(draws if len(models) > 1 else 0):
            weights = np.bincount(rng.integers(0, len(images), len(images)), minlength=len(images))
            samples.append([of_seeds(seeds, weights).mean(0) for seeds in models])
    lines = [f"{'':24} seeds" + "".join(f"{head:>32}" for head in heads)]
    for k, (pattern, value) in enumerate(zip(patterns, values, strict=True)):
        cells = []
        for j in range(len(heads)):
            cell = f"{value[:, j].mean():.{digits}f}"
            if len(value) > 1:
                cell += f" ± {value[:, j].std(ddof=1):.{digits}f}"
            if k > 0:
                found = np.array([draw[k][j] - draw[0][j] for draw in samples])
                ends = interval(value[:, j], values[0][:, j], np.nanstd(found))
                cell += " {:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*ends, n=digits)
            cells.append(cell)
        lines.append(f"{pattern:24} {len(value):5}" + "".join(f"{cell:>32}" for cell in cells))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", help="files of evaluate.py or localize.py")
    print("\n".join(compare(parser.parse_args().results)))
