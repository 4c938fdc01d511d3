"""Speed as ratios, each against a named reference in the same run.

    python tests/benchmark.py [--device cuda] [--quick] [--rows ROW ...] [--json FILE]
    python tests/benchmark.py --profile       parameters, GFLOPs and images/s of Tab. 3's models

Each row times its candidates in turn, round after round, and reports the median over the rounds of
reference / ours (above 1: ours is faster) with the lowest and the highest round. The references
stand here in their plain form. Where a row says nothing else: ResNet50, 256x192, random weights,
noise for images, and AFSS set to the paper's outcome (head P1, torso P2, bottom P2, all P3).
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import (  # noqa: E402
    PA100K_GROUPS,
    command,
    progress,
    use_device,
    write_json,
)
from evaluate import model_name  # noqa: E402
from localize import response_maps  # noqa: E402
from sspnet import (  # noqa: E402
    KEYPOINT_GROUPS,
    PLE_K,
    PLE_S,
    Baseline,
    HierarchicalLoss,
    SSPNet,
    build_model,
    prior_region,
)
from train import GRADIENT_NORM, parameter_groups  # noqa: E402

# Tab. 3: millions of parameters, GFLOPs, images/s.
PAPER_EFFICIENCY = {
    ("none", "resnet50"): (23.56, 2.69, 24),
    ("none", "swin_s"): (48.86, 7.74, 15),
    ("R", "resnet50"): (24.73, 2.92, 23),
    ("K", "resnet50"): (26.27, 3.31, 19),
    ("S", "resnet50"): (26.30, 3.32, 21),
    ("R", "swin_s"): (49.96, 8.13, 15),
    ("K", "swin_s"): (52.43, 8.65, 11),
    ("S", "swin_s"): (52.44, 8.65, 12),
}
PAPER_SCALES = {"head": 0, "torso": 1, "bottom": 1, "all": 2}  # what AFSS chose (Sec. 4.2)
GROUPS_OF = list(PA100K_GROUPS.values())
PLES = ("none", "R", "K", "S")
# A standing person's MPII points as shares of width and height.
POSE_X = [0.42, 0.42, 0.43, 0.57, 0.58, 0.58, 0.5, 0.5, 0.5, 0.5, 0.3, 0.32, 0.38, 0.62, 0.68, 0.7]
POSE_Y = [0.92, 0.74, 0.54, 0.54, 0.74, 0.92, 0.54, 0.22, 0.17, 0.05, 0.5, 0.38]
POSE = torch.tensor([POSE_X, [*POSE_Y, 0.23, 0.23, 0.38, 0.5]]).T


# ---- Measuring


def now(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def race(candidates, rounds, device, warm_up=1):
    """Times {name: function} in turn, `rounds` times after warming up -> {name: seconds}."""
    times = {name: [] for name in candidates}
    for _ in range(warm_up + rounds):
        for name, function in candidates.items():
            started = now(device)
            function()
            times[name].append(now(device) - started)
    return {name: seconds[warm_up:] for name, seconds in times.items()}


def ratio(times, reference, ours):
    """The median, lowest and highest round of reference / ours."""
    rounds = [a / b for a, b in zip(times[reference], times[ours], strict=True)]
    return {
        "ratio": statistics.median(rounds),
        "low": min(rounds),
        "high": max(rounds),
        "seconds": statistics.median(times[ours]),
        "reference_seconds": statistics.median(times[reference]),
    }


def build(ple, device="cpu", selecting=False, groups=GROUPS_OF, M=3):
    torch.manual_seed(0)
    model = Baseline(groups) if ple == "none" else SSPNet(groups, ple, M=M)
    if ple != "none":
        model.afss.scales = [PAPER_SCALES[g] for g in groups]
        model.afss.selecting = selecting
    return model.to(device, memory_format=torch.channels_last)


def batch(B, device="cpu", H=256, W=192, L=26):
    """Images, labels and keypoints about where people's joints are."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, H, W, generator=rng)
    keypoints = POSE * torch.tensor([W, H]) + torch.randn(B, 16, 2, generator=rng) * 0.03 * H
    labels = (torch.rand(B, L, generator=rng) < 0.3).float()
    images = images.to(device, memory_format=torch.channels_last)
    return images, labels.to(device), keypoints.to(device)


def stepper(model, B, device, amp=False, groups=GROUPS_OF, **size):
    """A function that makes one training step of `train.py`, its weights' average excepted."""
    images, labels, keypoints = batch(B, device, L=len(groups), **size)
    loss_of = HierarchicalLoss(groups, torch.full((len(groups),), 0.3)).to(device)
    fused = device.startswith("cuda")
    optimizer = torch.optim.Adam(parameter_groups(model.train(), 1e-4), fused=fused)
    selecting = isinstance(model, SSPNet) and model.afss.selecting

    def step():
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=amp):
            logits = model(images, keypoints)
        optimizer.zero_grad(set_to_none=True)
        loss_of(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        optimizer.step()
        if selecting:
            model.afss.update(logits.detach(), labels)

    return step


# ---- The plain references


def dense_offsets(sample, x):
    """Offset features at every position of x: for each m, shift the whole grid, sample, project."""
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    offsets, weights = sample.predict(pixels).split([2 * sample.M, sample.M], -1)
    offsets, weights = offsets.unflatten(-1, (sample.M, 2)), weights.softmax(-1)
    rows, columns = torch.arange(H, device=x.device), torch.arange(W, device=x.device)
    ys, xs = torch.meshgrid(rows, columns, indexing="ij")
    out = 0
    for m in range(sample.M):
        place = torch.stack([xs, ys], -1) + offsets[..., m, :]
        place = (2 * place + 1) / torch.tensor([W, H], device=x.device) - 1
        sampled = F.grid_sample(x, place, align_corners=False).permute(0, 2, 3, 1)
        out = out + weights[..., m, None] * sample.A(sampled)
    return out  # (B, H, W, C)


def dense_ple_s(ple, x, group):
    """PLE-S by way of the dense map of the region, subsampled at the end."""
    top, bottom = prior_region(group, x.shape[2])
    grid = ple.points(group, *x.shape[2:], x.device).round().long()  # (rows, columns, 2)
    dense = dense_offsets(ple.sample, x[:, :, top:bottom])
    return dense[:, grid[..., 1] - top, grid[..., 0]].permute(0, 3, 1, 2)


def dense_ple_k(ple, x, group, keypoints):
    """PLE-K by way of the dense map, read in a loop over images and keypoints."""
    dense = dense_offsets(ple.sample, x)
    rows = []
    for b in range(len(x)):
        for n in KEYPOINT_GROUPS[group]:
            u, v = keypoints[b, n].round().long().tolist()
            u, v = min(max(u, 0), x.shape[3] - 1), min(max(v, 0), x.shape[2] - 1)
            rows.append(dense[b, v, u])
    return torch.stack(rows).view(len(x), -1, x.shape[1]).transpose(1, 2)


def cam_per_attribute(model, images, attributes):
    """Grad-CAM-P with a forward and a backward pass of the whole network for each attribute."""
    out = []
    for j in attributes:
        model.zero_grad()
        A = model.features(images)
        A = A[model.map_of(j)]
        A.retain_grad()
        maps = [A if s == model.map_of(j) else None for s in range(3)]
        group = model.attribute_groups[j]
        (region,) = model.ple(A, [group])
        features = F.adaptive_max_pool2d(region, 1), F.adaptive_max_pool2d(region, 2)
        logits = model.heads[group](torch.cat([f.flatten(1) for f in features], 1))
        logits[:, model.members[group].index(j)].sum().backward()
        out.append((maps[model.map_of(j)].grad * A.detach()).sum(1).relu())
    return out


# ---- The rows: each yields (title, name of the reference, result)


def row_inference(args):
    """Images/s as a share of the baseline's."""
    images, _, keypoints = batch(args.batch, args.device)
    models = {ple: build(ple, args.device).eval() for ple in PLES}

    @torch.inference_mode()
    def run(model):
        with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.amp):
            model(images, keypoints)

    candidates = {name: partial(run, model) for name, model in models.items()}
    times = race(candidates, args.rounds + 2, args.device)
    for name in times:
        rate = args.batch / statistics.median(times[name])
        result = {**ratio(times, "none", name), "images_per_second": rate}
        yield f"inference, {name}", "baseline", result


def row_training(args):
    """A training step as a share of the baseline's; AFSS selecting (selecting) and frozen."""
    for state in ("frozen", "selecting"):
        steps = {}
        for ple in PLES:
            model = build(ple, args.device, state == "selecting")
            steps[ple] = stepper(model, args.batch, args.device, args.amp)
        times = race(steps, args.rounds + 2, args.device)
        for name in times:
            rate = args.batch / statistics.median(times[name])
            result = {**ratio(times, "none", name), "images_per_second": rate}
            yield f"training step, {state}, {name}", "baseline", result
    # AFSS's own part of the selecting step: the counts of a batch.
    afss, labels = build("S", args.device, True).afss, batch(args.batch, args.device)[1]
    logits = torch.randn(3, args.batch, 26, device=args.device)
    counts = race({"update": partial(afss.update, logits, labels)}, 100, args.device)
    share = statistics.median(counts["update"]) / statistics.median(times["S"])
    yield "AFSS's counts, share of a selecting step", "selecting step", {"share": share}


def row_ple(args):
    """PLE-S and PLE-K, forward and backward, against the dense map first."""
    B = args.batch
    for name, groups in (("S", ("head", "torso", "bottom", "all")), ("K", ("head", "all"))):
        torch.manual_seed(0)
        ple = (PLE_S() if name == "S" else PLE_K()).to(args.device)
        torch.nn.init.normal_(ple.sample.predict.weight, std=0.05)
        for scale, (H, W) in enumerate(((64, 48), (32, 24), (16, 12))):
            x = torch.randn(B, 256, H, W, device=args.device)
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            keypoints = batch(B, args.device)[2] / SSPNet.strides[scale]
            for group in groups:
                plain = partial(dense_ple_s, ple, x, group)
                if name == "K":
                    plain = partial(dense_ple_k, ple, x, group, keypoints)
                ours = partial(one_feature, ple, x, group, keypoints)
                candidates = {
                    "plain": partial(both_ways, plain, ple, x),
                    "ours": partial(both_ways, ours, ple, x),
                }
                times = race(candidates, args.rounds, args.device)
                title = f"PLE-{name}, {group} at P{scale + 1}, forward and backward"
                yield title, "dense map first", ratio(times, "plain", "ours")


def one_feature(ple, x, group, keypoints):
    return ple(x, [group], keypoints)[0]


def both_ways(function, ple, x):
    ple.zero_grad()
    x.grad = None
    function().square().mean().backward()


def row_cam(args):
    """Grad-CAM-P of all attributes of 16 images."""
    model, (images, _, keypoints) = build("S", args.device).eval(), batch(16, args.device)
    attributes = [0, 7, 13, 22] if args.quick else list(range(26))
    plain, ours = [], []
    cam_per_attribute(model, images, attributes[:1])  # warms up: on a CPU the rest takes minutes

    def run_plain():
        plain[:] = cam_per_attribute(model, images, attributes)

    def run_ours():
        ours[:] = response_maps(model, images, attributes, keypoints)[1]

    rounds, warm_up = (1, 0) if args.device == "cpu" else (args.rounds, 1)
    times = race({"plain": run_plain, "ours": run_ours}, rounds, args.device, warm_up)
    pairs = zip(plain, ours, strict=True)
    worst = max(((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item() for a, b in pairs)
    result = {**ratio(times, "plain", "ours"), "largest_difference": worst}
    yield f"Grad-CAM-P, {len(attributes)} attributes, 16 images", "a pass per attribute", result


def peak_of_a_step(ple, selecting, B, device, amp):
    """In a process of its own: the peak memory of two training steps, in bytes."""
    step = stepper(build(ple, device, selecting), B, device, amp)
    step()
    step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def row_memory(args):
    """Peak memory of a training step."""
    baseline = None
    for name, ple in (("baseline", "none"), ("S frozen", "S"), ("S selecting", "S")):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            given = ple, "selecting" in name, args.batch, args.device, args.amp
            peak = process.apply(peak_of_a_step, given)
        baseline = baseline or peak
        result = {"peak_GiB": peak / 2**30, "ratio": peak / baseline}
        yield f"peak memory of a training step, {name}", "baseline", result


ROWS = {
    "inference": row_inference,
    "training": row_training,
    "ple": row_ple,
    "cam": row_cam,
    "memory": row_memory,
}


def text_of(title, result):
    """A row for people."""
    text = f"{result['ratio']:.2f}x" if "ratio" in result else f"{100 * result['share']:.2f}%"
    if "low" in result:
        text += f" ({result['low']:.2f}-{result['high']:.2f})"
    for key in ("images_per_second", "largest_difference", "peak_GiB"):
        if key in result:
            text += f"  {key.replace('_', ' ')} {result[key]:.3g}"
    return f"{title:58} {text}"


# ---- Tab. 3's efficiency columns


def profile(device, models=PAPER_EFFICIENCY, batches=(1, 32), size=(256, 192), rounds=5):
    """For PA-100K's 26 attributes and the paper's scales, from random weights.

    Parameters in millions; GFLOPs as multiply-adds in convolutions and matrix products, by torch's
    own counter, at `size` and at 256x128; images/s in inference by batch size, the median of
    `rounds`.
    """
    rows = []
    for ple, backbone in progress(list(models), "model"):
        config = {"ple": ple, "groups": GROUPS_OF, "backbone": backbone, "afss": "group", "M": 3}
        config |= {"ratio": 0.75, "offsets": True, "prior": True, "channels": 256}
        model = build_model(config).to(device, memory_format=torch.channels_last).eval()
        if ple != "none":
            model.afss.scales = [PAPER_SCALES[g] for g in GROUPS_OF]
        row = {"ple": ple, "backbone": backbone, "paper": models[ple, backbone]}
        row["params"] = sum(p.numel() for p in model.parameters()) / 1e6
        with torch.inference_mode():
            for H, W in (size, (256, 128)):
                images, _, keypoints = batch(1, device, H, W)
                with FlopCounterMode(display=False) as counter:
                    model(images, keypoints)
                row[f"gflops_{H}x{W}"] = counter.get_total_flops() / 2e9
            for count in batches:
                images, _, keypoints = batch(count, device, *size)
                times = race({"run": partial(model, images, keypoints)}, rounds, device)
                row[f"images_per_second_{count}"] = count / statistics.median(times["run"])
        rows.append(row)
    return rows


def profile_lines(rows):
    """The profile beside the paper's figures, for people."""
    keys = [key for key in rows[0] if key.startswith(("gflops", "images"))]
    heads = "".join(f"{key.replace('_', ' '):>24}" for key in keys)
    lines = [f"{'':22}{'params (paper)':>20}{heads}   paper: GFLOPs, images/s"]
    for row in rows:
        name = f"{model_name(row['ple'])} {row['backbone']}"
        parameters = f"{row['params']:.2f} ({row['paper'][0]:.2f})"
        cells = "".join(f"{row[key]:24.2f}" for key in keys)
        lines.append(f"{name:22}{parameters:>20}{cells}   {row['paper'][1]:.2f}, {row['paper'][2]}")
    return lines


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu")
    add("--amp", action="store_true", help="bfloat16 autocast")
    add("--quick", action="store_true", help="batches of 8 instead of 32, four attributes")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--profile", action="store_true", help="Tab. 3's efficiency columns instead")
    add("--json", help="write the result to this file as well")
    args = parser.parse_args()
    args.device = use_device(args.device)
    args.batch, args.rounds = 8 if args.quick else 32, 3
    where = f"CPU, {torch.get_num_threads()} threads"
    if args.device != "cpu":
        where = torch.cuda.get_device_name()
    precision = "bf16 autocast" if args.amp else "float32"
    print(f"{where}, torch {torch.__version__}, batch {args.batch}, {precision}")
    rows = []
    if args.profile:
        rows = profile(args.device)
        print("\n".join(profile_lines(rows)))
        args.rows = []
    for name in progress(sorted(args.rows, key=list(ROWS).index), "row"):
        for title, reference, result in ROWS[name](args):
            rows.append({"row": title, "reference": reference, **result})
            print(text_of(title, result), flush=True)
    if args.json:
        about = {"device": where, "torch": str(torch.__version__), "batch": args.batch}
        write_json(args.json, {**about, "amp": args.amp, "rows": rows})


if __name__ == "__main__":
    command(main)
