"""Training, Sec. 4: `python train.py --ple S` trains on drawn pedestrians; see README.md for PA-100K.

Writes to --out: `last.pt` at the start and after every epoch (all that --resume needs), `best.pt` (the weights of the epoch
with the highest mA on the validation split; the test split is never looked at) and `log.csv`, a row per epoch.

    torchrun --nproc-per-node 4 train.py --data FOLDER       several processes ("ranks") share each batch: the same recipe
"""

import argparse
import csv
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from data import WITHOUT_VALIDATION, add_dataset_arguments, command, loader, show_progress, start_epoch
from evaluate import METRICS, SOURCE, autocast, build_model, group_means, metrics, model_name, open_dataset, predict, read_checkpoint
from sspnet import GROUPS, SCALES, Backbone, HierarchicalLoss, SSPNet

# The paper's recipe (Sec. 4), completed from the Strong Baseline where the paper is silent.
RECIPE = {
    "backbone": "resnet50",
    "weights": "imagenet",
    "size": (256, 192),  # H, W
    "channels": 256,  # of the pyramid
    "epochs": 30,
    "batch_size": 32,
    "lr": 1e-4,  # Adam
    "schedule": "plateau",  # x0.1 after 4 epochs without a lower validation loss
    "freeze": None,  # AFSS compares all scales to the end
}
# Drawn pedestrians, from random weights, on two CPU cores in less than ten minutes.
SYNTHETIC_RECIPE = {
    "backbone": "resnet18",
    "weights": "none",
    "size": (128, 96),
    "channels": 128,
    "epochs": 6,
    "batch_size": 16,
    "lr": 1e-3,
    "schedule": "onecycle",  # up and down again within the run: a short run has no time for a plateau
    "freeze": 3,  # from then on only the chosen scales are computed, which takes half the time
}
WEIGHT_DECAY = 5e-4
GRADIENT_NORM = 10
EMA_DECAY = 0.9998
LOSSES_READ = 50  # steps between two looks at the losses on a GPU, which has to finish its work for each
OFFSET_LR = 0.1  # of the learning rate, for the layers that predict offsets and their weights: at the full rate points
# leave the map and one weight takes all


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ple", default="S", choices=["R", "K", "S", "none"], help="prior location extraction; none: the baseline")
    add_dataset_arguments(parser)  # the dataset is synthetic by default, or pa100k where --data is given
    add("--keypoints", help="keypoint file (.npz) for PLE-K")
    add("--train-split", choices=["train", "trainval"], help="trainval keeps the last epoch as best.pt; it is the default for "
        "rap1 and pcs, which have no validation split")
    add("--backbone", choices=Backbone.names)
    add("--weights", help="of the backbone: imagenet, none, or a file with torchvision's state dict")
    add("--size", type=int, nargs=2, metavar=("H", "W"))
    add("--channels", type=int, help="of the feature pyramid")
    add("--epochs", type=int)
    add("--batch-size", type=int)
    add("--lr", type=float)
    add("--schedule", choices=["plateau", "onecycle"])
    add("--afss", default="group", choices=["group", "attribute", *SCALES], help="one scale per group, per attribute "
        "(AFSS* of Tab. 1), or the same fixed scale for all (Tab. 2 without AFSS)")
    add("--freeze", type=int, metavar="EPOCHS", help="keep AFSS's choice from then on; 0: never")
    add("--M", type=int, default=3, help="offset points per prior point (Fig. 5)")
    add("--ratio", type=float, default=0.75, help="share of points that PLE-S samples (Fig. 6)")
    add("--no-offsets", dest="offsets", action="store_false", help="Tab. 2 without offset points")
    add("--no-prior", dest="prior", action="store_false", help="Tab. 2 without spatial prior")
    add("--seed", type=int, default=0)
    add("--amp", choices=["bf16", "fp16"], help="automatic mixed precision")
    add("--out", help="folder; default runs/DATASET-PLE")
    add("--resume", action="store_true", help="go on from last.pt in --out")
    add("--workers", type=int, help="processes that load images; default 0 for drawn images, 2 for files")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    args.dataset, args.domain = args.dataset or ("pa100k" if args.data else "synthetic"), args.domain or 0
    args.train_split = args.train_split or ("trainval" if args.dataset in WITHOUT_VALIDATION else "train")
    for key, value in (SYNTHETIC_RECIPE if args.dataset == "synthetic" else RECIPE).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    args.size, args.freeze = tuple(args.size), args.freeze or None
    args.out = Path(args.out or f"runs/{args.dataset}-{args.ple}")
    args.workers = args.workers if args.workers is not None else 0 if args.dataset == "synthetic" else 2
    for name, low in (("epochs", 1), ("channels", 1), ("batch_size", 2), ("M", 1), ("workers", 0)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {low}")
    if not 0 < args.ratio <= 1:
        parser.error(f"--ratio {args.ratio}: expected more than 0, at most 1")
    if min(args.size) < 32:
        parser.error(f"--size {args.size[0]} {args.size[1]}: expected at least 32")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device")
    return args


# What a checkpoint remembers of the arguments; a resumed run must be given the same.
CONFIG = ("ple", *SOURCE, "train_split", "images", "backbone", "weights", "size", "channels", "epochs",
          "batch_size", "lr", "schedule", "afss", "freeze", "M", "ratio", "offsets", "prior", "seed", "amp")


def join_ranks(args):
    """Joins the process group where torchrun started this process, on the GPU that is its own."""
    if "RANK" in os.environ:
        if args.device.startswith("cuda"):
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if args.batch_size % ranks():
        raise ValueError(f"--batch-size {args.batch_size}: expected a multiple of the {ranks()} processes")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(line):
    """A line for people, by the first rank alone."""
    if rank() == 0:
        print(line, flush=True)


def parameter_groups(model, lr):
    """Adam's groups of parameters: all at the rate `lr`, but those that predict offsets and their weights at a tenth."""
    slow = (".offsets.", ".offset_weights.")
    offsets = [p for name, p in model.named_parameters() if any(part in name for part in slow)]
    others = [p for name, p in model.named_parameters() if not any(part in name for part in slow)]
    return [group for group in ({"params": others, "lr": lr}, {"params": offsets, "lr": lr * OFFSET_LR}) if group["params"]]


class Training:
    """Everything that changes while training, and goes into `last.pt`."""

    def __init__(self, args, config, positive_ratio, steps_per_epoch):
        torch.manual_seed(args.seed)
        self.model = self.build(config, None if args.resume else args.weights).to(args.device, memory_format=torch.channels_last)
        # Averages the gradients over the ranks. Batch norm takes each rank's own images, as each GPU has enough of them and
        # synchronizing every layer would cost more than it gives; the running statistics that count are the first rank's.
        self.network = self.model if ranks() == 1 else DistributedDataParallel(
            self.model, broadcast_buffers=False, find_unused_parameters=True)  # unused: the smoothing of scales not chosen
        self.loss = HierarchicalLoss(config["groups"], positive_ratio).to(args.device)
        self.ema = AveragedModel(self.model, multi_avg_fn=self.average, use_buffers=True)
        self.steps = self.epoch = self.saved = 0
        self.best, self.rows = -1.0, []
        groups = parameter_groups(self.model, args.lr)
        self.optimizer = torch.optim.Adam(groups, weight_decay=WEIGHT_DECAY)
        if args.schedule == "onecycle":
            self.schedule = torch.optim.lr_scheduler.OneCycleLR(
                self.optimizer, [group["lr"] for group in groups], total_steps=args.epochs * steps_per_epoch)
        else:
            self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, factor=0.1, patience=4)
        self.scaler = torch.amp.GradScaler(args.device.split(":")[0], enabled=args.amp == "fp16")

    @staticmethod
    def build(config, weights):
        weights = None if weights == "none" else weights
        if weights not in (None, "imagenet") and not Path(weights).is_file():
            raise FileNotFoundError(f"--weights {weights}: no such file, expected imagenet, none or a state dict")
        try:
            return build_model(config, weights)
        except OSError as error:  # urllib's errors are OSErrors
            raise ValueError(f"--weights imagenet: torchvision could not fetch them ({error}); give --weights none to "
                             "train from random weights, or --weights FILE") from None

    def average(self, averaged, current, _):
        """EMA of weights and batch-norm statistics, its decay warmed up so that short runs forget their start."""
        decay = min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
        if averaged[0].is_floating_point():  # one kind of tensor a call
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)

    def state(self):
        parts = ("model", "optimizer", "schedule", "scaler")
        state = {name: getattr(self, name).state_dict() for name in parts}
        state.update(ema=self.ema.module.state_dict(), steps=self.steps, epoch=self.epoch, best=self.best, rows=self.rows)
        return state

    def load(self, state):
        for name in ("model", "optimizer", "schedule", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(state["steps"])
        self.steps, self.epoch, self.best, self.rows = (state[k] for k in ("steps", "epoch", "best", "rows"))
        self.saved = self.epoch


def save(file, value):
    """Writes a checkpoint to a temporary file and renames it, so that `file` is always whole. The first rank alone writes."""
    if rank():
        return
    temporary = file.with_name(file.name + ".tmp")
    try:
        torch.save(value, temporary)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # on a full disk torch's zip writer raises a RuntimeError
        temporary.unlink(missing_ok=True)
        raise OSError(f"{file}: could not be written ({str(error).splitlines()[0]}); an earlier one is kept") from None


def train_epoch(run, batches, args, clock):
    """One epoch; returns the mean loss. `clock`: when the training, or its resumption, began, and at which epoch."""
    run.model.train()
    afss = run.model.afss if isinstance(run.model, SSPNet) else None
    if afss and args.freeze and run.epoch >= args.freeze:
        afss.live = False
    total, seen = torch.zeros((), device=args.device), []
    torch.manual_seed((args.seed * 1_000_003 + run.epoch) * 1_009 + rank())  # an epoch's chance is its own, resumed or not
    start_epoch(batches, run.epoch)
    for step, (images, labels, keypoints, rows) in enumerate(batches):
        images, labels, keypoints = (t.to(args.device, non_blocking=True) for t in (images, labels, keypoints))
        with autocast(args.device, args.amp):
            logits = run.network(images.to(memory_format=torch.channels_last), keypoints)  # (S, B, L)
        loss = run.loss(logits.float(), labels)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), GRADIENT_NORM)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        seen.append((loss.detach(), step, run.optimizer.param_groups[0]["lr"], rows))
        if args.schedule == "onecycle":
            run.schedule.step()
        run.steps += 1
        run.ema.update_parameters(run.model)
        if afss and afss.live:
            afss.update(logits.detach(), labels)
        total += loss.detach()
        if len(seen) == LOSSES_READ or step + 1 == len(batches) or args.device == "cpu":
            check_losses(seen, run.epoch, batches.dataset.table)
            seen.clear()
        started, first = clock
        done, whole = ((e - first) * len(batches) for e in (run.epoch, args.epochs))
        if rank() == 0:
            show_progress(f"epoch {run.epoch + 1}/{args.epochs}  step {step + 1}/{len(batches)}", done + step + 1, whole, started)
    if ranks() > 1:
        dist.all_reduce(total)
    return total.item() / len(batches) / ranks()


def check_losses(seen, epoch, table):
    """Stops at the first loss that is not finite; `seen`: (loss, step, learning rate, rows of the table) of each step."""
    losses = torch.stack([loss for loss, *_ in seen]).tolist()
    for loss, (_, step, lr, rows) in zip(losses, seen):
        if not math.isfinite(loss):
            raise ValueError(f"epoch {epoch + 1}, step {step + 1}: the loss is {loss}, expected a finite number (learning rate {lr:g}, images "
                             f"{' '.join(table.names[i] for i in rows)})")


def log_row(run, config, loss, validation, scale_mA, seconds):
    """The epoch's row of log.csv. Empty where there is nothing: AFSS's columns without AFSS, for instance."""
    row = {"epoch": run.epoch + 1, "lr": run.optimizer.param_groups[0]["lr"], "loss": loss}
    row.update({f"val_{name}": validation[name] if validation else None for name in METRICS})
    model = run.model
    scales = model.afss.scales() if isinstance(model, SSPNet) else None
    for group in GROUPS:
        chosen = sorted({SCALES[scales[j]] for j, g in enumerate(config["groups"]) if g == group}) if scales else []
        row[f"scale_{group}"] = "+".join(chosen)
    for s, scale in enumerate(SCALES):
        means = group_means(100 * scale_mA[s].cpu(), config["groups"]) if scale_mA is not None else {}
        row.update({f"{group}_{scale}": means.get(group) for group in GROUPS})
    length = getattr(getattr(getattr(model, "ple", None), "sample", None), "offset_length", None)
    row["offset_px"] = None if length is None else length.item()
    row["seconds"] = seconds
    return row


def write_log(file, rows):
    if rank():
        return
    temporary = file.with_name(file.name + ".tmp")
    with open(temporary, "w", newline="") as out:
        writer = csv.DictWriter(out, rows[0].keys())
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    os.replace(temporary, file)


def describe(row):
    """The epoch's line for people."""
    line = f"epoch {row['epoch']}: loss {row['loss']:.3f}"
    if row["val_mA"] is not None:
        line += "  val " + "  ".join(f"{name} {row[f'val_{name}']:.2f}" for name in METRICS)
    chosen = [f"{g} {row[f'scale_{g}']}" for g in GROUPS if row[f"scale_{g}"]]
    line += ("  scales " + ", ".join(chosen) if chosen else "")
    line += f"  offsets {row['offset_px']:.2f} px" if row["offset_px"] is not None else ""
    return line + f"  {row['seconds']:.0f} s"


def main(argv=None):
    args = parse_arguments(argv)
    last = args.out / "last.pt"
    config = {key: list(v) if isinstance(v := getattr(args, key), tuple) else v for key in CONFIG}
    checkpoint = read_checkpoint(last) if args.resume else None
    if checkpoint is not None:
        different = [k for k in CONFIG if checkpoint["config"].get(k) != config[k]]
        if different:
            k = different[0]
            raise ValueError(f"{last}: was trained with {k} {checkpoint['config'].get(k)}, not {config[k]}: resume with its own arguments")
    elif last.exists():
        raise ValueError(f"{last}: a training is here already: give --resume to go on with it, or another --out")
    join_ranks(args)
    table = open_dataset(args.ple, config, args.train_split, args.size, args.images)
    validation = open_dataset(args.ple, config, "val", args.size, args.images) if args.train_split == "train" else None
    for part, least in ((table, max(2, args.batch_size if ranks() > 1 else 0)), (validation, ranks())):
        if part and len(part.names) < least:
            raise ValueError(f"{part.name}: {len(part.names)} images, expected at least {least}")
    config.update(attributes=table.attributes, groups=table.groups)
    batches, val_batches = (part and loader(part, args.size, args.batch_size, part is table, args.seed, args.workers, args.device, rank(), ranks())
                            for part in (table, validation))
    positive_ratio = torch.from_numpy(table.labels.mean(0))
    run = Training(args, config, positive_ratio, len(batches))
    if checkpoint is not None:
        run.load(checkpoint)
    args.out.mkdir(parents=True, exist_ok=True)
    say(f"{table.name}: {len(table.names)} images, {len(table.attributes)} attributes; "
        f"{model_name(args.ple)}, {args.backbone}, {args.size[0]}x{args.size[1]}, "
        f"{args.epochs} epochs of {len(batches)} steps, {args.device}{f' x {ranks()}' if ranks() > 1 else ''}, to {args.out}")
    constant = [name for name, ratio in zip(table.attributes, positive_ratio.tolist()) if ratio in (0, 1)]
    if constant:
        say(f"nothing to learn, all positive or all negative in training: {', '.join(constant)}")
    if checkpoint is None:
        save(last, {"config": config, **run.state()})
    clock = time.time(), run.epoch
    go_on = lambda: f"epoch {run.saved} of {args.epochs} is in {last}, the same command with --resume goes on"
    terminate = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        while run.epoch < args.epochs:
            one_epoch(run, batches, val_batches, args, config, clock)
    except (KeyboardInterrupt, SystemExit) as stop:
        print(f"\ninterrupted: {go_on()}", file=sys.stderr)
        sys.exit(stop.code if isinstance(stop, SystemExit) else 130)
    except (ValueError, OSError) as error:
        raise ValueError(f"{str(error).strip().splitlines()[-1]}; {go_on()}") from None
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a process that loads images died ({str(error).splitlines()[0]}); {go_on()}") from None
    finally:
        signal.signal(signal.SIGTERM, terminate)
    say(f"done: {args.out / 'best.pt'}" + (f", val mA {run.best:.2f}" if validation else ""))
    if dist.is_initialized():
        dist.destroy_process_group()


def one_epoch(run, batches, val_batches, args, config, clock):
    """Trains an epoch, lets AFSS choose, validates the averaged weights, writes log and checkpoints."""
    began = time.time()
    loss = train_epoch(run, batches, args, clock)
    scale_mA, averaged, result = None, run.ema.module, None
    if isinstance(run.model, SSPNet) and run.model.afss.live:
        if ranks() > 1:
            dist.all_reduce(run.model.afss.counts)
        scale_mA = run.model.afss.select()
        averaged.afss.load_state_dict(run.model.afss.state_dict())
    if ranks() > 1:
        for buffer in averaged.buffers():
            dist.broadcast(buffer, 0)
    if val_batches:
        logits, labels = predict(averaged, val_batches, args.device, args.amp)
        if ranks() > 1:
            shares = [None] * ranks()
            dist.all_gather_object(shares, (logits, labels))
            logits, labels = (torch.cat(parts) for parts in zip(*shares))
        result = metrics(logits, labels)
        if args.schedule == "plateau":
            run.schedule.step(run.loss(logits.to(args.device), labels.to(args.device)).item())
    elif args.schedule == "plateau":
        run.schedule.step(loss)
    run.rows.append(log_row(run, config, loss, result, scale_mA, time.time() - began))
    run.epoch += 1
    say(describe(run.rows[-1]))
    if result is None or not result["mA"] <= run.best:  # an undefined mA keeps the latest
        run.best = result["mA"] if result else run.best
        save(args.out / "best.pt", {"config": config, "ema": averaged.state_dict(), "epoch": run.epoch})
    save(args.out / "last.pt", {"config": config, **run.state()})
    run.saved = run.epoch
    write_log(args.out / "log.csv", run.rows)


if __name__ == "__main__":
    command(main)
