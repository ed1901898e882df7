"""Figures by matplotlib as SVG that belongs to a page: its fonts and colours, in light and dark, and no ids twice.

Figures are drawn in colours that stand for the page's variables (`INK`, `series(3)`), which take their place in the
SVG; so the page's style decides, and a figure follows the reader's theme. Serves `secateur report`.
"""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#010101", "#010102"
"""Stand for the colour of text, and of grids."""

SERIES = 8
"""Colours that tell series apart; then they begin anew."""

_VARIABLES = {INK: "var(--ink-2)", FAINT: "var(--rule)"}
_VARIABLES |= {f"#0102{number:02x}": f"var(--s{number})" for number in range(SERIES)}

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "text.parse_math": False,  # names of models and files are shown as they are
    "axes.formatter.use_mathtext": False,
    "axes.formatter.useoffset": False,
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "lines.linewidth": 1.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.linewidth": 0.6,
    "grid.color": FAINT,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=[f"#0102{number:02x}" for number in range(SERIES)]),
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}

RUN = "run-"
"""What the gid of an artist begins with that belongs to run N: the page can hide it."""


def series(number: int) -> str:
    """The colour of a series."""
    return f"#0102{number % SERIES:02x}"


@contextmanager
def drawing() -> Iterator[None]:
    """Within the context matplotlib draws as the page wants it; glyphs that its own fonts lack are the page's care."""
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def box(axes: Axes) -> list[float]:
    """Where the axes lie in their figure: left, top, width, height, as shares of its size."""
    place = axes.get_position()
    return [round(v, 5) for v in (place.x0, 1 - place.y1, place.width, place.height)]


def markup(figure: Figure, name: str, label: str, description: str) -> Markup:
    """The figure as an `<svg>` element, named by `label` and told in words by `description`; `name` is unique."""
    with drawing():
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view, "matplotlib wrote an SVG without a viewBox"
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    body = re.sub(r"font: (?:(bold) )?([\d.]+)px [^;\"]*", _font, body)
    body = re.sub(r"font-family: [^;\"]*(; )?", "", body)
    body = re.sub(r"#01010[12]|#0102[0-9a-f]{2}", lambda found: _VARIABLES[found[0]], body)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r'\s+id="([^"]+)"', lambda found: _identity(found[1], name, used), body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = re.sub(r"\n\s*", "\n", body)
    return Markup(
        f'<svg class="plot" viewBox="{view[1]}" role="img" aria-label="{escape(label)}" '
        f'aria-describedby="{name}-desc"><desc id="{name}-desc">{escape(description)}</desc>{body}</svg>'
    )


def _font(found: re.Match[str]) -> str:
    return f"font-size: {found[2]}px" + ("; font-weight: bold" if found[1] else "")


def _identity(old: str, name: str, used: set[str]) -> str:
    """What an id becomes: the class of a run, an id of this figure, or nothing where nobody refers to it."""
    if old.startswith(RUN):
        return f' class="{old}"'
    return f' id="{name}-{old}"' if old in used else ""
