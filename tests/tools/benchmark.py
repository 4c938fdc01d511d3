"""Speed as ratios, each against a named reference in the same run.

    python tests/tools/benchmark.py [--device cuda] [--amp] [--quick] [--rows ROW ...]
    python tests/tools/benchmark.py --profile    parameters, GFLOPs, images/s of Tab. 3

Each row times its candidates in turn, round after round, and reports the median over the rounds of
reference / ours (above 1: ours is faster) with the lowest and the highest round. The references
stand here in their plain form. Where a row says nothing else: ResNet50, 256x192, random weights,
synthetic images, and AFSS set to the paper's outcome (head P1, torso P2, bottom P2, all P3).
"""

import multiprocessing
import statistics
import sys
import time
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))

import data  # noqa: E402
import sspnet  # noqa: E402
import train  # noqa: E402
from evaluate import autocast, model_name  # noqa: E402
from sspnet import SSPNet, response_maps  # noqa: E402

PAPER_SCALES = {"head": 0, "torso": 1, "bottom": 1, "all": 2}  # what AFSS chose (Sec. 4.2)
GROUPS_OF = list(data.PA100K_GROUPS.values())
PLES = ("none", "R", "K", "S")
MODELS = [(ple, backbone) for backbone in ("resnet50", "swin_s") for ple in PLES]  # of Tab. 3


def race(candidates, rounds, device):
    """Times {name: function} in turn, `rounds` times after warming up -> {name: seconds}."""
    times = {name: [] for name in candidates}
    finish = torch.cuda.synchronize if device != "cpu" else lambda: None
    for _ in range(1 + rounds):
        for name, function in candidates.items():
            finish()
            started = time.perf_counter()
            function()
            finish()
            times[name].append(time.perf_counter() - started)
    return {name: seconds[1:] for name, seconds in times.items()}


def ratio(times, reference, ours):
    """The median of reference / ours over the rounds, with the lowest and the highest."""
    rounds = [a / b for a, b in zip(times[reference], times[ours], strict=True)]
    return f"{statistics.median(rounds):.2f}x ({min(rounds):.2f}-{max(rounds):.2f})"


def build(ple, device, selecting=False, backbone="resnet50"):
    torch.manual_seed(0)
    if ple == "none":
        model = sspnet.Baseline(GROUPS_OF, backbone)
    else:
        model = SSPNet(GROUPS_OF, ple, backbone)
        model.afss.scales = [PAPER_SCALES[group] for group in GROUPS_OF]
        model.afss.selecting = selecting
    return model.to(device, memory_format=torch.channels_last)


@cache  # drawn once for all rows and models
def batch(B, device, H=256, W=192):
    """Images (uint8), labels and keypoints of the synthetic set."""
    split = data.synthetic("test", images=B, size=(H, W))
    images, labels, keypoints, _ = next(iter(data.loader(data.Pedestrians(split, (H, W)), B)))
    images = images.to(device, memory_format=torch.channels_last)
    return images, labels.to(device), keypoints.to(device)


def stepper(model, B, device, amp):
    """A function that makes one training step of `train.py`, its weights' average excepted."""
    loss_of = sspnet.HierarchicalLoss(GROUPS_OF, torch.full((26,), 0.3)).to(device)
    groups = train.parameter_groups(model.train(), 1e-4)
    optimizer = torch.optim.Adam(groups, fused=device.startswith("cuda") or None)
    scaler = torch.amp.GradScaler(device.split(":")[0], enabled=False)
    state = {"model": model, "optimizer": optimizer, "scaler": scaler}
    return partial(train.train_step, state, model, loss_of, *batch(B, device), amp)


def grid_sample(x, points, W_m):
    """`sspnet.bilinear_sample` by torch's own operation."""
    place = (2 * points + 1) / torch.tensor([x.shape[3], x.shape[2]], device=x.device) - 1
    sampled = F.grid_sample(x, place, align_corners=False)  # (B, C, N, M)
    return (sampled * W_m[:, None]).sum(3).transpose(1, 2)


def beside_baseline(title, candidates, args):
    """Images/s, and as a share of the baseline's."""
    times = race(candidates, args.rounds + 2, args.device)
    for name, seconds in times.items():
        rate = args.batch / statistics.median(seconds)
        yield f"{title}, {name} / baseline", f"{ratio(times, 'none', name)}  {rate:.3g} images/s"


def row_inference(args):
    images, _, keypoints = batch(args.batch, args.device)

    @torch.inference_mode()
    def run(model):
        with autocast(args.device, args.amp):
            model(data.normalize(images), keypoints)

    candidates = {ple: partial(run, build(ple, args.device).eval()) for ple in PLES}
    yield from beside_baseline("inference", candidates, args)


def row_training(args):
    """A training step, AFSS selecting and frozen."""
    for state in ("frozen", "selecting"):
        steps = {}
        for ple in PLES:
            model = build(ple, args.device, state == "selecting")
            steps[ple] = stepper(model, args.batch, args.device, args.amp)
        yield from beside_baseline(f"training step, {state}", steps, args)


def both_ways(sample, x, points, W_m):
    torch.autograd.grad(sample(x, points, W_m).square().mean(), [x, points])


def row_sample(args):
    """Three offset points around each of PLE-S's, of the group head, forward and backward."""
    torch.manual_seed(0)
    for scale, (H, W) in enumerate(((64, 48), (32, 24), (16, 12)), 1):
        grid = sspnet.PLE_S().points("head", H, W, args.device).flatten(0, 1)
        x = torch.randn(args.batch, 256, H, W, device=args.device)
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        points = grid[:, None] + torch.randn(args.batch, len(grid), 3, 2, device=args.device)
        inputs = x, points.requires_grad_(), torch.rand(points.shape[:3], device=args.device)
        ways = {"plain": partial(both_ways, grid_sample, *inputs)}
        ways["ours"] = partial(both_ways, sspnet.bilinear_sample, *inputs)
        title = f"bilinear_sample, {len(grid)} x 3 points at P{scale}, both ways / F.grid_sample"
        yield title, ratio(race(ways, args.rounds, args.device), "plain", "ours")


def row_cam(args):
    """Grad-CAM-P of all attributes, beside inference, which localization has to make anyway."""
    model, (images, _, keypoints) = build("S", args.device).eval(), batch(8, args.device)
    images = data.normalize(images)
    ways = {"inference": partial(torch.inference_mode()(model), images, keypoints)}
    ways["maps"] = partial(response_maps, model, images, range(26), keypoints)
    yield "inference / Grad-CAM-P", ratio(race(ways, args.rounds, args.device), "inference", "maps")


def peak_of_a_step(ple, selecting, B, device, amp):
    """In a process of its own: the peak memory of two training steps, in bytes."""
    step = stepper(build(ple, device, selecting), B, device, amp)
    step()
    step()
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # Not getrusage's: a process inherits its parent's peak there.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def row_memory(args):
    """Peak memory of a training step."""
    baseline = None
    for name, ple in (("none", "none"), ("S frozen", "S"), ("S selecting", "S")):
        with multiprocessing.get_context("spawn").Pool(1) as process:
            given = ple, "selecting" in name, args.batch, args.device, args.amp
            peak = process.apply(peak_of_a_step, given)
        baseline = baseline or peak
        result = f"{peak / baseline:.2f}x  {peak / 2**30:.2f} GiB"
        yield f"peak memory of a training step, {name} / baseline", result


ROWS = {"inference": row_inference, "training": row_training, "sample": row_sample}
ROWS.update(cam=row_cam, memory=row_memory)


def profile(device, models=MODELS, batches=(1, 32), size=(256, 192), rounds=5):
    """A dict per model. Parameters in millions; GFLOPs: multiply-adds in convolutions and matrix
    products, by torch's own counter; images/s in inference, the median of `rounds`."""
    rows = []
    for ple, backbone in data.progress(models, "model"):
        model = build(ple, device, backbone=backbone).eval()
        row = {"model": f"{model_name(ple)} {backbone}"}
        row["parameters"] = sum(p.numel() for p in model.parameters()) / 1e6
        with torch.inference_mode():
            for H, W in (size, (256, 128)):
                images, _, keypoints = batch(1, device, H, W)
                with FlopCounterMode(display=False) as counter:
                    model(data.normalize(images), keypoints)
                row[f"GFLOPs {H}x{W}"] = counter.get_total_flops() / 2e9
            for count in batches:
                images, _, keypoints = batch(count, device, *size)
                run = partial(model, data.normalize(images), keypoints)
                times = race({"run": run}, rounds, device)
                row[f"images/s of {count}"] = count / statistics.median(times["run"])
        rows.append(row)
    return rows


def main():
    parser = data.make_parser(__doc__)
    add = parser.add_argument
    add("--device", default="cpu")
    add("--amp", action="store_const", const="bf16", help="bfloat16 autocast")
    add("--quick", action="store_true", help="batches of 8 instead of 32")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    add("--profile", action="store_true", help="Tab. 3's efficiency columns instead")
    args = parser.parse_args()
    args.device = data.use_device(args.device)
    args.batch, args.rounds = 8 if args.quick else 32, 3
    where = f"CPU, {torch.get_num_threads()} threads"
    if args.device != "cpu":
        where = torch.cuda.get_device_name()
    precision = "bf16 autocast" if args.amp else "float32"
    print(f"{where}, torch {torch.__version__}, batch {args.batch}, {precision}")
    if args.profile:
        rows = profile(args.device)
        print(" | ".join(rows[0]))
        for row in rows:
            print(" | ".join(v if isinstance(v, str) else f"{v:.2f}" for v in row.values()))
        return
    for name in data.progress(args.rows, "row"):
        for title, result in ROWS[name](args):
            print(f"{title:72} {result}", flush=True)


if __name__ == "__main__":
    data.command(main)
