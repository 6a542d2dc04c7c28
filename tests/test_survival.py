"""Survival of a run: kills, signals, full disks, damaged files, bad numbers. Nothing here is mocked."""

import fcntl
import json
import os
import pty
import random
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from CLAN_train_gta5_2_city import train
from dataset.pipeline import DomainSampler
from options.train_options import get_arguments
from tests.scripts import EAGER, EVALUATE, ROOT, RUN, STEPS, TRAIN, fails, refused, rows_of, run, train_words
from utils import checkpoint, run_folder
from utils.run_folder import ResumePoint
from utils.system.errors import UserError
from utils.tools import demo
from utils.tools.demo_scenes import write_demo_data

# Nearly all runs here are of G alone; test_scripts.py and test_parallel.py resume the graphs of both networks
# to the bit.
RUN = [*RUN, "--method", "source", *EAGER]


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """A run that nothing happened to, with a checkpoint and a validation after every step. To be copied."""
    folder = tmp_path_factory.mktemp("survival") / "run"
    run(TRAIN, *train_words(data, folder, *RUN))
    return folder


def same_end(a: Path, b: Path) -> None:
    """Two runs ended with the same bits, the same tables and the same best checkpoint."""
    for name in ("loss.csv", "miou.csv"):
        rows = [[{**row, "seconds": ""} for row in rows_of(folder / name)] for folder in (a, b)]
        assert rows[0] == rows[1], name
    for name in (f"GTA5_{STEPS}.ckpt", "GTA5_best.ckpt"):
        x, y = (checkpoint.read(str(folder / name)) for folder in (a, b))
        assert x.keys() == y.keys() and len(x) > 90
        assert all(np.array_equal(x[key], y[key]) for key in x if key != "best_mIoU"), name


def cut_back(reference: Path, folder: Path, steps: int) -> Path:
    """A copy of the reference as a kill after `steps` steps left it."""
    shutil.copytree(reference, folder)
    for n in range(steps + 1, STEPS + 1):
        (folder / f"GTA5_{n}.ckpt").unlink()
    return folder


def start(*argv, script: str = TRAIN, cwd: Path = ROOT, **more) -> subprocess.Popen:
    """A script or module, begun; with its output in one pipe, a line at a time."""
    program = [ROOT / script] if script.endswith(".py") else ["-m", script]
    command = [sys.executable, "-u", *program, *map(str, argv)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **more}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, **streams)


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    """Until the condition holds; a process that ends before, or a wait without end, is an error."""
    end = time.time() + seconds
    while not condition():
        if process.poll() is not None or time.time() > end:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


def ended(process: subprocess.Popen, number: signal.Signals) -> str:
    """Return what a process prints after a signal; it has to end by itself, with the customary code."""
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number and "Traceback" not in output, output
    return output


def steps_in(folder: Path) -> int:
    return len(rows_of(folder / "loss.csv")) if (folder / "loss.csv").exists() else 0


slow = pytest.mark.slow


@pytest.mark.parametrize("steps", [4, *(pytest.param(n, marks=slow) for n in (1, 6))])
def test_resumes_from_an_older_checkpoint_and_keeps_the_newer_ones(reference, tmp_path, steps):
    folder = shutil.copytree(reference, tmp_path / "run")
    done = run(TRAIN, "--resume", folder / f"GTA5_{steps}.ckpt")
    same_end(reference, folder)
    if steps == STEPS:
        assert "all 6 steps are done" in done.stdout and not (folder / "after_6").exists()
    else:
        assert f"after_{steps}: GTA5_6.ckpt" in done.stdout
        aside = {path.name for path in (folder / f"after_{steps}").iterdir()}
        assert aside >= {f"GTA5_{n}.ckpt" for n in range(steps + 1, STEPS + 1)} | {"loss.csv", "miou.csv"}


def test_resumes_in_another_folder_and_leaves_the_first_alone(reference, tmp_path):
    """In the folder that the shell stands in, which is not replaced."""
    before = {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    folder = tmp_path / "b"
    folder.mkdir()
    (folder / "nohup.out").write_text("of somebody else")
    number = folder.stat().st_ino
    argv = ["--resume", reference / "GTA5_3.ckpt", "--snapshot-dir", "."]
    run(TRAIN, *argv, "--num-workers", 1, cwd=folder)
    same_end(reference, folder)
    assert folder.stat().st_ino == number and not [*folder.glob(".*"), *folder.glob("after_*")]
    assert (folder / "nohup.out").read_text() == "of somebody else"
    assert before == {path: path.stat().st_mtime_ns for path in reference.iterdir()}
    assert "already holds a run" in fails(TRAIN, *argv, cwd=folder)


@slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(reference, data, tmp_path, number):
    folder = tmp_path / "a run"
    argv = train_words(data, folder, *RUN)
    argv[argv.index("--save-pred-every") + 1] = "1000"
    process = start(*argv, "--not-val")
    wait_for(lambda: steps_in(folder) >= 1, process)
    process.send_signal(number)
    output = ended(process, number)
    done = steps_in(folder)
    assert f"{done} steps are done" in output
    assert f"stopped by {number.name}" in output
    assert [path.name for path in folder.glob("*.ckpt")] == [f"GTA5_{done}.ckpt"] and done < STEPS
    hint = shlex.split(re.search("resume with: (.*)", output)[1])  # as one would paste it
    assert hint[0] == "python" and Path(hint[1]).name == TRAIN and hint[-2:] == ["--device", "cpu"]
    run(TRAIN, *hint[2:])
    a, b = (checkpoint.read(str(path / "GTA5_6.ckpt")) for path in (reference, folder))
    assert all(np.array_equal(a[key], b[key]) for key in a if key != "best_mIoU")
    assert [row["loss_seg"] for row in rows_of(folder / "loss.csv")] == [
        row["loss_seg"] for row in rows_of(reference / "loss.csv")
    ]


@slow
def test_a_folder_belongs_to_one_process(data, tmp_path):
    folder = tmp_path / "run"
    process = start(*train_words(data, folder, *EAGER, "--num-steps", 100_000, "--not-val"))
    wait_for(lambda: steps_in(folder) >= 1, process)
    assert "another process" in fails(TRAIN, "--resume", folder)
    process.kill()
    process.wait()
    run(TRAIN, "--resume", folder, "--num-steps-stop", 1)


@pytest.mark.parametrize("damage", ["flip", *(pytest.param(kind, marks=slow) for kind in ("cut", "all"))])
def test_damaged_checkpoints_are_skipped(reference, tmp_path, damage):
    """Of a folder, or from one that was named; the best one serves when all others are damaged."""
    folder = shutil.copytree(reference, tmp_path / "run")
    for path in [folder / f"GTA5_{n}.ckpt" for n in range(1 if damage == "all" else 5, STEPS + 1)]:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 3] ^= 4
        path.write_bytes(raw[: len(raw) // 2] if damage == "cut" else raw)
    done = run(TRAIN, "--resume", folder / "GTA5_6.ckpt" if damage == "flip" else folder)
    assert "skipped" in done.stdout and "GTA5_6.ckpt: not a readable" in done.stdout
    name = "GTA5_best.ckpt" if damage == "all" else "GTA5_4.ckpt"
    assert f"resuming from {folder / name}" in done.stdout
    same_end(reference, folder)
    assert list(folder.glob("after_*/GTA5_6.ckpt"))


@slow
def test_a_run_without_a_checkpoint_starts_again(reference, data, tmp_path):
    folder = cut_back(reference, tmp_path / "run", 0)
    (folder / "GTA5_best.ckpt").unlink()
    done = run(TRAIN, "--resume", folder)
    assert "starting from scratch" in done.stdout and "after_0: rows of loss.csv, rows of miou.csv" in done.stdout
    for name in ("loss.csv", "miou.csv"):  # of steps that no checkpoint led to any more
        assert rows_of(folder / "after_0" / name) == rows_of(reference / name)
    same_end(reference, folder)
    (tmp_path / "empty").mkdir()
    assert "no run in it" in fails(TRAIN, "--resume", tmp_path / "empty")


def test_a_checkpoint_that_was_named_is_the_newest_to_resume_from(reference, tmp_path):
    """A damaged one is replaced by one before it, never by a later one."""
    folder = shutil.copytree(reference, tmp_path / "run")
    (folder / "GTA5_2.ckpt").write_bytes(b"damaged")
    assert run_folder.find_resumable(str(folder / "GTA5_2.ckpt")).checkpoint == folder / "GTA5_1.ckpt"
    (folder / "GTA5_1.ckpt").unlink()
    (folder / "GTA5_best.ckpt").write_bytes(b"damaged")
    for name in ("GTA5_2.ckpt", "GTA5_best.ckpt"):
        with pytest.raises(UserError, match=f"{name}: not a readable MindSpore checkpoint"):
            run_folder.find_resumable(str(folder / name))


def test_a_checkpoint_elsewhere_keeps_its_run_or_wants_its_options(reference, tmp_path):
    """A link leads to the run's options; a copy has none. A run that begins with one finds it again."""
    link, copy, new = tmp_path / "latest.ckpt", tmp_path / "backup" / "mine.ckpt", tmp_path / "new"
    link.symlink_to(reference / "GTA5_4.ckpt")
    assert get_arguments(["--resume", str(link)]).preheat_steps == 2
    copy.parent.mkdir()
    shutil.copy(reference / "GTA5_4.ckpt", copy)
    for name in (copy, copy.with_suffix("")):
        assert f"{copy.parent / 'options.json'} is missing: check --resume" in refused("--resume", name)
    inside = tmp_path / "run" / "GTA5_4.ckpt"  # its file on a larger disk, its options beside the link
    inside.parent.mkdir()
    inside.symlink_to(copy)
    shutil.copy(reference / "options.json", inside.parent)
    assert get_arguments(["--resume", str(inside), "--snapshot-dir", str(new)]).preheat_steps == 2
    assert run_folder.find_resumable(str(inside)).checkpoint == inside
    with pytest.raises(UserError, match="no such checkpoint"):  # though a folder's name begins so
        run_folder.find_resumable(get_arguments(["--resume", str(tmp_path / "back")]).continue_train)


@slow
def test_what_a_kill_leaves_is_cleared_and_a_validation_made_up_for(reference, tmp_path):
    folder = cut_back(reference, tmp_path / "run", 4)
    lines = (folder / "miou.csv").read_text().splitlines(keepends=True)
    (folder / "miou.csv").write_text("".join(lines[:4]))  # header and three validations
    with open(folder / "loss.csv", "ab") as file:
        file.write(b"6,0.12\0\0\0\xff")
    for name in (".GTA5_5.tmp.ckpt", ".GTA5_5.tmp.tmp"):
        (folder / name).write_bytes(b"half")
    assert "after_4: rows of loss.csv" in run(TRAIN, "--resume", folder).stdout
    same_end(reference, folder)
    assert not list(folder.glob(".*"))
    assert (folder / "after_4" / "loss.csv").read_bytes().endswith(b"6,0.12\0\0\0\xff")


@pytest.mark.parametrize("separator, mark", [(",", ""), (";", "\ufeff")])
def test_tables_that_a_spreadsheet_saved_lose_no_row(reference, tmp_path, separator, mark):
    """It writes E-05, quotes, a byte-order mark and, with semicolons, decimal commas."""
    folder, point = cut_back(reference, tmp_path / "run", 4), "," if separator == ";" else "."
    for name in ("loss.csv", "miou.csv"):
        header, *rows = [line.split(",") for line in (folder / name).read_text().splitlines()]
        rows = [[cell.upper().replace("NAN", "nan").replace(".", point) for cell in row] for row in rows]
        lines = [separator.join(cells) for cells in ([f'"{cell}"' for cell in header], *rows, [""])]
        (folder / name).write_text(mark + "\n".join(lines), encoding="utf-8")
    assert "E-0" in (folder / "loss.csv").read_text(encoding="utf-8")
    run(TRAIN, "--resume", folder)
    same_end(reference, folder)


def test_a_table_of_other_columns_is_not_lost(reference, tmp_path):
    folder = cut_back(reference, tmp_path / "run", 4)
    (folder / "loss.csv").write_text("step,loss\n0,1.5\n")
    assert "loss.csv: has other columns" in fails(TRAIN, "--resume", folder)
    assert (folder / "loss.csv").read_text() == "step,loss\n0,1.5\n" and not [*folder.glob("after_*")]
    alone = tmp_path / "alone"  # nothing to resume, and nothing to overwrite
    alone.mkdir()
    (alone / "miou.csv").touch()
    with pytest.raises(UserError, match="holds a run; choose another --snapshot-dir or move it away$"):
        run_folder.check_new(alone)


def test_a_notebook_can_train_again(data, tmp_path):
    """Two runs in one process, also after an error: the lock of the folder is given back."""
    argv = train_words(data, tmp_path / "new" / "run", *EAGER, "--method", "source", "--num-steps", 1)
    with pytest.raises(UserError, match="nowhere"):
        train(get_arguments([*argv, "--data-dir", str(tmp_path / "nowhere")]))
    assert not (tmp_path / "new").exists()
    train(get_arguments([*argv, "--not-val"]))
    train(get_arguments(["--resume", str(tmp_path / "new" / "run"), "--device", "cpu"]))
    for _ in range(2):
        run_folder.lock_results_dir(tmp_path / "result")


def stop_while_it_writes(process: subprocess.Popen, folder: Path) -> None:
    """SIGSTOP when a checkpoint is half written, unless the process ends before."""
    while process.poll() is None:
        if list(folder.glob(".GTA5_*")):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if list(folder.glob(".GTA5_*")):
                return
            process.send_signal(signal.SIGCONT)  # too late


@slow
def test_killed_at_random_moments(reference, data, tmp_path):
    """20 times kill -9, from start-up to the last validation; each time the run can be resumed."""
    rng, folder, kills, writing = random.Random(4), tmp_path / "run", 0, 0
    first = train_words(data, folder, *RUN)
    while kills < 20 or writing < 2:
        alive = (folder / "options.json").exists()
        process = start(*(("--resume", folder) if alive else first))
        if kills % 2 and alive:  # half of them while it works, the others at any time
            steps = steps_in(folder)
            while steps_in(folder) == steps and process.poll() is None:
                time.sleep(0.05)
            time.sleep(rng.uniform(0, 0.7))
            if kills % 4 == 1:  # and a quarter while a checkpoint is being written
                stop_while_it_writes(process, folder)
        else:
            time.sleep(rng.uniform(0, 6))
        if process.poll() is None:
            kills += 1
        process.kill()
        writing += bool(list(folder.glob(".GTA5_*")))
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output
        for path in folder.glob("GTA5_*.ckpt"):
            checkpoint.read(str(path))  # whole, under this name
        if (folder / f"GTA5_{STEPS}.ckpt").exists() and kills < 20:
            shutil.rmtree(folder)  # it got through: again from the start
    if (folder / "options.json").exists():
        run(TRAIN, "--resume", folder)
    else:
        run(TRAIN, *first)
    same_end(reference, folder)


@pytest.fixture(scope="module")
def many(data, tmp_path_factory):
    """3,000 images to validate on."""
    city, val = tmp_path_factory.mktemp("many") / "City", Path("val", "aachen")
    shutil.copytree(data / "City", city)
    for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
        for n in range(3, 3000):
            name = f"aachen_{{:06d}}_000019_{end}.png"
            os.link(city / kind / val / name.format(0), city / kind / val / name.format(n))
    return city


@slow
def test_a_signal_ends_an_evaluation_at_once(many, reference, tmp_path):
    argv = ["--data-dir", many, "--save", "--save-path", tmp_path / "result", "--input-size", "64,48"]
    process = start("--restore-from", reference / "GTA5_6.ckpt", *argv, script=EVALUATE)
    wait_for(lambda: (tmp_path / "result" / "color").exists(), process)
    process.send_signal(signal.SIGTERM)
    assert "stopped by SIGTERM" in ended(process, signal.SIGTERM)
    assert not (tmp_path / "result" / "result.json").exists()
    for path in (tmp_path / "result").glob("*/*.png"):
        Image.open(path).load()


@slow
def test_a_signal_ends_a_validation_at_once(data, many, tmp_path):
    folder, (terminal, end) = tmp_path / "run", pty.openpty()  # a terminal shows the bar of the validation
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # but none of no width
    process = start(*train_words(data, folder, *RUN, "--data-dir-target", many), stderr=end)
    wait_for(lambda: re.search(r"evaluate: .*\| [1-9]\d*/", read_now(terminal)), process)
    process.send_signal(signal.SIGTERM)
    assert "1 steps are done" in ended(process, signal.SIGTERM)
    assert rows_of(folder / "miou.csv") == []


def read_now(terminal: int) -> str:
    """Return what was written to a terminal since the last time."""
    text = b""
    while select.select([terminal], [], [], 0)[0]:
        text += os.read(terminal, 4096)
    return text.decode(errors="replace")


def test_a_signal_ends_the_rendering_of_the_demo(tmp_path):
    process = start("--demo", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("*.png")), process)
    process.send_signal(signal.SIGINT)
    assert ended(process, signal.SIGINT).splitlines()[-1] == "stopped by SIGINT"
    assert not list(tmp_path.rglob("*.png")) and not (tmp_path / "checkpoint").exists()


@slow
def test_a_signal_ends_the_demo_and_its_trainings(tmp_path):
    write_demo_data(tmp_path / "data" / "demo", 1234, source=4, target=4, val=2)
    process = start("--demo", "--num-steps", 40_000, cwd=tmp_path)
    wait_for(lambda: steps_in(tmp_path / "checkpoint" / "demo" / "stage_a"), process)
    process.send_signal(signal.SIGTERM)
    output = ended(process, signal.SIGTERM)
    assert re.search(r"^stage_a \| .* steps are done", output, re.MULTILINE)
    assert len(list(tmp_path.rglob("GTA5_*.ckpt"))) == 1


def test_a_training_of_the_demo_that_fails_ends_those_beside_it(data, tmp_path, capfd):
    argv = train_words(data, tmp_path / "good", *RUN)
    argv[argv.index("--num-steps") + 1] = "100000"
    bad = train_words(data, tmp_path / "bad", "--data-dir", tmp_path / "nowhere", *RUN)
    with pytest.raises(UserError, match="bad ended with exit code 2"):
        demo.train({"good": argv, "bad": bad})
    assert re.search(r"^bad     \| .*nowhere", capfd.readouterr().out, re.MULTILINE)


def test_a_signal_ends_the_distances_of_centres(reference, data, tmp_path):
    argv = ["--restore-from", reference / "GTA5_1.ckpt", reference / "GTA5_6.ckpt", "--device", "cpu"]
    argv += ["--data-dir", data / "GTA5", "--data-dir-target", data / "City", "--input-size", "96,64"]
    process = start(*argv, script="utils.tools.ccd", cwd=tmp_path)
    assert "tensors matched" in process.stdout.readline()  # all images are still to come
    process.send_signal(signal.SIGTERM)
    assert ended(process, signal.SIGTERM) == "stopped by SIGTERM\n"
    assert not [path for path in (tmp_path / "result").rglob("*") if path.is_file()]


@slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_ablation_and_its_runs(tmp_path, number):
    """SIGTERM to the ablation alone, as a batch system sends it; Ctrl-C to all processes of the terminal."""
    write_demo_data(tmp_path / "data" / "demo", 1, source=4, target=4, val=2)
    argv = ["--steps", 100_000, "--seeds", 1, "--rows", "source"]
    process = start(*argv, script="utils.tools.ablation", cwd=tmp_path, start_new_session=True)
    folder = tmp_path / "checkpoint" / "ablation" / "seed1" / "stage_a"
    wait_for(lambda: steps_in(folder), process)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    assert ended(process, number) == f"stopped by {number.name}\n"
    log = (folder / "output.log").read_text()
    assert f"stopped by {number.name}" in log and "Traceback" not in log
    assert not (folder / "result.json").exists()
    os.close(run_folder.lock_run_dir(folder))  # nobody is in it


def in_namespace(commands: str, mount: str, folder: Path) -> subprocess.CompletedProcess:
    """Run shell commands with a file system of their own on `folder`."""
    folder.mkdir()
    script = f"mount -t tmpfs -o {mount} tmpfs {folder} && {{ {commands} ; }}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    return done


def shell(script: str, argv) -> str:
    return " ".join(f"'{word}'" for word in (sys.executable, ROOT / script, *argv))


@slow
@pytest.mark.parametrize("megabytes, kept", [(6, 0), (40, 1)])
def test_a_full_disk_ends_the_run_with_one_line_and_whole_files(reference, data, tmp_path, megabytes, kept):
    disk, out = tmp_path / "disk", tmp_path / "out"
    command = shell(TRAIN, train_words(data, disk / "run", *RUN))
    done = in_namespace(f"{command}; code=$?; cp -a {disk}/run {out}; exit $code", f"size={megabytes}m", disk)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    assert "No space left" in done.stderr and "resumes with" in done.stderr
    assert len(list(out.glob("GTA5_*.ckpt"))) >= kept and not list(out.glob(".*"))
    for path in out.glob("*.ckpt"):
        checkpoint.read(str(path))
    run(TRAIN, "--resume", out)  # on a larger disk
    same_end(reference, out)


@slow
def test_evaluation_on_a_full_disk(reference, data, tmp_path):
    disk = tmp_path / "disk"
    argv = ["--restore-from", reference / "GTA5_6.ckpt", "--data-dir", data / "City", "--save"]
    argv += ["--input-size", "64,48", "--save-path", disk / "result"]
    done = in_namespace(shell(EVALUATE, argv), "size=8k", disk)
    assert done.returncode == 2 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_folder_that_cannot_be_written(data, tmp_path):
    disk = tmp_path / "disk"
    done = in_namespace(shell(TRAIN, train_words(data, disk / "run", *RUN)), "ro", disk)
    assert done.returncode == 2 and "Read-only file system" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "file").write_text("")
    assert "file" in fails(TRAIN, *train_words(data, tmp_path / "file", *RUN))


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    folder = tmp_path / "run"
    argv = train_words(data, folder, *EAGER, "--num-steps", 50, "--save-pred-every", 1, "--not-val")
    message = fails(TRAIN, *argv, "--learning-rate", "1e18", "--preheat-steps", 1)
    done = steps_in(folder)
    assert f"step {done}: a loss is not finite: loss_seg" in message and "aachen_" in message
    assert ".png" in message and ("nan" in message or "inf" in message)
    assert max(int(p.stem[5:]) for p in folder.glob("GTA5_*.ckpt")) <= done
    for path in folder.glob("*.ckpt"):
        values = checkpoint.read(str(path)).values()
        assert all(np.isfinite(v).all() for v in values if not isinstance(v, str))


def test_steps_without_a_labelled_pixel_are_seen_in_the_log(data, tmp_path):
    shutil.copytree(data / "GTA5", tmp_path / "GTA5")
    for path in sorted((tmp_path / "GTA5" / "labels").iterdir())[1:]:
        Image.fromarray(np.zeros((105, 191), np.uint8)).save(path)
    argv = train_words(data, tmp_path / "run", "--num-steps", 4, "--not-val", *EAGER, "--method", "source")
    output = run(TRAIN, *argv, "--data-dir", tmp_path / "GTA5").stdout  # each image once
    values = [float(row["loss_seg"]) for row in rows_of(tmp_path / "run" / "loss.csv")]
    assert values.count(0) == 3 and len(re.findall(r"^step \d: loss_seg 0, ", output, re.MULTILINE)) == 3


@slow
def test_a_broken_image_ends_the_run_and_costs_no_step(data, tmp_path):
    shutil.copytree(data / "GTA5", tmp_path / "GTA5")
    folder, path = tmp_path / "run", tmp_path / "GTA5" / "images" / "00002.png"
    whole = path.read_bytes()
    argv = [*EAGER, "--num-steps", 4, "--not-val", "--data-dir", tmp_path / "GTA5"]  # each image once
    samplers = {seed: DomainSampler(range(4), 0, 4, 1, [seed, 0], False, False) for seed in range(9)}
    seeds = (seed for seed, sampler in samplers.items() if sampler.index(2) == 1)
    argv = train_words(data, folder, *argv, "--random-seed", next(seeds))
    path.write_bytes(whole[:2000])
    assert "00002.png: not a readable image" in fails(TRAIN, *argv)
    assert steps_in(folder) == 2 and [path.name for path in folder.glob("*.ckpt")] == ["GTA5_2.ckpt"]
    path.write_bytes(whole)
    run(TRAIN, "--resume", folder)
    assert steps_in(folder) == 4


@slow
def test_without_validation_old_scores_make_room_and_it_can_come_back(reference, tmp_path):
    folder = shutil.copytree(reference, tmp_path / "run")
    run(TRAIN, "--resume", folder / "GTA5_4.ckpt", "--not-val", "--num-steps-stop", 5)
    assert [row["step"] for row in rows_of(folder / "miou.csv")] == ["1", "2", "3", "4"]
    run(TRAIN, "--resume", folder, "--val", "--num-steps-stop", 6)
    same_end(reference, folder)


@slow
def test_old_checkpoints_are_pruned_but_never_the_best(data, tmp_path):
    folder = tmp_path / "run"
    run(TRAIN, *train_words(data, folder, *RUN, "--keep-checkpoints", 2))
    names = sorted(path.name for path in folder.glob("*.ckpt"))
    assert names == ["GTA5_5.ckpt", "GTA5_6.ckpt", "GTA5_best.ckpt"]


def test_options_are_checked_against_data_and_run(reference, data, tmp_path, monkeypatch):
    message = fails(TRAIN, *train_words(data, tmp_path / "run", "--batch-size", 4))
    assert "--batch-size 4 x --iter-size 1 x 1 processes), more than the 3 of the target" in message
    assert not (tmp_path / "run").exists()
    message = fails(TRAIN, "--device", "cpu", "--device-id", 3)
    assert "--device-id 3 names an NPU, but the device is the CPU" in message
    message = refused("--resume", reference, "--lambda-adv", "0.5")
    assert "--lambda-adv 0.5 contradicts" in message
    folder = shutil.copytree(reference, tmp_path / "damaged")
    (folder / "options.json").write_text('{"batch_size": 2, ')
    assert "options.json is damaged" in refused("--resume", folder)
    options = json.loads((reference / "options.json").read_text())
    (folder / "options.json").write_text(json.dumps({**options, "batch_size": -3}))
    assert "argument --batch-size: -3 is out of range" in refused("--resume", folder)
    (folder / "options.json").write_text(json.dumps({**options, "device_id": 3}))  # of another machine
    assert get_arguments(["--resume", str(folder)]).device_id == 0
    (folder / "options.json").write_text(json.dumps({**options, "jit_level": "O1"}))
    assert get_arguments(["--resume", str(folder), "--mode", "pynative"]).jit_level is None
    monkeypatch.setenv("RANK_SIZE", "eight")
    assert "RANK_SIZE is 'eight', not a number" in refused("--resume", folder)


def test_a_validation_without_labels_is_never_the_best_and_does_no_harm(reference, data, tmp_path):
    """Labels of an own target may be dummies."""
    folder, city = cut_back(reference, tmp_path / "run", 4), tmp_path / "City"
    shutil.copytree(data / "City", city)
    for path in (city / "gtFine" / "val").rglob("*.png"):
        Image.fromarray(np.zeros((102, 204), np.uint8)).save(path)
    done = run(TRAIN, "--resume", folder, "--data-dir-target", city)
    assert "validation after 6 steps: mIoU nan" in done.stdout
    assert done.stdout.count("no class of the val set has a label") == 2
    scores = rows_of(folder / "miou.csv")
    assert [row["step"] for row in scores if row["mIoU"] == "nan"] == ["5", "6"]
    best = max(scores[:4], key=lambda row: float(row["mIoU"]))
    assert checkpoint.step_of(folder / "GTA5_best.ckpt") == int(best["step"])
    content = checkpoint.read(str(folder / "GTA5_6.ckpt"))
    assert content["best_mIoU"] == np.float32(best["mIoU"])


def test_classes_without_a_label_are_named_once_per_run(data, tmp_path):
    shutil.copytree(data / "City", tmp_path / "City")
    for path in (tmp_path / "City" / "gtFine" / "val").rglob("*.png"):
        ids = np.array(Image.open(path))
        Image.fromarray(np.where(np.isin(ids, (31, 33)), 0, ids).astype(np.uint8)).save(path)
    argv = train_words(data, tmp_path / "run", *RUN, "--num-steps", 2, "--num-steps-stop", 1)
    outputs = [run(TRAIN, *argv, "--data-dir-target", tmp_path / "City").stdout]
    outputs.append(run(TRAIN, "--resume", tmp_path / "run", "--num-steps-stop", 2).stdout)
    counts = [output.count("the val set has no label of train, bicycle: the mean") for output in outputs]
    assert counts == [1, 0] and all("validation after" in output for output in outputs)


def test_a_run_resumes_from_any_folder_while_its_lists_say_the_same(data, tmp_path):
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    (home / "data").symlink_to(data)
    (home / "games.txt").write_text("00003.png\n00001.png\n")
    (home / "streets.txt").write_text("aachen/aachen_000002_000019_leftImg8bit.png\n")
    argv = ["--data-list", "games.txt", "--data-list-target", "streets.txt", "--num-steps", 1, "--not-val"]
    run(TRAIN, *train_words(Path("data"), "run", *argv, *EAGER), cwd=home)
    again = ["--resume", home / "run"]
    assert "all 1 steps are done" in run(TRAIN, *again, cwd=away).stdout
    (away / "moved.txt").write_text((home / "games.txt").read_text())
    run(TRAIN, *again, "--data-list", "moved.txt", cwd=away)
    (away / "other.txt").write_text("00001.png\n00003.png\n")
    message = fails(TRAIN, *again, "--data-list", "other.txt", cwd=away)
    assert "--data-list other.txt: chooses other images, or another order" in message

    options = json.loads((home / "run" / "options.json").read_text())
    assert options["names_crc32"].keys() == {"source", "target"}
    assert options["data_list"] == str(away / "moved.txt") and options["snapshot_dir"] == str(home / "run")


def test_each_list_is_compared_with_that_of_the_run(tmp_path):
    names = {"source": 1, "target": 2}
    lists = {"data_list": "source", "gta5_split": "source", "data_list_target": "target"}
    no_lists, before = dict.fromkeys(lists), ResumePoint(tmp_path, options={"names_crc32": names})
    for name, data in lists.items():
        args = Namespace(**{**no_lists, name: "a file"})
        assert not run_folder.check_images(ResumePoint(), args, names)  # no options.json: nothing to compare
        assert not run_folder.check_images(before, args, names)
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} a file: chooses other"):
            run_folder.check_images(before, args, {**names, data: 3})
        [line] = run_folder.check_images(before, Namespace(**no_lists), {**names, data: 3})
        assert line.startswith(f"the {data} images are not those of the run before")
