"""Networks, losses, schedules and scores against NumPy and hand-made cases."""

import argparse

import mindspore
import numpy as np
import pytest
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from scipy.special import softmax as scipy_softmax

import utils.softmax
from CLAN_train_gta5_2_city import learning_rate, updates_per_step
from model.CLAN_D import discriminator
from model.CLAN_G import PaddedMaxPool, freeze_bn_affine, generator
from utils.loss import alignment_map, seg_loss, weight_discrepancy
from utils.metrics import class_iou, confusion_matrix, iou_table, mean_iou, summary
from utils.softmax import softmax

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (2, 19, 5, 7)).astype(np.float32)
OTHER = RNG.normal(0, 3, (2, 19, 5, 7)).astype(np.float32)
LABELS = np.where(RNG.random((2, 5, 7)) < 0.2, 255, RNG.integers(0, 19, (2, 5, 7))).astype(np.int32)
LABELLED = Tensor(np.count_nonzero(LABELS != 255), mindspore.float32)


def test_softmax_is_stable():
    big = LOGITS * 100
    assert np.allclose(softmax(Tensor(big)).asnumpy(), scipy_softmax(big.astype(float), 1), atol=1e-6)


def test_focal_loss_is_clamped():
    n, y, x = np.nonzero(LABELS != 255)
    p = scipy_softmax(LOGITS.astype(float) * 20, 1)[n, LABELS[n, y, x], y, x]
    p = np.clip(p, 1e-9, 1 - 1e-9)
    loss = seg_loss(Tensor(LOGITS * 20), Tensor(LABELS), LABELLED, focal=True)
    assert loss.item() == pytest.approx(-((1 - p) ** 2 * np.log(p)).mean(), rel=1e-5)


def test_the_forms_for_an_npu_and_for_the_cpu_agree(monkeypatch):
    """Values and gradients of what is one kernel on an NPU and written out on the CPU."""
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    weight = Tensor(RNG.normal(0, 1, LOGITS.shape).astype(np.float32))
    functions = (
        lambda x: seg_loss(x, Tensor(LABELS), LABELLED),
        lambda x: seg_loss(x, Tensor(LABELS), LABELLED, focal=True),
        lambda x: alignment_map(x, Tensor(OTHER)).sum(),
        lambda x: (softmax(x) * weight).sum(),
    )
    for f in functions:
        forms = []
        for on_npu in (True, False):
            monkeypatch.setattr(utils.softmax, "on_npu", lambda answer=on_npu: answer)
            forms.append(mindspore.value_and_grad(f)(Tensor(LOGITS)))
        (a, da), (b, db) = forms
        assert a.item() == pytest.approx(b.item(), rel=1e-5)
        assert np.allclose(da.asnumpy(), db.asnumpy(), rtol=1e-4, atol=1e-6)


def test_weight_discrepancy_is_the_same_in_every_execution():
    """With classifiers of the published size: otherwise a resumed run would differ in its last bits.

    The value alone does not show it.
    """
    mindspore.set_context(mode=mindspore.GRAPH_MODE, jit_config={"jit_level": "O0"})
    rng, shapes = np.random.default_rng(0), [(19, 2048, 3, 3), (19,)] * 4
    values = [Tensor(rng.normal(0, 0.01, shape).astype(np.float32)) for shape in 2 * shapes]
    weights = ParameterTuple([Parameter(value, name=f"w{k}") for k, value in enumerate(values)])
    w5, w6 = weights[:8], weights[8:]

    def discrepancy():
        return weight_discrepancy(w5, w6)

    graph, results = mindspore.jit(mindspore.value_and_grad(discrepancy, None, weights)), set()
    for _ in range(25):
        value, grads = graph()
        results.add(b"".join(x.asnumpy().tobytes() for x in (value, *grads)))
    assert len(results) == 1


def test_learning_rate_warms_up_from_zero_then_decays():
    args = argparse.Namespace(num_steps=100, preheat_steps=10, power=0.9)
    lr = [learning_rate(2.5e-4, i, args) for i in range(50)]
    assert lr[0] == 0 and lr[5] == pytest.approx(1.25e-4)
    assert lr[10] == pytest.approx(2.5e-4 * 0.9**0.9) and lr[49] == pytest.approx(2.5e-4 * 0.51**0.9)
    args.preheat_steps = 0
    assert learning_rate(1.0, 0, args) == 1


def test_released_update_counts_are_314_for_104_tensors():
    net_G = generator("resnet101")
    freeze_bn_affine(net_G)
    names = [p.name for p in net_G.trainable_params() if not p.name.startswith(("layer5", "layer6"))]
    assert len(names) == 104
    assert sum(updates_per_step("net_G." + name) for name in names) == 314


def test_full_network_has_the_published_size_and_rounds_up():
    net_G, net_D = generator("resnet101"), discriminator("resnet101")
    assert sum(p.size for p in net_G.trainable_params()) == 45_301_976
    freeze_bn_affine(net_G)
    assert {p.name.rsplit(".", 1)[1] for p in net_G.trainable_params()} == {"weight", "bias"}
    assert round(sum(p.size for p in net_D.trainable_params()) / 1e6, 2) == 2.78
    assert net_G.layer2[0].conv1.stride == (2, 2) and net_G.layer2[0].conv2.stride == (1, 1)
    assert net_G.layer3[5].conv2.dilation == (2, 2) and net_G.layer4[2].conv2.dilation == (4, 4)


@pytest.mark.parametrize("size, expected", [
    ((1280, 720), (161, 91)), ((1024, 512), (129, 65)), ((328, 184), (42, 24))])
def test_logits_have_the_size_of_ceil_mode_pooling(size, expected):
    net_G = generator("small").set_train(False)
    c1, c2 = net_G(Tensor(np.zeros((1, 3, size[1], size[0]), np.float32)))
    assert c1.shape == c2.shape == (1, 19, expected[1], expected[0])


@pytest.mark.parametrize("size", [(8, 10), (9, 11), (8, 11)])
def test_padded_max_pooling_is_ceil_mode_after_a_relu(size):
    """Forward to the bit, and its gradient: the form for Ascend and the one for other devices."""
    mindspore.set_context(mode=mindspore.PYNATIVE_MODE)
    x = ops.relu(Tensor(RNG.normal(0, 1, (2, 3, *size)).astype(np.float32)))
    pools = PaddedMaxPool(), nn.MaxPool2d(3, 2, pad_mode="pad", padding=1, ceil_mode=True)
    a, b = (pool(x).asnumpy() for pool in pools)
    weight = Tensor(RNG.normal(0, 1, a.shape).astype(np.float32))
    assert np.array_equal(a, b)
    da, db = (mindspore.grad(lambda x, pool=pool: (pool(x) * weight).sum())(x).asnumpy() for pool in pools)
    positive = x.asnumpy() > 0  # the ReLU passes no gradient elsewhere
    assert np.allclose(da[positive], db[positive], rtol=1e-6, atol=1e-6)


def test_initial_values():
    net_G = generator("resnet101")
    assert net_G.layer3[4].conv2.weight.asnumpy().std() == pytest.approx(0.01, rel=0.02)
    assert net_G.layer6.conv2d_list[2].weight.asnumpy().std() == pytest.approx(0.01, rel=0.02)
    assert 0 < abs(net_G.layer5.conv2d_list[0].bias.asnumpy()).max() <= (2048 * 9) ** -0.5
    conv = discriminator("resnet101").conv2
    bound = (64 * 16) ** -0.5
    assert abs(conv.weight.asnumpy()).max() == pytest.approx(bound, rel=0.01)
    assert abs(conv.bias.asnumpy()).max() <= bound


def test_miou_by_hand():
    truth = np.array([[0, 0, 1, 1], [2, 255, 255, 1]], np.uint8)
    prediction = np.array([[0, 1, 1, 1], [3, 0, 4, 1]], np.int32)
    confusion = confusion_matrix(truth, prediction)
    iou = class_iou(confusion)
    # road: 1 of 2; sidewalk: 3 of 4; building: 0 of 1; wall: predicted, never true: 0; the others: none
    assert iou[:4].tolist() == [50, 75, 0, 0] and np.isnan(iou[4:]).all()
    assert mean_iou(confusion) == 31.25
    *lines, last = iou_table(summary(confusion)).splitlines()
    lines = [line.split() for line in lines]
    assert ["road", "50.00"] in lines and ["fence", "–"] in lines and lines[-1] == ["mIoU", "31.25"]
    assert last.startswith("without a label: wall, fence, pole, ")
    assert np.isnan(mean_iou(np.zeros((19, 19), int)))
