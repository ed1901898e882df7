"""What mkdocs does here beside its own: equations as MathML, figures by the code, reference pages from its dataclasses.

All of it while the site is built, so that no page needs a script or a network.
"""

import re
from html import unescape
from typing import Any

import figures
import reference_pages
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
"""What pymdownx.arithmatex makes of $…$ and $$…$$."""

FIGURE = re.compile(r"<!-- figure: (\w+) -->(.*?)<!-- end of figure -->", flags=re.DOTALL)
"""A place for one of `figures.FIGURES`, and its caption."""


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages that are written from the code."""
    for path, content in reference_pages.pages().items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Draws the figures that a page asks for, and turns equations into MathML, which browsers show by themselves."""

    def drawn(found: re.Match[str]) -> str:
        return f"<figure>{figures.FIGURES[found[1]]()}<figcaption>{found[2].strip()}</figcaption></figure>"

    def as_mathml(found: re.Match[str]) -> str:
        return str(convert(unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"))

    return FIGURE.sub(drawn, EQUATION.sub(as_mathml, html))
