"""What happens in long runs: kills, interrupts, full disks, several processes."""

import contextlib
import functools
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time

import conftest
import numpy as np
import pytest
import torch
from conftest import SMALL, TINY, as_process, assert_same, load, log_rows, refuse, tiny, words
from torch.testing import assert_close

import data
import train
from evaluate import load_model, predict
from sspnet import HierarchicalLoss

# Children start without importing torch anew. That server's path lacks conftest's folder.
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["torch._dynamo", "torchvision.models.detection", "pytest"])


def run_training(arguments, environment=(), comparable=False, largest_file=None):
    """In a child process: a training, quietly. largest_file: in bytes, as on a disk that is full.
    comparable: without dropout, with batch norm's statistics frozen, and steps in proportion to the
    gradient. Adam's own step goes by its sign, however small it is: it makes much of roundings."""
    os.setpgrp()  # with its loading processes
    multiprocessing.set_start_method("fork", force=True)  # theirs, as in a command; not torch anew
    os.environ.update(environment)
    train.RANK = int(os.environ.get("RANK", 0))
    train.WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if comparable:
        torch.optim.Adam = functools.partial(torch.optim.Adam, eps=0.1)
        torch.nn.Dropout.forward = lambda self, x: x
        torch.nn.BatchNorm2d.train = lambda self, mode=True: torch.nn.Module.train(self, False)
    sys.argv = ["train.py"]
    data.command(lambda: train.main(arguments))


def run_ranks(count, target, arguments, timeout=120, **options):
    """`count` processes of one group, which end by the time-out where they wait for each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    if count > 1:
        where["WORLD_SIZE"] = str(count)
    children = []
    for rank in range(count):
        ranks = {**where, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        given = {"environment": ranks, **options}
        children.append(CHILDREN.Process(target=target, args=arguments, kwargs=given))
        children[-1].start()
    end = time.time() + timeout
    for child in children:
        child.join(max(0, end - time.time()))
    codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert codes == [0] * count


@pytest.mark.parametrize("options", ["--ple S", "--ple none --schedule plateau --amp bf16"])
def test_resume_is_bit_equal_to_an_uninterrupted_run(tmp_path, monkeypatch, options):
    whole, real = tiny(tmp_path / "whole", *words(options)), train.train_one_epoch

    def dies_in_the_third(epoch, *arguments, **options):
        done = real(epoch, *arguments, **options)
        return done if epoch < 2 else 1 / 0

    monkeypatch.setattr(train, "train_one_epoch", dies_in_the_third)
    with pytest.raises(ZeroDivisionError):
        tiny(tmp_path / "cut", *words(options))
    monkeypatch.undo()
    assert load(tmp_path / "cut" / "last.pt")["epoch"] == 2
    (tmp_path / "cut" / "log.csv").write_text("")  # a kill may come before it is written
    torch.manual_seed(99)  # a new process would start elsewhere
    assert_same(whole, tiny(tmp_path / "cut", *words(options), "--resume"))
    assert_same(log_rows(tmp_path / "whole"), log_rows(tmp_path / "cut"))


@pytest.mark.parametrize("split", ["train", "trainval"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_that_is_killed_before_last_pt_is_done_again(tmp_path, monkeypatch, split, epoch):
    """Where best.pt and log.csv have it already; also the first."""
    options = ["--ple", "none", "--epochs", "2", "--train-split", split, "--schedule", "onecycle"]
    whole = tiny(tmp_path / "whole", *options)
    written_whole = data.written_whole
    saved = []

    def killed(file):
        saved.append(file.name)
        if saved.count("last.pt") == epoch + 2:  # the first is written before the first epoch
            raise ZeroDivisionError
        return written_whole(file)

    monkeypatch.setattr(data, "written_whole", killed)
    with pytest.raises(ZeroDivisionError):
        tiny(tmp_path / "cut", *options)
    monkeypatch.undo()
    assert saved[:5] == ["log.csv", "last.pt", "best.pt", "log.csv", "last.pt"]
    assert load(tmp_path / "cut/last.pt")["epoch"] == epoch
    assert_same(whole, tiny(tmp_path / "cut", *options, "--resume"))
    for file in ("best.pt", "log.csv"):
        assert (tmp_path / "cut" / file).exists()
    assert_same(load(tmp_path / "whole/best.pt"), load(tmp_path / "cut/best.pt"))


def test_a_resume_is_refused_with_other_labels_or_processes_or_where_best_is_lost(tmp_path):
    """Batch norm's batch and the random numbers would be others; the run would not be done."""
    conftest.write_csv(tmp_path)
    options = [*words("--dataset csv --data . --ple none --out csv"), *SMALL]
    conftest.succeed("train.py", *options)
    conftest.write_csv(tmp_path, rows=("a.png,1,0", "b.png,1,1"))
    assert "digest" in refuse("train.py", *options, "--resume")
    options = words("--ple none --epochs 2")
    last = tiny(tmp_path / "run", *options)
    resumed = [*TINY, *options, *words("--resume --out run")]
    last["config"]["processes"] = 2
    torch.save(last, tmp_path / "run" / "last.pt")
    assert "processes 2, not 1" in refuse("train.py", *resumed)
    last["config"]["processes"], last["best"] = 1, 101.0  # of the first epoch
    torch.save(last, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "best.pt").unlink()
    assert "best.pt" in refuse("train.py", *resumed)


def test_resume_where_there_is_nothing_starts_anew_and_a_moved_run_goes_on(tmp_path):
    options = [*words("--ple none --epochs 1"), "--resume"]
    first = tiny(tmp_path / "run", *options)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert_same(first, tiny(tmp_path / "moved", *options, "--workers", "1"))
    conftest.write_csv(tmp_path / "here")
    of_csv = ["train.py", *words("--dataset csv --ple none --out csv --resume"), *SMALL, "--data"]
    conftest.succeed(*of_csv, tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    conftest.succeed(*of_csv, tmp_path / "there")
    tiny(tmp_path / "tuned", *options, "--weights", str(tmp_path / "moved/best.pt"))
    (tmp_path / "moved/best.pt").unlink()  # what it started from is not needed any more
    tiny(tmp_path / "tuned", *options, "--weights", str(tmp_path / "moved/best.pt"))


def test_sigkill_at_random_moments_then_resume_ends_at_the_same_weights(tmp_path):
    arguments = [*TINY, *words("--epochs 3 --ple S --freeze 2 --workers 1 --resume")]
    run_ranks(1, run_training, ([*arguments, "--out", str(tmp_path / "whole")],))
    longest = sum(float(row["seconds"]) for row in log_rows(tmp_path / "whole"))
    cut, rng, kills = [*arguments, "--out", str(tmp_path / "cut")], np.random.default_rng(0), 0
    while kills < 2:
        child = CHILDREN.Process(target=run_training, args=(cut,))
        child.start()
        child.join(rng.uniform(0.05, longest))
        if child.is_alive():
            child.kill()
            with contextlib.suppress(ProcessLookupError):  # killed before it had a group
                os.killpg(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
        else:  # finished before the kill: the next one begins anew
            assert child.exitcode == 0
            (tmp_path / "cut").rename(tmp_path / f"finished-{child.pid}")
    run_ranks(1, run_training, (cut,))
    for file in ("last.pt", "best.pt"):
        assert_same(load(tmp_path / "whole" / file), load(tmp_path / "cut" / file))


def test_ctrl_c_with_three_workers_is_one_line(tmp_path):
    """To the whole process group, as a terminal sends it. A cluster's own RANK is not torchrun's:
    the run reports as the only one."""
    options = words("--epochs 50 --ple R --workers 3 --out")
    process = subprocess.Popen(
        as_process(*options, str(tmp_path / "run")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONWARNINGS": "ignore", "RANK": "1", "WORLD_SIZE": "2"},
    )
    while not process.stdout.readline().startswith("epoch 1/"):
        assert process.poll() is None, process.stderr.read()
    time.sleep(0.3)  # with the workers of the second epoch at work
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    lines = [line for line in error.splitlines() if not line.endswith(" min left")]
    assert lines == ["train.py: interrupted"]
    assert load(tmp_path / "run" / "last.pt")["epoch"] >= 1


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    out = tmp_path / "run"
    options = words("--ple R --schedule plateau")
    state = tiny(out, *options, "--epochs", "1")
    state["config"]["epochs"] = 3  # as if meant to go on; the plateau does not depend on it
    torch.save(state, out / "last.pt")
    before = {file.name: file.read_bytes() for file in out.glob("*.pt")}
    limit = len(before["last.pt"]) // 4
    resumed = [*TINY, *options, "--resume", "--out", str(out)]
    with pytest.raises(AssertionError, match=r"\[2\]"):  # one line and exit status 2
        run_ranks(1, run_training, (resumed,), largest_file=limit)
    assert not list(out.glob("partial-*"))
    assert {file.name: file.read_bytes() for file in out.glob("*.pt")} == before
    assert tiny(out, *options, "--resume")["epoch"] == 3  # once there is room


def test_two_processes_learn_what_one_does(tmp_path):
    """In a step of all images; Adam's first moment is a tenth of the gradient and the decay."""
    options = [*TINY, *words("--ple S --epochs 1 --batch-size 16 --out")]
    for count in (1, 2):
        run_ranks(count, run_training, ([*options, str(tmp_path / str(count))],), comparable=True)
    for a, b in zip(log_rows(tmp_path / "1"), log_rows(tmp_path / "2"), strict=True):
        for key in a.keys() - {"epoch", "seconds"}:
            if key.startswith("scale"):
                assert a[key] == b[key]
            elif a[key]:  # of shares 1%: a logit near 0 may fall to either side
                near = {"rel": 1e-3} if key in ("loss", "lr") else {"abs": 1}
                assert float(a[key]) == pytest.approx(float(b[key]), **near), key
    one, two = (load(tmp_path / f"{n}/last.pt")["optimizer"]["state"] for n in (1, 2))
    for k in one:
        mine, theirs = one[k]["exp_avg"], two[k]["exp_avg"]
        assert_close(theirs, mine, atol=1e-4 * mine.abs().max().item(), rtol=1e-4)


def own_loop(environment):
    """A training loop of one's own under DistributedDataParallel, as it is by default; its choice
    is that of all images."""
    os.environ.update(environment)
    model = conftest.random_model("R", "thin", afss="attribute").eval()
    model.training = True  # but none of its parts, so that a batch alone decides its logits
    images, labels = torch.randn(12, 4, 3, 64, 48), (torch.rand(12, 4, 5) < 0.5).float()
    for batch, truth in zip(images, labels, strict=True):
        model.afss.update(model(batch), truth)
    model.afss.select()
    expected, model.afss.scales = list(model.afss.scales), [1] * 5
    torch.distributed.init_process_group("gloo")
    network = torch.nn.parallel.DistributedDataParallel(model)
    for i in range(int(environment["RANK"]), 12, 2):
        logits = network(images[i])
        logits.sum().backward()
        model.afss.update(logits, labels[i])
    model.afss.select()
    torch.distributed.destroy_process_group()
    assert model.afss.scales == expected


def test_afss_chooses_by_all_processes_images_in_a_loop_of_ones_own():
    run_ranks(2, own_loop, ())


@pytest.mark.parametrize("images", [1, 2])
def test_validation_is_of_all_processes_images_also_where_one_has_none(tmp_path, images):
    """The plateau watches the loss of all."""
    conftest.write_csv(tmp_path)
    rows = ["path,Hat,boots", "a.png,1,0", "b.png,0,1"][: images + 1]
    (tmp_path / "val.csv").write_text("\n".join(rows))
    options = ["--data", str(tmp_path), *SMALL, *words("--dataset csv --ple none --batch-size 2")]
    options += ["--out", str(tmp_path / "run"), "--schedule", "plateau"]
    run_ranks(2, run_training, (options,))
    assert log_rows(tmp_path / "run")[0]["val_Accu"]
    model, config = load_model(tmp_path / "run/best.pt")
    validation = data.open_split(config, "val")
    logits, labels = predict(model, data.loader(data.Pedestrians(validation, (64, 48)), 2))
    ratio = torch.from_numpy(data.open_split(config, "train").labels.mean(0))
    loss = HierarchicalLoss(config["groups"], ratio)(logits, labels).item()
    watched = load(tmp_path / "run/last.pt")["scheduler"]["best"]
    assert watched == pytest.approx(loss, rel=1e-4)


def test_torchrun(tmp_path):
    launch = [sys.executable, *words("-m torch.distributed.run --nproc-per-node 2 --standalone")]
    options = words("--epochs 2 --freeze 1 --ple S --out")
    line = [*launch, *as_process(*options, str(tmp_path / "run"))[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # else torchrun warns
    done = subprocess.run(line, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    assert [row for row in done.stderr.splitlines() if not row.endswith(" min left")] == []
    assert "processes: 2" in done.stdout
    assert done.stdout.count("epoch 1/2:") == 1  # one reporter
    epoch = load(tmp_path / "run" / "best.pt")["epoch"]
    logged = float(log_rows(tmp_path / "run")[epoch - 1]["val_mA"])
    options = words("--split val --images 16")  # over two processes, none twice
    assert f"mA {logged:.2f}" in conftest.succeed("evaluate.py", tmp_path / "run/best.pt", *options)
