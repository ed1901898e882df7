"""A plot as a PNG file, by matplotlib where it is there. Serves `secateur bench` and `secateur sizes`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.files import replacing


def draw_to(path: Path, drawn: Callable[[Any], Any]) -> str:
    """Writes the figure that `drawn` makes, given matplotlib's class of figures; says what it did."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return f"no {path.name}: matplotlib is not installed; run: pip install 'secateur[bench]'"
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = drawn(Figure)
    for axes in figure.axes:
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight", metadata={"Software": None})
    return f"wrote {path}"
