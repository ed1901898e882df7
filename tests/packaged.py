"""What is in a wheel and a source distribution, and what the wheel does in a bare environment: `make package`.

python tests/packaged.py dist [--contents-only]
"""

import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
NEEDED = (
    "secateur/py.typed", "secateur/modeling_pruned.py", "secateur/families/modeling_deepseek.py",
    "secateur/report/page.html", "secateur/report/page.css", "secateur/report/page.js",
)  # fmt: skip
"""What is no module that something imports, or is read as a file."""
WHITE = {".py", ".typed", ".html", ".css", ".js"}
SECONDS = 2.0
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy")


def check(holds: bool, said: str) -> None:
    if not holds:
        sys.exit(f"package: {said}")


def check_wheel(wheel: Path) -> None:
    """All modules and templates of src/, the license, valid metadata, and nothing else."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (about,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(about), validate=True)
    own = {name for name in names if name.startswith("secateur/")}
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src/secateur").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    check(own == source, f"{wheel.name} differs from src: {sorted(own ^ source)}")
    check(set(NEEDED) <= own, f"{wheel.name} lacks {sorted(set(NEEDED) - own)}")
    check({Path(name).suffix for name in own} <= WHITE, f"{wheel.name} holds more than code and templates")
    check(any(name.endswith("licenses/LICENSE") for name in names), f"{wheel.name} lacks the license")
    check(metadata.license_expression == "Apache-2.0" and bool(metadata.description), "no license or no description")
    check(str(metadata.requires_python) == ">=3.10", f"it says Python {metadata.requires_python}")


def check_sdist(sdist: Path) -> None:
    """Only files that git knows, and all that the wheel and the tests are made of."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()} - {"PKG-INFO"}
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    check(listed.returncode == 0, f"git cannot list the files of {ROOT}: {listed.stderr.strip()}")
    tracked = set(listed.stdout.splitlines())
    check(names <= tracked, f"{sdist.name} holds files that git does not know: {sorted(names - tracked)}")
    left = {n for n in tracked - names if not n.startswith(".")}
    check(not left, f"{sdist.name} leaves out {sorted(left)}")


def check_installed(wheel: Path) -> None:
    """In a fresh environment with no extras: imports fast, is typed, and the command line runs."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        bin = Path(folder) / "bin"
        install = [str(bin / "pip"), "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
        subprocess.run(install, check=True)

        def python(code: str) -> str:
            done = subprocess.run(
                [str(bin / "python"), "-c", code], capture_output=True, text=True, cwd=folder, check=False
            )
            check(done.returncode == 0, f"in a bare environment: {done.stderr}")
            return done.stdout

        timed = "import time; t = time.perf_counter(); import secateur; print(time.perf_counter() - t)"
        python(timed)  # compiles
        seconds = float(python(timed))
        check(seconds < SECONDS, f"`import secateur` takes {seconds:.1f} s")
        heavy = python(f"import secateur, sys; print(*(set({HEAVY}) & set(sys.modules)))").split()
        check(not heavy, f"`import secateur` imports {heavy}")
        python("import secateur; from secateur import *; [getattr(secateur, name) for name in secateur.__all__]")
        for words in (["--version"], ["--help"], ["prune", "--help"], ["inspect", "--help"]):
            done = subprocess.run(
                [str(bin / "secateur"), *words], capture_output=True, text=True, cwd=folder, check=False
            )
            check(done.returncode == 0 and bool(done.stdout), f"secateur {' '.join(words)}: {done.stderr}")
    print(f"`import secateur` in a bare environment: {seconds:.2f} s")


def main() -> None:
    """Exits with a line where something is wrong."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    if "--contents-only" not in sys.argv:
        check_installed(wheel)
    print(f"{wheel.name} and {sdist.name}: all there, nothing stray")


if __name__ == "__main__":
    main()
