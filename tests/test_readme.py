"""The READMEs: their links, anchors, options, paths and commands exist."""

import re

import pytest

from options.train_options import build_parser
from tests.scripts import ROOT, module, run

READMES = ("README.md", "README_CN.md")
RESULTS = tuple(f"tests/results/{name}.md" for name in (
    "ablation", "camvid-idd", "faithfulness", "trajectory"))
OF_OTHERS = {"--worker-num", "--local-worker-num", "--join", "--master-addr", "--master-port", "--node-rank",
             "--dist", "--bind-core", "--signal"}  # msrun, pytest, sbatch


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = re.sub(r"^```.*?^```$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.S | re.M)
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 30
    for link in links:
        path, _, anchor = link.partition("#")
        assert link.startswith("https://") or not path or (ROOT / path).exists(), link
        assert path or anchor in anchors, link


@pytest.fixture(scope="module")
def known():
    """Return the options of all scripts and tools."""
    text = run("CLAN_evaluate_city.py", "--help").stdout
    for tool in ("utils.tools.ablation", "utils.tools.ccd", "tests.benchmark", "tests.golden"):
        text += module(tool, "--help").stdout
    return {*re.findall(r"--[\w-]+", text), *build_parser()._option_string_actions, *OF_OTHERS}


@pytest.mark.parametrize("name", READMES)
def test_options_exist(name, known):
    text = (ROOT / name).read_text(encoding="utf-8")
    mentioned = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
    assert len(mentioned) > 50
    assert not {option.replace("_", "-") for option in mentioned} - known


@pytest.mark.parametrize("path", [*READMES, *RESULTS])
def test_paths_and_modules_exist(path):
    """Mentioned files and folders such as `utils/loss.py`, and commands such as python -m tests.golden."""
    text = (ROOT / path).read_text(encoding="utf-8")
    folders, kinds = "utils|tests|dataset|model|options|figure", "py|json|md|png"
    names = re.findall(rf"`((?:{folders})/[\w./]*(?:/|\.(?:{kinds})))`", text)
    started = re.findall(r"python -m ((?:utils|tests)\.[\w.]+)", text)
    assert started
    for name in [*names, *(name.replace(".", "/") + ".py" for name in started)]:
        assert (ROOT / name).exists(), name
