"""Checkpoints of this project and of others, which are generated here with their names and shapes."""

import gzip
import json
import pickle
import tracemalloc

import mindspore
import numpy as np
import pytest
import safetensors.numpy

from CLAN_train_gta5_2_city import with_model
from model.CLAN_D import discriminator
from model.CLAN_G import generator
from options.train_options import get_arguments
from tests.golden import shapes_D, shapes_G, state
from tests.scripts import EAGER, EVALUATE, run
from tests.test_torch_file import legacy, saved, zipped
from utils import checkpoint
from utils.system.errors import UserError


@pytest.fixture(scope="module")
def authors():
    return state(shapes_G())


@pytest.fixture(scope="module")
def net_G():
    return generator("resnet101")


@pytest.fixture(scope="module")
def small():
    return {"net_G": generator("small"), "net_D": discriminator("small")}


def load(net, content, name="net_G", complete=False):
    return checkpoint.load(net, content, "FILE", name, complete)


def values_of(net, before=""):
    return {before + p.name: p.asnumpy().copy() for p in net.get_parameters()}


def save(path, content, about=None, crc_check=False):
    entries = [{"name": name, "data": mindspore.Tensor(value)} for name, value in content.items()]
    mindspore.save_checkpoint(entries, str(path), append_dict=about, crc_check=crc_check)


def test_authors_snapshot_matches_completely(net_G, authors):
    report = load(net_G, {**authors, "bn1.num_batches_tracked": np.array(7)})
    assert report == ("FILE -> G: 536 tensors matched, 1 skipped (bn1.num_batches_tracked), "
                      "0 left at their initial value")
    assert np.array_equal(net_G.layer3[22].bn3.gamma.asnumpy(), authors["layer3.22.bn3.weight"])
    assert np.array_equal(net_G.layer1[0].downsample[1].beta.asnumpy(), authors["layer1.0.downsample.1.bias"])
    assert np.array_equal(net_G.bn1.moving_mean.asnumpy(), authors["bn1.running_mean"])
    assert np.array_equal(net_G.bn1.moving_variance.asnumpy(), authors["bn1.running_var"])
    assert np.array_equal(net_G.layer6.conv2d_list[3].bias.asnumpy(), authors["layer6.conv2d_list.3.bias"])


def test_an_export_has_the_names_and_shapes_of_the_authors_network(net_G, authors, tmp_path):
    load(net_G, authors, complete=True)
    checkpoint.save_safetensors(tmp_path / "G", net_G)
    tensors = safetensors.numpy.load_file(tmp_path / "G")
    assert {name: value.shape for name, value in tensors.items()} == shapes_G()
    assert all(v.dtype == np.float32 and np.array_equal(v, authors[name]) for name, v in tensors.items())
    assert checkpoint.model_of(checkpoint.read(str(tmp_path / "G"))) == "resnet101"


def test_an_exported_network_is_read_again_to_the_bit(small, reference, tmp_path):
    """By the scripts, which know the network by its shapes and the kind of file by its content."""
    export = [EVALUATE, "--export", "safetensors", "--save-path", tmp_path, *EAGER, "--restore-from"]
    file, first = tmp_path / "CLAN_small.safetensors", tmp_path / "CLAN_small_1.safetensors"
    run(*export, reference / "GTA5_6.ckpt")
    assert "earlier results are now" in run(*export, file).stdout
    assert first.read_bytes() == file.read_bytes()
    load(small["net_G"], checkpoint.read(str(file)), complete=True)
    content = checkpoint.read(str(reference / "GTA5_6.ckpt"))
    assert all(np.array_equal(content[n], v) for n, v in values_of(small["net_G"], "net_G.").items())


def packed(tensors, dtype="F32"):
    """Return a safetensors file of numbers (an array for each name), which are of `dtype`."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": dtype, "shape": value.shape, "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize("dtype, store, expected", [
    ("F16", lambda v: v.astype(np.float16), lambda v: v.astype(np.float16).astype(np.float32)),
    ("BF16", lambda v: v.view("<u2")[..., 1::2], lambda v: (v.view("<u4") & 0xFFFF0000).view("<f4")),
    ("F64", lambda v: v.astype(float), lambda v: v),
])  # fmt: skip
def test_safetensors_of_other_precisions_become_float32(small, tmp_path, dtype, store, expected):
    net, path = small["net_G"], tmp_path / "G.bin"
    values = values_of(net)
    path.write_bytes(packed({name: store(v) for name, v in values.items()}, dtype))
    assert ", 0 skipped, 0 left" in load(net, checkpoint.read(str(path)), complete=True)
    assert all(np.array_equal(expected(values[name]), v) for name, v in values_of(net).items())


FILE = packed({"net.a": np.ones((2, 3), np.float32), "net.b": np.ones(4, np.float32)})


@pytest.mark.parametrize("data, told", [
    (FILE[:-1], "a damaged safetensors file"), (FILE[:60], "a damaged safetensors file"),
    (FILE + b"x", "a damaged safetensors file"), (b"\0" * 7 + b"\1" + FILE[8:], "not a readable"),
    (packed({"a": np.ones(4, np.uint8)}, "F8_E4M3"), "'a' is of the type F8_E4M3; save the weights as F32"),
    (FILE, "520 of 536 tensors of net_G are not in it"), (packed({}), "520 of 536 tensors of net_G"),
])  # fmt: skip
def test_damaged_and_foreign_safetensors_are_an_error(net_G, tmp_path, data, told):
    path = tmp_path / "G.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: {told}.*") as error:
        checkpoint.load(net_G, checkpoint.read(str(path)), str(path), "net_G")
    assert "\n" not in str(error.value)


def test_backbones_of_others_leave_both_classifiers_alone(net_G, authors):
    both = {name: value + 1 for name, value in authors.items() if name.startswith(("layer5", "layer6"))}
    first = {name: value for name, value in both.items() if name.startswith("layer5")}
    backbone, mindcv = {name: value for name, value in authors.items() if name not in both}, {}
    for name, value in backbone.items():
        head, leaf = name.rsplit(".", 1)
        name = f"{head}.{checkpoint.BN_NAMES[leaf]}" if value.ndim == 1 else name
        mindcv[name.replace("downsample", "down_sample")] = value
    voc = {name: np.resize(value, (21, *value.shape[1:])) for name, value in first.items()}  # its classes
    sees_layer3 = {name: value[:, :1024] for name, value in first.items() if value.ndim == 4}
    adaptsegnet, fc = {**backbone, **both, **sees_layer3}, np.zeros((10, 2048), np.float32)
    before = [layer.conv2d_list[0].bias.asnumpy().copy() for layer in (net_G.layer5, net_G.layer6)]
    for prefix, content, skipped in (
        ("", {**backbone, "fc.weight": fc}, "1 skipped (fc.weight)"),  # torchvision
        ("", {**mindcv, "classifier.weight": fc}, "1 skipped (classifier.weight)"),
        ("Scale.", {**backbone, **voc}, "8 skipped (layer5.conv2d_list.0.weight, layer5"),  # DeepLab
        ("Scale.", {**backbone, **first}, "8 skipped (layer5"),
        ("", adaptsegnet, "16 skipped (layer5"), ("net_G.", adaptsegnet, "16 skipped (layer5"),
    ):  # fmt: skip
        report = load(net_G, {prefix + name: value for name, value in content.items()})
        assert f"520 tensors matched, {skipped}" in report and "16 left" in report
    for layer, bias in zip((net_G.layer5, net_G.layer6), before):
        assert np.array_equal(layer.conv2d_list[0].bias.asnumpy(), bias)


def test_discriminator_and_what_does_not_cover_a_network(net_G, authors):
    net_D, tensors = discriminator("resnet101"), state(shapes_D())
    assert "10 tensors matched, 0 skipped, 0 left" in load(net_D, tensors, "net_D")
    assert np.array_equal(net_D.classifier.bias.asnumpy(), tensors["classifier.bias"])
    with pytest.raises(UserError, match="FILE: 520 of 536 tensors of net_G are not in it.*another network"):
        load(net_G, tensors)
    for net, name, content, missing in ((net_G, "net_G", authors, "layer4.2.conv3.weight"),
                                        (net_D, "net_D", tensors, "conv2.weight")):
        with pytest.raises(UserError, match=f"FILE: 1 of .* tensors of {name} .*{missing}"):
            load(net, {other: value for other, value in content.items() if other != missing}, name)


def test_training_takes_the_network_of_the_weights(tmp_path):
    path = tmp_path / "a.ckpt"
    mindspore.save_checkpoint(generator("small"), str(path))
    for argv, model in ([], "resnet101"), (["--restore-from", str(path)], "small"):
        args, line = with_model(get_arguments(argv), {})
        assert args.model == model and line == (f"network small, as in {path}" if argv else "")
    assert with_model(get_arguments([]), {"model": "small"})[0].model == "small"  # resumed
    assert with_model(get_arguments(["--model", "small"]), {}) == (get_arguments(["--model", "small"]), "")


def test_the_other_suffix_is_found(tmp_path):
    for name in ("GTA5_best.ckpt", "v1.ckpt", "v1.2.ckpt"):
        (tmp_path / name).write_bytes(b"")
    for given, found in (("GTA5_best.pth", "GTA5_best.ckpt"), ("v1.2", "v1.2.ckpt"), ("v1.ckpt", "v1.ckpt")):
        assert checkpoint.find(str(tmp_path / given)) == str(tmp_path / found)
    for given, told in (("v2", "no such checkpoint"), (".", "is a folder: name a file in it")):
        with pytest.raises(UserError, match=told):
            checkpoint.find(str(tmp_path / given))


@pytest.mark.parametrize("name, broken, value", [("net_G", "layer3.0.bn2.moving_variance", np.nan),
                                                 ("net_D", "conv1.bias", -np.inf)])  # fmt: skip
def test_weights_that_are_not_finite_are_an_error(small, monkeypatch, tmp_path, name, broken, value):
    net, before = small[name], values_of(small[name])
    content = {**before, broken: np.full_like(before[broken], value)}
    with pytest.raises(UserError, match=f"FILE: {broken} has nan or inf"):
        load(net, content, name)
    assert all(np.array_equal(v, before[n]) for n, v in values_of(net).items())
    with monkeypatch.context() as dry_run:  # whose values mean nothing
        dry_run.setattr(checkpoint, "simulated", lambda: True)
        assert "0 left" in load(net, content, name)
    with pytest.raises(UserError, match=f"new.ckpt is not written: after 3 steps {broken} is not finite"):
        checkpoint.save(tmp_path / "new.ckpt", net, None, 3, 0.5)
    assert not list(tmp_path.iterdir())
    load(net, before, name)


@pytest.mark.parametrize("name", ["GTA5_9.pth.tar", "G.PTH", "G.bin", "G", "last.ckpt"])
def test_content_decides_on_the_kind_of_a_file(small, tmp_path, name):
    """Not the suffix: PyTorch Lightning's .ckpt is a zip, and people rename files."""
    values, path = values_of(small["net_D"]), tmp_path / name
    save(tmp_path / "mindspore.ckpt", values)
    for data in (saved(values), saved(values, legacy), (tmp_path / "mindspore.ckpt").read_bytes()):
        path.write_bytes(data)
        content = checkpoint.read(str(path))
        assert all(np.array_equal(content[n], v) for n, v in values.items())
        assert "10 tensors matched" in load(small["net_D"], content, "net_D")


@pytest.mark.parametrize("data, told", [
    (b"", "an empty file; download it again"), (bytes(10**4), "an empty file"),
    (b"\xef\xbb\xbf\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning", "a web page; .*gdown"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "a Git LFS .*lfs pull"),
    (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", "an exported model"),
    (b"\n\x031.0\x12\tMindSpore*\x052.8.0:\xa8\x17\n0", "an exported model; give the checkpoint"),
    (gzip.compress(b"x", mtime=0), "an archive"), (b"G.pth".ljust(257, b"\0") + b"ustar", "an archive"),
    (pickle.dumps({"epoch": 3}, 2), "a pickle that torch.save did not write; .*torch.save"),
    (b'{"message": "Not Found"}', "an unknown kind of file"),
])  # fmt: skip
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path, data, told):
    path = tmp_path / "G.pth"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: not a readable checkpoint, but {told}"):
        checkpoint.read(str(path))


def test_bare_networks_need_no_checksum_and_our_checkpoints_do(small, tmp_path):
    """An earlier port saved net_G.* and net_D.* alone, also the DeepLab weights, without a checksum."""
    values = {**values_of(small["net_G"], "net_G."), **values_of(small["net_D"], "net_D.")}
    path = tmp_path / "DeepLab_resnet_pretrained_init-f81d91e8(1).ckpt"
    save(path, values)
    for name, net in small.items():
        report = load(net, checkpoint.read(str(path)), name)
        assert ", 0 skipped, 0 left" in report and report.endswith("; the file has no checksum")
    save(path, values, crc_check=True)
    assert "checksum" not in load(small["net_G"], checkpoint.read(str(path)))
    for more, about in (({}, {"step": 3}), ({}, {"model": "small"}), ({"optimizer_G.x": np.ones(2)}, None)):
        save(path, {**values, **more}, about)
        with pytest.raises(UserError, match="not a readable .*the checksum at its end is missing"):
            checkpoint.read(str(path))


@pytest.mark.parametrize("before, wrapper", [
    ("module.", ""), ("module.module.", "net"), ("_orig_mod.", "model"), ("module._orig_mod.", "state_dict"),
    ("model.", "state_dict"), ("", "model"),
])  # fmt: skip
def test_prefixes_and_wrappers(small, tmp_path, before, wrapper):
    """Of DataParallel, torch.compile, Lightning and training loops, which also save their optimizers."""
    for name, net in small.items():
        values = values_of(net, before)
        moments = {"state": {"0": {"exp_avg": np.ones(3, np.float32)}}, "param_groups": [{"lr": 0.1}]}
        whole = {"epoch": 7, wrapper: values, "optimizer": moments, "best": None} if wrapper else values
        (tmp_path / "x.pth").write_bytes(saved(whole))
        report = load(net, checkpoint.read(str(tmp_path / "x.pth")), name)
        assert f"{len(values)} tensors matched, 0 skipped, 0 left" in report


@pytest.mark.parametrize("content", [{"epoch": 3, "optimizer": {"state": {"0": {"a": np.ones(2)}}}}, 3, {}])
def test_a_pytorch_file_without_a_state_dict_is_an_error(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(saved(content))
    with pytest.raises(UserError, match="x.pth: has no state dict .*re-save it"):
        checkpoint.read(str(tmp_path / "x.pth"))


def test_a_network_that_is_in_a_file_twice_is_an_error(small):
    for name, net in small.items():
        for first in ("model.", ""):
            twice = {**values_of(net, first), **values_of(net, "ema.")}
            with pytest.raises(UserError, match=rf"FILE: holds {name} twice, below \['{first}', 'ema.'\]"):
                load(net, twice, name)


def test_weights_for_other_classes_are_told_by_their_number(small):
    G, D = values_of(small["net_G"]), values_of(small["net_D"])
    for name in [n for n in G if n.startswith(("layer5", "layer6"))]:
        G[name] = G[name][:16]
    D["conv1.weight"] = D["conv1.weight"][:, :16]
    assert "8 left" in load(small["net_G"], G)  # a training may start from the backbone alone
    for name, content in (("net_G", G), ("net_D", D)):
        with pytest.raises(UserError, match="FILE: has 16 classes, not 19; .*info.json"):
            load(small[name], content, name, complete=True)


@pytest.mark.parametrize("pack, most", [(None, 2.3), (zipped, 1.2), (legacy, 1.2)])
def test_reading_takes_little_more_memory_than_the_file(tmp_path, pack, most):
    values, path = {f"layer{i}.weight": np.ones(2**20, np.float32) for i in range(8)}, tmp_path / "x.ckpt"
    if pack:
        path.write_bytes(saved(values, pack))
    else:
        save(path, values, crc_check=True)
    size = path.stat().st_size
    tracemalloc.start()
    content = checkpoint.read(str(path))
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(content) >= 8 and now < 1.2 * size and peak < most * size
