"""Paths as shells and scripts pass them, defaults in --help, and permissions of written files."""

import os
from pathlib import Path

import mindspore
import numpy as np
import pytest
from mindspore import Tensor

from options import Parser, evaluate_options, size, train_options
from tests.scripts import refused
from utils.system.files import atomic


def test_a_tilde_is_the_home_folder(monkeypatch):
    """Shells expand it only at the start of a word: not in --snapshot-dir=~/x, and not if it is quoted."""
    monkeypatch.setenv("HOME", "/home/ada")
    args = train_options.get_arguments(["--snapshot-dir=~/x", "--data-list", "~", "--restore-from=./~/x"])
    assert (args.snapshot_dir, args.data_list, args.restore_from) == ("/home/ada/x", "/home/ada", "./~/x")
    args = evaluate_options.get_arguments(["--restore-from", "~/a", "--save_path=~/y", "--data-dir", "/z~"])
    assert (args.restore_from, args.save_path, args.data_dir) == ("/home/ada/a", "/home/ada/y", "/z~")


def test_a_script_with_line_ends_of_windows_is_named():
    """Behind a backslash, the carriage return ends the command: the options of later lines are lost."""
    assert "Windows line ends" in refused("--source", "gta5", "\r")


def test_help_shows_the_defaults_as_one_types_them(capsys):
    parser = Parser("A program.")
    parser.add_argument("--crop", type=size, default=(1280, 720), help="size of the crop")
    parser.add_argument("--rate", type=float, default=10.0, help="learning rate")
    parser.add_argument("--images", type=int, default=0, help="number of images (default: 0, all)")
    parser.add_argument("--fast", action="store_true", help="be quick")
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    output = capsys.readouterr().out
    assert "size of the crop (default: 1280,720)\n" in output and "learning rate (default: 10)\n" in output
    assert output.count("default: 0") == 1 and "be quick\n" in output


@pytest.mark.parametrize("umask, mode", [(0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_umask_leaves(tmp_path, umask, mode):
    """Those of MindSpore too, which makes its files read-only for their owner."""
    path, before = tmp_path / "GTA5_1.ckpt", os.umask(umask)
    content = [{"name": "a", "data": Tensor(np.zeros(3, np.float32))}]
    try:
        for write in (lambda file: mindspore.save_checkpoint(content, str(file)), Path.touch):
            with atomic(path) as temporary:
                write(temporary)
            assert path.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)
