"""The READMEs: their links and anchors exist, and so does every option that they mention."""

import re
from pathlib import Path

import pytest

from options.train_options import build_parser
from tests.scripts import ROOT, module, run

READMES = ("README.md", "README_CN.md")
OF_OTHERS = {  # msrun, pip, pytest
    "--worker-num", "--local-worker-num", "--join", "--master-addr", "--master-port", "--node-rank", "--dist",
    "--cluster-time-out", "--log-dir",
}  # fmt: skip


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M)


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = without_code((ROOT / name).read_text(encoding="utf-8"))
    anchors = {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 30
    for link in links:
        path, _, anchor = link.partition("#")
        assert link.startswith("https://") or not path or (ROOT / path).exists(), link
        assert path or anchor in anchors, link


@pytest.fixture(scope="module")
def known():
    """The options of all scripts and tools."""
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


@pytest.mark.parametrize("name", READMES)
def test_paths_exist(name):
    """Files of the project that are mentioned in the text, such as `utils/loss.py`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    folders, kinds = "utils|tests|dataset|model|options|figure", "py|json|md|png"
    for path in re.findall(rf"`((?:{folders})/[\w./]+\.(?:{kinds}))`", text):
        assert Path(ROOT / path).exists(), path
