"""docs/tutorial.md is run: every command of it, in order, in one shell, on the real model that `make model` fetches."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
WORDS = " ".join(PAGE.split())
PORT = "8080"

pytestmark = [pytest.mark.real, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page was followed, and what was said; `.venv` there is whatever runs the tests."""
    folder = tmp_path_factory.mktemp("tutorial")
    for name in (".cache", "examples", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    activate = folder / ".venv/bin/activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"export PATH='{Path(sys.executable).parent}':$PATH\n", encoding="utf-8")
    script = "".join(text for _, text in BLOCKS).replace(PORT, str(free_port()))
    with (folder / "said").open("w+", encoding="utf-8") as said:
        shell = subprocess.Popen(
            ["bash", "-euo", "pipefail"], stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, text=True,
            cwd=folder, env=os.environ | {"COLUMNS": "200"}, start_new_session=True,
        )  # fmt: skip
        try:
            shell.communicate(script, timeout=1200)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(shell.pid, signal.SIGKILL)  # a server that an error left
        said.seek(0)
        text = said.read()
    assert shell.returncode == 0, text[-3000:]
    return folder, text


def widths(checkpoint: Path) -> int:
    """Parameters of a checkpoint."""
    with safe_open(checkpoint / "model.safetensors", framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    return sum(a * (rest[0] if rest else 1) for a, *rest in shapes)


def test_all_blocks_of_the_page_are_commands() -> None:
    assert BLOCKS and {language for language, _ in BLOCKS} == {"sh"}


def test_following_the_page_prunes_and_verifies(followed: tuple[Path, str]) -> None:
    run = followed[0] / "runs/first"
    assert json.loads((run / "verify.json").read_text())["passed"]
    results = json.loads((run / "eval.json").read_text())
    assert 0.799 < results["pruned"]["block_parameters"] / results["dense"]["block_parameters"] <= 0.8
    assert results["pruned"]["perplexity"] < 10 * results["dense"]["perplexity"], "the page calls it a demonstration"
    same, other = (float(ratio) for ratio in re.findall(r"perplexity .* ([\d.]+) ×", followed[1]))
    assert same < other, "the page says that another text loses more"
    report = (run / "report.html").read_text(encoding="utf-8")
    assert report.index('id="warnings"') < report.index("<table") and "README.md" in report


def test_the_page_tells_what_is_in_the_model(followed: tuple[Path, str]) -> None:
    said = followed[1]
    inspected = said[: said.index("run folder:")]
    assert "30 layers" in inspected and "1,536" in inspected and "106,168,320" in inspected
    assert "1,536 MLP channels" in WORDS and "106 of its 135 M" in WORDS


def test_the_page_says_what_was_removed(followed: tuple[Path, str]) -> None:
    folder, said = followed
    lines = re.findall(r"layer +(\d+): (\d) of 3 KV groups, +([\d,]+) of 1,536 channels", said)
    assert [int(layer) for layer, *_ in lines] == list(range(30))
    kept = sum(int(groups) * 294_912 + int(channels.replace(",", "")) * 1_728 for _, groups, channels in lines)
    assert 106_168_320 * 0.799 < kept <= 106_168_320 * 0.8
    config = json.loads((folder / "runs/first/model/config.json").read_text())
    assert "per_layer_config" in config and (folder / "runs/first/model/README.md").is_file()


def test_the_other_size_is_larger_and_holds_this_one(followed: tuple[Path, str]) -> None:
    run = followed[0] / "runs/first"
    plans = [json.loads((folder / "plan.json").read_text())["kept"] for folder in (run, run / "sizes/0.1")]
    assert all(set(kept) <= set(plans[1][name]) for name, kept in plans[0].items())
    assert widths(run / "model") < widths(run / "sizes/0.1/model")


def test_both_ways_of_use_write_text(followed: tuple[Path, str]) -> None:
    folder, said = followed
    assert re.search(r"A function is called by \S", said)
    assert (folder / "runs/first/model-q8_0.gguf").is_file()
    answer, _ = json.JSONDecoder().raw_decode(said[said.index('{"choices"') :])
    assert answer["choices"][0]["message"]["content"].strip()
