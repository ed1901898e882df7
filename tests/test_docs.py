"""The documentation says what is there: commands, options, modules, files. The site builds, and fetches nothing."""

import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.cli import COMMANDS
from secateur.config import Config
from secateur.run import Run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(DOCS)): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}
SOURCES = {
    path.name for folder in ("src", "tests", "docs", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")
}
FOREIGN = {
    "--tensor-parallel-size", "--port", "--data", "--header", "--silent", "--fail", "--retry", "--retry-delay",
    "--retry-connrefused", "--no-deps", "--nproc-per-node", "--num_processes", "--module",
    "--prune", "--gigabytes", "--limit",
}  # fmt: skip
"""Options of other programs that pages show, benchmarks among them."""
DATA = ("py", "json", "jsonl", "safetensors", "yaml", "html", "png")
"""What follows the dot of a file."""

sys.path.insert(0, str(DOCS))


def code(page: str) -> list[str]:
    """What a page shows as code: blocks and spans."""
    fenced = r"```(?:\w+)?\n(.*?)```"
    blocks = [line for block in re.findall(fenced, page, flags=re.DOTALL) for line in joined(block).splitlines()]
    return blocks + re.findall(r"`([^`]+)`", re.sub(fenced, "", page, flags=re.DOTALL).replace("\n", " "))


def joined(block: str) -> str:
    """A block of shell lines without the breaks that a backslash escapes."""
    return re.sub(r"\\\n\s*", "", block)


def options(kind: type) -> set[str]:
    names = {f.name.replace("_", "-") for f in fields(kind)}
    return {f"--{name}" for name in names} | {f"--no-{name}" for name in names} | {"--help", "--only", "--version"}


def missing_in(line: str) -> str | None:
    """What a line of code says of Secateur that is not there."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if not words or words[0] != "secateur" or len(words) == 1:
        return None
    name, *arguments = words[1:]
    if name not in COMMANDS and name not in ("COMMAND", "--help", "--version"):
        return f"secateur {name}"
    known = options(COMMANDS[name][0]) if name in COMMANDS else {"--help"}
    return next((a for a in arguments if a.startswith("--") and a.split("=")[0] not in known), None)


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist_with_their_options(name: str) -> None:
    wrong = [
        (line, missing) for line in code(PAGES[name]) if line.startswith("secateur ") and (missing := missing_in(line))
    ]
    assert not wrong
    everywhere = set().union(*(options(kind) for kind, _ in COMMANDS.values())) | FOREIGN
    named = {option for span in code(PAGES[name]) for option in re.findall(r"(?<![\w-])--[a-z][a-z_-]+", span)}
    assert named <= everywhere


@pytest.mark.parametrize("name", PAGES)
def test_files_modules_and_targets_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[1].split())
    for span in code(PAGES[name]):
        for path in re.findall(r"(?:benchmarks|examples|tests|docs|src)/[\w./-]+", span):
            assert (ROOT / path).exists(), path
        for module in re.findall(r"(?<![\w/.*-])\w+\.py\b", span):
            assert module in SOURCES, module
        for target in re.findall(r"^make ((?:[a-z-]+ ?)+)", span):
            assert set(target.split()) <= targets, target
        found = re.fullmatch(r"(\w+)\.(\w+)", span)
        if found and found[1] + ".py" in SOURCES and found[2] not in DATA:
            assert hasattr(importlib.import_module(f"secateur.{found[1]}"), found[2]), span


@pytest.mark.parametrize("name", PAGES)
def test_python_on_the_pages_compiles_and_imports_what_exists(name: str) -> None:
    for block in re.findall(r"```python\n(.*?)```", PAGES[name], flags=re.DOTALL):
        compile(block, name, "exec")
        for module, names in re.findall(r"^from (secateur[\w.]*) import (.*)$", block, flags=re.MULTILINE):
            assert all(hasattr(importlib.import_module(module), n.strip()) for n in names.split(",")), block


def test_every_file_of_a_run_is_on_its_page() -> None:
    run = Run(Path("RUN"), Config("m", sparsity=0.5))
    paths = [getattr(run, name) for name, value in vars(Run).items() if isinstance(value, property)]
    missing = {path.name for path in paths if f"`{path.name}`" not in PAGES["reference/run.md"]}
    assert not missing


def test_every_setting_has_a_text_in_the_reference() -> None:
    import reference_pages

    (page,) = reference_pages.pages().values()
    assert {f.name for f in fields(Config)} - {"learning"} <= set(reference_pages.shown("prune", COMMANDS["prune"][0]))
    for command, (kind, _) in COMMANDS.items():
        for setting in reference_pages.shown(command, kind):
            anchor = f"{{ #{command}-{setting.replace('_', '-')} }}\n"
            assert anchor in page, anchor
            assert re.match(r"\n\w|\n`", page[page.index(anchor) + len(anchor) :]), f"no text under {anchor}"
    assert not re.search(r"^\| `\w+` \|  \|", page, flags=re.MULTILINE), "a line of a table says nothing"


# --- the site --------------------------------------------------------------------------------------------------------


class Seen(HTMLParser):
    """What a page fetches, its ids and the links that it has."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        if tag in ("script", "img", "iframe", "source"):
            self.fetched.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preconnect", "preload", "icon", "modulepreload"):
            self.fetched.append(given.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_is_built_and_none_fetches_anything_from_elsewhere(site: Path) -> None:
    for name in (*PAGES, "reference/commands.md"):
        html = (site / name).with_suffix(".html").read_text(encoding="utf-8")
        seen = Seen()
        seen.feed(html)
        assert not [url for url in seen.fetched if "//" in url], name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?https?:|@import", sheet.read_text(encoding="utf-8")), sheet


def test_equations_are_mathml_and_figures_have_words(site: Path) -> None:
    html = (site / "method.html").read_text(encoding="utf-8")
    assert (
        html.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">')
        == PAGES["method.md"].count("$$") // 2
    )
    assert "arithmatex" not in html and "\\(" not in html and "\\[" not in html and "merror" not in html
    figures = re.findall(r"<figure>.*?</figure>", html, flags=re.DOTALL)
    assert len(figures) == PAGES["method.md"].count("<!-- figure: ")
    for figure in figures:
        (described,) = re.findall(r"<desc[^>]*>(.*?)</desc>", figure, flags=re.DOTALL)
        assert 'role="img"' in figure and len(described) > 100 and "<figcaption>" in figure and "<p>&lt;" not in figure


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Page\n\n[lost](index.md#nowhere)\n", encoding="utf-8")
    settings = re.sub(r"(?ms)^(nav|hooks|plugins|exclude_docs|extra_css):.*?(?=^\w|\Z)", "", settings)
    (tmp_path / "mkdocs.yml").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "nowhere" in done.stderr
