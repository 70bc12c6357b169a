"""The page as a person sees it, in headless Chromium: on a screen, light and dark, on a phone, and on paper.

Looked at are boxes and pixels: nothing sticks out or lies on something else, every plot has been drawn, letters are
large enough and stand out from what is behind them (axe-core's rules), and print shows what a screen hides.
"""

import io
import os
import re
import shutil

import pytest

from moe.report.page import write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install '.[dev]'")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed: pip install '.[dev]'")

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("POLYCLINIC_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser: apt-get install chromium, or POLYCLINIC_CHROMIUM")

KINDS = ("met", "missed", "many", "unfinished", "job", "long_job", "dense")
WIDTHS = SMALL, PHONE, TABLET, SCREEN = 320, 390, 768, 1280  # CSS pixels
LEAST_LETTER = 7.5  # CSS pixels of height, in plots on the smallest phone
A4 = 297 / 25.4 * 96  # CSS pixels of height

# Elements that stick out of the page; what lies in something that scrolls or is hidden does not.
STICKING_OUT = """() => [...document.querySelectorAll('body *')].filter(element => {
  for (let inside = element; inside; inside = inside.parentElement)
    if (inside !== element && ['auto', 'scroll', 'hidden'].includes(getComputedStyle(inside).overflowX)) return false;
  const box = element.getBoundingClientRect();
  return box.width && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(element => element.outerHTML.slice(0, 100))"""

# Of each plot: its title, names that stick out of it, pairs that lie on each other, the height of its smallest letters.
NAMES_IN_PLOTS = """() => [...document.querySelectorAll('figure svg')].map(svg => {
  const frame = svg.getBoundingClientRect();
  const names = [...svg.querySelectorAll('text')].filter(text => text.textContent.trim());
  const corners = text => {  // of the turned box, not of the one around it
    const box = text.getBBox(), turn = text.getScreenCTM();
    const at = (x, y) => new DOMPoint(x, y).matrixTransform(turn);
    const inset = box.height * 0.2;  // between the letters and the edges of their line
    const [left, top, right, bottom] = [box.x, box.y + inset, box.x + box.width, box.y + box.height - inset];
    return [at(left, top), at(right, top), at(right, bottom), at(left, bottom)];
  };
  const shapes = names.map(corners);
  const apart = (a, b) => [a, b].some(shape => [0, 1].some(edge => {  // one of four axes parts them
    const [from, to] = [shape[edge], shape[edge + 1]];
    const along = point => point.x * (to.x - from.x) + point.y * (to.y - from.y);
    const [first, second] = [a.map(along), b.map(along)];
    return Math.max(...first) <= Math.min(...second) || Math.max(...second) <= Math.min(...first);
  }));
  const overlapping = [], outside = [];
  shapes.forEach((shape, i) => {
    if (shape.some(point => point.x < frame.left - 1 || point.x > frame.right + 1 || point.y < frame.top - 1 ||
                            point.y > frame.bottom + 1)) outside.push(names[i].textContent);
    for (let j = 0; j < i; j++)
      if (!apart(shape, shapes[j])) overlapping.push(names[j].textContent + ' / ' + names[i].textContent);
  });
  const height = shape => Math.hypot(shape[3].x - shape[0].x, shape[3].y - shape[0].y) / 0.6;
  return {title: svg.querySelector('title').textContent, outside, overlapping,
          letters: Math.min(...shapes.map(height))};
})"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory, specialty_run, job_run, change_json):
    """By what is special about the run: the page's address."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    specialties = tuple(f"specialty_of_department_{number}" for number in range(9))
    runs = {
        "met": specialty_run(folders["met"], ("billing", "pharmacology", "radiology"), steps=40),
        "missed": specialty_run(folders["missed"]),
        "many": specialty_run(folders["many"], specialties, num_layers=12, steps=400),
        "unfinished": specialty_run(folders["unfinished"], finished=False),
        "job": job_run(folders["job"]),
        "long_job": job_run(folders["long_job"], steps=2000, num_experts=64, domains=("billing", "public", "radiology"),
                            finished=False),
        "dense": job_run(folders["dense"], dense=True),
    }  # fmt: skip
    change_json(runs["missed"].results, optout={"subsets": 3, "bitwise_equal": False, "plain_router_differs": False})
    return {kind: write_page(run).resolve().as_uri() for kind, run in runs.items()}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as started:
        # Its own sandbox wants rights that a container does not give; the page is ours.
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        yield (launched := started.chromium.launch(executable_path=CHROMIUM, args=arguments))
        launched.close()


@pytest.fixture
def show(browser, pages):
    """A function: a page in a window so wide."""
    opened = []

    def shown(kind, width=SCREEN, scheme="light"):
        opened.append(browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme))
        opened[-1].goto(pages[kind])
        return opened[-1]

    yield shown
    for page in opened:
        page.close()


@pytest.mark.parametrize("kind", KINDS)
def test_asks_for_nothing_and_says_nothing(kind, browser, pages):
    page, asked, said = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pages[kind], wait_until="networkidle")
    page.close()
    assert asked == [pages[kind]] and said == []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_sticks_out_or_lies_on_something_else(kind, show):
    page = show(kind)
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate(STICKING_OUT) == [], width
        plots = page.evaluate(NAMES_IN_PLOTS)
        assert len(plots) >= 4
        for plot in plots:
            assert plot["outside"] == [] and plot["overlapping"] == [], (width, plot["title"])
            assert plot["letters"] >= LEAST_LETTER, (width, plot["title"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["met", "job"])
def test_every_plot_is_drawn(kind, scheme, show):
    """In colours of the page, on its paper."""
    from PIL import Image

    page = show(kind, scheme=scheme)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(paper) > 600) == (scheme == "light")
    for svg in page.query_selector_all("figure svg"):
        title = svg.query_selector("title").text_content()
        image = Image.open(io.BytesIO(svg.screenshot())).convert("RGB")
        colors = image.getcolors(image.width * image.height)
        background = sum(count for count, color in colors if color == tuple(paper)) / (image.width * image.height)
        assert 0.2 < background < 0.98, title
        lively = sum(count for count, color in colors if max(color) - min(color) > 60)
        assert lively > 0.001 * image.width * image.height, title


@pytest.mark.parametrize("scheme, width", [("light", SCREEN), ("dark", PHONE)])
@pytest.mark.parametrize("kind", ["met", "missed", "unfinished", "job"])
def test_can_be_read_by_everybody(kind, scheme, width, show):
    """What axe-core finds wrong: contrast, names of things, order of headings, tables without heads, ..."""
    page = show(kind, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


@pytest.mark.parametrize("kind", ["met", "many", "job"])
def test_on_paper(kind, show, tmp_path):
    page = show(kind)
    page.emulate_media(media="print")
    tall = {name: page.locator(name).first.bounding_box() for name in ("nav", "pre.long", ".signature")
            if page.locator(name).count()}  # fmt: skip
    assert tall.pop("nav") is None
    assert set(tall) == ({"pre.long", ".signature"} if kind != "job" else {"pre.long"})
    assert all(box and box["height"] > 10 for box in tall.values()), "the config, and where to sign, are on paper"
    assert page.evaluate(STICKING_OUT) == []
    pdf = page.pdf(format="A4")
    num_pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 2 <= num_pages <= 2 + page.evaluate("document.body.scrollHeight") / (0.5 * A4)  # none that is nearly empty


def test_hashes_can_be_compared_by_eye_and_in_full(show):
    page = show("met")
    short = page.locator("#data code[title]").first
    assert short.get_attribute("title").startswith(short.inner_text()) and len(short.inner_text()) == 12
    page.locator("summary", has_text="Hashes in full").click()
    assert page.locator("#config code", has_text="a0" * 32).is_visible()


def test_sections_can_be_gone_to(show):
    page = show("met", PHONE)
    for link in page.locator("nav a").all():
        link.click()
        place = page.locator(page.url[page.url.index("#") :]).bounding_box()
        at_end = page.evaluate("scrollY + innerHeight >= document.body.scrollHeight - 1")
        assert abs(place["y"]) < 2 or at_end, link.inner_text()
