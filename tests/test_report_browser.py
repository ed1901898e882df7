"""The report in a real browser: `make test-browser` brings Chromium, Playwright and axe.

Screenshots are compared with tests/screenshots/*.png: figures one by one, in a fixed width and with their text made
invisible, so that no font has a part in it. `RENEW=1 make test-browser` writes them anew, to be looked at.
"""

import io
import os
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("playwright")

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

from made_runs import make_run
from secateur.report.page import write_report

BASELINES = Path(__file__).parent / "screenshots"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
WIDTH = 480
"""CSS pixels of a figure that is compared."""

OFF = 24
"""Levels of 255 by which a pixel may be off: rounding at the edges of lines."""

SHARE = 0.004
"""Share of pixels that may be further off. A curve is about 1 % of its figure."""

LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-sync",
          "--disable-component-update", "--font-render-hinting=none", "--force-color-profile=srgb"]  # fmt: skip


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome", "chrome")
        path = next((found for name in names if name and (found := shutil.which(name))), None)
        started = playwright.chromium.launch(executable_path=path, args=LAUNCH)
        yield started
        started.close()


@pytest.fixture(scope="session")
def one(tmp_path_factory):
    return write_report([make_run(tmp_path_factory.mktemp("one") / "run")])


@pytest.fixture(scope="session")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    runs = [make_run(folder / f"run-{i}", sparsity=s, seed=i) for i, s in enumerate((0.2, 0.4, 0.6))]
    return write_report(runs, folder / "several.html")


@pytest.fixture(scope="session")
def mixture(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("mixture") / "run", layers=48, heads=4, experts=128, channels=32, steps=2000)
    return write_report([run])


@pytest.fixture
def shown(browser):
    """Opens a page from disk; at the end nothing may have been complained of, or asked of any network."""
    contexts, said, asked = [], [], []

    def show(path: Path, viewport: dict[str, int] = DESKTOP, scheme: str = "light", **options) -> Page:
        context = browser.new_context(viewport=viewport, color_scheme=scheme, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(path.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked), asked


# --- it opens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "several", "mixture"])
def test_every_figure_is_visible_and_draws_something(shown, request, name):
    page = shown(request.getfixturevalue(name))
    for summary in page.locator("main details.run-block:not([open]) > summary").all():
        summary.click()
    found = page.evaluate(
        """() => [...document.querySelectorAll("figure")].map(f => {
            const [svg, place] = [f.querySelector("svg.plot"), f.getBoundingClientRect()];
            const parts = [...svg.querySelectorAll("path, image, use")];
            const drawn = parts.filter(p => p.getBoundingClientRect().width > 1);
            const inside = svg.getBoundingClientRect();
            return {id: f.id, width: place.width, drawn: drawn.length, inside: inside.width <= place.width,
                    height: inside.height, seen: svg.checkVisibility()};
        })"""
    )
    assert len(found) >= 8
    for figure in found:
        assert figure["seen"] and figure["inside"] and figure["width"] > 300 and figure["height"] > 100, figure
        assert figure["drawn"] >= 3, figure


def test_figures_do_not_lie_on_each_other(shown, several):
    page = shown(several)
    boxes = page.evaluate(
        """() => [...document.querySelectorAll("figure")].filter(f => f.checkVisibility())
                  .map(f => f.getBoundingClientRect()).map(b => [b.left, b.top, b.right, b.bottom])"""
    )
    for i, a in enumerate(boxes):
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] + 1 or b[2] <= a[0] + 1 or a[3] <= b[1] + 1 or b[3] <= a[1] + 1


def test_the_page_of_48_layers_and_128_experts_opens_in_two_seconds(shown, mixture):
    assert mixture.stat().st_size < 5e6
    took = []
    for _ in range(3):  # the first one starts the browser, too
        start = time.perf_counter()
        page = shown(mixture)
        page.wait_for_function("document.readyState === 'complete' && !document.getElementById('theme').hidden")
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        took.append(time.perf_counter() - start)
    assert min(took) < 2, took


def test_without_scripts_all_is_there_but_what_needs_them(shown, one):
    page = shown(one, java_script_enabled=False)
    assert page.locator("svg.plot").first.is_visible() and page.locator("#settings").is_visible()
    assert not page.locator("#theme").is_visible() and not page.locator(".filters").first.is_visible()


# --- tables and runs -------------------------------------------------------------------------------------------------


def column(page: Page, table: str, place: int) -> list[str]:
    rows = page.locator(f"#{table} tbody tr:visible")
    return rows.locator(f":nth-child({place})").all_inner_texts()


def test_tables_sort_by_number_up_and_down(shown, one):
    page = shown(one)
    head = page.locator("#widths-by-layer thead th", has_text="share kept")
    head.locator("button").click()
    shares = [float(text.rstrip("%")) for text in column(page, "widths-by-layer", 5)]
    assert len(shares) == 12 and shares == sorted(shares) and head.get_attribute("aria-sort") == "ascending"
    head.locator("button").click()
    shares = [float(text.rstrip("%")) for text in column(page, "widths-by-layer", 5)]
    assert shares == sorted(shares, reverse=True) and head.get_attribute("aria-sort") == "descending"


def test_tables_sort_words_and_keep_what_is_unknown_last(shown, tmp_path):
    runs = [make_run(tmp_path / "b", until="plan"), make_run(tmp_path / "a", sparsity=0.5), make_run(tmp_path / "c")]
    page = shown(write_report(runs, tmp_path / "page.html"))
    head = page.locator("#runs thead th", has_text="× dense").first
    for _ in range(2):
        head.locator("button").click()
        assert column(page, "runs", 7)[-1] == "–"
    page.locator("#runs thead th", has_text="state").locator("button").click()
    assert column(page, "runs", 12) == ["finished", "finished", "stopped before export"]


def test_tables_filter_by_words_and_kind(shown, one):
    page = shown(one)
    bar = page.locator(".filters:has([data-for=widths-by-layer])")
    bar.locator("select").select_option("kv_groups")
    assert set(column(page, "widths-by-layer", 2)) == {"KV groups"}
    assert bar.locator(".count").inner_text() == "6 of 12 rows"
    page.locator("[data-for=settings]").fill("weight KD")
    assert column(page, "settings", 1) == ["kd_weight", "learning.kd_weight"]
    page.locator("[data-for=settings]").fill("kd_")
    assert column(page, "settings", 1) == [
        "kd_weight",
        "kd_temperature",
        "learning.kd_weight",
        "learning.kd_temperature",
    ]


def test_only_settings_that_differ_are_shown_on_request(shown, several):
    page = shown(several)
    page.locator("[data-differences]").check()
    assert column(page, "settings", 1) == ["sparsity", "seed"]


def test_a_run_that_is_unchecked_disappears_everywhere(shown, several):
    page = shown(several)
    parts = page.locator(".run-1:visible, [data-run='1']:visible")
    assert parts.count() > 10
    page.locator("[data-show='1']").uncheck()
    assert parts.count() == 0 and page.locator(".run-0:visible").count() > 5
    page.locator("[data-show='1']").check()
    assert parts.count() > 10


# --- figures answer --------------------------------------------------------------------------------------------------


def test_a_map_tells_the_place_that_is_pointed_at(shown, mixture):
    page = shown(mixture)
    canvas = page.locator("#map-0-expert-channels .canvas")
    canvas.scroll_into_view_if_needed()
    place = canvas.bounding_box()
    canvas.hover(position={"x": place["width"] * 0.55, "y": place["height"] * 0.5})
    said = page.locator("#map-0-expert-channels .readout").inner_text()
    assert said.startswith("layer 2") and "expert 6" in said and "% kept" in said


def test_a_curve_is_read_by_arrow_keys(shown, one):
    page = shown(one)
    page.locator("#loss .canvas").focus()
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.locator("#loss .readout").inner_text().startswith("step 4: loss ")


# --- who reads it ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one", "several", "mixture"])
@pytest.mark.parametrize("width", [320, 390, 768])
def test_nothing_scrolls_sideways_on_a_phone(shown, request, name, width):
    page = shown(request.getfixturevalue(name), {"width": width, "height": 844})
    for summary in page.locator("main details:not([open]) > summary").all()[:60]:
        if summary.is_visible():
            summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_axe_finds_nothing(shown, request, name, scheme):
    page = shown(request.getfixturevalue(name), scheme=scheme, bypass_csp=True)
    response = Axe().run(page).response
    assert len(response["passes"]) > 20
    found = response["violations"]
    assert not found, [(v["id"], v["nodes"][0]["html"][:200], v["nodes"][0].get("failureSummary")) for v in found]


CONTRASTS = """() => {
    const pixel = Object.assign(document.createElement("canvas"), {width: 1, height: 1});
    const canvas = pixel.getContext("2d", {willReadFrequently: true});
    const rgb = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const light = (c) => [.2126, .7152, .0722].reduce((sum, w, i) => {
        const v = c[i] / 255;
        return sum + w * (v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    }, 0);
    const behind = (part) => {
        for (let at = part; at; at = at.parentElement) {
            const colour = rgb(getComputedStyle(at).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const contrast = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
    const found = {text: [], lines: []};
    for (const part of document.querySelectorAll("body *")) {
        if (!part.checkVisibility()) continue;
        const [style, back] = [getComputedStyle(part), behind(part)];
        const own = [...part.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        const drawn = part.closest("svg");
        if (own && !(drawn && part.tagName !== "text"))
            found.text.push([contrast(rgb(drawn ? style.fill : style.color), back), part.textContent.trim()]);
        const own_style = part.getAttribute("style");
        if (drawn && part.tagName === "path" && /stroke: var\\(--(s\\d|ink-2)/.test(own_style))
            if (style.strokeOpacity === "1") found.lines.push([contrast(rgb(style.stroke), back), own_style]);
    }
    return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "several"])
def test_text_and_curves_stand_out_in_both_themes(shown, request, name, scheme):
    found = shown(request.getfixturevalue(name), scheme=scheme).evaluate(CONTRASTS)
    assert len(found["text"]) > 200
    assert min(found["text"])[0] >= 4.5, min(found["text"])
    assert len(found["lines"]) > 10 and min(found["lines"])[0] >= 3, min(found["lines"])


def test_the_theme_follows_the_reader_and_the_button(shown, one):
    page = shown(one, scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.locator("#theme").click()
    light = page.evaluate(ground)
    assert page.locator("#theme").inner_text() == "Theme: light" and light != dark
    page.locator("#theme").click()
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.locator("#theme").inner_text() == "Theme: dark"


def test_keys_reach_everything_in_the_order_of_the_page(shown, one):
    page = shown(one)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    places, seen = [], []
    for _ in range(400):
        page.keyboard.press("Tab")
        at = page.evaluate(
            """() => { const a = document.activeElement, b = a.getBoundingClientRect();
                if (a === document.body) return null;
                const name = a.getAttribute("aria-label") || a.textContent || a.value || a.labels?.[0]?.textContent;
                const fixed = !!a.closest("nav, header");
                return {tag: a.tagName, y: b.top + scrollY, fixed, name: (name || "").trim(),
                        ring: getComputedStyle(a).outlineStyle}; }"""
        )
        if at is None:
            break
        seen.append(at)
        if not at["fixed"]:
            places.append(at["y"])
    assert {"BUTTON", "A", "INPUT", "SELECT", "SUMMARY", "DIV"} <= {at["tag"] for at in seen}
    assert all(at["ring"] != "none" and at["name"] for at in seen), [
        at for at in seen if at["ring"] == "none" or not at["name"]
    ]
    rows = sum(later < earlier - 420 for earlier, later in pairwise(places))
    assert rows == 0, "focus jumps back up the page"


def test_headings_go_down_one_step_at_a_time(shown, several):
    levels = shown(several).evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


# --- it looks as it did ----------------------------------------------------------------------------------------------

FIGURES = {
    "one": ("loss", "sparsity", "widths", "map-0-kv-groups", "map-0-channels", "gates-0", "tasks-0", "bench-0-0"),
    "several": ("pareto-size-0", "loss"),
    "mixture": ("map-0-expert-channels",),
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", list(FIGURES))
def test_figures_look_as_they_did(shown, request, name, scheme):
    page = shown(request.getfixturevalue(name), scheme=scheme)
    page.add_style_tag(
        content=f"text {{ opacity: 0 }} .plot {{ width: {WIDTH}px !important }} nav {{ display: none }}"
        ".figures, .beside { grid-template-columns: 1fr !important }"  # nothing lies beside a figure, or behind it
    )
    wrong = {}
    for figure in FIGURES[name]:
        picture = page.locator(f"#{figure} svg.plot").screenshot(animations="disabled")
        now = Image.open(io.BytesIO(picture)).convert("RGB")
        kept = BASELINES / f"{name}-{figure}-{scheme}.png"
        if os.environ.get("RENEW"):
            BASELINES.mkdir(exist_ok=True)
            now.save(kept, optimize=True)
        before = Image.open(kept).convert("RGB")
        assert now.size == before.size, kept
        off = np.abs(np.asarray(now, int) - np.asarray(before, int)).max(2) > OFF
        if off.mean() > SHARE:
            wrong[kept.name] = f"{off.mean():.2%}"
    assert not wrong, f"shares of pixels that differ: {wrong}"
