"""Survival of a run: kills, signals, full disks, damaged files, bad numbers."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import mindspore
import numpy as np
import pytest
from PIL import Image

from CLAN_train_gta5_2_city import main
from dataset.pipeline import DomainSampler
from options.train_options import get_arguments
from tests import scripts
from tests.scripts import EAGER, EVALUATE, ROOT, RUN, STEPS, TRAIN, fails, refused, rows_of, run, train_words
from utils import checkpoint, run_folder
from utils.run_folder import ResumePoint
from utils.system import device
from utils.system.errors import UserError
from utils.tools import demo
from utils.tools.demo_scenes import write_demo_data

# Nearly all runs here are of G alone; test_parity.py resumes the graphs of both networks to the bit.
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


def cut_back(reference: Path, folder: Path) -> Path:
    """A copy of the reference as a kill after 4 steps left it."""
    return shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("GTA5_5*", "GTA5_6*"))


def start(*argv, script: str = TRAIN, cwd: Path = ROOT) -> subprocess.Popen:
    """A script or module, begun; with its output in one pipe, a line at a time."""
    program = [ROOT / script] if script.endswith(".py") else ["-m", script]
    command, env = [sys.executable, "-u", *program, *map(str, argv)], {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, process: subprocess.Popen) -> None:
    """Until the condition holds or the process has ended, which `ended` then finds."""
    scripts.wait_until(lambda: condition() or process.poll() is not None)


def ended(process: subprocess.Popen, number: signal.Signals) -> str:
    """Send a signal; return the output of the process, which has to end with the customary code."""
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 128 + number and "Traceback" not in output, output
    assert f"stopped by {number.name}" in output
    return output


def steps_in(folder: Path) -> int:
    return len(rows_of(folder / "loss.csv")) if (folder / "loss.csv").exists() else 0


slow = pytest.mark.slow


def test_resumes_from_an_older_checkpoint_and_keeps_the_newer_ones(reference, tmp_path):
    """In two segments, of which each takes over the options of the one before; .pth stands for .ckpt."""
    folder = shutil.copytree(reference, tmp_path / "run")
    output = run(TRAIN, "--resume", folder / "GTA5_4.pth", "--num-steps-stop", 5).stdout
    assert "after_4: GTA5_6.ckpt" in output
    aside = {path.name for path in (folder / "after_4").iterdir()}
    assert aside >= {"GTA5_5.ckpt", "GTA5_6.ckpt", "options.json", "loss.csv", "miou.csv"}
    assert rows_of(folder / "after_4" / "miou.csv") == rows_of(reference / "miou.csv")
    gigabytes = re.search("disk: 2 checkpoints of (.*) GB each", output)[1]
    assert float(gigabytes) == pytest.approx((folder / "GTA5_5.ckpt").stat().st_size / 1e9, rel=0.1)
    best = max(float(row["mIoU"]) for row in rows_of(folder / "miou.csv"))
    told = f"all 5 steps are done; {folder}/GTA5_best.ckpt has mIoU {best:.2f}; evaluate the last checkpoint"
    hint = re.search(f"{told} with: python {ROOT / EVALUATE} (.*)", output)[1]
    assert "mIoU" in run(EVALUATE, *shlex.split(hint), "--save-path", tmp_path / "result").stdout
    message = fails(TRAIN, "--resume", folder, "--num-steps-stop", 4)
    assert "has 5 steps, more than --num-steps-stop 4" in message
    run(TRAIN, "--resume", folder, "--num-steps-stop", 6, "--keep-checkpoints", 2)
    assert {path.name for path in folder.glob("*.ckpt")} == {f"GTA5_{n}.ckpt" for n in (5, 6, "best")}
    assert not (folder / "after_5").exists()
    same_end(reference, folder)
    segments = json.loads((folder / "options.json").read_text())["before"]
    assert [(leg["until_step"], leg["num_steps_stop"]) for leg in segments] == [(4, 6), (5, 5)]


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
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(reference, data, tmp_path):
    folder = tmp_path / "a run"
    argv = train_words(data, folder, *RUN, "--not-val", "--save-pred-every", 1000)
    process = start(*argv)
    wait_for(lambda: steps_in(folder) >= 1, process)
    output, done = ended(process, signal.SIGTERM), steps_in(folder)
    assert f"{done} steps are done" in output
    assert [path.name for path in folder.glob("*.ckpt")] == [f"GTA5_{done}.ckpt"] and done < STEPS
    hint = shlex.split(re.search("resume with: (.*)", output)[1])  # as one would paste it
    assert hint[0] == "python" and Path(hint[1]).name == TRAIN and hint[-2:] == ["--device", "cpu"]
    run(TRAIN, *hint[2:])
    a, b = (checkpoint.read(str(path / "GTA5_6.ckpt")) for path in (reference, folder))
    assert all(np.array_equal(a[key], b[key]) for key in a if key != "best_mIoU")


@pytest.mark.parametrize("left, damaged", [
    ("GTA5_4", "56"), pytest.param("GTA5_best", "123456", marks=slow),
    pytest.param("scratch", [*"123456", "best"], marks=slow)])  # fmt: skip
def test_damaged_checkpoints_are_skipped(reference, tmp_path, left, damaged):
    """In a folder, where all that goes is kept aside."""
    folder = shutil.copytree(reference, tmp_path / "run")
    for path in (folder / f"GTA5_{name}.ckpt" for name in damaged):
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 3] ^= 4
        path.write_bytes(raw)
    output = run(TRAIN, "--resume", folder).stdout
    assert "skipped" in output and "GTA5_6.ckpt: not a readable" in output
    assert ("starting from scratch" if left == "scratch" else f"resuming from {folder / left}.ckpt") in output
    same_end(reference, folder)
    [aside] = folder.glob("after_*")
    assert (aside / "GTA5_6.ckpt").exists()
    assert all(rows_of(aside / name) == rows_of(reference / name) for name in ("loss.csv", "miou.csv"))


def test_a_checkpoint_that_cannot_be_resumed_from(reference, tmp_path):
    """With values that are not finite, or of G alone: skipped in a folder, an error where it was named."""
    shutil.copy(reference / "GTA5_4.ckpt", tmp_path)
    content = checkpoint.read(str(reference / "GTA5_6.ckpt"))
    weights = {name: v for name, v in content.items() if name.startswith("net_G.")}
    name, whole = next(iter(weights)), {name: v for name, v in content.items() if not isinstance(v, str)}
    for file, tensors in (("GTA5_5", weights), ("GTA5_6", {**whole, name: weights[name] * np.nan})):
        entries = [{"name": n, "data": mindspore.Tensor(v)} for n, v in tensors.items()]
        mindspore.save_checkpoint(entries, str(tmp_path / f"{file}.ckpt"), crc_check=True)
    point = run_folder.find_resumable(str(tmp_path))
    assert point.checkpoint == tmp_path / "GTA5_4.ckpt" and point.steps == 4 and len(point.damaged) == 2
    (tmp_path / "GTA5_4.ckpt").rename(tmp_path / "GTA5_best.ckpt")
    assert run_folder.find_resumable(str(tmp_path)).checkpoint == tmp_path / "GTA5_best.ckpt"
    for file, told in (("GTA5_5", "not a checkpoint of this project"), ("GTA5_6", f"{name} has nan or inf")):
        with pytest.raises(UserError, match=f"{file}.ckpt: {told}.*: --resume {tmp_path}$"):
            run_folder.find_resumable(str(tmp_path / f"{file}.ckpt"))


def test_a_checkpoint_elsewhere_keeps_its_run_or_wants_its_options(reference, tmp_path):
    """A link leads to the run's options; a copy has none."""
    link, copy, inside = (tmp_path / name for name in ("latest.ckpt", "backup/mine.ckpt", "run/GTA5_4.ckpt"))
    link.symlink_to(reference / "GTA5_4.ckpt")
    assert get_arguments(["--resume", str(link)]).preheat_steps == 2
    copy.parent.mkdir()
    shutil.copy(reference / "GTA5_4.ckpt", copy)
    for name in (copy, copy.with_suffix(""), copy.parent):
        assert f"{copy.parent / 'options.json'} is missing: check --resume" in refused("--resume", name)
    inside.parent.mkdir()
    inside.symlink_to(copy)  # its file on a larger disk, its options beside the link
    shutil.copy(reference / "options.json", inside.parent)
    assert get_arguments(["--resume", str(inside)]).preheat_steps == 2
    assert run_folder.find_resumable(str(inside)).checkpoint == inside


def test_a_run_that_ended_before_its_first_step_leaves_its_folder_free(reference, tmp_path):
    """Unless another process may be in it: not every file system has locks."""
    shutil.copy(reference / "options.json", tmp_path)
    (tmp_path / "loss.csv").write_text("step,loss_seg\n")
    with pytest.raises(UserError, match="already holds a run"):
        run_folder.check_new(tmp_path)
    os.close(run_folder.lock_run_dir(tmp_path))
    run_folder.check_new(tmp_path)
    for name, content in (("loss.csv", "step,loss_seg\n0,1.5\n"), ("GTA5_best.ckpt", "")):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="already holds a run.* --resume"):
            run_folder.check_new(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("separator, mark", [(",", ""), (";", "\ufeff")])
def test_tables_that_a_spreadsheet_saved_lose_no_row(reference, tmp_path, separator, mark):
    """It writes E-05, quotes, a byte-order mark and, with semicolons, decimal commas.

    What a kill leaves is cleared, a row that it tore is kept aside, and its validation is made up for.
    """
    folder, point = cut_back(reference, tmp_path / "run"), "," if separator == ";" else "."
    for name, torn in (("loss.csv", b"6,0.12\0\0\xff"), ("miou.csv", b"")):
        header, *rows = [line.split(",") for line in (folder / name).read_text().splitlines()]
        rows = [[cell.upper().replace("NAN", "nan").replace(".", point) for cell in row] for row in rows]
        lines = [separator.join(cells) for cells in ([f'"{cell}"' for cell in header], *rows, [""])]
        (folder / name).write_bytes((mark + "\n".join(lines)).encode() + torn)
    assert b"E-0" in (folder / "loss.csv").read_bytes()
    lines = (folder / "miou.csv").read_bytes().splitlines(keepends=True)
    (folder / "miou.csv").write_bytes(b"".join(lines[:4]))  # header and three validations
    (folder / ".GTA5_5.tmp.ckpt").write_bytes(b"half")
    assert "after_4: rows of loss.csv\n" in run(TRAIN, "--resume", folder).stdout
    same_end(reference, folder)
    assert not list(folder.glob(".*"))
    assert (folder / "after_4" / "loss.csv").read_bytes().endswith(b"6,0.12\0\0\xff")


def test_a_table_of_other_columns_is_not_lost(reference, tmp_path):
    folder = cut_back(reference, tmp_path / "run")
    (folder / "loss.csv").write_text("step,loss\n0,1.5\n")
    assert "loss.csv: has other columns" in fails(TRAIN, "--resume", folder)
    assert (folder / "loss.csv").read_text() == "step,loss\n0,1.5\n" and not [*folder.glob("after_*")]


def test_a_folder_belongs_to_one_process_until_its_run_ends(data, tmp_path, monkeypatch):
    """Two runs in one process, as in a notebook, follow each other, also after an error."""
    monkeypatch.setattr(device, "setup", lambda *_: None)  # other tests have chosen it
    folder = tmp_path / "run"
    argv = train_words(data, folder, *EAGER, "--method", "source", "--num-steps", 1, "--not-val")
    with pytest.raises(UserError, match="nowhere"):
        main(get_arguments([*argv, "--data-dir", str(tmp_path / "nowhere")]))
    lock = run_folder.lock_run_dir(folder)
    with pytest.raises(UserError, match="run: another process is training there; wait for it"):
        main(get_arguments(argv))
    os.close(lock)
    main(get_arguments(argv))
    main(get_arguments(["--resume", str(folder)]))
    for _ in range(2):
        run_folder.lock_results_dir(tmp_path / "result")
        run_folder.release_results_dir()


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
    """10 times kill -9, from start-up to the last validation; each time the run can be resumed."""
    rng, folder, kills, writing = random.Random(4), tmp_path / "run", 0, 0
    first = train_words(data, folder, *RUN)
    while kills < 10 or not writing:
        begun = (folder / "options.json").exists()
        process = start(*(("--resume", folder) if begun else first))
        if kills % 2:
            stop_while_it_writes(process, folder)
        else:
            time.sleep(rng.uniform(0, 6))
        kills += process.poll() is None
        process.kill()
        writing += bool(list(folder.glob(".GTA5_*")))
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output
        for path in folder.glob("GTA5_*.ckpt"):
            checkpoint.read(str(path))  # whole, under this name
        if (folder / f"GTA5_{STEPS}.ckpt").exists() and kills < 10:
            shutil.rmtree(folder)  # it got through: again from the start
    run(TRAIN, *(("--resume", folder) if (folder / "options.json").exists() else first))
    same_end(reference, folder)


@slow
def test_a_signal_ends_a_validation_at_once(data, tmp_path):
    """Of 3,000 images."""
    folder, city = tmp_path / "run", shutil.copytree(data / "City", tmp_path / "City")
    for path in city.glob("*/val/aachen/aachen_000000_*"):
        for n in range(3, 3000):
            os.link(path, path.with_name(path.name.replace("000000", f"{n:06d}", 1)))
    process = start(*train_words(data, folder, *RUN, "--data-dir-target", city))
    wait_for((folder / "GTA5_1.ckpt").exists, process)
    time.sleep(2)  # of half a minute
    assert "1 steps are done" in ended(process, signal.SIGTERM)
    assert rows_of(folder / "miou.csv") == []


@pytest.mark.parametrize("script, options", [
    (EVALUATE, "--restore-from {run}/GTA5_6.ckpt --data-dir {data}/City --save"),
    ("utils.tools.ccd", "--restore-from {run}/GTA5_1.ckpt {run}/GTA5_6.ckpt --data-dir {data}/GTA5 "
     "--data-dir-target {data}/City --device cpu")])  # fmt: skip
def test_a_signal_ends_other_programs_without_a_result(reference, data, tmp_path, script, options):
    argv = [*options.format(run=reference, data=data).split(), "--input-size", "64,48"]
    process = start(*argv, script=script, cwd=tmp_path)
    wait_for(lambda: "tensors matched" in process.stdout.readline(), process)  # the images are still to come
    assert ended(process, signal.SIGTERM).splitlines()[-1] == "stopped by SIGTERM"
    assert not {path.name for path in (tmp_path / "result").rglob("*.*")} - {"legend.png"}


def test_a_signal_ends_the_rendering_of_the_demo(tmp_path):
    process = start("--demo", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.rglob("*.png")), process)
    assert ended(process, signal.SIGINT).splitlines()[-1] == "stopped by SIGINT"
    assert not list(tmp_path.rglob("*.png"))
    assert [path.name for path in (tmp_path / "checkpoint").rglob("*")] == ["demo"]  # tried at the start


@slow
def test_a_signal_ends_the_demo_and_its_trainings(tmp_path):
    write_demo_data(tmp_path / "data" / "demo", 1234, source=4, target=4, val=2)
    process = start("--demo", "--num-steps", 40_000, cwd=tmp_path)
    wait_for(lambda: steps_in(tmp_path / "checkpoint" / "demo" / "stage_a"), process)
    output = ended(process, signal.SIGTERM)
    assert re.search(r"^stage_a \| .* steps are done", output, re.MULTILINE)
    assert len(list(tmp_path.rglob("GTA5_*.ckpt"))) == 1


def test_a_training_of_the_demo_that_fails_says_why(data, tmp_path, capfd):
    argv = train_words(data, tmp_path / "bad", "--data-dir", tmp_path / "nowhere", *RUN)
    with pytest.raises(UserError, match="bad ended with exit code 2"):
        demo.train("bad", argv, 1)
    assert re.search(r"^bad     \| .*nowhere", capfd.readouterr().out, re.MULTILINE)


@slow
def test_a_signal_ends_the_ablation_and_its_runs(tmp_path):
    """SIGTERM to the ablation alone, as a batch system sends it."""
    write_demo_data(tmp_path / "data" / "demo", 1, source=4, target=4, val=2)
    argv = ["--steps", 100_000, "--seeds", 1, "--rows", "source"]
    process = start(*argv, script="utils.tools.ablation", cwd=tmp_path)
    folder = tmp_path / "checkpoint" / "ablation" / "seed1" / "stage_a"
    wait_for(lambda: steps_in(folder), process)
    output = ended(process, signal.SIGTERM)
    assert re.search(r"^seed1/stage_a \| stopped by SIGTERM$", output, re.MULTILINE)
    assert output.endswith("\nstopped by SIGTERM\n") and not (folder / "result.json").exists()
    os.close(run_folder.lock_run_dir(folder))  # nobody is in it


def run_on(disk: Path, mount: str, argv: list[str], then: str = ":") -> subprocess.CompletedProcess:
    """Train with a file system of its own on `disk`, and run a shell command; the training's exit code."""
    disk.mkdir()
    training = shlex.join(map(str, (sys.executable, ROOT / TRAIN, *argv)))
    script = f"mount -t tmpfs -o {mount} tmpfs {disk} && {{ {training}; code=$?; {then}; exit $code; }}"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no file system can be mounted here: {done.stderr}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stdout + done.stderr
    return done


@slow
def test_a_full_disk_ends_the_run_with_one_line_and_whole_files(reference, data, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    done = run_on(disk, "size=40m", train_words(data, disk / "run", *RUN), f"cp -a {disk}/run {out}")
    assert "No space left" in done.stderr and "resumes with" in done.stderr
    assert list(out.glob("GTA5_*.ckpt")) and not list(out.glob(".*"))
    for path in out.glob("*.ckpt"):
        checkpoint.read(str(path))
    run(TRAIN, "--resume", out)  # on a larger disk
    same_end(reference, out)


def test_a_folder_that_cannot_be_written(data, tmp_path):
    disk = tmp_path / "disk"
    told = "error: --snapshot-dir {}: {}; choose a folder that can be written\n"
    message = run_on(disk, "ro", train_words(data, disk / "run", *RUN)).stderr
    assert told.format(disk / "run", "Read-only file system") in message
    (tmp_path / "file").write_text("")
    assert told.format(tmp_path / "file", "is a file") in fails(TRAIN, *train_words(data, tmp_path / "file"))


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    folder = tmp_path / "run"
    argv = train_words(data, folder, *EAGER, "--num-steps", 50, "--save-pred-every", 1, "--not-val")
    message = fails(TRAIN, *argv, "--learning-rate", "1e9", "--classifier-lr-mult", "1e9")
    done = steps_in(folder)
    assert re.search(f"step {done}: a loss is not finite: loss_seg .*(nan|inf).*; its images: .*_", message)
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
    stream = DomainSampler(range(4), 0, 4, 1, [1234, 0], False, False)
    folder, path = tmp_path / "run", tmp_path / "GTA5" / "images" / f"{stream.index(2) + 1:05d}.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    argv = [*EAGER, "--num-steps", 4, "--not-val", "--data-dir", tmp_path / "GTA5"]  # each image once
    assert f"{path}: not a readable image" in fails(TRAIN, *train_words(data, folder, *argv))
    assert steps_in(folder) == 2 and [path.name for path in folder.glob("*.ckpt")] == ["GTA5_2.ckpt"]
    path.write_bytes(whole)
    run(TRAIN, "--resume", folder)
    assert steps_in(folder) == 4


def test_options_are_checked_against_data_and_run(reference, data, tmp_path):
    message = fails(TRAIN, *train_words(data, tmp_path / "run", "--batch-size", 4))
    assert "--batch-size 4 x --iter-size 1 x 1 processes), more than the 3 of the target" in message
    message = fails(TRAIN, "--device", "cpu", "--device-id", 3)
    assert "--device-id 3 names an NPU, but the device is the CPU" in message
    assert "--lambda-adv 0.5 contradicts" in refused("--resume", reference, "--lambda-adv", "0.5")
    message = refused("--resume", reference, "--batch-size", 1)
    assert "--batch-size 1 x --iter-size 1 x 1 processes = 1, but" in message
    path = tmp_path / "options.json"
    path.write_text('{"batch_size": 2, ')
    assert "options.json is damaged" in refused("--resume", tmp_path)
    options = json.loads((reference / "options.json").read_text())
    path.write_text(json.dumps({**options, "device_id": 3, "not_val": True}))  # of another machine
    args = get_arguments(["--resume", str(tmp_path), "--val"])
    assert args.device_id == 0 and not args.not_val
    path.write_text(json.dumps({**options, "jit_level": "O1"}))
    assert get_arguments(["--resume", str(tmp_path), "--mode", "pynative"]).jit_level is None


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
    shutil.copy(home / "games.txt", away / "moved.txt")
    output = run(TRAIN, "--resume", home / "run", "--data-list", "moved.txt", cwd=away).stdout
    assert "all 1 steps are done" in output
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
