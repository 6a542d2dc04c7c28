"""What researchers build on, through the command lines: the ablation, curves of a run, cluster distances."""

import json

import pytest
from PIL import Image

from tests.scripts import module


def test_ablation_names_mistakes_in_one_line(tmp_path):
    assert "no such row" in module("tests.ablation", "--rows", "source,clam", code=2).stderr
    assert "--seeds" in module("tests.ablation", "--seeds", "one", code=2).stderr


@pytest.mark.slow
def test_ablation_at_its_smallest_resumes_and_keeps_what_is_done(tmp_path):
    words = ["--steps", 4, "--seeds", 1, "--rows", "source,clan", "--markdown", "t.md", "--chart", "c.png"]
    done = module("tests.ablation", *words, cwd=tmp_path)
    folder = tmp_path / "checkpoint" / "ablation" / "seed1"
    results = {row: json.loads((folder / row / "result.json").read_text()) for row in ("source", "clan")}
    gain = results["clan"]["mIoU"] - results["source"]["mIoU"]
    line = next(line for line in (tmp_path / "t.md").read_text().splitlines() if line.startswith("| CLAN"))
    assert line.split(" | ")[1:5] == ["1", f"{results['clan']['mIoU']:.2f}", f"{gain:+.2f}", "–"]
    assert line in done.stdout and Image.open(tmp_path / "c.png").width > 800

    (folder / "clan" / "result.json").unlink()  # as if it had been killed
    again = module("tests.ablation", *words, cwd=tmp_path).stdout
    assert "source: mIoU" in again and again.count("done before") == 2  # stage A and source
    assert json.loads((folder / "clan" / "result.json").read_text())["mIoU"] == results["clan"]["mIoU"]
    module("tests.ablation", *words[2:], "--steps", 5, "--rows", "source", cwd=tmp_path)
    kept = json.loads((folder / "source_1" / "result.json").read_text())  # of other options: renamed
    assert kept["mIoU"] == results["source"]["mIoU"]
