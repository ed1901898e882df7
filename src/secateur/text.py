"""Documents out of files, folders and datasets on the hub; every error names the file, and the line where there is one.

Local files are read through pyarrow, which comes with `datasets`, and not through `datasets` itself, which would copy
them into its own cache and lose the file name and line of an error. pyarrow's gzip and zstd streams also notice a file
that was cut short; the zstandard package returns the first part of one as if it were all.
"""

import io
import json
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from secateur.files import InputError

COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES = (".jsonl", ".ndjson", ".json")
HELD_OUT = "held-out part of "
"""What the name of an evaluation text begins with that is a part of the calibration text's source."""
PIECE_CHARACTERS = 4_000
"""Plain text is cut into documents of about this length."""


def documents(data: str, text_column: str = "text", whole: bool = False) -> Iterator[str]:
    """Documents of `data` in a fixed order, streamed; a row without a value is an empty document.

    `data` is a file, a folder (all readable files below it, sorted by path; hidden ones are left out), or a dataset on
    the hub as `name`, `name:config` or `name:config:split` (split `train` by default). Plain text has no marks between
    documents: it is cut into pieces at blank lines, else at lines, unless `whole`. Raises InputError that names the
    file, and the line where there is one.
    """
    files = local_files(data)
    if files is None:
        yield from _hub_documents(data, text_column)
    for path in files or ():
        yield from _file_documents(path, text_column, whole)


def evaluation_text(
    data: str, text_column: str = "text", characters: int | None = None, join: Literal["raw", "lines"] = "raw"
) -> str:
    """One text for perplexities, documents joined by a blank line ("\\n\\n"); the first `characters` of it, or all.

    `raw`: a text file is one document, as it is. `lines`: every line is a document, with its newline, and a blank line
    is an empty one, as in the rows of WikiText-2 on the hub. Empty documents count: so the hub's rows by either `join`
    and the raw file by `lines` give the text of the papers' protocol.
    """
    taken, length = [], 0
    for document in documents(data, text_column, whole=True):
        rows = [document]
        if join == "lines":
            rows = [line if line.strip() else "" for line in io.StringIO(document)] or [""]
        taken += rows
        length += len(document)
        if characters is not None and length >= characters:
            break
    text = "\n\n".join(taken)[:characters]
    if not text.strip():
        raise InputError(f"{data} holds no text to evaluate on; name another file")
    return text


def local_files(data: str) -> list[Path] | None:
    """The files that `data` stands for; None for the name of a dataset on the hub."""
    path = Path(data).expanduser()
    if data and path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in inside if file_type(p) in READERS and p.is_file())
        if not files:
            raise InputError(f"{data}: no file in this folder ends in {', '.join(READERS)} (or these with .gz, .zst)")
        return files
    if data and path.exists():
        return [path]
    if not data or file_type(path) in READERS or data[0] in "./~" or data.count("/") > 1:
        raise InputError(f"{data!r}: no such file or folder; check the path given as data")
    return None


def file_type(path: Path) -> str:
    """The suffix before .gz or .zst, in lower case."""
    return (path.with_suffix("") if path.suffix.lower() in COMPRESSION else path).suffix.lower()


def _file_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    if file_type(path) not in READERS:
        raise InputError(f"{path}: unknown file type; files may end in {', '.join(READERS)} (or these with .gz, .zst)")
    yield from READERS[file_type(path)](path, column, whole)


@dataclass
class _Place:
    """How far a file was read without an error."""

    unit: str
    done: int = 0

    def __str__(self) -> str:
        return f" after {self.unit} {self.done:,}" if self.done else ""


@contextmanager
def _errors_of(path: Path, unit: str = "line") -> Iterator[_Place]:
    """Turns what reading raises into one line that names the file, and the place that its reader has come to."""
    place = _Place(unit)
    try:
        yield place
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text{place}; convert it, for instance with iconv") from None
    except (OSError, pa.ArrowException) as error:
        reason = f"{path} cannot be read{place} ({one_line(error)})"
        raise InputError(f"{reason}; check that it is complete and of the type its suffix says") from None


def _stream(path: Path) -> Any:
    return pa.input_stream(str(path), compression=COMPRESSION.get(path.suffix.lower()))


def _text_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    with _errors_of(path) as place, io.TextIOWrapper(_stream(path), encoding="utf-8-sig") as file:
        if whole:
            yield file.read()
            return
        piece = ""
        for line in iter(lambda: file.readline(2 * PIECE_CHARACTERS), ""):
            piece += line
            place.done += line.endswith("\n")
            if len(piece) >= (2 if line.strip() else 1) * PIECE_CHARACTERS:
                yield piece.strip("\n")
                piece = ""
        yield piece.strip("\n")


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSON Lines file, each with its place (file and line). Raises InputError for what is no JSON object."""
    with _errors_of(path) as place, io.BufferedReader(_stream(path)) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                text, row = line.decode("utf-8-sig" if number == 1 else "utf-8"), None
                with suppress(ValueError, RecursionError):
                    row = json.loads(text)
                if not isinstance(row, dict):
                    raise InputError(f"{path}, line {number} is not a JSON object; a JSON Lines file has one a line")
                yield f"{path}, line {number}", row
            place.done = number


def _jsonl_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    for place, row in json_rows(path):
        yield _text_of(row, column, place)


def _parquet_documents(path: Path, column: str, whole: bool) -> Iterator[str]:
    with _errors_of(path, "row") as place, _stream(path) as stream:
        source = pa.BufferReader(stream.read()) if path.suffix.lower() in COMPRESSION else stream
        file = pq.ParquetFile(source, page_checksum_verification=True)  # of pages that have a checksum
        _text_of(dict.fromkeys(file.schema_arrow.names), column, str(path))
        for group in range(file.num_row_groups):  # by themselves, so that the groups before a damaged one are read
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                for row in batch.to_pylist():
                    yield _text_of(row, column, str(path))
                    place.done += 1


READERS: dict[str, Callable[[Path, str, bool], Iterator[str]]] = {
    **dict.fromkeys((".txt", ".text", ".md"), _text_documents),
    **dict.fromkeys(JSON_LINES, _jsonl_documents),
    ".parquet": _parquet_documents,
}


def _hub_documents(data: str, column: str) -> Iterator[str]:
    name, config, split = (*data.split(":", 2), "", "")[:3]
    try:
        import datasets

        for row in datasets.load_dataset(name, config or None, split=split or "train", streaming=True):
            yield _text_of(row, column, data)
    except InputError:
        raise
    except Exception as error:  # datasets raises whatever its network, file and parsing libraries raise
        reason = f"{data} is no file or folder here, and cannot be read as a dataset from the hub"
        raise InputError(f"{reason} ({one_line(error)}); check the name, or give a local file") from None


def _text_of(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        found = ", ".join(map(str, row)) or "none"
        raise InputError(f'{where} has no column "{column}" (columns: {found}); name the text by --text-column')
    value = row[column]
    if value is None:
        return ""
    if not isinstance(value, str):
        reason = f'{where}: column "{column}" holds a value of type {type(value).__name__}, not text'
        raise InputError(f"{reason}; name another one by --text-column")
    return encodable(value)


def encodable(text: str) -> str:
    """The text without halves of surrogate pairs: JSON may spell them, UTF-8 has no bytes for them, tokenizers fail."""
    return text.encode("utf-8", "replace").decode()


def one_line(error: Exception) -> str:
    """What an error says, on one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 300)
