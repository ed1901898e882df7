"""The unpruned model's next-token distributions, kept on disk: the likeliest words of each, and the mass of the rest.

For `--teacher cache`: what the model says of a batch is computed when that is first learned on, and read from
RUN/teacher whenever it is again: in a resumed run, in another sweep, in further epochs, with other gates. A file holds
a batch and is called by its tokens, so that no other batch's is ever taken; `about.json` says whose they are.

Shape suffixes: B batch, T positions, R = B·T rows, K words kept, V vocabulary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.data import fingerprint
from secateur.files import InputError, read_json, replacing, write_json
from secateur.objective import KeptWords
from secateur.vocabulary import Vocabulary


class Exactness(NamedTuple):
    """What the words left out cost, on some rows: sums of KL divergences are never above the exact ones."""

    rest: float
    """Mean mass of the words that are not kept."""
    kl: float
    """L_kl by the kept words and the mass of the rest, nats a token."""
    exact_kl: float
    """L_kl by all words."""


class TeacherCache:
    """A folder of distributions at one temperature, of one model.

    Raises InputError where the folder holds those of another one.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], top_k: int, temperature: float) -> None:
        self.folder, self.top_k, self.temperature = folder, top_k, temperature
        own = {**about, "top_k": top_k, "temperature": temperature}
        path = folder / "about.json"
        if path.exists():
            found = read_json(path, "secateur learn RUN")
            other = [key for key in own if not isinstance(found, dict) or found.get(key) != own[key]]
            if other:
                has = found.get(other[0]) if isinstance(found, dict) else None
                raise InputError(
                    f"{folder} holds a teacher's distributions of other {other[0]} ({has}, here {own[other[0]]}); "
                    "remove that folder, or learn in another one"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, own)

    def of(self, ids_BT: Tensor, teacher: Vocabulary) -> KeptWords:
        """What the teacher says of a batch: read, or computed and written."""
        path = self.folder / f"{fingerprint(ids_BT.cpu())}.safetensors"
        if path.exists():
            try:
                words = KeptWords(**load_file(path))
                if words.index_RK.shape == (ids_BT.numel(), min(self.top_k, teacher.words)):
                    return KeptWords(*(tensor.to(ids_BT.device) for tensor in words))
            except (SafetensorError, TypeError):
                pass  # a broken file gives way to a new one
        words = self._ask(ids_BT, teacher)
        with replacing(path) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in words._asdict().items()}, temporary)
        return words

    @torch.no_grad()
    def _ask(self, ids_BT: Tensor, teacher: Vocabulary) -> KeptWords:
        hidden_RD, labels_R = teacher.hidden(ids_BT).flatten(0, 1), ids_BT.roll(-1, dims=1).flatten()
        parts = []
        for part in teacher.head.chunks(len(labels_R), ids_BT.device):
            logits_RV = teacher.head.logits(hidden_RD[part]).float()
            label_R = logits_RV.log_softmax(-1).gather(1, labels_R[part, None])[:, 0]
            log_q_RV = (logits_RV / self.temperature).log_softmax(-1)
            log_q_RK, index_RK = log_q_RV.topk(min(self.top_k, log_q_RV.shape[1]), dim=-1)
            rest_R = log_q_RV.scatter(1, index_RK, -torch.inf).logsumexp(-1)
            parts.append(KeptWords(index_RK.int(), log_q_RK, rest_R, label_R))
        return KeptWords(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
