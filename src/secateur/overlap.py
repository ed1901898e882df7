"""Text that calibration and evaluation share: runs of 13 words, found by hashes; the warning in the table of a run.

Words are what is left of a text in lower case without punctuation, the measure of the GPT-3 paper (arXiv 2005.14165,
appendix C). Shared runs make figures look better than they are: the gates were learned on what they are tested on.

Shape suffixes: W words of a text, R runs of RUN words that begin at its words.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from secateur.data import stored_tokens
from secateur.files import InputError

if TYPE_CHECKING:
    from secateur.tasks import Tasks

RUN = 13
"""Words of a run."""
UNSEEN = 0
"""Number of a word that the calibration text does not have."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Shared:
    """What a text shares with the calibration text."""

    words: int
    covered: int
    """Words that lie in a shared run."""
    runs: int
    """Shared runs; a shared passage of 20 words has 8 of them."""


class Runs:
    """All runs of some texts, none across the border of two; 8 bytes a run."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.numbers: dict[str, int] = {}
        self.words = 0
        found = []
        for text in texts:
            words = _words(text)
            number_W = np.fromiter((self.numbers.setdefault(w, len(self.numbers) + 1) for w in words), np.uint64)
            self.words += len(number_W)
            found.append(_hashes(number_W))
        self.hashes = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)

    def in_text(self, text: str) -> Shared:
        """Looks for the runs in a text."""
        number_W = np.fromiter((self.numbers.get(word, UNSEEN) for word in _words(text)), np.uint64)
        hash_R = _hashes(number_W)
        if not len(hash_R) or not len(self.hashes):
            return Shared(len(number_W), 0, 0)
        place_R = np.searchsorted(self.hashes, hash_R).clip(max=len(self.hashes) - 1)
        known_R = np.lib.stride_tricks.sliding_window_view(number_W != UNSEEN, RUN).all(axis=1)
        hit_R = (self.hashes[place_R] == hash_R) & known_R
        covered_W = np.convolve(hit_R, np.ones(RUN, np.int64)) > 0
        return Shared(len(number_W), int(covered_W.sum()), int(hit_R.sum()))

    def in_texts(self, texts: Iterable[str]) -> Shared:
        """The sum over texts."""
        found = [self.in_text(text) for text in texts]
        return Shared(sum(s.words for s in found), sum(s.covered for s in found), sum(s.runs for s in found))


def overlap(
    learned_from: Iterable[Path], ids_NT: torch.Tensor, tasks: "Tasks | None", tokenizer: Any
) -> dict[str, Any]:
    """What the tokens that gates were learned from (RUN/data.safetensors, guard-*.safetensors) share with windows of
    text and with tasks."""
    learned = [_calibration(path) for path in learned_from]
    runs = Runs(text for calibration_NT in learned for text in decoded(calibration_NT, tokenizer))
    found: dict[str, Any] = {"run_words": RUN, "calibration_words": runs.words}
    found["text"] = asdict(runs.in_texts(decoded(ids_NT, tokenizer)))
    found["tasks"] = {}
    for name, items in tasks.texts().items() if tasks is not None else ():
        hit = sum(any(runs.in_text(text).runs for text in texts) for texts in items)
        found["tasks"][name] = {"items": len(items), "hit": hit}
    return found


def _calibration(path: Path) -> torch.Tensor:
    try:
        return stored_tokens(path, 2**31 - 1)[0]["calibration"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} holds no calibration tokens ({error}); run `secateur learn RUN` again") from None


def decoded(ids_NT: torch.Tensor, tokenizer: Any) -> Iterator[str]:
    """The documents in blocks of tokens that follow each other, as text; EOS ends a document."""
    ids_T = ids_NT.flatten()
    eos = tokenizer.eos_token_id
    ends = () if eos is None else ((ids_T == eos).nonzero().flatten() + 1).tolist()
    for start, end in zip(chain([0], ends), chain(ends, [len(ids_T)]), strict=True):
        yield tokenizer.decode(ids_T[start:end].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _hashes(number_W: np.ndarray) -> np.ndarray:
    """64-bit hashes of the runs of a text, modulo 2^64: Σ mix(word k of the run) · M^k."""
    mixed_W = (number_W ^ (number_W >> np.uint64(16))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed_W ^= mixed_W >> np.uint64(31)
    runs = max(0, len(number_W) - RUN + 1)
    hash_R = np.zeros(runs, np.uint64)
    for k in range(RUN):
        hash_R = hash_R * MULTIPLIER + mixed_W[k : k + runs]
    return hash_R
