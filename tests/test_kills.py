"""kill -9 in every stage, at random moments and at operations on files, and full disks: a short form of kills.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_runs_that_are_killed_or_find_a_full_disk_resume_to_the_files_of_one_that_was_never_interrupted(tmp_path):
    faults = ["--kills", "10", "--windows", "8", "--full", "4"]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "kills.py", *faults, "--folder", tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^22 faults .* 0 wrong", done.stdout, flags=re.MULTILINE)
