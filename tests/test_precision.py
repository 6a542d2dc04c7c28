"""Mixed precision on the CPU, which runs float16 convolutions: gradients, losses, skipped steps, resuming."""

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, amp, nn, ops

from CLAN_train_gta5_2_city import CLANStep
from model import CLAN_G
from model.CLAN_D import discriminator
from model.CLAN_G import generator
from options.train_options import get_arguments
from tests import golden
from tests.scripts import TRAIN, losses, rows_of, run, train_words
from utils import checkpoint
from utils.system import device

FACTORS = {"preheating": (1.0, 1.0, 0.0), "weighted": (0.9, 0.4, 40.0)}  # damp, base, local


def make_step(level: str, size: str = "1024,512", mode: str = "pynative", *more: str) -> CLANStep:
    """Small network, the paper's settings, source and target of one size.

    As graphs, many steps take half the time, but gradients at this size 12 GB instead of 5.
    """
    args = get_arguments(["--model", "small", "--device", "cpu", "--mode", mode, "--amp-level", level,
                          "--input-size", size, "--input-size-target", size, *more])  # fmt: skip
    modes = {"graph": mindspore.GRAPH_MODE, "pynative": mindspore.PYNATIVE_MODE}
    mindspore.set_context(mode=modes[mode], jit_config={"jit_level": "O0"})
    mindspore.set_seed(5)
    return CLANStep(args, generator("small"), discriminator("small")).set_train()


def images(width: int, height: int):
    """x_s, y_s and x_t."""
    (x_s, y_s), (x_t, _) = (golden.batch(seed, (width, height), (width, height)) for seed in (1, 2))
    return x_s, y_s, x_t


def layer_gradients(step: CLANStep, factors: tuple[float, float, float]) -> dict[str, np.ndarray]:
    """Gradients by pass and layer, such as "target net_G.layer4"."""
    layers = {}
    for name, grads in golden.gradients(step, *images(1024, 512), factors).items():
        for weight, g in grads.items():
            assert g.any(), (name, weight)
            layer = f"{name} {'.'.join(weight.split('.')[:2])}"
            layers.setdefault(layer, []).append(g.ravel().astype(float))
    return {layer: np.concatenate(grads) for layer, grads in layers.items()}


class RoundedBatchNorm(nn.BatchNorm2d):
    """Batch norm as on an NPU: float16 activations, float32 statistics, which the CPU's kernel lacks."""

    def construct(self, x):
        return super().construct(x.astype(mindspore.float32)).astype(mindspore.float16)


@pytest.mark.slow
def test_gradients_survive_float16(monkeypatch):
    """Cosine of mixed-precision and float32 gradients, per pass and layer; with an NPU's batch norm, too."""
    full, mixed = make_step("O0"), [make_step("O3")]  # O3: G as in O2, and D too
    monkeypatch.setattr(CLAN_G, "batch_norm", lambda channels: RoundedBatchNorm(channels, momentum=0.9))
    mixed.append(make_step("O3"))
    for when, factors in FACTORS.items():
        expected = layer_gradients(full, factors)
        for step in mixed:
            for layer, g in layer_gradients(step, factors).items():
                cosine = g @ expected[layer] / np.linalg.norm(g) / np.linalg.norm(expected[layer])
                assert cosine >= 0.98, (when, step is mixed[1], layer, cosine)


def test_batch_norm_is_float16_only_in_graphs_for_an_npu(monkeypatch):
    """Without a type of its own: to_float(float16) would make its running variance float16 in validation."""
    graph, pynative = mindspore.GRAPH_MODE, mindspore.PYNATIVE_MODE
    for on_npu, mode, is_float32 in ((False, graph, True), (True, pynative, True), (True, graph, False)):
        monkeypatch.setattr(CLAN_G, "on_npu", lambda on_npu=on_npu: on_npu)
        mindspore.set_context(mode=mode)
        net_G = generator("small")
        CLAN_G.to_mixed_precision(net_G)
        assert bool(net_G.bn1.fp32) == is_float32 and not net_G.bn1.fp16 and net_G.conv1.fp16


def test_loss_scaling_follows_the_precision_and_not_the_option(monkeypatch):
    """On a 910A convolutions compute in float16 at --amp-level O0 too."""
    assert make_step("O0").scaler is None and make_step("O2").scaler is not None
    monkeypatch.setattr(device, "precision", lambda *_: {"convolutions of G": "float16"})
    assert make_step("O0").target_pass.factor == 1024


def test_a_910A_forgets_what_overflowed_before(monkeypatch):
    step, seen = make_step("O2"), []
    monkeypatch.setattr(amp, "all_finite", seen.append)
    step.clear_overflow()
    monkeypatch.setattr(device, "chip", lambda: "ascend910")
    step.clear_overflow()
    assert len(seen) == 1


@pytest.mark.slow
def test_few_of_the_first_steps_are_skipped():
    """At a quarter of the pixels, where the first step overflows from the same loss scale on: 2^13."""
    step = make_step("O3", "512,256", "graph")
    batch = images(512, 256)
    for i in range(20):
        step.step([batch], golden.labelled(batch[1]), *FACTORS["weighted"], lr=2.5e-4 * i / 20, lr_D=1e-4)
    assert step.update.skipped.asnumpy() <= 2


STRONG = ["--preheat-steps", 2, "--lambda-adv", 0.1, "--lambda-local", 5]


@pytest.mark.slow
@pytest.mark.parametrize("levels, more", [(("O2", "O3"), []), (("O3",), STRONG)])
def test_mixed_precision_stays_close(data, tmp_path, levels, more):
    """With the paper's weights of the losses, and with a discriminator that moves G."""
    for level in ("O0", *levels):
        argv = ["--num-steps", 10, "--not-val", "--amp-level", level, *more]
        argv = train_words(data, tmp_path / level, *argv)
        assert "skipped" not in run(TRAIN, *argv).stdout
    for level in levels:
        np.testing.assert_allclose(losses(tmp_path / level), losses(tmp_path / "O0"), rtol=0.02)
        assert not np.array_equal(losses(tmp_path / level), losses(tmp_path / "O0"))


@pytest.mark.slow
def test_a_step_that_overflows_in_mixed_precision_is_skipped():
    step, batch = make_step("O2", "64,64", "graph", "--recipe", "released"), images(64, 64)

    def moved() -> bool:
        before = [w.asnumpy().copy() for w in (*step.weights_G, *step.weights_D)]
        assert np.isfinite(step.step([batch], golden.labelled(batch[1]), 1.0, 0.4, 40.0, 2.5e-4, 1e-4)).all()
        return any((w.asnumpy() != b).any() for w, b in zip((*step.weights_G, *step.weights_D), before))

    assert moved() and step.update.skipped.asnumpy() == 0
    ops.assign(step.update.scale_value, Tensor(1e38, mindspore.float32))  # in place: see parallel.average
    assert not moved() and step.update.skipped.asnumpy() == 1
    assert step.update.scale_value.asnumpy() == np.float32(0.5e38)
    assert step.update.beta1_power.asnumpy() == np.float32(0.9)  # of the one update of D
    ops.assign(step.update.scale_value, Tensor(1024.0, mindspore.float32))
    assert moved() and step.update.skipped.asnumpy() == 1


@pytest.mark.slow
def test_a_run_in_mixed_precision_in_segments_ends_with_the_same_bits(data, tmp_path):
    """The scale of the loss, its counter and the count of skipped steps are resumed too; validations of G in
    float16 are the same.
    """
    argv = ["--num-steps", 4, "--amp-level", "O3", "--iter-size", 2, "--lambda-adv", 1]
    run(TRAIN, *train_words(data, tmp_path / "run", *argv, "--save-pred-every", 2))
    leg = ["--continue-train", tmp_path / "run" / "GTA5_2.ckpt", "--snapshot-dir", tmp_path / "leg"]
    run(TRAIN, *leg)
    names = ("scale_value", "counter", "skipped")
    one, two = (checkpoint.read(str(tmp_path / f / "GTA5_4.ckpt")) for f in ("run", "leg"))
    assert set(names) <= one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    scores = rows_of(tmp_path / "run" / "miou.csv")
    assert len(scores) == 2 and scores == rows_of(tmp_path / "leg" / "miou.csv")
