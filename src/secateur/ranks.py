"""Ranks: processes that torchrun or `accelerate launch` started and that learn gates together. Serves `prune`, `learn`.

Every rank has the gates and goes through the same loop (learn.py); rows go to the ranks in turns, and what each makes
of them is put together in the order of the rows. So gates do not depend on how many ranks there are. Rank 0 alone reads
options, opens the run, writes files and speaks; the others are handed what they need and leave once gates are learned.

None hangs. Each rank beats in the store of the launcher; rank 0 listens to all, the others to rank 0. Who is silent for
too long, or leaves with a word of what went wrong, interrupts the listener as Ctrl-C would: what is learned is saved.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from secateur import interrupts
from secateur.config import Config
from secateur.files import InputError
from secateur.recipes import ONE_SHOT

BEAT = 1.0
"""Seconds between two beats of a rank."""

SILENT = 10.0
"""Seconds without a beat after which a rank is taken to be gone, when something has gone wrong anyway; one that is well
may miss some on a machine that has too much to do."""

LAST_WORD = 4.0
"""Seconds that a rank in which something went wrong leaves rank 0 to say so."""

PATIENCE = 120.0
"""The same when all seems well: a rank may hold on to its interpreter while it loads. SECATEUR_RANK_TIMEOUT sets it."""

GRACE = 15.0
"""Seconds in which an interrupt must be heard; the collective operations of torch hear none while they wait."""

DONE = "done"
INTERRUPTED = "interrupted"
"""What ranks leave with where nothing is wrong."""

GONE = "the launcher is gone"

Item = TypeVar("Item")


class RankLost(KeyboardInterrupt):
    """Other ranks are gone: an interruption like any other, so what is learned is saved."""


class Ranks:
    """This process among those that learn together; alone unless there are several."""

    def __init__(self, rank: int = 0, count: int = 1, watch: "_Watch | None" = None, store: Any = None) -> None:
        self.rank, self.count, self._watch = rank, count, watch
        self._store = store  # which may live in this process, and others may look into it to the end

    @property
    def first(self) -> bool:
        """Whether this rank reads options, writes files and speaks."""
        return self.rank == 0

    def in_turn(self, items: Sequence[Item], work: Callable[[Item], torch.Tensor]) -> Iterator[torch.Tensor]:
        """What `work` makes of each item, in the order of the items, on all ranks, who take them in turns.

        All results have the same shape. Every rank works as often as any other, which sharded weights ask for: where
        items do not come out even the last one is done several times. Raises RankLost.
        """
        for start in range(0, len(items), self.count):
            try:
                own = work(items[min(start + self.rank, len(items) - 1)])
                parts = self._gathered(own)
                if own.device.type != "cpu" and self.count > 1:
                    torch.accelerator.synchronize()  # here, where it is known what it means if another rank is gone
            except RuntimeError as error:
                raise self._told_apart(error) from error
            yield from parts[: len(items) - start]

    def handed(self, value: Any = None) -> Any:
        """The `value` that rank 0 has, on all ranks, who wait for it as long as rank 0 lives. Raises RankLost."""
        if self.count == 1:
            return value
        box = [value]
        try:
            dist.broadcast_object_list(box, src=0)
        except RuntimeError as error:
            raise self._told_apart(error) from error
        return box[0]

    def leave(self, word: str = DONE) -> None:
        """Says why to the others and goes on alone."""
        global _here
        if self._watch is None:
            return
        self._watch.end(word)
        if not self.first and word != INTERRUPTED:
            # Rank 0 may need what was sent last, or has to say what went wrong before a launcher ends it.
            self._watch.wait_for_first(GRACE if word == DONE else LAST_WORD)
        with suppress(RuntimeError):
            dist.destroy_process_group()
        self._watch, self.rank, self.count = None, 0, 1
        _here = ALONE

    @property
    def dismissed(self) -> bool:
        """Whether rank 0 has left."""
        try:
            return self._watch is None or self._watch.word(0) is not None
        except RuntimeError:  # with its store
            return True

    def why(self) -> str | None:
        """What happened to another rank, in a line; INTERRUPTED or DONE where that is all; None where all are well."""
        return None if self._watch is None else self._watch.lost()

    def _gathered(self, own: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of all ranks, by rank."""
        if self.count == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous())
        return parts

    def _told_apart(self, error: RuntimeError) -> BaseException:
        """RankLost where another rank is gone, which shows as many an error of torch's; else the error itself."""
        reason = self.why()
        return error if reason is None else RankLost(reason)


ALONE = Ranks()
_here = ALONE


def here() -> Ranks:
    """This process among its ranks."""
    return _here


def join() -> Ranks:
    """Meets the other processes that the launcher has started, as its environment says. Raises InputError."""
    global _here
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    patience, attempt = _patience(), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        meeting, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=max(patience, PATIENCE))))
        limit = timedelta(seconds=patience)
        store = dist.TCPStore(
            *place, is_master=False, timeout=limit, wait_for_workers=False
        )  # one that waits is locked
        watch = _Watch(dist.PrefixStore(f"secateur/{attempt}", store), rank, count, patience)
        # How long is waited in all that follows is up to the beats: rank 0 may be busy for hours before it learns.
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=count, timeout=timedelta(days=7))
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"rank {rank} of {count} cannot meet the others at {place[0]}:{place[1]} ({reason}); start all of them "
            "with torchrun or accelerate launch"
        ) from None
    _here = Ranks(rank, count, watch, meeting)
    return _here


@contextmanager
def led(ranks: Ranks) -> Iterator[None]:
    """What rank 0 does; at its end, whichever, the others are told."""
    word = "ended with an error"
    try:
        yield
        word = DONE
    except SystemExit as end:
        word = INTERRUPTED if end.code == 130 else word if end.code else DONE
        raise
    finally:
        ranks.leave(word)


def follow(ranks: Ranks) -> None:
    """What the other ranks do: learn along, in silence. What goes wrong rank 0 says."""
    from secateur.methods import learn_along

    try:
        learn_along(ranks)
        ranks.leave()
    except KeyboardInterrupt:
        with interrupts.held_back():
            dismissed = ranks.dismissed
            ranks.leave(INTERRUPTED)
            sys.exit(0 if dismissed else 130)
    except InputError as error:
        ranks.leave(str(error))
        sys.exit(2)
    except BaseException as error:
        ranks.leave(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        raise


def check(config: Config) -> None:
    """Raises InputError for what these ranks cannot do."""
    check_count(config, _here.count)
    if _here.count > 1:
        _check_device(config.device)


def check_count(config: Config, count: int, several: str = "start several, with torchrun or accelerate launch") -> None:
    """Raises InputError for what so many ranks cannot do, and for what one alone cannot; `several` says how to have
    more of them."""
    if count == 1:
        if config.shard:
            raise InputError(f"--shard spreads a model over ranks: {several}")
        return
    if config.sweep is not None:
        raise InputError(f"--sweep learns on one rank, not on {count}; take one")
    config.rows_a_pass(count)


def call(config: Config, learns: bool = True) -> None:
    """Has the other ranks, where there are any, learn along, or leave where nothing is learned."""
    if learns and config.method not in ONE_SHOT and config.steps:
        check(config)
        _here.handed(config)
    else:
        _here.leave()


def _check_device(device: str) -> None:
    """Raises InputError where there is no device for each rank of this node."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    there = torch.cuda.device_count()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "cpu" or (device == "auto" and accelerator is None):
        return
    if device not in ("auto", "cuda"):
        raise InputError(f"--device {device}: each rank takes the CUDA device of its own number; say cuda or cpu")
    if local > there:
        raise InputError(
            f"{local} ranks were started on a node of {there} CUDA devices; start {there or 'one'}, or say --device cpu"
        )


def _patience() -> float:
    said = os.environ.get("SECATEUR_RANK_TIMEOUT", str(PATIENCE))
    try:
        patience = float(said)
    except ValueError:
        patience = 0.0
    if patience < SILENT:
        raise InputError(f"SECATEUR_RANK_TIMEOUT is a number of seconds, {SILENT:g} or more, not {said!r}")
    return patience


class _Watch:
    """Beats, and listens to others: a thread of its own. What it says of ranks lies in the launcher's store."""

    def __init__(self, store: Any, rank: int, count: int, patience: float) -> None:
        self.store, self.rank, self.count, self.patience = store, rank, count, patience
        self.others = [other for other in range(count) if other != rank]
        self.heard = self.others if rank == 0 else [0]
        self.ended = threading.Event()
        self.reason: str | None = None
        self.store.set(f"who/{rank}", f"{socket.gethostname()}, process {os.getpid()}")
        self.store.add(f"beat/{rank}", 1)
        threading.Thread(target=self._listen, name="beats of ranks", daemon=True).start()

    def end(self, word: str) -> None:
        """Stops beating, with a word."""
        self.ended.set()
        with suppress(RuntimeError):
            self.store.set(f"word/{self.rank}", word)

    def wait_for_first(self, seconds: float) -> None:
        """Waits until rank 0 has left, no longer than that."""
        until = time.monotonic() + seconds
        with suppress(RuntimeError):
            while time.monotonic() < until and self.word(0) is None:
                time.sleep(0.1)

    def lost(self) -> str | None:
        """As `Ranks.why`. Takes up to SILENT seconds."""
        if self.reason is not None:
            return self.reason
        try:
            before = {rank: self._beats(rank) for rank in self.others}
            until = time.monotonic() + SILENT
            while True:
                words = {rank: word for rank in self.others if (word := self.word(rank)) is not None}
                if wrong := {rank: word for rank, word in words.items() if word not in (DONE, INTERRUPTED)}:
                    return self._line(*wrong.popitem())
                silent = [rank for rank in before if rank not in words and self._beats(rank) == before[rank]]
                if not silent:
                    return max(words.values(), default=None)
                if time.monotonic() >= until:
                    return self._line(silent[0], "ended without a word")
                time.sleep(0.1)
        except RuntimeError:
            return GONE

    def _listen(self) -> None:
        beats, missed, failed = dict.fromkeys(self.heard, 0), dict.fromkeys(self.heard, 0), 0
        while not self.ended.wait(BEAT):
            try:
                self.store.add(f"beat/{self.rank}", 1)
                for rank in self.heard:
                    before, beats[rank] = beats[rank], self._beats(rank)
                    missed[rank] = missed[rank] + 1 if 0 < before == beats[rank] else 0  # with none it is still to come
                    word = self.word(rank)
                    if word is None and missed[rank] * BEAT >= self.patience:
                        word = f"has not been heard of for {self.patience:g} seconds"
                    if word not in (None, DONE):
                        return self._alarm(None if word == INTERRUPTED else self._line(rank, str(word)))
                failed = 0
            except RuntimeError:
                failed += 1
                if failed * BEAT >= self.patience:
                    return self._alarm(GONE)
        return None

    def _alarm(self, reason: str | None) -> None:
        """Interrupts the main thread; ends the process where that waits for a rank that is gone and cannot hear it."""
        self.reason = reason  # None: another one was interrupted, maybe because a third one is gone
        if interrupts.interrupt_main(GRACE) or self.ended.is_set():
            return
        if self.rank == 0:
            print(
                f"secateur: {self.lost() or INTERRUPTED}; what is learned is saved up to the last checkpoint",
                file=sys.stderr,
            )
        self.end(INTERRUPTED)
        os._exit(130)

    def _line(self, rank: int, what: str) -> str:
        return f"rank {rank} of {self.count} ({self.store.get(f'who/{rank}').decode()}): {what}"

    def word(self, rank: int) -> str | None:
        """What a rank left with; None while it has not."""
        key = f"word/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _beats(self, rank: int) -> int:
        return int(self.store.add(f"beat/{rank}", 0))
