"""Mixed precision on the CPU, which runs float16 convolutions: gradients, losses, skipped steps, resuming."""

import mindspore
import numpy as np
import pytest
from mindspore import Tensor, amp, nn, ops

from CLAN_train_gta5_2_city import CLANStep
from dataset.transform import IMG_MEAN, LABEL_TO_TRAIN
from model import CLAN_G
from model.CLAN_D import discriminator
from model.CLAN_G import generator
from options.train_options import get_arguments
from tests.golden import synthetic_image
from tests.scripts import TRAIN, losses, rows_of, run, train_words
from utils import checkpoint
from utils.system import device

FACTORS = {"preheating": (1.0, 1.0, 0.0), "weighted": (0.9, 0.4, 40.0)}  # damp, base, local


def image(seed: int, width: int = 1024, height: int = 512) -> tuple[Tensor, Tensor]:
    rgb, ids = synthetic_image(seed, width, height)
    x = (rgb[None, :, :, ::-1].astype(np.float32) - IMG_MEAN).transpose(0, 3, 1, 2)
    return Tensor(np.ascontiguousarray(x)), Tensor(LABEL_TO_TRAIN[ids][None].astype(np.int32))


def make_step(level: str, size: str = "1024,512", mode: str = "pynative") -> CLANStep:
    """Small network, the paper's settings, source and target of one size.

    As graphs, many steps take half the time, but gradients at this size 12 GB instead of 5.
    """
    modes = {"graph": mindspore.GRAPH_MODE, "pynative": mindspore.PYNATIVE_MODE}
    mindspore.set_context(mode=modes[mode], jit_config={"jit_level": "O0"})
    mindspore.set_seed(5)
    argv = ["--model", "small", "--device", "cpu", "--mode", mode]
    argv += ["--input-size", size, "--input-size-target", size]
    args = get_arguments([*argv, "--amp-level", level])
    return CLANStep(args, generator("small"), discriminator("small")).set_train()


def gradients(step: CLANStep, factors: tuple[float, float, float]) -> dict[str, dict[str, np.ndarray]]:
    """Gradients by the layers of the source, the target and D's pass, each for itself."""
    (x_s, y_s), (x_t, _) = image(1), image(2)
    out = {}

    def take(name, weights, sums):
        groups = {}
        for w, g in zip(weights, sums):
            groups.setdefault(".".join(w.name.split(".")[:2]), []).append(g.asnumpy().ravel().astype(float))
            ops.assign(g, ops.zeros_like(g))
        assert all(g.any() for gs in groups.values() for g in gs), name
        out[name] = {layer: np.concatenate(gs) for layer, gs in groups.items()}

    _, p = step.source_pass(x_s, y_s, step.labelled_per_batch([(x_s, y_s, x_t)]))
    take("source", step.weights_G, step.sums_G)
    _, _, t, weight = step.target_pass(x_t, *(Tensor(v, mindspore.float32) for v in factors))
    take("target", step.weights_G, step.sums_G)
    step.D_source_pass(p)
    step.D_target_pass(t, weight)
    take("D", step.weights_D, step.sums_D)
    return out


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
        expected = gradients(full, factors)
        for step in mixed:
            for name, layers in gradients(step, factors).items():
                for layer, g in layers.items():
                    other = expected[name][layer]
                    cosine = g @ other / np.linalg.norm(g) / np.linalg.norm(other)
                    assert cosine >= 0.98, (when, step is mixed[1], name, layer, cosine)


def test_batch_norm_is_float16_only_in_graphs_for_an_npu(monkeypatch):
    """Without a type of its own: to_float(float16) would make its running variance float16 in validation."""
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    for on_npu, mode in ((False, mindspore.GRAPH_MODE), (True, mindspore.PYNATIVE_MODE)):
        monkeypatch.setattr(CLAN_G, "on_npu", lambda on_npu=on_npu: on_npu)
        mindspore.set_context(mode=mode)
        net_G = generator("small")
        CLAN_G.to_mixed_precision(net_G)
        assert net_G.bn1.fp32 and not net_G.bn1.fp16 and net_G.conv1.fp16
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    net_G = generator("small")
    CLAN_G.to_mixed_precision(net_G)
    assert not net_G.bn1.fp32 and not net_G.bn1.fp16 and net_G.conv1.fp16


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
    (x_s, y_s), (x_t, _) = image(1, 512, 256), image(2, 512, 256)
    for i in range(20):
        step.step([(x_s, y_s, x_t)], *FACTORS["weighted"], lr=2.5e-4 * i / 20, lr_D=1e-4)
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
    args = get_arguments(["--model", "small", "--device", "cpu", "--amp-level", "O2", "--recipe", "released",
                          "--input-size", "64,64", "--input-size-target", "64,48"])
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    net_G, net_D = generator("small"), discriminator("small")
    step = CLANStep(args, net_G, net_D).set_train()
    rng = np.random.default_rng(0)
    x_s, x_t = (Tensor(rng.normal(0, 60, (1, 3, h, 64)).astype(np.float32)) for h in (64, 48))
    y_s = Tensor(rng.integers(0, 19, (1, 64, 64)).astype(np.int32))

    def moved() -> bool:
        before = [w.asnumpy().copy() for w in (*step.weights_G, *step.weights_D)]
        assert np.isfinite(step.step([(x_s, y_s, x_t)], 1.0, 0.4, 40.0, 2.5e-4, 1e-4)).all()
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
