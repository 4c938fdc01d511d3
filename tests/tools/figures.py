"""The figures and tables of results.md, details.md and the README, from results.json.

    pip install matplotlib
    python tests/tools/figures.py    # draws .pictures/*.svg, rewrites tables between their marks

A table stands between `<!-- its name -->` and `<!-- end -->`. A verdict is "ahead" or "behind"
where the 95% interval of three runs or more excludes 0, else "undecided".
"""

import json
from pathlib import Path

import numpy as np
from compare import GROUPS

TESTS = Path(__file__).parents[1]
DATA = json.loads((TESTS / "pages/results.json").read_text(encoding="utf-8"))
PAGES = (TESTS / "pages/results.md", TESTS / "pages/details.md", TESTS.parent / "README.md")
MODELS = ("K", "S", "R")
WIDTH = 680  # of a figure in pixels, as GitHub shows it
# Okabe and Ito's colours, which colour-blind readers tell apart; on white, so that a dark page is
# no matter.
COLOURS = {"K": "#0072b2", "S": "#d55e00", "R": "#009e73", "baseline": "#000000"}
SETTINGS = {setting["name"]: setting for setting in DATA["settings"]}
# Those that figure 1 shows, in their order.
SHOWN = ("all", "one", "gpu", "four", "twelve", "large", "published")
LETTERS = dict(zip(SHOWN, "ABCDEFG", strict=True))


def find(kind, **wanted):
    """The records of a kind with these values; None: without this key."""
    return [r for r in DATA[kind] if all(r.get(key) == value for key, value in wanted.items())]


def difference(setting, model, metric, minus="baseline", ablation=None):
    """That record, or None."""
    names = {"setting": setting, "model": model, "metric": metric, "minus": minus}
    found = find("differences", **names, ablation=ablation, note=None)
    return found[0] if found else None


def compared(settings, metrics):
    """(setting, model, a record for each metric) where the first is there. "IoU at stride 16" is
    IoU minus the baseline's at that stride."""
    for setting in settings:
        for model in MODELS:
            records = []
            for metric in metrics:
                name, _, stride = metric.partition(" at ")
                minus = "baseline at stride 16" if stride else "baseline"
                records.append(difference(setting, model, name, minus))
            if records[0]:
                yield setting, model, records


def ablated():
    """(name, model, the records of mA, F1 and IoU) of each model without a part."""
    for record in find("differences", minus="itself", metric="mA"):
        key = record["setting"], record["model"]
        others = [difference(*key, m, "itself", record["ablation"]) for m in ("F1", "IoU")]
        name = f"{LETTERS[record['setting']]} {record['model']}, {record['ablation']}"
        yield name, record["model"], [record, *others]


def number(value, metric, sign="+"):
    """A figure as it is printed: three decimals for IoU and PCC, two for percent."""
    digits = 3 if metric.startswith(("IoU", "PCC")) else 2
    return f"{value:{sign}.{digits}f}"


def cells(records):
    """Of each record its mean and its interval."""
    row = []
    for record in records:
        row.append(number(record["mean"], record["metric"]) if record else "")
        ends = record.get("interval", []) if record else []
        interval = ", ".join(number(end, record["metric"]) for end in ends)
        row.append(interval and f"[{interval}]")
    return row


def verdict(record, reverse=False):
    """Three words at most, and the number of runs. reverse: of what is subtracted."""
    if record is None:
        return "not run"
    low, high = record.get("interval", (-1, 1))
    if reverse:
        low, high = -high, -low
    word = "ahead" if low > 0 else "behind" if high < 0 else "undecided"
    return f"{word} ({record['n']})"


def table(heads, rows):
    """Lines of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def baseline_mA(setting):
    """The mean over a setting's trainings of the baseline, as it is printed."""
    records = find("trainings", setting=setting, model="baseline")
    return number(np.mean([record["mA"] for record in records]), "mA", "")


def differences():
    """Table 1: figure 1's numbers, one a cell."""
    rows = []
    for setting, model, records in compared(LETTERS, ("mA", "F1", "IoU", "IoU at stride 16")):
        row = [LETTERS[setting], model, str(records[0]["n"]), baseline_mA(setting)]
        rows.append(row + cells(records))
    heads = ["", "model", "runs", "baseline's mA", "mA", "95%", "F1", "95%"]
    return table([*heads, "IoU, stride 32", "95%", "IoU, stride 16", "95%"], rows)


CLAIMS = (  # of the paper; metric, what is subtracted
    ("mA above the baseline's", "mA", "baseline"),
    ("F1 above the baseline's", "F1", "baseline"),
    ('mA of group "all" similar or higher', "all", "baseline"),
    ("boxes better than the last map's", "IoU", "baseline"),
    ("boxes better than at stride 16", "IoU", "baseline at stride 16"),
    ("PCC higher, all true boxes", "PCC", "baseline"),
    ("PCC higher, predicted boxes", "PCC, predicted", "baseline"),
)
# Metric, what is subtracted, what differs from the full S, and whether the claim is for the full S,
# which is what is subtracted then.
CLAIMS_OF_S = (
    ("mA above K's", "mA", "K", None, False),
    ("boxes better than K's", "IoU", "K", None, False),
    ("mA above that without the prior", "mA", "itself", "no prior", True),
    ("boxes better than without the prior", "IoU", "itself", "no prior", True),
    ("mA above that without offset points", "mA", "itself", "no offset points", True),
    ("boxes better than without them", "IoU", "itself", "no offset points", True),
    ("mA of AFSS above that of P3 alone", "mA", "itself", "AFSS for P3", False),
)


def verdicts():
    """Table 2: of setting B, which has three runs of each; the number of runs in brackets."""
    rows = []
    for claim, metric, minus in CLAIMS:
        records = [difference("one", model, metric, minus) for model in MODELS]
        rows.append([claim, *map(verdict, records)])
    for claim, metric, minus, part, reverse in CLAIMS_OF_S:
        record = difference("one", "S", metric, minus, part)
        rows.append([claim, "", verdict(record, reverse), ""])
    records = [difference("four", model, "mA") for model in MODELS]
    rows.insert(1, [f"the same in {LETTERS['four']}, with 128 channels", *map(verdict, records)])
    return table(["claim", *MODELS], rows)


def ablations():
    """Models without a part minus the full ones, as in figure 4."""
    rows = [[name, str(records[0]["n"]), *cells(records)] for name, _, records in ablated()]
    return table(["", "runs", "mA", "95%", "F1", "95%", "IoU", "95%"], rows)


def scales():
    """How often AFSS froze a finer scale for head than for all, where it could choose."""
    rows = []
    for setting, letter in LETTERS.items():
        frozen = []
        for record in find("trainings", setting=setting, fixed=None):
            frozen += [run.split() for run in record.get("frozen", [])]
        if frozen:
            finer = sum(run[0] < run[3] for run in frozen)
            coarser = sum(run[0] > run[3] for run in frozen)
            counts = len(frozen), finer, len(frozen) - finer - coarser, coarser
            rows.append([letter, *map(str, counts)])
    return table(["", "runs of R, K, S", "head finer than all", "the same", "coarser"], rows)


def settings():
    """How each was run."""
    rows = []
    for name, letter in LETTERS.items():
        setting = SETTINGS[name]
        row = [setting[key] for key in ("machine", "commit", "minutes")]
        rows.append([f"{letter} {setting['label']}", *row, f"`{setting['command']}`"])
    heads = ["setting", "machine", "commit", "minutes a training"]
    return table([*heads, "command"], rows)


def values_of(key, records):
    """A figure of each record, None where it has none; IoU at the default threshold."""
    values = [record.get(key, record.get("groups", {}).get(key)) for record in records]
    return [value["0.2"] if isinstance(value, dict) else value for value in values]


def means():
    """Test figures, means over a setting's runs; of the baseline at both strides."""
    keys = ["mA", "Accu", "Prec", "Rec", "F1", *GROUPS, "IoU", "IoU at stride 16"]
    keys += ["PCC", "PCC, predicted"]
    found = {}
    for record in DATA["trainings"]:
        if record["setting"] not in ("synthetic", "few", "middle") and "ablation" not in record:
            letter = LETTERS.get(record["setting"], record["setting"])
            channels = f" ({record['channels']})" if record.get("channels") else ""
            found.setdefault((letter, record["model"] + channels), []).append(record)
    rows = []
    for (letter, model), records in found.items():
        seeds = {seed for record in records for seed in record["seeds"]}
        row = [letter, model, str(len(seeds))]
        for key in keys:
            values = values_of(key, records)
            row.append("" if None in values else number(np.mean(values), key, ""))
        rows.append(row)
    return table(["", "model", "runs", *keys], rows)


def groups():
    """Differences by group."""
    rows = []
    for setting, model, records in compared(LETTERS, GROUPS):
        rows.append([LETTERS[setting], model, str(records[0]["n"]), *cells(records)])
    heads = [head for group in GROUPS for head in (group, "95%")]
    return table(["", "model", "runs", *heads], rows)


def attributes():
    """IoU at 0.2 of setting A by attribute."""
    columns = {}
    for name in ("baseline", *MODELS):
        for record in find("trainings", setting="all", model=name):
            columns[name] = record["IoU by attribute"]
            if name == "baseline":
                columns["baseline at stride 16"] = record["IoU at stride 16 by attribute"]
    rows = []
    for attribute in next(iter(columns.values())):
        rows.append([attribute, *(number(c[attribute], "IoU", "") for c in columns.values())])
    return table(["", *columns], rows)


def fewer():
    """Differences with fewer images."""
    rows = []
    for setting, model, records in compared(("few", "middle"), ("mA", "F1")):
        row = [SETTINGS[setting]["label"], model, str(records[0]["n"]), baseline_mA(setting)]
        rows.append(row + cells(records)[::2])
    return table(["", "model", "runs", "baseline's mA", "mA", "F1"], rows)


def synthetic():
    """Drawn pedestrians, means of three seeds, and the differences to the baseline."""
    keys = ["mA", "F1", *GROUPS, "IoU", "PCC"]
    rows = []
    for name in ("baseline", *MODELS):
        records = find("trainings", setting="synthetic", model=name)
        row = [name, str(len(records))]
        row += [number(np.mean(values_of(key, records)), key, "") for key in keys]
        row += cells([difference("synthetic", name, metric) for metric in ("mA", "IoU")])
        rows.append(row)
    heads = ["", "runs", *keys, "mA minus the baseline's", "95%", "IoU minus the baseline's", "95%"]
    return table(heads, rows)


def described(name):
    """A setting's backbone, and the parts of its label: images, size, passes, channels, perhaps
    what it was measured on."""
    return [SETTINGS[name]["backbone"], *SETTINGS[name]["label"].split(", ")]


def key():
    """The settings' letters, and what they stand for."""
    rows = []
    for name, letter in LETTERS.items():
        backbone, *parts = described(name)
        rows.append([letter, backbone, *parts, *[""] * (5 - len(parts))])
    heads = ["", "backbone", "training images", "size", "passes", "channels", "measured on"]
    return table(heads, rows)


# What others report on PA-100K: the paper's Tab. 3 and 10; PaddleClas' page on PULC's person
# attributes, release 2.4, from ImageNet's weights, from its own, and distilled; deep-person-reid's
# issue 474.
OTHERS = """
the paper's SSPNet-S|ResNet50|256x192|30|83.15|88.43|0.28
the paper's baseline|ResNet50|256x192|30|81.97|88.11|0.15
PaddleClas' PULC|PPLCNet x1.0|256x192|-|76.31, 77.31, 78.59|-|no boxes
deep-person-reid|OSNet|-|-|74.7|-|no boxes
"""


def card():
    """The README's: the published models, the baseline that was trained beside them, others."""
    rows = []
    backbone, _, size, *_ = described("published")
    for model, passes in SETTINGS["published"]["passes"].items():
        (record,) = find("trainings", setting="published", model=model, ablation=None)
        name = f"SSPNet-{model}"
        found = [number(record[key], key, "") for key in ("mA", "F1")]
        iou = number(record["IoU"]["0.2"], "IoU", "")
        if model == "baseline":
            name = "our baseline"
            iou += f" (stride 16: {record['IoU at stride 16']['0.2']})"
        rows.append([name, backbone, size, passes, *found, iou])
    rows += [line.split("|") for line in OTHERS.strip().splitlines()]
    return table(["PA-100K's test images", "backbone", "size", "passes", "mA", "F1", "IoU"], rows)


TABLES = (differences, verdicts, ablations, scales, settings, means)
TABLES += (groups, attributes, fewer, synthetic, key, card)


def with_tables(page):
    """A page's text with its tables made anew."""
    for made in TABLES:
        mark = f"<!-- {made.__name__} -->\n"
        before, found, rest = page.partition(mark)
        if found:
            page = before + mark + made() + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return page


def canvas(height):
    """An empty figure of 680 pixels' width."""
    import matplotlib.pyplot as plt

    return plt.figure(figsize=(WIDTH / 72, height / 72))


def bare(axes, *sides):
    """Axes with readable ticks, and without these borders."""
    axes.tick_params(labelsize=12)
    axes.spines[list(sides)].set_visible(False)


def forest(rows, columns, left):
    """Differences side by side: rows of (label, model, a record for each column), or of a heading
    alone; columns of (title, the paper's gain by model). All lengths in pixels."""
    line, top, bottom, gap, right = 21, 34, 26, 16, 26
    height = top + bottom + line * len(rows)
    figure = canvas(height)
    each = (WIDTH - left - right) / len(columns) - gap
    text = {"va": "center", "fontsize": 13}
    for y, (label, *of) in enumerate(rows):
        place = 1 - (top + line * (y + 0.5)) / height
        if of:
            figure.text(0, place, label, color=COLOURS[of[0]], **text)
            runs = next(record["n"] for record in of[1] if record)
            figure.text(1 - 20 / WIDTH, place, str(runs), **text)
        else:
            figure.text(0, place, label, weight="bold", backgroundcolor="white", **text)
    figure.text(1 - 20 / WIDTH, 1 - 20 / height, "n", **text)
    for k, (title, gains) in enumerate(columns):
        x = (left + k * (each + gap)) / WIDTH
        box = [x, bottom / height, each / WIDTH, line * len(rows) / height]
        axes = figure.add_axes(box)
        axes.set(ylim=(len(rows) - 0.5, -0.5), yticks=[], facecolor="none")
        axes.set_title(title, fontsize=13, pad=8)
        axes.axvline(0, color="black", linewidth=1)
        bare(axes, "top", "left", "right")
        axes.locator_params(axis="x", nbins=3)
        for y, (_, *of) in enumerate(rows):
            record = of[1][k] if of else None
            if record is None:
                continue
            colour = COLOURS[of[0]]
            runs = record.get("runs", [])
            ends = record.get("interval", [])
            axes.plot(ends, [y] * len(ends), color=colour, linewidth=3)
            axes.plot(runs, [y] * len(runs), "o", color=colour, markersize=6, alpha=0.7)
            axes.plot(record["mean"], y, "|", color=colour, markersize=14, markeredgewidth=2)
            if of[0] in gains:
                axes.plot(gains[of[0]], y, "D", color="black", markersize=7, fillstyle="none")
    return figure


def figure_1():
    """Differences to the baseline by setting and model."""
    rows = []
    for setting, letter in LETTERS.items():
        rows.append([f"{letter}  {SETTINGS[setting]['label']}"])
        for _, model, records in compared([setting], ("mA", "F1", "IoU at stride 16")):
            rows.append([model, model, records])
    gains = DATA["paper_gain"]
    titles = {"mA": "mA in %", "F1": "F1 in %", "IoU": "IoU, to stride 16"}
    return forest(rows, [(title, gains[metric]) for metric, title in titles.items()], left=30)


CURVES = (  # of figure 2: label, model, key of its IoU by threshold, style
    ("baseline, stride 32", "baseline", "IoU", "-"),
    ("baseline, stride 16", "baseline", "IoU at stride 16", "--"),
    *((model, model, "IoU", "-") for model in MODELS),
)


def figure_2():
    """IoU against the threshold on the heat map: means over the runs of setting B."""
    axes = canvas(300).add_axes([0.08, 0.16, 0.70, 0.80])
    ends = []
    for label, model, key, style in CURVES:
        runs = [r[key] for r in find("trainings", setting="one", model=model, ablation=None)]
        values = [np.mean([run[threshold] for run in runs]) for threshold in runs[0]]
        look = {"color": COLOURS[model], "linewidth": 2, "marker": "o", "linestyle": style}
        axes.plot([float(threshold) for threshold in runs[0]], values, **look)
        ends.append((values[-1], label, COLOURS[model]))
    axes.set_ylim(0)
    place = -1
    for y, label, colour in sorted(ends):
        place = max(y, place + 0.06 * axes.get_ylim()[1])  # so that no two texts touch
        axes.text(0.715, place, label, fontsize=13, va="center", color=colour)
    axes.set_xlabel("threshold on the heat map", fontsize=13)
    axes.set_ylabel("mean IoU", fontsize=13)
    bare(axes, "top", "right")
    return axes.figure


def figure_3():
    """What AFSS compares: training mA at P1, P2 and P3 by pass, minus the mean of the three."""
    (record,) = [r for r in DATA["trainings"] if "training_mA" in r]
    figure = canvas(250)
    for k, group in enumerate(GROUPS):
        axes = figure.add_axes([0.09 + 0.232 * k, 0.2, 0.205, 0.66])
        values = np.array(record["training_mA"][group])
        values -= values.mean(1, keepdims=True)
        passes = range(1, len(values) + 1)
        axes.plot(passes, values[:, 0], "o-", color="#0072b2", markersize=5, label="P1")
        axes.plot(passes, values[:, 1], "s-", color="#d55e00", markersize=5, label="P2")
        axes.plot(passes, values[:, 2], "^-", color="#009e73", markersize=5, label="P3")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(ylim=(-0.9, 0.7), xticks=[1, 4, 8])
        axes.set_title(group, fontsize=13)
        axes.set_xlabel("pass", fontsize=13)
        bare(axes, "top", "right")
        axes.tick_params(labelleft=k == 0)
    figure.axes[0].set_ylabel("mA minus the mean", fontsize=13)
    place = {"loc": "lower right", "ncols": 3, "columnspacing": 0.8, "handlelength": 1}
    axes.legend(fontsize=12, frameon=False, **place)
    return figure


def figure_4():
    """What the full model loses by a part."""
    columns = [("mA in %", {}), ("F1 in %", {}), ("IoU", {})]
    return forest(list(ablated()), columns, left=160)


FIGURES = {"forest": figure_1, "iou": figure_2, "scales": figure_3, "ablations": figure_4}


def draw(folder):
    """Each figure as an SVG whose text is text."""
    import matplotlib

    matplotlib.use("svg")
    style = {"svg.fonttype": "none", "svg.hashsalt": "sspnet", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        for name, drawn in FIGURES.items():
            drawn().savefig(Path(folder) / f"{name}.svg", metadata={"Date": None})
        matplotlib.pyplot.close("all")


if __name__ == "__main__":
    draw(TESTS.parent / ".pictures")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
