"""Predictions side by side: the mean and spread over seeds, and the difference to the first.

    python evaluate.py runs/S-0/best.pt --predictions S-0.npz          # and so for each model
    python tests/compare.py 'none-*.npz' 'R-*.npz' 'S-*.npz'

Each argument is a file, or a pattern in quotes for the files of one model's seeds. Figures are in
percent; brackets hold the 95% interval of a difference, by a paired bootstrap over images and
seeds together: each draw takes the same images for all models, and for each some of its seeds.
"""

import argparse
import glob

import numpy as np

GROUPS = ("head", "torso", "bottom", "all")


def figures(labels, predicted, groups, weights):
    """mA, F1 and the groups' mA of (N, L) arrays of 0 and 1; image i counts weights[i] times."""
    TP, P = weights @ (labels * predicted), weights @ labels
    TN, N = weights @ ((1 - labels) * (1 - predicted)), weights @ (1 - labels)
    label_mA = 50 * (TP / P + TN / N)  # NaN without positives or negatives: left out of means
    both = (labels * predicted).sum(1)
    prec = weights @ (both / np.maximum(predicted.sum(1), 1)) / weights.sum()
    rec = weights @ (both / np.maximum(labels.sum(1), 1)) / weights.sum()
    by_group = [np.nanmean(label_mA[groups == g]) for g in GROUPS if g in groups]
    return np.array([np.nanmean(label_mA), 200 * prec * rec / (prec + rec), *by_group])


def compare(patterns, draws=1000):
    """A line for each pattern, under a heading."""
    models = [[np.load(file) for file in sorted(glob.glob(pattern))] for pattern in patterns]
    first = models[0][0] if models[0] else None
    for pattern, files in zip(patterns, models, strict=True):
        same = [np.array_equal(f[k], first[k]) for f in files for k in ("names", "attributes")]
        if not (files and all(same)):
            raise SystemExit(f"compare.py: {pattern}: no file, or of other images or attributes")
    labels, groups, rng = first["labels"].astype(float), first["groups"], np.random.default_rng(0)
    predicted = [[(f["probabilities"] > 0.5).astype(float) for f in files] for files in models]
    names = ["mA", "F1", *(g for g in GROUPS if g in groups)]
    lines = [f"{'':24} seeds" + "".join(f"{name:>36}" for name in names)]

    def of_seeds(seeds, weights):
        return np.array([figures(labels, seed, groups, weights) for seed in seeds])

    samples = [[] for _ in models]
    with np.errstate(invalid="ignore"):  # 0 / 0 of what is undefined
        values = [of_seeds(seeds, np.ones(len(labels))) for seeds in predicted]
        for _ in range(draws if len(models) > 1 else 0):
            weights = np.bincount(rng.integers(0, len(labels), len(labels)), minlength=len(labels))
            for sample, seeds in zip(samples, predicted, strict=True):
                chosen = rng.integers(0, len(seeds), len(seeds))
                sample.append(of_seeds(seeds, weights)[chosen].mean(0))
    for pattern, value, sample in zip(patterns, values, samples, strict=True):
        cells = [f"{mean:.2f}" for mean in value.mean(0)]
        if len(value) > 1:
            pairs = zip(cells, value.std(0, ddof=1), strict=True)
            cells = [f"{cell} ± {spread:.2f}" for cell, spread in pairs]
        if sample is not samples[0]:
            low, high = np.percentile(np.subtract(sample, samples[0]), [2.5, 97.5], axis=0)
            rows = zip(cells, (value.mean(0) - values[0].mean(0)), low, high, strict=True)
            cells = [f"{cell} {d:+.2f} [{a:+.2f}, {b:+.2f}]" for cell, d, a, b in rows]
        lines.append(f"{pattern:24} {len(value):5}" + "".join(f"{cell:>36}" for cell in cells))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", nargs="+", help="files of evaluate.py --predictions")
    print("\n".join(compare(parser.parse_args().predictions)))
