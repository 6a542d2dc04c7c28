"""Steps of several images through the scripts: batches, --iter-size, several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from CLAN_train_gta5_2_city import CLANStep, train
from dataset.pipeline import DomainSampler
from options.train_options import get_arguments
from tests import scripts
from tests.scripts import EVALUATE, RUN, TRAIN, losses, refused, rows_of, run, run_parallel, train_words
from utils import checkpoint
from utils.run import Run
from utils.system import parallel
from utils.system.errors import UserError

FROZEN = "tests/frozen.py"
STEPS = ["--num-steps", 3, "--preheat-steps", 1, "--save-pred-every", 1, "--lambda-adv", 0.1]


def start_parallel(folder: Path, *argv) -> tuple[subprocess.Popen, list[int]]:
    """Start a training of two processes in folder / "run"; return msrun and their ids after a checkpoint."""
    argv = [*argv, "--num-steps", 100_000, "--not-val", "--save-pred-every", 5]
    job = scripts.start_parallel(folder / "logs", 2, TRAIN, *argv)
    scripts.wait_until(lambda: list(folder.glob("run/GTA5_*.ckpt")) or job.poll() is not None)
    workers = [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text("utf-8").split()
               if b"MS_ROLE=MS_WORKER" in Path(f"/proc/{pid}/environ").read_bytes()
               and b"CLAN_train" in Path(f"/proc/{pid}/cmdline").read_bytes()]  # fmt: skip
    assert len(workers) == 2
    return job, workers


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Return the tensors of the last checkpoint of a run."""
    content = checkpoint.read(str(folder / f"GTA5_{len(losses(folder))}.ckpt"))
    return {name: value for name, value in content.items() if isinstance(value, np.ndarray) and value.ndim}


def assert_same(a: Path, b: Path, rtol: float = 1e-4) -> None:
    """Assert that losses and all tensors of two runs agree up to rounding."""
    np.testing.assert_allclose(losses(a), losses(b), rtol=rtol)
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        scale = max(float(np.abs(value).max()), 1e-6)
        assert np.abs(right[name] - value).max() <= rtol * scale, name


@pytest.fixture(scope="module")
def two_at_once(data, tmp_path_factory):
    """A run of two images per step, as one batch, with frozen batch norm."""
    folder = tmp_path_factory.mktemp("two") / "run"
    run(FROZEN, *train_words(data, folder, *STEPS, "--batch-size", 2))
    return folder


@pytest.mark.slow
def test_two_batches_of_one_are_a_batch_of_two(data, tmp_path, two_at_once):
    run(FROZEN, *train_words(data, tmp_path / "run", *STEPS, "--iter-size", 2))
    assert_same(two_at_once, tmp_path / "run")


@pytest.mark.slow
def test_iter_size_of_the_released_recipe(data, tmp_path):
    """With repeated updates, mirrored and scaled images, and one batch with few labelled pixels."""
    shutil.copytree(data, tmp_path / "data")
    for path in list((tmp_path / "data" / "GTA5" / "labels").iterdir())[::2]:
        with Image.open(path) as label:
            ids = np.array(label)
        ids[5:] = 0
        Image.fromarray(ids).save(path)
    argv = [*STEPS[:4], "--recipe", "released", "--method", "source", "--not-val"]
    run(FROZEN, *train_words(tmp_path / "data", tmp_path / "one", *argv, "--batch-size", 2))
    run(FROZEN, *train_words(tmp_path / "data", tmp_path / "two", *argv, "--iter-size", 2))
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    """Folder and output of a run of two processes with one image each per step, with frozen batch norm."""
    folder = tmp_path_factory.mktemp("processes")
    argv = train_words(data, folder / "run", *STEPS)
    return folder / "run", run_parallel(folder / "logs", 2, FROZEN, *argv)[0]


@pytest.mark.slow
def test_two_processes_are_a_batch_of_two(two_at_once, two_processes):
    folder, output = two_processes
    assert_same(two_at_once, folder)
    assert "2 of each per step (batch size 1 x iter size 1 x 2 processes)" in output
    assert output.count("saved ") == 3
    mine, theirs = (float(rows_of(f / "miou.csv")[2]["mIoU"]) for f in (folder, two_at_once))
    assert mine == pytest.approx(theirs, abs=0.05)
    assert json.loads((folder / "options.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_in_one(tmp_path, two_processes):
    folder, more = two_processes[0], tmp_path / "more"
    argv = ["--continue-train", folder / "GTA5_1.ckpt", "--snapshot-dir", more]
    assert "--batch-size 3 x --iter-size 1 x 1 processes = 3, but" in refused(*argv, "--batch-size", 3)
    assert "1 processes = 1, but" in refused(*argv)
    run(FROZEN, *argv, "--iter-size", 2)
    assert_same(folder, more)


@pytest.mark.slow
def test_statistics_of_two_processes_stay_close_to_those_of_a_batch(data, tmp_path):
    """Batch norm sees one image in each process, not two: the first losses differ a little."""
    run_parallel(tmp_path / "logs", 2, TRAIN, *train_words(data, tmp_path / "two", *STEPS))
    run(TRAIN, *train_words(data, tmp_path / "one", *STEPS, "--batch-size", 2))
    np.testing.assert_allclose(losses(tmp_path / "two")[0], losses(tmp_path / "one")[0], rtol=0.1)
    moving = [{n: v for n, v in weights(tmp_path / f).items() if "moving" in n} for f in ("one", "two")]
    for name, value in moving[0].items():
        assert np.abs(moving[1][name] - value).mean() < 0.1 * np.abs(value).mean() + 1e-3, name


@pytest.mark.slow
def test_two_processes_evaluate_as_one(data, tmp_path, two_processes):
    path = two_processes[0] / "GTA5_3.ckpt"
    argv = ["--restore-from", path, "--data-dir", data / "City", "--input-size", "64,48", "--save"]
    run_parallel(tmp_path / "logs", 2, EVALUATE, *argv, "--save-path", tmp_path / "two")
    run(EVALUATE, *argv, "--save-path", tmp_path / "one")
    assert (tmp_path / "two" / "result.json").read_text() == (tmp_path / "one" / "result.json").read_text()
    images = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.png"))
    assert len(images) == 10  # label ids, colours and panels, and the legend
    for name in images:
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_process_ends_the_job(data, tmp_path):
    job, workers = start_parallel(tmp_path, *train_words(data, tmp_path / "run"))
    os.kill(workers[1], signal.SIGKILL)
    assert job.wait(180) != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.slow
def test_sigterm_ends_the_job_after_a_checkpoint(data, tmp_path):
    """SIGTERM goes to msrun, as from a batch system."""
    job, workers = start_parallel(tmp_path, *train_words(data, tmp_path / "run"))
    job.terminate()
    job.wait(60)
    scripts.wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    os.killpg(job.pid, signal.SIGKILL)  # the programs with which msrun shows the logs
    steps = len(rows_of(tmp_path / "run" / "loss.csv"))
    output = (tmp_path / "logs" / "worker_0.log").read_text()
    assert f"{steps} steps are done; resume with: msrun --worker_num=2 --local_worker_num=2" in output
    argv = ["--continue-train", tmp_path / "run", "--iter-size", 2, "--num-steps-stop", steps + 1]
    assert f"resuming from {tmp_path / 'run' / f'GTA5_{steps}.ckpt'}" in run(TRAIN, *argv).stdout


def test_processes_that_differ_in_options_or_images_do_not_start(data, tmp_path, monkeypatch):
    """The folders may differ between machines, but not the learning rate or the images."""
    numbers, start, processes = [], Run.__init__, parallel.processes

    def start_as_one_of_two(self, *parts):
        monkeypatch.setattr(parallel, "processes", lambda: 2)
        start(self, *parts)

    monkeypatch.setattr(Run, "__init__", start_as_one_of_two)
    monkeypatch.setattr(parallel, "all_equal", numbers.append)  # None: they are not
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "list.txt").write_text("00001.png\n00002.png\n")
    other = ["--data-dir", tmp_path / "data" / "GTA5"]
    for more in ([], other, ["--learning-rate", 1e-4], ["--data-list", tmp_path / "list.txt"]):
        monkeypatch.setattr(parallel, "processes", processes)
        with pytest.raises(UserError, match="start from different values, options or images"):
            train(get_arguments(train_words(data, tmp_path / "run", *more)))
    assert numbers[0] == numbers[1] and len(set(numbers)) == 3


def test_a_step_takes_one_exchange_of_processes(data, tmp_path, monkeypatch):
    """Two more steps, two more; with a checkpoint, whose losses have to be finite, one for that."""
    exchanges, reduce = [], parallel.all_reduce_sum
    monkeypatch.setattr(parallel, "all_reduce_sum", lambda values: exchanges.append(values) or reduce(values))
    monkeypatch.setattr(CLANStep, "step", lambda *_: np.ones(5))
    counts = []
    for steps in (2, 4):
        argv = train_words(data, tmp_path / str(steps), "--not-val", "--mode", "pynative")
        train(get_arguments([*argv, "--num-steps", "9", "--num-steps-stop", str(steps)]))
        counts.append(len(exchanges))
        exchanges.clear()
    assert counts[1] == counts[0] + 2
    assert [row["loss_seg"] for row in rows_of(tmp_path / "4" / "loss.csv")] == ["1"] * 4


def test_no_checkpoint_of_a_step_whose_losses_are_not_finite(data, tmp_path, monkeypatch):
    """Those of a step are looked at before the next one, a checkpoint and the end."""
    monkeypatch.setattr(CLANStep, "step", lambda *_: np.array([1, 1, 1, 1, np.nan]))
    for every, stop in ((1, 2), (2, 2), (9, 1)):
        folder = tmp_path / f"{every}-{stop}"
        argv = train_words(data, folder, "--num-steps", stop, "--save-pred-every", every, "--not-val")
        with pytest.raises(UserError, match="step 0: a loss is not finite: .*loss_D_t nan"):
            train(get_arguments([*argv, "--mode", "pynative"]))
        assert not list(folder.glob("*.ckpt")) and not rows_of(folder / "loss.csv")


@pytest.mark.slow
def test_a_mistake_that_only_one_process_sees_ends_the_job(data, tmp_path, two_at_once):
    argv = train_words(data, two_at_once, *STEPS)
    output = run_parallel(tmp_path / "logs", 2, TRAIN, *argv, ends_well=False)
    assert "already holds a run" in output[0] and "already holds a run" not in output[1]
    scheduler = (tmp_path / "logs" / "scheduler.log").read_text()
    named = re.search(r'a process ended early: see "error:" in (\S+)', scheduler)[1]
    assert "already holds a run" in Path(named).read_text("utf-8") and "Traceback" not in scheduler


@pytest.mark.slow
def test_a_broken_image_costs_no_step_of_two_processes(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    argv = train_words(tmp_path / "data", tmp_path / "run", "--num-steps", 50, "--not-val")
    stream = DomainSampler(range(4), 0, 2, 2, [1234, 0], False, False)
    first, second = ({stream.index(2 * step), stream.index(2 * step + 1)} for step in (0, 1))
    broken = tmp_path / "data" / "GTA5" / "images" / f"{min(second - first) + 1:05d}.png"
    broken.write_bytes(broken.read_bytes()[:5000])
    output = run_parallel(tmp_path / "logs", 2, TRAIN, *argv, ends_well=False)
    assert f"{broken}: not a readable image" in "".join(output)
    assert [path.name for path in tmp_path.glob("run/*.ckpt")] == ["GTA5_1.ckpt"]


@pytest.mark.slow
def test_recompute_changes_no_result(reference, data, tmp_path):
    """Nor the BN statistics, which recomputing batch norm could update twice."""
    run(TRAIN, *train_words(data, tmp_path / "again", *RUN, "--recompute"))
    assert_same(reference, tmp_path / "again", 1e-5)
