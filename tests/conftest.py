"""Settings of all tests (one thread, no bars, their own cache for code in checkpoints), and a finished tiny run."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="secateur-modules-")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TQDM_DISABLE"] = "1"  # as the command line sets it, but tests import tqdm first
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait leave the cores to the processes of other tests

import pytest
import torch
import transformers

from runs import prune_arguments, secateur, write_checkpoint, write_texts
from secateur import files

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(files, "to_disk", lambda _path: None)
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    write_checkpoint(folder / "dense")
    write_texts(folder / "text.jsonl")
    return folder


@pytest.fixture
def dense(base):
    return base / "dense"


@pytest.fixture
def text(base):
    return base / "text.jsonl"


@pytest.fixture(scope="module")
def finished(base):
    assert secateur(*prune_arguments(base / "dense", base / "text.jsonl", base / "run")) == 0
    return base / "run"


@pytest.fixture
def run(finished, tmp_path):
    """A copy of a finished run, to work on."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def broken(dense, tmp_path):
    """A copy of the model, to break."""
    return shutil.copytree(dense, tmp_path / "broken")
