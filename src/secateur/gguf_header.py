"""The header of a GGUF file of someone else: every count and length is checked against the size of the file before the
gguf library, which believes them, reads it. Format: version 2 and 3 of ggml's docs/gguf.md, little-endian.

Each check raises ValueError with a reason, as in untrusted.py.
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from secateur.untrusted import MAX_LAYERS

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type of a value → its bytes."""
UINT32, STRING, ARRAY = 4, 8, 9
MAX_NAME = 65_535
MAX_DIMS = 4
MAX_ALIGNMENT = 2**20


def check_gguf(path: Path) -> None:
    """Checks the header of a GGUF file. Also raises OSError."""
    with path.open("rb") as file:
        if path.stat().st_size < 24:
            raise ValueError("it is too short for a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _Header(content).check()


class _Header:
    """A place in the file, which moves on as it is read."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.at, self.alignment = content, 0, 32

    def check(self) -> None:
        """Reads all of the header."""
        magic, version, tensors, entries = self.take("<4sIQQ")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError("it is not a little-endian GGUF file of version 2 or 3")
        self.fits(entries, 13, "metadata entries")
        keys: set[bytes] = set()
        for _ in range(entries):
            key = self.name(keys)
            (kind,) = self.take("<I")
            self.value(kind, key)
        self.fits(tensors, 24, "tensors")
        names: set[bytes] = set()
        self.check_extents([self.extent(names) for _ in range(tensors)])

    def take(self, form: str) -> Any:
        """The values that come next."""
        size = struct.calcsize(form)
        if size > len(self.content) - self.at:
            raise ValueError("its header ends with the file")
        self.at += size
        return struct.unpack_from(form, self.content, self.at - size)

    def fits(self, count: int, size: int, what: str) -> None:
        """Refuses a count of what takes more bytes than are left."""
        if count * size > len(self.content) - self.at:
            raise ValueError(f"it claims {count:,} {what}, and has {len(self.content) - self.at:,} bytes for them")

    def skip_text(self) -> bytes:
        """A text, its first bytes."""
        (length,) = self.take("<Q")
        self.fits(length, 1, "characters of a text")
        self.at += length
        return self.content[self.at - length : self.at - length + min(length, MAX_NAME)]

    def name(self, known: set[bytes]) -> bytes:
        """A key or the name of a tensor, which comes once."""
        begin = self.at
        name = self.skip_text()
        if self.at - begin - 8 > MAX_NAME:
            raise ValueError(f"a name has more than {MAX_NAME:,} characters")
        if name in known:
            raise ValueError(f"it has {name.decode('utf-8', 'replace')!r} twice")
        known.add(name)
        return name

    def value(self, kind: int, key: bytes) -> None:
        """A value of the metadata."""
        if kind == STRING:
            self.skip_text()
        elif kind == ARRAY:
            inner, count = self.take("<IQ")
            if inner != STRING and inner not in SCALARS:
                raise ValueError(f"{key.decode('utf-8', 'replace')!r} is an array of the unknown type {inner}")
            self.fits(count, SCALARS.get(inner, 8), "values of an array")
            if inner == STRING:
                for _ in range(count):
                    self.skip_text()
            else:
                self.at += count * SCALARS[inner]
        elif kind in SCALARS:
            raw = self.take(f"<{SCALARS[kind]}s")[0]
            number = int.from_bytes(raw, "little")
            if key == b"general.alignment":
                if kind != UINT32 or not 0 < number <= MAX_ALIGNMENT or number & (number - 1):
                    raise ValueError("its alignment is not a power of two")
                self.alignment = number
            elif key.endswith(b".block_count") and number > MAX_LAYERS:
                raise ValueError(f"it claims {number:,} layers, more than {MAX_LAYERS:,}")
        else:
            raise ValueError(f"{key.decode('utf-8', 'replace')!r} has the unknown type {kind}")

    def extent(self, names: set[bytes]) -> tuple[int, int, str]:
        """Where a tensor lies behind the header, and its name."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        name = self.name(names).decode("utf-8", "replace")
        (count,) = self.take("<I")
        if not 0 < count <= MAX_DIMS:
            raise ValueError(f"tensor {name!r} has {count:,} dimensions")
        shape = self.take(f"<{count}Q")
        kind, offset = self.take("<IQ")
        try:
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name!r} has the unknown type {kind}") from None
        values = math.prod(shape)
        if offset % self.alignment or shape[0] % block or 0 in shape:
            raise ValueError(f"tensor {name!r} is not aligned, or not of whole blocks")
        return offset, offset + values // block * size, name

    def check_extents(self, extents: list[tuple[int, int, str]]) -> None:
        """Refuses tensors that lie in each other, or behind the end of the file."""
        room = len(self.content) - -(-self.at // self.alignment) * self.alignment
        end = 0
        for begin, stop, name in sorted(extents):
            if begin < end or stop > room:
                where = f"lies from {begin:,} to {stop:,}"
                raise ValueError(f"tensor {name!r} {where}, where there is room from {end:,} to {room:,}")
            end = stop
