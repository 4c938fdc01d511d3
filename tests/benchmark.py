"""Speed as ratios, each against a named reference in the same run: `python tests/benchmark.py [--device cuda] [--quick] [--json FILE]`.

Each row times its candidates in turn, round after round, and reports the median over the rounds of reference / ours (above 1:
ours is faster) with the lowest and highest round. The references stand here in their plain form. AFSS is set to the paper's
outcome (head P1, torso P2, bottom P2, all P3), ResNet50, 256x192, random weights and noise for images where a row says nothing else.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import PA100K_GROUPS, Table, keep_freed_memory, loader, normalize, show_progress, synthetic, write_json  # noqa: E402
from evaluate import TAB_3_SCALES, metrics  # noqa: E402
from localize import grad_cam_p, heatmaps  # noqa: E402
from sspnet import KEYPOINT_GROUPS, STRIDES, Baseline, HierarchicalLoss, OffsetSampling, PLE_K, PLE_S, SSPNet, prior_region  # noqa: E402
from train import parameter_groups  # noqa: E402

GROUPS_OF = list(PA100K_GROUPS.values())
# Where people's joints are on average, as shares of width and height: a benchmark on random points would read the whole map.
POSE = torch.tensor([[.42, .92], [.42, .74], [.43, .54], [.57, .54], [.58, .74], [.58, .92], [.5, .54], [.5, .22], [.5, .17], [.5, .05],
                     [.3, .5], [.32, .38], [.38, .23], [.62, .23], [.68, .38], [.7, .5]])


def race(candidates, rounds, device, warm_up=1):
    """Times {name: function} in turn, `rounds` times after some to warm up -> {name: seconds of each round}."""
    times = {name: [] for name in candidates}
    for _ in range(warm_up + rounds):
        for name, function in candidates.items():
            started = now(device)
            function()
            times[name].append(now(device) - started)
    return {name: seconds[warm_up:] for name, seconds in times.items()}


def now(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ratio(times, reference, ours):
    """{"ratio": median of reference / ours over the rounds, "low": ..., "high": ...}."""
    rounds = [a / b for a, b in zip(times[reference], times[ours])]
    return {"ratio": statistics.median(rounds), "low": min(rounds), "high": max(rounds), "seconds": statistics.median(times[ours]),
            "reference_seconds": statistics.median(times[reference])}


def build(ple, device="cpu", live=False, groups=GROUPS_OF, M=3):
    torch.manual_seed(0)
    model = Baseline(groups) if ple == "none" else SSPNet(groups, ple, M=M)
    if ple != "none":
        model.afss.selection.copy_(torch.tensor([TAB_3_SCALES[g] for g in groups]))
        model.afss.live = live
    return model.to(device, memory_format=torch.channels_last)


def batch(B, device="cpu", H=256, W=192, L=26):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(B, 3, H, W, generator=generator).to(device, memory_format=torch.channels_last)
    keypoints = POSE * torch.tensor([W, H]) + torch.randn(B, 16, 2, generator=generator) * 0.03 * H
    return images, (torch.rand(B, L, generator=generator) < 0.3).float().to(device), keypoints.to(device)


def stepper(model, B, device, amp=None, **size):
    """A function that makes one training step: forward, backward, clipping, Adam, AFSS's counts."""
    images, labels, keypoints = batch(B, device, **size)
    loss_of = HierarchicalLoss(model.afss.attribute_groups if hasattr(model, "afss") else GROUPS_OF, torch.full((labels.shape[1],), 0.3)).to(device)
    optimizer = torch.optim.Adam(parameter_groups(model.train(), 1e-4))

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=amp == "bf16"):
            logits = model(images, keypoints)
        loss = loss_of(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        if hasattr(model, "afss") and model.afss.live:
            model.afss.update(logits.detach(), labels)

    return step


# ---- the plain references ----


def dense_offsets(layers, x):
    """Offset features at every position of x: for each m, shift the whole grid, sample the map, project, weigh and add."""
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1)  # (B, H, W, C)
    offsets = layers.offsets(pixels).unflatten(-1, (layers.M, 2))
    weights = layers.offset_weights(pixels).softmax(-1)
    ys, xs = torch.meshgrid(torch.arange(H, device=x.device), torch.arange(W, device=x.device), indexing="ij")
    out = 0
    for m in range(layers.M):
        place = torch.stack([xs, ys], -1) + offsets[..., m, :]
        place = (2 * place + 1) / torch.tensor([W, H], device=x.device) - 1
        sampled = F.grid_sample(x, place, align_corners=False).permute(0, 2, 3, 1)
        out = out + weights[..., m, None] * layers.A(sampled)
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
            rows.append(dense[b, min(max(v, 0), x.shape[2] - 1), min(max(u, 0), x.shape[3] - 1)])
    return torch.stack(rows).view(len(x), -1, x.shape[1]).transpose(1, 2)


def cam_per_attribute(model, images, attributes):
    """Grad-CAM-P with a forward and a backward pass through the whole network for each attribute."""
    out = []
    for j in attributes:
        kept = {}
        smooth = model.fpn.smooth[model.map_of(j)]
        hook = smooth.register_forward_hook(lambda _, __, result: (result.retain_grad(), kept.update(A=result))[0])
        model.zero_grad()
        model.classify(model.features(images))[:, j].sum().backward()
        hook.remove()
        out.append((kept["A"].grad * kept["A"].detach()).sum(1).relu())
    return out


def numpy_metrics(scores, labels):
    """The five metrics in plain numpy."""
    predicted, true = scores > 0, labels > 0.5
    tp, tn = (predicted & true).sum(0), (~predicted & ~true).sum(0)
    mA = ((tp / true.sum(0) + tn / (~true).sum(0)) / 2).mean()
    both, either = (predicted & true).sum(1), (predicted | true).sum(1)
    accu, prec, rec = ((both / np.maximum(n, 1)).mean() for n in (either, predicted.sum(1), true.sum(1)))
    return [100 * v for v in (mA, accu, prec, rec, 2 * prec * rec / (prec + rec))]


# ---- the rows ----


def row_inference(args):
    """1. Inference, images/s as a share of the baseline's; on a CPU as in a program that imports the model, and with freed memory
    kept, as in the commands, which speeds up all alike but saves the baseline the greater share of its time."""
    images, _, keypoints = batch(args.batch, args.device)
    models = {name: build(name, args.device).eval() for name in ("none", "R", "K", "S")}
    if args.compile:
        models.update({f"{name} compiled": torch.compile(build(name, args.device).eval()) for name in ("none", "S")})

    @torch.inference_mode()
    def run(model):
        with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
            model(images, keypoints)

    for kept in ("", ", freed memory kept") if args.device == "cpu" else ("",):
        if kept:
            keep_freed_memory()
        times = race({name: lambda model=model: run(model) for name, model in models.items()}, args.rounds + 2, args.device)
        for name in times:
            result = {**ratio(times, "none", name), "images_per_second": args.batch / statistics.median(times[name])}
            yield f"1. inference{kept}, {name} : baseline", "baseline", result


def row_training(args):
    """2. A training step, images/s as a share of the baseline's; AFSS live and frozen."""
    amp = "bf16" if args.amp else None
    for state in ("frozen", "live"):
        steps = {ple: stepper(build(ple, args.device, state == "live"), args.batch, args.device, amp) for ple in ("none", "R", "K", "S")}
        times = race(steps, args.rounds + 2, args.device)
        for name in times:
            result = {**ratio(times, "none", name), "images_per_second": args.batch / statistics.median(times[name])}
            yield f"2. training step, AFSS {state}, {name} : baseline", "baseline", result
    # AFSS's own part of the live step: counting, and once an epoch the choice.
    afss, (_, labels, _) = build("S", args.device, True).afss, batch(args.batch, args.device)
    logits = torch.randn(3, args.batch, 26, device=args.device)
    own = race({"update": lambda: [afss.update(logits, labels) for _ in range(100)], "select": lambda: afss.select()}, args.rounds, args.device)
    share = statistics.median(own["update"]) / 100 / statistics.median(times["S"])
    yield "6. AFSS's counts, share of a live step", "live step", {"share": share, "select_seconds": statistics.median(own["select"])}


def row_ple(args):
    """3. and 4. PLE-S and PLE-K, forward and backward, against the dense map first."""
    torch.manual_seed(0)
    B = args.batch
    for title, groups in (("3. PLE-S", ("head", "torso", "bottom", "all")), ("4. PLE-K", ("head", "all"))):
        ple = (PLE_S() if "S" in title else PLE_K()).to(args.device)
        torch.nn.init.normal_(ple.sample.offsets.weight, std=0.05)
        for scale, (H, W) in enumerate(((64, 48), (32, 24), (16, 12))):
            x = torch.randn(B, 256, H, W, device=args.device).to(memory_format=torch.channels_last).requires_grad_()
            keypoints = batch(B, args.device)[2] / STRIDES[scale]
            for group in groups:
                plain, ours = (((lambda: dense_ple_s(ple, x, group)), (lambda: ple(x, group))) if "S" in title else
                               ((lambda: dense_ple_k(ple, x, group, keypoints)), (lambda: ple(x, group, keypoints))))

                def both_ways(function):
                    ple.zero_grad()
                    x.grad = None
                    function().square().mean().backward()

                times = race({"plain": lambda: both_ways(plain), "ours": lambda: both_ways(ours)}, args.rounds, args.device)
                yield f"{title}, {group} at P{scale + 1}, forward and backward", "dense map first", ratio(times, "plain", "ours")


def row_cam(args):
    """5. Grad-CAM-P of all attributes of 16 images."""
    model, (images, _, keypoints) = build("S", args.device).eval(), batch(16, args.device)
    attributes = list(range(26)) if not args.quick else [0, 7, 13, 22]
    plain, ours = [], []
    once = args.device == "cpu"  # the reference takes minutes there: warmed up on one attribute
    cam_per_attribute(model, images, attributes[:1])
    times = race({"plain": lambda: plain.append(cam_per_attribute(model, images, attributes)),
                  "ours": lambda: ours.append(heatmaps(model, images, attributes, keypoints, grad_cam_p)[1])},
                 1 if once else args.rounds, args.device, 0 if once else 1)
    worst = max(((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item() for a, b in zip(plain[-1], ours[-1]))
    yield (f"5. Grad-CAM-P, {len(attributes)} attributes, 16 images", "a pass per attribute",
           {**ratio(times, "plain", "ours"), "largest_difference": worst})


def row_metrics(args):
    """6. The five metrics."""
    random = np.random.default_rng(0)
    scores, labels = random.normal(size=(90_000, 26)).astype(np.float32), (random.random((90_000, 26)) < 0.2).astype(np.float32)
    tensors = torch.from_numpy(scores), torch.from_numpy(labels)
    times = race({"plain": lambda: numpy_metrics(scores, labels), "ours": lambda: metrics(*tensors)}, args.rounds, "cpu")
    ours = metrics(*tensors)
    worst = max(abs(a - ours[name]) for a, name in zip(numpy_metrics(scores, labels), ("mA", "Accu", "Prec", "Rec", "F1")))
    yield "6. five metrics, 90,000 x 26", "numpy", {**ratio(times, "plain", "ours"), "largest_difference": worst}


def row_input(args):
    """7. Images from JPEG files, and the wait for them in training."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = synthetic("train", count=16 * args.batch if not args.quick else 4 * args.batch, size=(256, 128))
        files = [Path(folder) / f"{name}.jpg" for name in drawn.names]
        for file, picture in zip(files, drawn.images):
            Image.fromarray(picture).save(file, quality=90)
        table = Table("jpeg", drawn.attributes, drawn.groups, drawn.names, files, drawn.labels, drawn.keypoints)

        def bare():
            for file in files:
                np.asarray(Image.open(file).convert("RGB").resize((192, 256), Image.Resampling.BILINEAR))

        def pipeline(workers):
            for _ in loader(table, (256, 192), args.batch, train=True, workers=workers, device=args.device):
                pass

        times = race({"bare": bare, "0": lambda: pipeline(0), "1": lambda: pipeline(1), "2": lambda: pipeline(2)}, max(1, args.rounds // 2), args.device)
        for workers in "012":
            yield (f"7. input pipeline, {workers} workers", "bare decode and resize",
                   {**ratio(times, "bare", workers), "images_per_second": len(files) / statistics.median(times[workers])})
        model, waited, started = build("S", args.device).train(), 0.0, now(args.device)
        optimizer, loss_of = torch.optim.Adam(model.parameters(), 1e-4), HierarchicalLoss(GROUPS_OF, torch.full((26,), 0.3)).to(args.device)
        batches = iter(loader(table, (256, 192), args.batch, train=True, workers=2, device=args.device))
        for step in range(4 if args.device == "cpu" else 16):
            before = now(args.device)
            images, labels, keypoints, _ = next(batches, (None,) * 4)
            if images is None:
                break
            waited += now(args.device) - before
            with torch.autocast(args.device, torch.bfloat16, enabled=args.amp):
                logits = model(images.to(args.device, memory_format=torch.channels_last), keypoints.to(args.device))
            optimizer.zero_grad()
            loss_of(logits.float(), labels.to(args.device)).backward()
            optimizer.step()
        yield "7. waiting for data, share of a training epoch, 2 workers", "epoch", {"share": waited / (now(args.device) - started)}


def alone(args, *arguments):
    """Seconds and peak bytes of a training step and an inference, each measured in a process of its own."""
    command = [sys.executable, __file__, "--device", args.device, *(["--amp"] if args.amp else []), "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def one(args):
    """The process of `alone`: `--one PLE live|frozen BATCH H W M ATTRIBUTES`."""
    ple, live = args.one[0], args.one[1] == "live"
    B, H, W, M, L = map(int, args.one[2:])
    groups = (GROUPS_OF * (L // 26 + 1))[:L]
    model = build(ple, args.device, live, groups, M)
    step = stepper(model, B, args.device, "bf16" if args.amp else None, H=H, W=W, L=L) if ple != "none" or L == 26 else None
    images, _, keypoints = batch(B, args.device, H, W, L)
    seconds = race({"step": step}, 2, args.device)["step"]
    peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else peak_of_process()
    model.eval()
    with torch.inference_mode():
        inference = race({"inference": lambda: model(images, keypoints)}, 2, args.device)["inference"]
    print(json.dumps({"step_seconds": min(seconds), "inference_seconds": min(inference), "peak_bytes": peak}))


def peak_of_process():
    """Bytes; getrusage's figure would include what the parent process held when it started this one."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])


def row_memory(args):
    """8. Peak memory of a training step, each in a process of its own."""
    found = {name: alone(args, ple, live, args.batch, 256, 192, 3, 26) for name, ple, live in (
        ("none", "none", "frozen"), ("S frozen", "S", "frozen"), ("S live", "S", "live"))}
    for name, result in found.items():
        if "failed" not in result:
            result = {**result, "ratio": result["peak_bytes"] / found["none"]["peak_bytes"]}
        yield f"8. peak memory of a training step, {name}", "baseline", result


def row_growth(args):
    """How time and memory grow with batch, pixels, M and attributes."""
    base = (4, 256, 192, 3, 26)
    changes = ([(B, *base[1:]) for B in (1, 4, 16, 64)] + [(4, H, W, 3, 26) for H, W in ((384, 288), (512, 384))]
               + [(4, 256, 192, M, 26) for M in (1, 2, 8)] + [(4, 256, 192, 3, L) for L in (100, 500)])
    for B, H, W, M, L in changes[:4] if args.quick else changes:
        yield f"growth: batch {B}, {H}x{W}, M {M}, {L} attributes", "", alone(args, "S", "frozen", B, H, W, M, L)


ROWS = {"inference": row_inference, "training": row_training, "ple": row_ple, "cam": row_cam, "metrics": row_metrics, "input": row_input,
        "memory": row_memory, "growth": row_growth}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile's inference as well")
    parser.add_argument("--quick", action="store_true", help="batches of 8 instead of 32, four attributes instead of 26")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--json", help="write the result to this file as well")
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.batch, args.rounds = (8, 3) if args.quick else (32, 3)
    args.rows.sort(key=list(ROWS).index)
    if args.one:
        keep_freed_memory()
        return one(args)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}, batch {args.batch}, {'bf16 autocast' if args.amp else 'float32'}")
    results, started = [], time.time()
    for done, name in enumerate(args.rows, 1):
        if name != "inference":
            keep_freed_memory()  # as the commands do
        for title, reference, result in ROWS[name](args):
            results.append({"row": title, "reference": reference, **result})
            text = f"{result['ratio']:.2f}x" if "ratio" in result else f"{100 * result['share']:.2f}%" if "share" in result else ""
            text += f" ({result['low']:.2f}-{result['high']:.2f})" if "low" in result else ""
            more = [f"{result[key]:.{digits}{kind}}{unit}" for key, digits, kind, unit in (
                ("images_per_second", 1, "f", " images/s"), ("largest_difference", 1, "e", " largest difference"),
                ("step_seconds", 2, "f", " s a step"), ("inference_seconds", 3, "f", " s inference")) if key in result]
            more += [f"{result['peak_bytes'] / 2**30:.2f} GiB"] if "peak_bytes" in result else []
            more += [f"failed: {result['failed']}"] if "failed" in result else []
            print(f"{title:58} {text:22} {', '.join(more)}", flush=True)
        show_progress(f"{done}/{len(args.rows)} rows", done, len(args.rows), started)
    if args.json:
        write_json(args.json, {"device": where, "torch": torch.__version__, "batch": args.batch, "amp": args.amp, "rows": results})


if __name__ == "__main__":
    main()
