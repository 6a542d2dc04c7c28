"""The training script with batch norm in evaluation mode: then an image's gradients depend on it alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import CLAN_train_gta5_2_city as script  # isort: skip  # sets the environment before mindspore is imported
from mindspore import nn

import model.CLAN_G
from options.train_options import get_arguments
from utils.system.errors import run_script

model.CLAN_G.batch_norm = lambda channels: nn.BatchNorm2d(channels, use_batch_statistics=False)
run_script(script.main, get_arguments())
