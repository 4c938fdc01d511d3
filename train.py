"""Training (Sec. 4): `python train.py --ple S` trains on drawn pedestrians, `--data FOLDER` on
PA-100K.

Writes to --out: last.pt at the start and after every epoch (all that --resume needs), best.pt (the
averaged weights of the epoch with the highest mA on the validation split; the test split is never
looked at) and log.csv, one row per epoch.

    torchrun --nproc-per-node 4 train.py --data FOLDER    four processes share each batch
"""

import argparse
import copy
import csv
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR, ReduceLROnPlateau

import data
import evaluate
from evaluate import METRICS, autocast, group_means, metrics, model_name, predict
from sspnet import GROUPS, SCALES, Backbone, HierarchicalLoss, OffsetSampling, SSPNet, build_model

# The paper's recipe (Sec. 4), completed from the Strong Baseline where the paper is silent.
RECIPE = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "size": (256, 192),  # H, W
    "channels": 256,  # of the pyramid
    "epochs": 30,
    "batch_size": 32,
    "lr": 1e-4,
    "schedule": "plateau",  # "step" without a validation split, see `make_scheduler`
    "freeze": 0,  # AFSS keeps selecting to the end
}
# Drawn pedestrians from random weights: minutes on two CPU cores.
SYNTHETIC_RECIPE = {
    "backbone": "resnet18",
    "weights": "none",
    "size": (128, 96),
    "channels": 128,
    "epochs": 6,
    "batch_size": 16,
    "lr": 1e-3,
    "schedule": "onecycle",  # a short run has no time for a plateau
    "freeze": 3,  # from then on only the selected scales are computed
}
WEIGHT_DECAY = 5e-4
GRADIENT_NORM = 10
EMA_DECAY = 0.9998
OFFSET_LR = 0.1  # of the learning rate, for the layer that predicts offsets and their weights:
# at the full rate points leave the map, and one weight takes all
LOSSES_READ = 50  # steps between two looks at the losses on a GPU, which has to finish for each

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# A resumed run must be given the same values of these.
RESUME_KEYS = (
    *("ple", *data.DATA_KEYS, "train_split", "images", "backbone", "weights", "size", "channels"),
    *("epochs", "batch_size", "lr", "schedule", "afss", "freeze", "M", "ratio", "offsets", "prior"),
    *("seed", "amp"),
)


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="What has no default here comes from RECIPE, or SYNTHETIC_RECIPE, in train.py.",
    )
    add = parser.add_argument
    ples, modes = ["R", "K", "S", "none"], ["group", "attribute", *SCALES]
    add("--ple", default="S", choices=ples, help="prior location (default S); none: the baseline")
    data.add_dataset_arguments(parser)  # synthetic by default, pa100k where --data is given
    splits = ["train", "trainval"]
    add("--train-split", choices=splits, help="with trainval the last epoch counts as the best")
    add("--afss", default="group", choices=modes, help="AFSS, AFSS* of Tab. 1, or a fixed scale")
    add("--freeze", type=int, metavar="EPOCHS", help="keep AFSS's choice from then on; 0: never")
    add("--M", type=int, default=3, help="offset points per prior point (Fig. 5)")
    add("--ratio", type=float, default=0.75, help="fraction of points that PLE-S samples (Fig. 6)")
    add("--no-offsets", dest="offsets", action="store_false", help="Tab. 2 without offset points")
    add("--no-prior", dest="prior", action="store_false", help="Tab. 2 without spatial prior")
    add("--backbone", choices=Backbone.names, help="of torchvision")
    add("--weights", help="of the backbone: imagenet, none, or a torchvision state dict file")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="of the model's input")
    add("--channels", type=int, help="of the feature pyramid")
    add("--epochs", type=int, help="how many epochs to train")
    add("--batch-size", type=int, help="images per step, of all processes together")
    add("--lr", type=float, help="the learning rate at its highest")
    add("--schedule", choices=["plateau", "onecycle", "step"], help="the learning rate's course")
    add("--seed", type=int, default=0, help="of weights, order and augmentation (default 0)")
    add("--amp", choices=["bf16", "fp16"], help="automatic mixed precision")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--out", help="folder; default runs/DATASET-PLE")
    add("--resume", action="store_true", help="continue from last.pt in --out")
    add("--workers", type=int, help="processes that load images")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=device, help="cpu, cuda or cuda:N (default here: %(default)s)")
    args = parser.parse_args(argv)
    args.dataset = args.dataset or ("pa100k" if args.data else "synthetic")
    without_validation = args.dataset in data.WITHOUT_VALIDATION
    args.train_split = args.train_split or ("trainval" if without_validation else "train")
    for key, value in (SYNTHETIC_RECIPE if args.dataset == "synthetic" else RECIPE).items():
        if getattr(args, key) is None:
            without = key == "schedule" and value == "plateau" and args.train_split == "trainval"
            setattr(args, key, "step" if without else value)
    args.size = tuple(args.size)
    args.out = Path(args.out or f"runs/{args.dataset}-{args.ple}")
    if args.workers is None:
        args.workers = 0 if args.dataset == "synthetic" else 2
    check_arguments(args)
    return args


def check_arguments(args):
    """Refuses what is out of range."""
    data.check_lowest(args, epochs=1, channels=1, batch_size=2, M=1, freeze=0)
    low, high, size = min(args.size), max(args.size), "{} {}".format(*args.size)
    ranges = (
        (0 < args.ratio <= 1, f"--ratio {args.ratio}: expected more than 0, at most 1"),
        (0 < args.lr < math.inf, f"--lr {args.lr}: expected a positive number"),
        (0 <= args.seed < 2**31, f"--seed {args.seed}: expected 0 to {2**31 - 1}"),
        (32 <= low <= high <= 4096, f"--size {size}: expected 32 to 4096"),
    )
    for holds, message in ranges:
        if not holds:
            raise ValueError(message)
    if args.batch_size % WORLD_SIZE:
        expected = f"a multiple of {WORLD_SIZE} processes"
        raise ValueError(f"--batch-size {args.batch_size}: expected {expected}")
    if args.schedule == "plateau" and args.train_split == "trainval":
        raise ValueError("--schedule plateau: needs a validation split, expected step or onecycle")


def print_rank0(line):
    if RANK == 0:
        print(line, flush=True)


# ---- What a step needs


def make_model(config, args):
    """The model of a config, on the device; the backbone's weights are read unless resuming."""
    weights = None if args.resume or args.weights == "none" else args.weights
    torch.manual_seed(args.seed)
    try:
        model = build_model(config, weights)
    except OSError as error:  # urllib's errors are OSErrors
        hint = "give --weights none to train from random weights, or --weights FILE"
        reason = f"torchvision could not fetch them ({error})"
        raise ValueError(f"--weights imagenet: {reason}; {hint}") from None
    return model.to(args.device, memory_format=torch.channels_last)


def parameter_groups(model, lr):
    """Adam's groups: everything at `lr`, what predicts offsets and their weights at a tenth."""
    slow, rest = [], []
    for name, parameter in model.named_parameters():
        (slow if name.startswith("ple.sample.predict.") else rest).append(parameter)
    groups = [{"params": rest, "lr": lr}, {"params": slow, "lr": lr * OFFSET_LR}]
    return groups if slow else groups[:1]


def make_scheduler(args, optimizer, steps_per_epoch):
    """The learning rate's course.

    plateau: x0.1 after 4 epochs without a lower validation loss. step: x0.1 after 60% and 85% of
    the epochs, where there is no validation split to watch (the training loss hardly ever rises).
    onecycle: up and down again, step by step.
    """
    if args.schedule == "onecycle":
        rates = [group["lr"] for group in optimizer.param_groups]
        return OneCycleLR(optimizer, rates, total_steps=args.epochs * steps_per_epoch)
    if args.schedule == "step":
        milestones = [max(1, round(share * args.epochs)) for share in (0.6, 0.85)]
        return MultiStepLR(optimizer, milestones, gamma=0.1)
    return ReduceLROnPlateau(optimizer, factor=0.1, patience=4)


@torch.no_grad()
def update_ema(ema, model, steps):
    """Exponential moving average of weights and batch-norm statistics after `steps` steps.

    Its decay is warmed up, so that short runs forget their start. Stays on the device.
    """
    decay = min(EMA_DECAY, (1 + steps) / (10 + steps))
    old = [*ema.parameters(), *ema.buffers()]
    new = [*model.parameters(), *model.buffers()]
    floats = [i for i, tensor in enumerate(old) if tensor.dtype == torch.float32]
    others = [i for i, tensor in enumerate(old) if tensor.dtype != torch.float32]
    torch._foreach_lerp_([old[i] for i in floats], [new[i] for i in floats], 1 - decay)
    torch._foreach_copy_([old[i] for i in others], [new[i] for i in others])


def record_offsets(model):
    """A list to which every forward pass in training adds its mean |dP_m|, in map pixels."""
    lengths = []

    def hook(predict, inputs, predicted):
        if predict.training:
            M = predicted.shape[-1] // 3
            offsets = predicted.detach()[..., : 2 * M].float().unflatten(-1, (M, 2))
            lengths.append(offsets.norm(dim=-1).mean())

    for module in model.modules():
        if isinstance(module, OffsetSampling):
            module.predict.register_forward_hook(hook)
    return lengths


def read_losses(unread, epoch, split):
    """The losses of (loss, step, learning rate, indices) as numbers; stops at one not finite."""
    losses = torch.stack([loss for loss, *_ in unread]).tolist()
    for loss, (_, step, lr, indices) in zip(losses, unread, strict=True):
        if not math.isfinite(loss):
            names = " ".join(split.names[i] for i in indices)
            raise ValueError(
                f"epoch {epoch + 1}, step {step + 1}: the loss is {loss}, expected a finite number "
                f"(learning rate {lr:g}, images {names})"
            )
    return losses


# ---- An epoch


def train_one_epoch(epoch, state, network, loss_of, batches, args, run):
    """One epoch; returns its mean loss. `network` is the model, perhaps wrapped; `run` says since
    when, and from which epoch on, this process trains."""
    model, optimizer, scaler = state["model"].train(), state["optimizer"], state["scaler"]
    selecting = isinstance(model, SSPNet) and model.afss.selecting
    torch.manual_seed((args.seed * 1_000_003 + epoch) * 1_009 + RANK)  # the same after a resume
    data.start_epoch(batches, epoch)
    losses, unread = [], []
    for step, (images, labels, keypoints, indices) in enumerate(batches):
        images = images.to(args.device, non_blocking=True, memory_format=torch.channels_last)
        labels = labels.to(args.device, non_blocking=True)
        keypoints = keypoints.to(args.device, non_blocking=True)
        with autocast(args.device, args.amp):
            logits = network(images, keypoints)  # (S, B, L)
        loss = loss_of(logits.float(), labels)

        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_NORM)
        scaler.step(optimizer)
        scaler.update()
        unread.append((loss.detach(), step, optimizer.param_groups[0]["lr"], indices))
        if args.schedule == "onecycle":
            state["scheduler"].step()
        update_ema(state["ema"], model, epoch * len(batches) + step + 1)
        if selecting:
            model.afss.update(logits.detach(), labels)

        if len(unread) == LOSSES_READ or step + 1 == len(batches) or args.device == "cpu":
            losses += read_losses(unread, epoch, batches.dataset.split)
            unread.clear()
        if RANK == 0:
            text = f"epoch {epoch + 1}/{args.epochs}  step {step + 1}/{len(batches)}"
            done = (epoch - run["first"]) * len(batches) + step + 1
            whole = (args.epochs - run["first"]) * len(batches)
            data.show_progress(text, done, whole, run["started"])
    total = torch.tensor(sum(losses) / len(losses), device=args.device)
    if WORLD_SIZE > 1:
        dist.all_reduce(total)
    return total.item() / WORLD_SIZE


def select_scales(model, ema, groups):
    """Eq. 4 from the counts of the whole epoch; returns the mA of each group and scale."""
    if WORLD_SIZE > 1:
        dist.all_reduce(model.afss.counts)
    mA = 100 * model.afss.select()  # (S, L)
    ema.afss.scales = list(model.afss.scales)
    columns = {}
    for s, scale in enumerate(SCALES):
        for group, value in group_means(mA[s], groups).items():
            columns[f"{group}_{scale}"] = value
    return columns


def validate(ema, batches, loss_of, args):
    """The five metrics of the averaged weights on the validation split, and the loss."""
    logits, labels = predict(ema, batches, args.device, args.amp)
    if WORLD_SIZE > 1:
        shares = [None] * WORLD_SIZE
        dist.all_gather_object(shares, (logits, labels))
        logits, labels = (torch.cat(parts) for parts in zip(*shares, strict=True))
    loss = loss_of(logits.to(args.device), labels.to(args.device)).item()
    return metrics(logits, labels), loss


# ---- Files


def check_files(args):
    """Refuses an --out that would lose something or could not be written, and absent files.

    Returns the checkpoint to resume from, or None.
    """
    checkpoint = evaluate.read_checkpoint(args.out / "last.pt") if args.resume else None
    if args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {args.out}: this is a file, expected a folder")
    for name in ("last.pt", "best.pt", "log.csv"):
        for file in (args.out / name, args.out / f"{name}.tmp"):
            if file.is_dir():
                raise ValueError(f"{file}: this is a folder, expected a file")
        if (args.out / name).exists() and not args.resume:
            hint = "give --resume to continue it, or another --out"
            raise ValueError(f"{args.out / name}: a training is here already: {hint}")
    own_weights = not args.resume and args.weights not in ("none", "imagenet")
    if own_weights and not Path(args.weights).is_file():
        raise ValueError(f"--weights {args.weights}: no such file, expected imagenet, none or it")
    return checkpoint


def save(file, value):
    """Writes a checkpoint that is always whole."""
    if RANK:
        return
    try:
        with data.replacing(file) as temporary:
            torch.save(value, temporary)
    except (OSError, RuntimeError) as error:  # of a full disk torch's writer says RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise OSError(f"{file}: could not be written ({reason}); an earlier one is kept") from None


def write_log(file, rows):
    """log.csv: one row per epoch, empty where an epoch measures nothing."""
    if RANK:
        return
    names = ["epoch", "lr", "loss", *(f"val_{name}" for name in METRICS)]
    names += [f"scale_{group}" for group in GROUPS]
    names += [f"{group}_{scale}" for scale in SCALES for group in GROUPS]
    with data.replacing(file) as temporary, open(temporary, "w", newline="") as out:
        writer = csv.DictWriter(out, [*names, "offset_px", "seconds"])
        writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(cells)


def describe(row):
    """An epoch's row as a line for people."""
    line = f"epoch {row['epoch']}: loss {row['loss']:.3f}"
    if "val_mA" in row:
        line += "  val " + "  ".join(f"{name} {row[f'val_{name}']:.2f}" for name in METRICS)
    scales = [f"{group} {row[f'scale_{group}']}" for group in GROUPS if f"scale_{group}" in row]
    if scales:
        line += "  scales " + ", ".join(scales)
    if "offset_px" in row:
        line += f"  offsets {row['offset_px']:.2f} px"
    return f"{line}  {row['seconds']:.0f} s"


def restore(state, config, checkpoint, file):
    """Loads the content of last.pt into `state`; returns its epoch, best mA and log rows."""
    for key in (*RESUME_KEYS, "attributes", "digest"):
        was, now = checkpoint["config"].get(key), config[key]
        if was != now:
            what = f"{key} {was}, not {now}" if key in RESUME_KEYS else f"other images ({key})"
            raise ValueError(f"{file}: was trained with {what}: resume with its own arguments")
    try:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        return checkpoint["epoch"], checkpoint["best"], list(checkpoint["rows"])
    except Exception as error:  # whatever a damaged or foreign file makes them raise
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{file}: cannot be resumed ({type(error).__name__}: {reason})") from None


@contextmanager
def resumable(run, args):
    """Says how to resume when a signal or an error stops the training."""

    def stop(number, _):
        raise SystemExit(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    earlier = [signal.signal(number, stop) for number in numbers]
    last = args.out / "last.pt"
    try:
        yield
    except (SystemExit, ValueError, OSError, RuntimeError) as error:
        hint = f"epoch {run['saved']} of {args.epochs} is in {last}, add --resume to continue"
        if isinstance(error, SystemExit):
            if RANK == 0:
                print(f"\ninterrupted: {hint}", file=sys.stderr)
            raise
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        line = str(error).strip().splitlines()[-1]
        if isinstance(error, RuntimeError):
            line = f"a process that loads images died ({str(error).splitlines()[0]})"
        raise ValueError(f"{line}; {hint}") from None
    finally:
        for number, handler in zip(numbers, earlier, strict=True):
            signal.signal(number, handler)


# ---- The training


def open_splits(args, config):
    """Loaders of the training and the validation split (or None); completes the config."""
    splits = {args.train_split: data.open_split(config, args.train_split)}
    if args.train_split == "train":
        splits["val"] = data.open_split(config, "val")
    train = splits[args.train_split]
    least = {args.train_split: args.batch_size if WORLD_SIZE > 1 else 2, "val": WORLD_SIZE}
    for name, split in splits.items():
        if len(split.names) < least[name]:
            count = len(split.names)
            raise ValueError(f"{split.name}: {count} images, expected at least {least[name]}")
        if split.attributes != train.attributes:
            raise ValueError(f"{split.name}: its attributes are not those of {train.name}")
    config.update(attributes=train.attributes, groups=train.groups)
    config["digest"] = data.digest(name for split in splits.values() for name in split.names)
    common = {"size": args.size, "batch_size": args.batch_size, "seed": args.seed}
    common.update(workers=args.workers, device=args.device, rank=RANK, ranks=WORLD_SIZE)
    batches, validation = data.loader(train, train=True, **common), splits.get("val")
    return batches, validation and data.loader(validation, **common)


def print_header(split, batches, args):
    where = args.device if WORLD_SIZE == 1 else f"{args.device} x {WORLD_SIZE}"
    print_rank0(
        f"{split.name}: {len(split.names)} images, {len(split.attributes)} attributes; "
        f"{model_name(args.ple)}, {args.backbone}, {args.size[0]}x{args.size[1]}, "
        f"{args.epochs} epochs of {len(batches)} steps, {where}, to {args.out}"
    )
    ratios = split.labels.mean(0)
    constant = [a for a, r in zip(split.attributes, ratios, strict=True) if r in (0, 1)]
    if constant:
        names = ", ".join(constant)
        print_rank0(f"nothing to learn, all positive or all negative in training: {names}")


def wrap(model, args):
    """The model as it is called in training: compiled, and averaging gradients over processes.

    Of batch norm's statistics rank 0's count. Once AFSS's choice is frozen or fixed, the pyramid's
    convolutions of other scales are unused.
    """
    network = torch.compile(model, dynamic=False) if args.compile else model  # all batches alike
    if WORLD_SIZE == 1:
        return network
    unused = isinstance(model, SSPNet) and not model.afss.selecting
    unused = unused and set(model.afss.scales) != {0, 1, 2}
    return DistributedDataParallel(network, broadcast_buffers=False, find_unused_parameters=unused)


def train_to_the_end(state, batches, val_batches, args, config, run, rows):
    """The loop over epochs: train, let AFSS select, validate the averaged weights, save."""
    model, ema = state["model"], state["ema"]
    lengths = record_offsets(model)
    network = None
    split = batches.dataset.split
    loss_of = HierarchicalLoss(split.groups, torch.from_numpy(split.labels.mean(0)))
    loss_of = loss_of.to(args.device)
    for epoch in range(run["first"], args.epochs):
        started = time.time()
        freezes = isinstance(model, SSPNet) and args.freeze and epoch >= args.freeze
        if freezes and model.afss.selecting:
            model.afss.selecting, network = False, None
        network = network or wrap(model, args)
        loss = train_one_epoch(epoch, state, network, loss_of, batches, args, run)
        row = {"epoch": epoch + 1, "lr": state["optimizer"].param_groups[0]["lr"], "loss": loss}
        if isinstance(model, SSPNet):
            if model.afss.selecting:
                row.update(select_scales(model, ema, config["groups"]))
            for group in set(config["groups"]):
                pairs = zip(model.afss.scales, config["groups"], strict=True)
                chosen = sorted({SCALES[s] for s, g in pairs if g == group})
                row[f"scale_{group}"] = "+".join(chosen)
        if lengths:
            row["offset_px"] = torch.stack(lengths).mean().item()
            lengths.clear()
        if WORLD_SIZE > 1:
            for buffer in ema.buffers():
                dist.broadcast(buffer, 0)

        score, val_loss = math.inf, loss  # without a validation split the latest epoch is the best
        if val_batches:
            result, val_loss = validate(ema, val_batches, loss_of, args)
            row.update({f"val_{name}": result[name] for name in METRICS})
            score = result["mA"]
        if args.schedule == "plateau":
            state["scheduler"].step(val_loss)
        elif args.schedule == "step":
            state["scheduler"].step()
        row["seconds"] = time.time() - started
        rows.append(row)
        common = {"config": config, "epoch": epoch + 1, **evaluate.provenance()}
        if not score < run["best"]:
            run["best"] = score
            save(args.out / "best.pt", {**common, "ema": ema.state_dict()})
        save_last(state, common, run, rows, args)
        write_log(args.out / "log.csv", rows)
        print_rank0(describe(row))


def save_last(state, common, run, rows, args):
    """Everything that changes while training, for --resume."""
    parts = {name: part.state_dict() for name, part in state.items()}
    save(args.out / "last.pt", {**common, **parts, "best": run["best"], "rows": rows})
    run["saved"] = common["epoch"]


def main(argv=None):
    args = parse_arguments(argv)
    checkpoint = check_files(args)
    args.device = data.set_up_device(args.device)
    config = {key: getattr(args, key) for key in RESUME_KEYS}
    config["size"] = list(args.size)
    batches, val_batches = open_splits(args, config)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")

    model = make_model(config, args)
    groups = parameter_groups(model, args.lr)
    fused = args.device.startswith("cuda")
    optimizer = torch.optim.Adam(groups, weight_decay=WEIGHT_DECAY, fused=fused)
    state = {
        "model": model,
        "ema": copy.deepcopy(model),
        "optimizer": optimizer,
        "scheduler": make_scheduler(args, optimizer, len(batches)),
        "scaler": torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16"),
    }
    first, best, rows = 0, -math.inf, []
    if args.resume:
        first, best, rows = restore(state, config, checkpoint, args.out / "last.pt")
    run = {"first": first, "saved": first, "best": best, "started": time.time()}
    print_header(batches.dataset.split, batches, args)
    if not args.resume and RANK == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        open(args.out / "log.csv", "x").close()  # refuses where another run starts just now
        common = {"config": config, "epoch": 0, **evaluate.provenance()}
        save_last(state, common, run, rows, args)
    with resumable(run, args):
        train_to_the_end(state, batches, val_batches, args, config, run, rows)
    best = args.out / "best.pt"
    if RANK == 0 and not best.exists():
        raise ValueError(f"{best}: is gone, though all {args.epochs} epochs are done")
    print_rank0(f"done: {best}" + (f", val mA {run['best']:.2f}" if val_batches else ""))
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    data.command(main)
