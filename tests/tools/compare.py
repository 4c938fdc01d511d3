"""Results side by side: the mean and spread over seeds, and the difference to the first.

    python evaluate.py runs/S-0/best.pt --predictions S-0.npz          # and so for each model
    python tests/tools/compare.py 'none-*.npz' 'R-*.npz' 'S-*.npz'
    python tests/tools/compare.py 'none-*.json' 'S-*.json'    # of localize.py's --json: IoU

    python tests/tools/compare.py 'none-*.npz' 'S-*.npz' --record one --models baseline S

The last writes the figures of each seed and the differences into results.json, under the name of a
setting and those of the models; "baseline at stride 16" adds boxes to the baseline's record. Each
argument is a file, or a pattern in quotes for the files of one model's seeds, which are the numbers
at the ends of their names. mA and F1 are in percent, IoU at each threshold and PCC at the first are
of true boxes; "p > 0.5": of those whose attribute is predicted. A difference is the mean of those
within the seeds that both models have: a seed moves all models together. Brackets hold its 95%
interval, over images (a paired bootstrap) and seeds together; of one seed, over images alone.
"""

import argparse
import glob
import json
import re
import warnings
from pathlib import Path

import numpy as np

GROUPS = ("head", "torso", "bottom", "all")
RESULTS = Path(__file__).parents[1] / "pages/results.json"


def open_predictions(file):
    """What others must share with an .npz; headings; a function of images' weights: figures."""
    archive = np.load(file)
    labels, groups, p = archive["labels"].astype(float), archive["groups"], archive["probabilities"]
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("probabilities outside of 0 to 1")
    predicted = (p > 0.5).astype(float)
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

    same = [archive[key].tolist() for key in ("names", "attributes", "groups", "labels")]
    return same, ["mA", "F1", *(g for g in GROUPS if g in groups)], figures


def open_boxes(file):
    """The same of a .json of localize.py: means over attributes."""
    content = json.loads(Path(file).read_text())
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
                of_k = counted & (attribute_of == k)
                rows.append(box_figures(weights[image_of[of_k]], ious[of_k], p[of_k]))
            columns.append(np.nanmean(rows, 0))
        return np.concatenate(columns)

    boxes = sorted([r["image"], r["attribute"], r["true_box"]] for r in records)
    heads = [*(f"IoU at {t:g}" for t in content["thresholds"]), "PCC"]
    heads += [f"{head}, p > 0.5" for head in heads]
    return [images, content["thresholds"], boxes], heads, figures


def box_figures(weights, ious, p):
    """Weighted means of IoU at each threshold, weighted PCC of the first with the probability."""
    means = weights @ ious / weights.sum()
    x, y = ious[:, 0] - means[0], p - weights @ p / weights.sum()
    variances = (weights @ x**2) * (weights @ y**2)
    pcc = weights @ (x * y) / np.sqrt(variances) if variances > 1e-12 else np.nan
    return [*means, pcc]


def open_model(pattern):
    """{seed: an opened file} of a pattern's files; a name without a number is a seed, too."""
    seeds = {}
    for file in sorted(glob.glob(pattern)):
        number = re.search(r"\d*$", Path(file).stem).group()
        if number in seeds:
            raise SystemExit(f"compare.py: {file}: a second file of seed {number}")
        opener = open_boxes if file.lower().endswith(".json") else open_predictions
        try:
            seeds[number] = opener(file)
        except Exception as error:  # whatever a foreign or damaged file makes these raise
            kind = "of evaluate.py --predictions or of localize.py --json for one model"
            raise SystemExit(f"compare.py: {file}: not a file {kind} ({error!r:.99})") from error
    if not seeds:
        raise SystemExit(f"compare.py: {pattern}: no such file")
    return seeds


# The 97.5% quantiles of Student's t for 1 to 10 degrees of freedom; above, the last is too wide.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(differences, image_deviation):
    """The mean of two models' differences within a seed, (seeds,), and its 95% interval.

    Its error has two parts: that of images, and that of seeds, so few that it calls for Student's
    t. The quantile is the mean of both, weighed by the parts' variances (Cochran's way)."""
    mean, count = np.mean(differences), len(differences)
    image_variance, seed_variance, student = image_deviation**2, 0.0, 1.96
    if count > 1:
        seed_variance = np.var(differences, ddof=1) / count
        student = T[min(count - 1, len(T)) - 1]
    variance = image_variance + seed_variance
    quantile = (1.96 * image_variance + student * seed_variance) / max(variance, 1e-30)
    half = quantile * variance**0.5
    return mean, mean - half, mean + half


def measure(patterns, draws=1000):
    """The headings, and of each pattern's model (seeds, headings) figures, (shared seeds, headings)
    differences to the first model, and (headings, 3) their mean and interval."""
    models = [open_model(pattern) for pattern in patterns]
    (images, *same), heads, _ = next(iter(models[0].values()))
    for pattern, model in zip(patterns, models, strict=True):
        if any(opened[0] != [images, *same] for opened in model.values()):
            what = "images, labels or boxes, attributes, groups or thresholds"
            raise SystemExit(f"compare.py: {pattern}: has other {what} than {patterns[0]}")
        if not model.keys() & models[0].keys():
            raise SystemExit(f"compare.py: {pattern}: has no seed of {patterns[0]}")
    rng = np.random.default_rng(0)

    def of_seeds(weights):
        return [{seed: f(weights) for seed, (_, _, f) in model.items()} for model in models]

    def differences(found, k):
        shared = sorted(found[k].keys() & found[0].keys())
        return np.array([found[k][seed] - found[0][seed] for seed in shared])

    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        warnings.simplefilter("ignore")  # means of what is undefined
        found, samples = of_seeds(np.ones(len(images))), [[] for _ in models]
        for _ in range(draws if len(models) > 1 else 0):
            weights = np.bincount(rng.integers(0, len(images), len(images)), minlength=len(images))
            drawn = of_seeds(weights)
            for k, sample in enumerate(samples):
                sample.append(differences(drawn, k).mean(0))
        measured = []
        for k in range(len(models)):
            within = differences(found, k)
            deviations = np.nanstd(samples[k], 0) if samples[k] else np.zeros(len(heads))
            ends = [interval(*pair) for pair in zip(within.T, deviations, strict=True)]
            measured.append((np.array(list(found[k].values())), within, np.array(ends)))
    return heads, measured


def compare(patterns, draws=1000):
    """A line for each pattern, under a heading."""
    heads, measured = measure(patterns, draws)
    digits = 3 if heads[0].startswith("IoU") else 2
    lines = [f"{'':24} seeds" + "".join(f"  {head:>32}" for head in heads)]
    for k, (pattern, found) in enumerate(zip(patterns, measured, strict=True)):
        values, within, intervals = found
        cells = []
        for j in range(len(heads)):
            cell = f"{values[:, j].mean():.{digits}f}"
            if len(values) > 1:
                cell += f" ± {values[:, j].std(ddof=1):.{digits}f}"
            if k > 0:
                cell += " {:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*intervals[j], n=digits)
            cells.append(cell)
        lines.append(f"{pattern:24} {len(values):5}" + "".join(f"  {cell:>32}" for cell in cells))
        if not len(within) == len(values) == len(measured[0][0]):
            lines.append(f"{'':24}       differences of {len(within)} seeds that both have")
    return lines


def keys_of(head):
    """Where results.json has the figure of a heading."""
    if head in GROUPS:
        return "groups", head
    if head.startswith("IoU at "):
        return "IoU", head.removeprefix("IoU at ")
    return ("PCC, predicted" if head == "PCC, p > 0.5" else head,)


def record(patterns, setting, models, file=RESULTS, draws=1000):
    """Writes into results.json the figures of each seed, (setting, model, seed), and each model's
    differences to the first. What is there of them is replaced."""
    content = json.loads(file.read_text(encoding="utf-8"))
    heads, measured = measure(patterns, draws)
    # Of the boxes of predicted attributes PCC alone.
    wanted = [j for j, h in enumerate(heads) if not h.endswith(", p > 0.5") or "PCC" in h]
    if any(" at " in model for model in models):  # of a map at another stride the boxes alone
        wanted = [j for j in wanted if heads[j].startswith("IoU")]
    keys = {j: keys_of(heads[j]) for j in wanted}
    for pattern, model, (values, within, intervals) in zip(patterns, models, measured, strict=True):
        name, at, stride = model.partition(" at ")
        own = {j: (names[0] + at + stride, *names[1:]) for j, names in keys.items()}
        for seed, figures in zip(open_model(pattern), values, strict=True):
            of_run = {"setting": setting, "model": name, "seeds": [int(seed or 0)]}
            record_training(content["trainings"], of_run, figures, own)
        if model != models[0]:
            about = {"setting": setting, "model": model, "minus": models[0]}
            record_differences(content["differences"], about, within, intervals, keys)
    write_records(file, content)


def rounded(value, keys):
    return round(float(value), 3 if keys[0].startswith(("IoU", "PCC")) else 2)


def record_training(trainings, of_run, figures, keys):
    """Adds the figures of one training, or changes what its record has. keys: see `record`."""
    same = [r for r in trainings if {**r, **of_run} == r and "note" not in r]
    run = same[0] if same else of_run
    if not same:
        trainings.append(run)
    for j, names in keys.items():
        place = run.setdefault(names[0], {}) if len(names) > 1 else run
        place[names[-1]] = rounded(figures[j], names)


def record_differences(differences, about, within, intervals, keys):
    """Puts a model's differences in the place of those that have the same `about`. IoU is that at
    the default threshold."""
    for j, names in keys.items():
        metric = "IoU" if names[0] == "IoU" else names[-1]
        if names[0] == "IoU" and names[1] != "0.2":
            continue
        of_metric = {**about, "metric": metric}
        for old in [r for r in differences if {**r, **of_metric} == r and "note" not in r]:
            differences.remove(old)
        mean, *ends = [rounded(value, names) for value in intervals[j]]
        runs = [rounded(value, names) for value in within[:, j]]
        new = {**of_metric, "n": len(runs), "mean": mean, "runs": runs}
        differences.append({**new, "interval": ends} if len(runs) > 2 else new)


def write_records(file, content):
    """Writes results.json, with a record a line."""
    parts = []
    for key, value in content.items():
        rows = [json.dumps(row) for row in value] if isinstance(value, list) else []
        joined = "[\n" + ",\n".join(rows) + "\n]" if rows else json.dumps(value)
        parts.append(f"{json.dumps(key)}: {joined}")
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("results", nargs="+", help="files of evaluate.py or localize.py")
    parser.add_argument("--record", metavar="SETTING", help="write into results.json")
    parser.add_argument("--models", nargs="+", help="the models' names there, one a pattern")
    args = parser.parse_args()
    print("\n".join(compare(args.results)))
    if args.record:
        record(args.results, args.record, args.models)
