"""Who hears of what the stages do: nobody, one, or several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.optimise import Step
from secateur.recover import RecoveryStep


class Progress:
    """Hears of what the stages do, and says nothing; the command line's `Screen` draws it."""

    def stage(self, name: str) -> None:
        """A stage begins."""

    def step(self, step: Step) -> None:
        """A learning step is done."""

    def recovered(self, step: RecoveryStep) -> None:
        """A step of recovery is done."""

    def size(self, name: str) -> None:
        """Another size of a sweep begins."""

    def measured(self, rows: int, of: int) -> None:
        """The units have been scored on so many rows of text, or the sensitivity of their gates measured."""

    def written(self, tokens: int) -> None:
        """The model wrote so many more tokens of text for itself."""

    def scored(self, rows: int, of: int) -> None:
        """So many more rows of the zero-shot tasks went through a model, of so many for both models."""

    def told(self, line: str) -> None:
        """Something that was found out on the way."""

    def warned(self, warning: str) -> None:
        """Something that is possible, and maybe not meant."""

    def evaluated(self, results: Mapping[str, Any]) -> None:
        """Both models have been measured: what eval.json is to hold."""


class Listeners(Progress):
    """Tells several, in turn, all that a `Progress` hears."""

    def __init__(self, each: Sequence[Progress]) -> None:
        self.each = each


def _told_to_each(name: str) -> Callable[..., None]:
    def tell(self: Listeners, *said: Any) -> None:
        for one in self.each:
            getattr(one, name)(*said)

    return tell


for _name in [name for name in vars(Progress) if not name.startswith("_")]:
    setattr(Listeners, _name, _told_to_each(_name))
