"""What goes wrong in long runs: several processes, kills, full disks, dying workers, broken files.
The longest need --slow."""

import ctypes
import functools
import io
import multiprocessing
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    PA100K,
    ROOT,
    TINY,
    assert_same,
    command,
    log_rows,
    refuse,
    succeed,
    tiny,
    words,
)
from PIL import Image
from test_data import write_pa100k
from test_datasets import (
    REAL,
    Call,
    random_masks,
    random_pictures,
    upar_content,
    write_pcs,
    write_peta,
    write_pickle,
    write_rap1,
)
from torch.testing import assert_close

import data
import evaluate
import train
from data import PA100K_GROUPS, Pedestrians, Split, read_image
from evaluate import read_checkpoint

CHILDREN = multiprocessing.get_context("forkserver")  # children start without importing torch
CHILDREN.set_forkserver_preload(["train"])
SLOW = pytest.mark.slow


def run_training(arguments, environment=(), comparable=False):
    """In a child process: a training, quietly.

    `comparable`: with batch norm's statistics frozen, and steps in proportion to the gradient.
    Adam's own step goes by the gradient's sign, however small it is: it makes much of roundings.
    """
    os.environ.update(environment)
    train.RANK = int(os.environ.get("RANK", 0))
    train.WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a shell's background jobs
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if comparable:
        torch.optim.Adam = functools.partial(torch.optim.Adam, eps=0.1)
        torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
        out = Path(arguments[arguments.index("--out") + 1])
        record_first_gradients(out / f"gradients-{train.RANK}.pt")
    sys.argv = ["train.py"]
    data.command(lambda: train.main(arguments))


def record_first_gradients(file):
    """Saves the gradients with which the first step is made."""
    clip = torch.nn.utils.clip_grad_norm_

    def record(parameters, norm):
        parameters = list(parameters)
        if not file.exists():
            torch.save([p.grad for p in parameters], file)
        return clip(parameters, norm)

    torch.nn.utils.clip_grad_norm_ = record


def children_train(count, arguments, **options):
    """`count` ranks of one training."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(count):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        environment.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        given = arguments, environment if count > 1 else {}
        ranks.append(CHILDREN.Process(target=run_training, args=given, kwargs=options))
        ranks[-1].start()
    for child in ranks:
        child.join(240)
        assert child.exitcode == 0, child


# ---- several processes ----


@pytest.mark.parametrize(
    "more", ["--ple S --freeze 2", "--ple K --schedule plateau --afss attribute"]
)
@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tmp_path, more):
    """With batch norm's statistics frozen: the same gradients, and so (roundings grow) the same
    training."""
    for count in (1, 2):
        children_train(count, words(*TINY, more, f"--out {tmp_path}/{count}"), comparable=True)
    one, two = (log_rows(tmp_path / str(count)) for count in (1, 2))
    for a, b in zip(one, two, strict=True):
        for key in a:
            if key.startswith("scale"):
                assert a[key] == b[key]
            elif key in ("loss", "lr"):
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-3), key
            elif key not in ("epoch", "seconds", "offset_px") and a[key]:
                # shares: a logit near 0 may fall to either side
                assert float(a[key]) == pytest.approx(float(b[key]), abs=1), key
    one, two = (torch.load(tmp_path / f"{n}/last.pt", weights_only=True) for n in (1, 2))
    for name, value in one["model"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert_close(two["model"][name], value, atol=1e-3, rtol=1e-2)
    files = "1/gradients-0.pt", "2/gradients-0.pt", "2/gradients-1.pt"
    alone, *shared = (torch.load(tmp_path / file) for file in files)
    for gradients in shared:
        for mine, theirs in zip(alone, gradients, strict=True):
            assert_close(theirs, mine, atol=1e-4 * mine.abs().max().item(), rtol=1e-4)


def test_each_image_is_validated_once_and_shares_make_up_the_batch(tmp_path):
    table = data.synthetic("train", count=23)

    def epoch(batches):
        return [index.tolist() for *_, index in batches]

    training = functools.partial(data.loader, table, (32, 24), 8, train=True, seed=3)
    shares, whole = [training(rank=r, ranks=2) for r in range(2)], training()
    for number in (0, 1):
        for batches in (*shares, whole):
            data.start_epoch(batches, number)
        for a, b, both in zip(epoch(shares[0]), epoch(shares[1]), epoch(whole), strict=True):
            assert len(a) == len(b) == 4 and sorted(a + b) == sorted(both)
    validation = [data.loader(table, (32, 24), 6, rank=r, ranks=3) for r in range(3)]
    seen = [i for batches in validation for i in sum(epoch(batches), [])]
    assert sorted(seen) == list(range(23))


@pytest.mark.slow
def test_torchrun(tmp_path):
    launch = words(sys.executable, "-m torch.distributed.run --nproc-per-node 2 --standalone")
    launch += [str(ROOT / "train.py"), *TINY]
    launch += words(f"--epochs 2 --freeze 1 --ple S --out {tmp_path}/run")
    done = subprocess.run(launch, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr  # neither selecting nor frozen
    assert "cpu x 2" in done.stdout
    assert done.stdout.count("epoch 1:") == 1  # one reporter
    epoch = read_checkpoint(tmp_path / "run" / "best.pt")["epoch"]
    logged = float(log_rows(tmp_path / "run")[epoch - 1]["val_mA"])
    found = command(f"evaluate.py {tmp_path}/run/best.pt --split val --images 24")
    assert f"mA {logged:.2f}" in found.stdout, found.stderr  # 24 images over two ranks, none twice


def count_page_faults(keep, answer):
    """In a child process: the pages fetched from the system while a large tensor is made and freed
    twenty times."""
    if keep:
        data.keep_freed_memory()
    for round in range(22):
        if round == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(16 * 2**20)
    answer.put(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="of Linux's C library alone",
)
def test_freed_memory_is_kept_for_the_next_step():
    found = []
    for keep in (False, True):
        answer = CHILDREN.SimpleQueue()
        child = CHILDREN.Process(target=count_page_faults, args=(keep, answer))
        child.start()
        found.append(answer.get())
        child.join()
    assert found[1] < found[0] / 10, found


# ---- kills, full disks, dying workers ----


def killed_and_resumed(folder, arguments, kills, longest, random):
    """Kills a training at random moments, `kills` times, resuming it after each; then lets it
    finish."""
    hit = 0
    while True:
        resume = ["--resume"] if (folder / "last.pt").exists() else []
        line = [*arguments, *resume, "--out", str(folder)]
        child = CHILDREN.Process(target=run_training, args=(line,))
        child.start()
        if hit == kills:
            child.join(240)
            assert child.exitcode == 0
            return
        child.join(random.uniform(0.05, longest))
        if child.is_alive():
            child.kill()
            child.join()
            hit += 1
        else:  # finished before the kill: begin anew
            assert child.exitcode == 0
            for file in folder.iterdir():
                file.unlink()


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_sigkill_at_random_moments_then_resume_ends_at_the_same_weights(tmp_path, kills):
    arguments = words(*TINY, "--epochs 6 --ple S --freeze 3")
    started = time.time()
    children_train(1, [*arguments, "--out", str(tmp_path / "whole")])
    (tmp_path / "cut").mkdir()
    longest, rng = 0.7 * (time.time() - started), np.random.default_rng(0)
    killed_and_resumed(tmp_path / "cut", arguments, kills, longest, rng)
    for file in ("last.pt", "best.pt"):
        assert_same(
            torch.load(tmp_path / "whole" / file, weights_only=True),
            torch.load(tmp_path / "cut" / file, weights_only=True),
        )


@pytest.mark.slow
def test_sigkill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    """Kills within a second of checkpoints being written over and over: the file that is there is
    always a whole one."""
    random = np.random.default_rng(0)
    for _ in range(20):
        child = CHILDREN.Process(target=save_for_ever, args=(tmp_path / "last.pt",))
        child.start()
        while not (tmp_path / "last.pt").exists():
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        child.kill()
        child.join()
        value = torch.load(tmp_path / "last.pt", weights_only=True)
        assert (value["weights"] == value["number"]).all()


def save_for_ever(file):
    number = 0
    while True:
        number += 1
        train.save(file, {"number": number, "weights": torch.full((2_000_000,), number)})


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(tmp_path, number, code):
    options = words(f"--epochs 50 --ple R --out {tmp_path}/run")
    arguments = [sys.executable, str(ROOT / "train.py"), *TINY, *options]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("epoch 1:"):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == code and "Traceback" not in error
    last = error.strip().splitlines()[-1]
    epoch = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"]
    where = f"{tmp_path / 'run' / 'last.pt'}, add --resume to continue"
    assert last == f"interrupted: epoch {epoch} of 50 is in {where}"


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    out = tmp_path / "run"
    state = tiny(out, "--ple", "R", "--epochs", "2", "--schedule", "plateau")
    state["config"]["epochs"] = 3  # as if meant to go on; the plateau does not depend on it
    torch.save(state, out / "last.pt")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    limit = len(before["last.pt"]) // 4  # no file may grow beyond, as on a disk that is full
    options = words(f"--ple R --schedule plateau --out {out} --resume")
    arguments = [sys.executable, str(ROOT / "train.py"), *TINY, *options]
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    done = subprocess.run(arguments, capture_output=True, text=True, preexec_fn=full)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "could not be written" in done.stderr and "epoch 2 of 3 is in" in done.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


class Deadly(Pedestrians):
    """Its process dies with the sixth image, as when the kernel runs out of memory."""

    def __getitem__(self, i):
        if i == 5 and torch.utils.data.get_worker_info():
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def test_a_worker_that_dies_is_an_error_and_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "Pedestrians", Deadly)
    done = command("train.py", *TINY, f"--ple R --workers 1 --out {tmp_path}/run")
    assert done.returncode == 2 and "a process that loads images died" in done.stderr
    assert "add --resume to continue" in done.stderr
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 0


# ---- numbers that go wrong ----


def assert_finite(state):
    for name, value in state.items():
        assert not isinstance(value, torch.Tensor) or value.isfinite().all(), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_step(tmp_path, monkeypatch):
    real, steps = train.HierarchicalLoss.forward, []

    def spoilt(self, logits, labels):
        steps.extend([1] * logits.requires_grad)  # not in validation
        loss = real(self, logits, labels)
        return loss * float("nan") if len(steps) == 5 else loss

    monkeypatch.setattr(train.HierarchicalLoss, "forward", spoilt)
    done = command("train.py", *TINY, f"--ple R --out {tmp_path}/run")  # three steps an epoch
    batches = data.loader(data.synthetic("train", count=24, size=(64, 48)), (64, 48), 8, train=True)
    data.start_epoch(batches, 1)
    rows = [index.tolist() for *_, index in batches][1]
    names = " ".join(batches.dataset.split.names[i] for i in rows)
    expected = "epoch 2, step 2: the loss is nan, expected a finite number (learning rate "
    assert done.returncode == 2 and expected in done.stderr
    where = f"{tmp_path / 'run' / 'last.pt'}, add --resume to continue"
    assert f"images {names}); epoch 1 of 3 is in {where}" in done.stderr
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert state["epoch"] == 1
    assert_finite(state["model"])


def test_losses_are_looked_at_every_few_steps_on_a_gpu():
    """`read_losses` finds the first bad one among several."""
    table = data.Split("t", ["Hat"], ["head"], list("abcdef"), list("abcdef"), np.zeros((6, 1)))
    seen = [
        (torch.tensor(1.0), 7, 0.7, torch.tensor([0, 1])),
        (torch.tensor(torch.inf), 8, 0.8, torch.tensor([2, 3])),
        (torch.tensor(torch.nan), 9, 0.9, torch.tensor([4, 5])),
    ]
    train.read_losses(seen[:1], 4, table)
    expected = r"epoch 5, step 9: the loss is inf, .* \(learning rate 0.8, images c d\)"
    with pytest.raises(ValueError, match=expected):
        train.read_losses(seen, 4, table)


def test_an_attribute_that_is_on_everybody_or_nobody_trains_and_is_reported(tmp_path):
    def change(mat):
        for part in ("train", "val", "test"):
            mat[f"{part}_label"][:, 0], mat[f"{part}_label"][:, 7] = 1, 0

    write_pa100k(tmp_path, counts=(8, 4, 4), change=change)
    printed = succeed(
        f"train.py --data {tmp_path}",
        *TINY[2:],
        "--epochs 2 --backbone resnet18 --weights none --batch-size 4 --ple R --out",
        f"{tmp_path}/run",
    )
    assert "all positive or all negative in training: Female, Hat" in printed
    assert succeed(f"evaluate.py {tmp_path}/run/best.pt").count("undefined") >= 3
    assert_finite(torch.load(tmp_path / "run" / "last.pt", weights_only=True)["model"])


# ---- hostile and broken files ----


def picture_files(folder):
    """Every kind of picture that should read, with the colour of its pixel (2, 1), and those that
    should not, by name."""
    colours = np.zeros((6, 4, 3), np.uint8)
    colours[..., 0], colours[2, 1] = 40, (200, 100, 50)
    rgb = Image.fromarray(colours)
    grey = Image.fromarray(np.where(colours[..., 1] > 0, 180, 60).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    animated = {"save_all": True, "append_images": [Image.new("P", (4, 6))]}
    good = {
        "rgb.png": (rgb, {}, (200, 100, 50)),
        "grey.png": (grey, {}, (180,) * 3),
        "bits.png": (grey.point(lambda v: 255 * (v > 100), mode="1"), {}, (255,) * 3),
        "palette.png": (rgb.quantize(4), {}, (200, 100, 50)),
        "palette.gif": (rgb.quantize(4), {}, (200, 100, 50)),
        "alpha.png": (rgb.convert("RGBA"), {}, (200, 100, 50)),
        "greyalpha.png": (grey.convert("LA"), {}, (180,) * 3),
        "cmyk.tif": (rgb.convert("CMYK"), {}, (200, 100, 50)),
        "16bit.png": (Image.fromarray(np.array(grey, np.uint16) * 257), {}, (180,) * 3),
        "animated.gif": (rgb.quantize(4), animated, (200, 100, 50)),
        "turned.png": (rgb.transpose(Image.Transpose.ROTATE_90), {"exif": exif}, (200, 100, 50)),
        "progressive.jpg": (rgb.resize((64, 96)), {"progressive": True}, None),
    }
    for name, (image, options, _) in good.items():
        image.save(folder / name, **options)
    Image.new("RGB", (1, 1), (9, 8, 7)).save(folder / "one.png")
    rgb.save(folder / "whole.png")
    rgb.resize((64, 96)).save(folder / "whole.jpg")
    whole = {name: (folder / name).read_bytes() for name in ("whole.png", "whole.jpg")}
    bad = {
        "empty.jpg": b"",
        "text.jpg": b"hello",
        "cut.png": whole["whole.png"][:60],
        "cut.jpg": whole["whole.jpg"][:400],
        "header.jpg": whole["whole.jpg"][:20],
    }
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")  # 400 million pixels in a small file
    return {name: colour for name, (*_, colour) in good.items()}, [*bad, "bomb.png"]


def test_every_kind_of_picture_reads_or_is_refused_by_name(tmp_path):
    good, bad = picture_files(tmp_path)
    for name, colour in good.items():
        image = read_image(tmp_path / name)
        assert image.dtype == torch.uint8 and image.shape[0] == 3, name
        if colour:
            assert image.shape == (3, 6, 4), name
            assert (image[:, 2, 1].int() - torch.tensor(colour)).abs().max() <= 2, name
    assert read_image(tmp_path / "one.png").flatten().tolist() == [9, 8, 7]
    labels = np.zeros((len(good), 26), np.float32)
    images = [tmp_path / name for name in good]
    table = Split("kinds", list(PA100K_GROUPS), PA100K, list(good), images, labels)
    batches = data.loader(table, (64, 48), 4, train=True)
    assert sum(len(images) for images, *_ in batches) == len(good) // 4 * 4
    for name in bad:
        with pytest.raises(ValueError, match=f"{name}: not a readable image") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_an_unreadable_picture_in_training_is_one_line(tmp_path):
    write_pa100k(tmp_path, counts=(8, 4, 4))
    (tmp_path / "data" / "000003.jpg").write_bytes(b"")
    for workers in (0, 2):
        assert "000003.jpg: not a readable image" in refuse(
            f"train.py --data {tmp_path}",
            *TINY[2:],
            "--backbone resnet18 --weights none --batch-size 4 --ple none --workers",
            f"{workers} --out",
            tmp_path / f"run{workers}",
        )


def write_two_photos(folder):
    write_pcs(folder, "clothing-co-parsing", random_masks(2)[0])


def write_upar(folder):
    random_pictures(folder, upar_content()["image_name"])
    write_pickle(folder / "dataset_all.pkl", upar_content())


@pytest.mark.parametrize(
    "write, file, dataset",
    [
        (write_pa100k, "annotation.mat", "pa100k"),
        pytest.param(write_rap1, "RAP_annotation/RAP_annotation.mat", "rap1", marks=SLOW),
        (write_peta, "PETA.mat", "peta"),
        (write_two_photos, "label_list.mat", "pcs"),
        (write_upar, "dataset_all.pkl", "upar"),
    ],
)
def test_an_annotation_cut_anywhere_is_one_line(tmp_path, write, file, dataset):
    write(tmp_path)
    size = (tmp_path / file).stat().st_size
    read = functools.partial(data.load_split, dataset, tmp_path, "train")
    refuses_when_cut(tmp_path / file, read, 1024 if size > 8192 else max(1, size // 12))


def refuses_when_cut(file, read, step):
    expected, whole = read(), file.read_bytes()
    for end in [*range(0, len(whole), step), len(whole) - 1]:
        file.write_bytes(whole[:end])
        try:
            table = read()
        except ValueError as error:
            assert file.name in str(error) and "\n" not in str(error), end
        else:  # a checksum's last bytes, for instance, can be missing
            assert end > len(whole) - 8, end
            assert table.names == expected.names and (table.labels == expected.labels).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, file, dataset, kilobytes",
    [
        ("pa100k-slice", "annotation.mat", "pa100k", 1),
        ("peta", "PETA.mat", "peta", 1),
        ("pa100k", "annotation.mat", "pa100k", 8),
        ("rap1", "RAP_annotation/RAP_annotation.mat", "rap1", 8),
    ],
)  # the last two take a tenth of a second and more to read
def test_a_real_annotation_cut_anywhere_is_one_line(
    tmp_path, monkeypatch, folder, file, dataset, kilobytes
):
    monkeypatch.setattr(data, "check_images", lambda images: None)  # they are not at hand
    pytest.importorskip("scipy", reason="reading .mat files needs scipy")
    if not (REAL / folder / file).is_file():
        pytest.skip("needs the real annotation files beside the project")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes((REAL / folder / file).read_bytes())
    read = functools.partial(data.load_split, dataset, tmp_path, "train")
    refuses_when_cut(tmp_path / file, read, 1024 * kilobytes)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    assert command("train.py", *TINY, f"--epochs 1 --ple S --out {out}").returncode == 0
    return out / "best.pt"


def without(state):
    del state["ema"]["heads.head.weight"]


def with_more(state):
    state["ema"]["heads.more.weight"] = torch.zeros(2)


def reshaped(state):
    state["ema"]["heads.head.weight"] = torch.zeros(3, 3)


def without_config(state):
    del state["config"]["groups"]


def not_a_model(state):
    state["config"]["ple"] = "Q"


def other_types(state):
    state["ema"] = [1, 2]


@pytest.mark.parametrize(
    "spoil, message",
    [
        (without, "Missing key"),
        (with_more, "Unexpected key"),
        (reshaped, "size mismatch for heads.head.weight"),
        (without_config, "its config has no 'groups'"),
        (not_a_model, "ple 'Q'"),
        (other_types, "best.pt"),
    ],
)
def test_a_checkpoint_that_differs_is_refused(checkpoint, tmp_path, spoil, message):
    state = torch.load(checkpoint, weights_only=True)
    spoil(state)
    torch.save(state, tmp_path / "best.pt")
    for name in ("evaluate.py", "localize.py"):
        assert message in refuse(f"{name} {tmp_path}/best.pt --images 4")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_checkpoint_cut_anywhere_or_with_code_is_refused_and_nothing_runs(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for end in (0, 10, 1000, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:end])
        with pytest.raises(ValueError, match="cut.pt: not a readable checkpoint"):
            evaluate.load_model(tmp_path / "cut.pt")
    evil = Call(os.system, f"touch {tmp_path / 'marker'}")
    torch.save({"config": {}, "ema": evil}, tmp_path / "evil.pt")
    plain = io.BytesIO()
    pickle.dump(evil, plain)
    (tmp_path / "plain.pt").write_bytes(plain.getvalue())
    for name in ("evil.pt", "plain.pt"):
        done = command(f"evaluate.py {tmp_path}/{name}")
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and name in done.stderr
    assert "plain.pt: expected a state dict" in refuse(
        f"train.py --weights {tmp_path}/plain.pt", *TINY, f"--out {tmp_path}/run"
    )
    assert not (tmp_path / "marker").exists()
