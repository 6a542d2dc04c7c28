"""Checkpoints of this project and of others, which are generated here with their names and shapes."""

import shutil
import weakref

import numpy as np
import pytest

from CLAN_train_gta5_2_city import train
from model.CLAN_D import discriminator
from model.CLAN_G import generator
from options.train_options import get_arguments
from tests.golden import shapes_D, shapes_G, state
from utils import checkpoint, run_folder
from utils.system.errors import UserError


@pytest.fixture(scope="module")
def authors():
    return state(shapes_G())


@pytest.fixture(scope="module")
def net_G():
    return generator("resnet101")


def load(net, content):
    return checkpoint.load(net, content, "FILE", "net_G")


def test_authors_snapshot_matches_completely(net_G, authors):
    report = load(net_G, {**authors, "bn1.num_batches_tracked": np.array(7)})
    assert report == ("FILE -> G: 536 tensors matched, 1 skipped (bn1.num_batches_tracked), "
                      "0 left at their initial value")
    assert np.array_equal(net_G.layer3[22].bn3.gamma.asnumpy(), authors["layer3.22.bn3.weight"])
    assert np.array_equal(net_G.layer1[0].downsample[1].beta.asnumpy(), authors["layer1.0.downsample.1.bias"])
    assert np.array_equal(net_G.bn1.moving_mean.asnumpy(), authors["bn1.running_mean"])
    assert np.array_equal(net_G.bn1.moving_variance.asnumpy(), authors["bn1.running_var"])
    assert np.array_equal(net_G.layer6.conv2d_list[3].bias.asnumpy(), authors["layer6.conv2d_list.3.bias"])


@pytest.mark.parametrize("classes", [21, 19])
def test_deeplab_init_leaves_both_classifiers_alone(net_G, authors, classes):
    init = {"Scale." + name: value for name, value in authors.items() if not name.startswith("layer6")}
    for name in [n for n in init if "layer5" in n]:
        init[name] = np.ones((classes, *init[name].shape[1:]), np.float32)
    before = net_G.layer5.conv2d_list[0].weight.asnumpy()
    report = load(net_G, init)
    assert "520 tensors matched, 8 skipped (Scale.layer5" in report
    assert "16 left at their initial value (layer5" in report
    assert np.array_equal(net_G.layer5.conv2d_list[0].weight.asnumpy(), before)


def test_torchvision_mindcv_and_adaptsegnet(net_G, authors):
    backbone = {name: value for name, value in authors.items() if not name.startswith(("layer5", "layer6"))}
    report = load(net_G, {**backbone, "fc.weight": np.zeros((10, 2048), np.float32)})
    assert "520 tensors matched, 1 skipped (fc.weight), 16 left" in report

    ms = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    mindcv = {}
    for name, value in backbone.items():
        head, leaf = name.rsplit(".", 1)
        if value.ndim == 1:
            name = f"{head}.{ms[leaf]}"
        mindcv[name.replace("downsample", "down_sample")] = value
    report = load(net_G, {**mindcv, "classifier.weight": np.zeros((10, 2048), np.float32)})
    assert "520 tensors matched, 1 skipped (classifier.weight), 16 left" in report

    multi = dict(authors)
    for name in [n for n in multi if n.startswith("layer5") and n.endswith("weight")]:
        multi[name] = np.zeros((19, 1024, 3, 3), np.float32)  # its first classifier looks at layer3
    report = load(net_G, multi)
    assert "520 tensors matched, 16 skipped (layer5" in report and "16 left at their initial value" in report


def test_what_does_not_cover_the_network_is_an_error(net_G, authors):
    with pytest.raises(UserError, match="FILE: 520 of 536 tensors of net_G are not in it.*another network"):
        load(net_G, state(shapes_D()))
    with pytest.raises(UserError, match="1 of 536 tensors of net_G .*layer4.2.conv3.weight"):
        load(net_G, {name: v for name, v in authors.items() if name != "layer4.2.conv3.weight"})
    with pytest.raises(UserError, match="another network"):
        load(generator("small"), {"x": np.zeros(3, np.float32)})


def test_discriminator():
    net_D, tensors = discriminator("resnet101"), state(shapes_D())
    report = checkpoint.load(net_D, tensors, "FILE", "net_D")
    assert "10 tensors matched, 0 skipped, 0 left" in report
    assert np.array_equal(net_D.classifier.bias.asnumpy(), tensors["classifier.bias"])
    with pytest.raises(UserError, match="FILE: 1 of 10"):
        tensors.pop("conv2.weight")
        checkpoint.load(net_D, tensors, "FILE", "net_D")


def test_the_other_suffix_is_found(tmp_path, monkeypatch):
    (tmp_path / "GTA5_best.ckpt").write_bytes(b"")
    assert checkpoint.find(str(tmp_path / "GTA5_best.pth")) == str(tmp_path / "GTA5_best.ckpt")
    for name in ("v1.ckpt", "v1.2.ckpt"):
        (tmp_path / name).write_bytes(b"")
    assert checkpoint.find(str(tmp_path / "v1.2")) == str(tmp_path / "v1.2.ckpt")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.find("./GTA5_best.ckpt") == "./GTA5_best.ckpt"
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.find(".")


def test_a_resumed_run_frees_the_old_checkpoint(reference, tmp_path, monkeypatch):
    """The content, 400 MB for the full network, is freed once the weights have their values."""
    content, alive = [], []
    restore, truncate = checkpoint.restore, run_folder.truncate_run

    def watch(tensors, *rest):
        content.extend(weakref.ref(v) for v in tensors.values() if isinstance(v, np.ndarray))
        return restore(tensors, *rest)

    def look(*rest):
        alive.extend(v for v in content if v() is not None)
        return truncate(*rest)

    monkeypatch.setattr(checkpoint, "restore", watch)
    monkeypatch.setattr(run_folder, "truncate_run", look)
    shutil.copytree(reference, tmp_path / "run")
    train(get_arguments(["--continue-train", str(tmp_path / "run"), "--device", "cpu"]))
    assert len(content) > 100 and not alive
