"""The gradients that save memory are the usual ones; what a training step takes."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, ops

from CLAN_train_gta5_2_city import CLANStep
from model import convolution
from model.CLAN_D import discriminator
from model.CLAN_G import generator
from model.upsample import CPUUpsample, Up
from options.train_options import get_arguments
from tests.benchmark import Worker
from tests.scripts import ROOT, TRAIN, train_words
from utils.flops import generator_flop, step_flop

RNG = np.random.default_rng(0)


def normal(*shape):
    return Tensor(RNG.normal(0, 1, shape).astype(np.float32))


def gradients(cell, dout, *inputs):
    """Return the gradients of a cell's inputs for `dout`, that of its result, as arrays."""
    gradient = ops.GradOperation(get_all=True, sens_param=True)(cell)
    return [tensor.asnumpy() for tensor in gradient(*inputs, dout)]


@pytest.fixture(params=[mindspore.GRAPH_MODE, mindspore.PYNATIVE_MODE])
def mode(request):
    mindspore.set_context(mode=request.param)


@pytest.mark.parametrize("batch, c, k, size, kind", [  # kind: kernel, stride, padding, dilation
    (1, 5, 7, (9, 11), (3, 1, 2, 2)),
    (2, 6, 3, (13, 8), (3, 1, 6, 6)),  # taps that see nothing but padding
    (2, 3, 4, (14, 17), (7, 2, 3, 1)),
    (2, 3, 5, (11, 12), (4, 2, 1, 1)),  # the last row takes part in nothing
])
def test_gradients_of_a_convolution(mode, batch, c, k, size, kind):
    x, weight = normal(batch, c, *size), normal(k, c, kind[0], kind[0])
    usual, ours = convolution.Convolution(*kind), convolution.low_memory_convolution(*kind)
    dout = normal(*usual(x, weight).shape)
    for a, b in zip(gradients(ours, dout, x, weight), gradients(usual, dout, x, weight)):
        assert np.allclose(a, b, rtol=1e-5, atol=3e-5)


def test_gradient_of_up_sampling(mode):
    for n, (h, w), size in ((1, (5, 7), (33, 50)), (3, (1, 4), (9, 16)), (2, (6, 1), (6, 5))):
        for dtype, tolerance in ((mindspore.float32, 1e-5), (mindspore.float16, 1e-2)):
            x, dout = normal(n, 4, h, w).astype(dtype), normal(n, 4, *size)
            [a], [b] = gradients(CPUUpsample(size), dout, x), gradients(Up(size), dout, x)
            assert a.dtype == b.dtype and np.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_operations_of_a_step():
    """The figures of the README, GFLOP, for the paper's sizes."""
    net_G, net_D = generator("resnet101"), discriminator("resnet101")
    assert round(generator_flop(net_G, (1280, 720)) / 1e9) == 1347
    assert round(generator_flop(net_G, (1024, 512)) / 1e9) == 771
    assert round(step_flop(net_G, net_D, (1280, 720), (1024, 512)) / 1e10) == 667


@pytest.mark.slow
def test_peak_memory():
    """Of a fresh process, for the paper's network at a quarter of the paper's width and height."""
    worker = Worker(sys.executable, "tests.benchmark", "--serve", "step", "320x180+256x128")
    peak = [worker.ask()["peak"] for _ in range(2)][-1]  # GB
    worker.close()
    assert peak < 3, peak


@pytest.mark.slow
def test_sizes_of_images_compile_passes_and_not_their_pairs(compiled):
    """Three sizes per domain, as --random-scale has: 3 + 3 passes of G, 2 + 2 of D, the update.

    Two of the sizes have logits of one size. Not 9 whole steps, as there are pairs.
    """
    mindspore.set_context(mode=mindspore.GRAPH_MODE, jit_config={"jit_level": "O0"})
    argv = ["--model", "small", "--device", "cpu", "--input-size", "64,48", "--input-size-target", "64,48"]
    step = CLANStep(get_arguments(argv), generator("small"), discriminator("small")).set_train()
    y = Tensor(np.ones((1, 48, 64), np.int32))
    for h_s, w_s in ((48, 64), (38, 51), (52, 70)):
        for h_t, w_t in ((48, 64), (38, 51), (52, 70)):
            batch = normal(1, 3, h_s, w_s), y, normal(1, 3, h_t, w_t)
            step.step([batch], 1.0, 1.0, 0.4, 40.0, 0.0, 0.0)
    assert len(compiled) == 11


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_a_long_run_needs_no_more_than_a_short_one(data, tmp_path):
    """Memory, open files and CPU seconds per step do not grow, once all image sizes have occurred."""
    folder = tmp_path / "run"
    argv = train_words(data, folder, "--num-steps", 300, "--save-pred-every", 15, "--recipe", "released")
    process = subprocess.Popen([sys.executable, ROOT / TRAIN, *argv, "--keep-checkpoints", "2"],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seen, status = [], Path(f"/proc/{process.pid}")  # each second: steps, pages, open files, clock ticks
    while process.poll() is None:
        time.sleep(1)
        with suppress(OSError):  # not there yet, or ended meanwhile
            steps = (folder / "loss.csv").read_text("utf-8").count("\n") - 1
            pages = int((status / "statm").read_text("utf-8").split()[1])
            ticks = sum(map(int, (status / "stat").read_text("utf-8").rsplit(")")[1].split()[11:13]))
            seen.append((steps, pages, len(list((status / "fd").iterdir())), ticks))
    assert process.returncode == 0
    early, late = (np.array([row for row in seen if first <= row[0] < end])
                   for first, end in ((120, 200), (200, 301)))
    before, after = np.median(early, 0), np.median(late, 0)
    assert after[1] <= 1.1 * before[1] and after[2] <= before[2] + 2, (before, after)
    per_step = [(rows[-1, 3] - rows[0, 3]) / (rows[-1, 0] - rows[0, 0]) for rows in (early, late)]
    assert per_step[1] <= 1.5 * per_step[0], per_step
