"""The page of AttentionView in a real browser: what it shows, by mouse, by keyboard and to a screen reader."""

import xml.etree.ElementTree

import numpy as np
import pytest
from oracle import HANG_SECONDS, make_rng

from fastattn import AttentionView, attention

LAYERS, HEADS = 2, 3
TOKENS = ["[CLS]", "<b>tiger</b>", "jumped", "it", "it"]
WEIGHTS = make_rng().dirichlet(np.full(len(TOKENS), 0.5), (LAYERS, HEADS, len(TOKENS)))
WEIGHTS[1, 2, 3] = [0.03, 0.8125, 0.0975, 0.0, 0.06]
LOUD = [
    "<img src=x onerror=document.title='run'>",
    "</script><script>document.title='run'</script>",
    '"><svg onload=1>',
]


@pytest.fixture
def open_page(browser, tmp_path):
    """Open a view's page from its file; at the end, that it was quiet and fetched nothing but itself is checked."""
    contexts, noise, requests = [], [], []

    def open_it(view=None, choice=None, address="", **context):
        view = view or AttentionView(WEIGHTS, TOKENS)
        view.save(tmp_path / "page.html", **(choice or {"word": 3, "layer": 1, "head": 2}))
        contexts.append(browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **context}))
        page = contexts[-1].new_page()
        page.set_default_timeout(1e3 * HANG_SECONDS)
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((tmp_path / "page.html").as_uri() + address)
        return page

    yield open_it
    for context in contexts:
        context.close()
    # Chromium remarks that these tests read pixels.
    assert [text for text in noise if not text.startswith("Canvas2D: Multiple readback")] == []
    asked = {url.partition("#")[0] for url in requests if not url.startswith(("data:", "blob:"))}
    assert asked == {(tmp_path / "page.html").as_uri()}


def shares(page, side="keys"):
    return page.locator(f"#{side} .weight").all_text_contents()


def table(page):
    """The rows as (word, position, weight), read by header cells as a screen reader does."""
    rows = page.locator("#rows tr")
    cells = [(row.locator("th[scope=row]").inner_text(), *row.locator("td").all_inner_texts()) for row in rows.all()]
    return [(word, int(at) if at else None, float(share)) for word, at, share, _stars in cells]


def check_shown(page, layer, head, query):
    """Pickers, grid, table and the shares beside the words all tell of this head and this word."""
    row = WEIGHTS[layer].mean(axis=0)[query] if head == HEADS else WEIGHTS[layer, head, query]
    assert page.locator("#layer").input_value() == str(layer)
    assert page.locator("#head").input_value() == str(head)
    pressed = page.locator('#grid [aria-pressed="true"]')
    assert pressed.count() == 1
    name = "mean over heads" if head == HEADS else f"head {head}"
    assert pressed.get_attribute("aria-label") == f"Layer {layer}, {name}"
    listed = {at: (word, share) for word, at, share in table(page)}
    assert list(listed) == sorted(listed, key=lambda at: -row[at])
    assert set(listed) >= set(np.flatnonzero(row > 0.0005))
    for at, (word, share) in listed.items():
        assert word == TOKENS[at]
        assert abs(share - row[at]) <= 0.0005 + 0.5 / 4095
    for share, weight in zip(shares(page), row, strict=True):
        assert abs(float(share or 0) - weight) <= 0.005 + 0.5 / 4095
    assert f"Layer {layer}, {name}: what “{TOKENS[query]}” (position {query}) looks at" in page.inner_text("caption")


def lines(page):
    """How much is drawn at the left end of each line, for each query word."""
    return page.evaluate("""() => {
        const canvas = document.getElementById("lines"), box = canvas.getBoundingClientRect();
        const scale = canvas.width / box.width, pen = canvas.getContext("2d");
        return [...document.querySelectorAll("#queries .word")].map((word) => {
            const at = word.getBoundingClientRect();
            const y = ((at.top + at.bottom) / 2 - box.top) * scale, x = (at.right - box.left + 4) * scale;
            const pixels = pen.getImageData(x, y - 3, 4, 6).data;
            return Math.max(...pixels.filter((_, i) => i % 4 === 3));
        });
    }""")


def test_what_is_shown_first(open_page):
    page = open_page(choice={"word": 3, "layer": 1, "head": 2, "title": "A <i>tiger</i>"})
    assert page.title() == page.inner_text("h1") == "A <i>tiger</i>"
    check_shown(page, 1, 2, 3)
    assert page.inner_text("#status") == "Layer 1, head 2: “it” looks most at “<b>tiger</b>”, 0.81."
    assert shares(page) == ["0.03", "0.81", "0.10", "", "0.06"]


def test_hover_shows_a_word_and_leaves_again(open_page):
    page = open_page()
    page.hover("#queries .word >> nth=2")
    check_shown(page, 1, 2, 2)
    drawn = lines(page)
    assert drawn[2] > 150 > 40 > max(drawn[:2] + drawn[3:])
    page.hover("h1")
    check_shown(page, 1, 2, 3)
    assert lines(page)[3] > 150


def test_hover_on_a_word_that_is_looked_at(open_page):
    page = open_page()
    page.hover("#keys .word >> nth=1")
    column = WEIGHTS[1, 2, :, 1]
    assert np.allclose([float(share or 0) for share in shares(page, "queries")], column, atol=0.0052)
    assert "which words look at “<b>tiger</b>” (position 1)" in page.inner_text("caption")
    assert [at for _, at, _ in table(page)] == [at for at in np.argsort(-column) if column[at] > 0.0002]


def test_pickers(open_page):
    page = open_page()
    page.select_option("#layer", "0")
    check_shown(page, 0, 2, 3)
    page.select_option("#head", "1")
    check_shown(page, 0, 1, 3)
    page.select_option("#head", label="mean")
    check_shown(page, 0, HEADS, 3)


def test_click_in_the_grid(open_page):
    page = open_page()
    page.click("#grid button >> nth=1")
    check_shown(page, 0, 1, 3)
    page.get_by_role("button", name="Layer 1, mean over heads").click()
    check_shown(page, 1, HEADS, 3)


def test_keyboard_alone(open_page):
    page = open_page()
    focused = "document.activeElement"
    stops = []
    for _ in range(12):
        page.keyboard.press("Tab")
        stops.append(page.evaluate(f"{focused}.id || {focused}.parentElement.id"))
    controls = ["layer", "head", "beside", "all", "threshold", "strongest", "find", "svg", "png"]
    assert stops == [*controls, "queries", "keys", "grid"]
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.locator('#grid [aria-pressed="true"]').get_attribute("aria-label") == "Layer 0, head 1"
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowDown")
    check_shown(page, 0, 1, 1)
    assert "“<b>tiger</b>” looks most at" in page.inner_text("#status")


def test_all_words(open_page):
    page = open_page()
    page.click("#all")
    row = page.locator("tbody tr >> nth=0")
    largest = np.unravel_index(np.argmax(WEIGHTS[1, 2]), WEIGHTS[1, 2].shape)
    assert row.locator("th").inner_text() == " → ".join(TOKENS[i] for i in largest)
    assert row.locator("td >> nth=0").inner_text() == " → ".join(map(str, largest))
    assert page.inner_text("caption") == "Layer 1, head 2: the largest weights of all words"
    assert page.get_attribute("#all", "aria-pressed") == "true"
    assert min(lines(page)) > 60
    assert page.inner_text("#status") == "Layer 1, head 2: all words."
    page.click("#queries .word >> nth=0")
    check_shown(page, 1, 2, 0)
    page.keyboard.press("Escape")
    assert page.get_attribute("#all", "aria-pressed") == "true"


def test_a_pointer_changes_every_part_but_what_is_announced(open_page):
    page = open_page()
    announced = page.inner_text("#announced")
    page.hover("#keys .word >> nth=1")
    assert page.inner_text("#status").startswith("Layer 1, head 2: “<b>tiger</b>” is looked at most by ")
    assert page.inner_text("#announced") == announced


def test_stars_have_a_legend(open_page):
    page = open_page()
    stars = {
        row.locator("th").inner_text(): row.locator(".stars").inner_text() for row in page.locator("tbody tr").all()
    }
    assert stars["<b>tiger</b>"] == "★★★★★"
    assert stars["jumped"] == stars["[CLS]"] == "★"
    assert page.inner_text("#stars-note") == "★★★★★ from 0.5, ★★★ from 0.1, ★ from 0.02."


def count_of_lines(page):
    return page.evaluate("linesOf(null).length")


def test_threshold_and_strongest(open_page):
    page = open_page()
    shown = [(WEIGHTS[1, 2] >= least).sum() for least in (0.005, 0.3)]
    assert count_of_lines(page) == shown[0]
    page.locator("#threshold").fill("0.3")
    assert count_of_lines(page) == shown[1] < shown[0]
    page.locator("#threshold").fill("0")
    page.select_option("#strongest", label="1")
    assert count_of_lines(page) == len(TOKENS)


def test_a_token_is_found(open_page):
    page = open_page(choice={"word": 0})
    page.fill("#find", "IT")
    assert page.locator('#queries [aria-pressed="true"]').inner_text().strip() == "it"
    first = page.evaluate("state.chosen.index")
    page.press("#find", "Enter")
    assert [first, page.evaluate("state.chosen.index")] == [3, 4]
    page.fill("#find", "zebra")
    assert page.inner_text("#status") == page.inner_text("#announced") == "No query holds “zebra”."
    assert page.get_attribute("#find", "aria-invalid") == "true"
    assert page.evaluate("state.chosen.index") == 4


def test_marks_of_blanks_are_shown_on_wish(open_page):
    page = open_page(AttentionView(np.eye(3), ["The", "Ġtiger", "▁ran"]), {"word": 1})
    texts = page.locator("#queries .text")
    assert texts.all_text_contents() == ["The", "tiger", "ran"]
    page.check("#marks")
    assert texts.all_text_contents() == ["The", "Ġtiger", "▁ran"]
    assert not open_page().is_visible("#marks")


def test_the_address_holds_the_state(open_page):
    page = open_page()
    page.select_option("#layer", "0")
    page.select_option("#head", label="mean")
    page.click("#keys .word >> nth=2")
    page.locator("#threshold").fill("0.25")
    assert page.inner_text("#threshold-told") == "0.25"
    page.select_option("#strongest", label="3")
    address = page.evaluate("location.hash")
    assert address == "#layer=0&head=mean&key=2&threshold=0.25&strongest=3"
    again = open_page(address=address)
    assert again.evaluate("location.hash") == address
    assert again.inner_text("#status") == page.inner_text("#status")
    assert count_of_lines(again) == count_of_lines(page)


def test_the_address_holds_all_words(open_page):
    page = open_page()
    page.click("#all")
    address = page.evaluate("location.hash")
    assert address == "#layer=1&head=2&query=all"
    assert open_page(address=address).inner_text("#status") == "Layer 1, head 2: all words."


def test_an_address_that_is_pasted_is_followed(open_page):
    page = open_page()
    with page.expect_navigation():
        page.evaluate("location.hash = '#layer=0&head=1&query=2'")
    check_shown(page, 0, 1, 2)


@pytest.mark.parametrize("width", [390, 700, 900, 1000, 1100])
def test_no_column_is_crushed(open_page, width):
    page = open_page(viewport={"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("tbody tr >> nth=0").bounding_box()["height"] < 60


def test_an_address_of_what_there_is_not_is_passed_over(open_page):
    page = open_page(address="#layer=7&head=x&query=-1&threshold=9&strongest=4&other=%3Cb%3E")
    check_shown(page, 1, 2, 3)
    assert page.evaluate("location.hash") == "#layer=1&head=2&query=3"


def test_the_figure_is_saved(open_page):
    page = open_page(AttentionView(WEIGHTS, [*TOKENS[:4], "a&b"]))
    with page.expect_download() as saved:
        page.click("#svg")
    assert saved.value.suggested_filename == "attention.svg"
    svg = saved.value.path().read_text()
    root = xml.etree.ElementTree.fromstring(svg)
    names = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert names[1:] == [*TOKENS[:4], "a&b"] * 2
    assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) == count_of_lines(page)
    with page.expect_download() as saved:
        page.click("#png")
    assert saved.value.path().read_bytes().startswith(b"\x89PNG")


def test_a_wide_grid_says_that_it_scrolls(open_page):
    weights = np.broadcast_to(np.eye(3), (2, 16, 3, 3))
    view = AttentionView(weights, ["a", "b", "c"])
    assert open_page(view, {"word": 0}, viewport={"width": 390, "height": 740}).is_visible("#scrolls")
    assert not open_page().is_visible("#scrolls")


def test_two_heads_beside_each_other(open_page):
    page = open_page()
    assert not page.is_visible("#queries-2")
    page.select_option("#beside", label="Layer 0, head 1")
    assert np.allclose([float(share or 0) for share in shares(page, "keys-2")], WEIGHTS[0, 1, 3], atol=0.0052)
    check_pair(page, (1, 2), (0, 1), 3)
    page.hover("#queries-2 .word >> nth=2")
    check_pair(page, (1, 2), (0, 1), 2)
    assert page.inner_text("#status").count("“jumped” looks most at") == 2
    page.hover("h1")
    page.select_option("#beside", label="none")
    check_shown(page, 1, 2, 3)
    assert not page.is_visible("#queries-2")


def check_pair(page, first, second, query):
    """Titles and table tell of both heads, the largest weight in either first."""
    assert page.locator("figcaption").all_inner_texts() == [f"Layer {a}, head {b}" for a, b in (first, second)]
    rows = page.locator("tbody tr").all()
    both = [[float(cell) for cell in row.locator("td").all_inner_texts()] for row in rows if row.inner_text()[0] != "o"]
    for at, one, other in both:
        assert np.allclose([one, other], [WEIGHTS[(*head, query, int(at))] for head in (first, second)], atol=0.0007)
    largest = [max(shares) for _, *shares in both]
    assert largest == sorted(largest, reverse=True)


@pytest.mark.parametrize("by", ["pointer", "keyboard"])
def test_shift_in_the_grid_shows_a_head_beside_the_first(by, open_page):
    page = open_page()
    head = page.get_by_role("button", name="Layer 0, head 1")
    if by == "pointer":
        head.click(modifiers=["Shift"])
    else:
        head.focus()
        page.keyboard.press("Shift+Enter")
    check_pair(page, (1, 2), (0, 1), 3)
    assert page.locator('#grid [aria-pressed="true"]').count() == 2
    address = page.evaluate("location.hash")
    assert "beside=0.1" in address
    again = open_page(address=address)
    check_pair(again, (1, 2), (0, 1), 3)
    with again.expect_download() as saved:
        again.click("#svg")
    svg = saved.value.path().read_text()
    assert "Layer 1, head 2: " in svg
    assert "Layer 0, head 1: " in svg


def neuron_view(**options):
    """A view of two heads that share their keys."""
    queries, keys = make_rng().standard_normal((2, 2, len(TOKENS), 16))
    _, weights = attention(queries, keys[:1], keys[:1], return_weights=True, **options)
    return AttentionView(weights, TOKENS, queries=queries, keys=keys[:1]), queries, keys[:1]


def steps(page):
    return [float(cell) for cell in page.locator("#steps td").all_inner_texts()]


def test_how_a_weight_comes_about(open_page):
    view, queries, keys = neuron_view()
    page = open_page(view, {"word": 3, "head": 1})
    scores = queries[1, 3] @ keys[0].T / 4
    powers = np.exp(scores - scores.max())
    for key in (2, 4):
        page.select_option("#partner", str(key))
        expected = [4 * scores[key], scores[key], scores[key] - scores.max(), powers[key], powers[key] / powers.sum()]
        assert np.allclose(steps(page), expected, atol=0.06)
    page.click("summary")
    page.locator("#dimensions tr").last.wait_for()
    rows = page.locator("#dimensions tr").all()
    numbers = [[float(cell) for cell in row.locator("td").all_inner_texts()] for row in rows]
    product = queries[1, 3] * keys[0, 4]
    assert np.allclose(numbers, np.transpose([queries[1, 3], keys[0, 4], product]), atol=0.06)
    page.select_option("#partner", "-1")
    assert page.inner_text("#neuron-title").endswith(f"gives “{TOKENS[int(np.argmax(scores))]}”")


def test_how_a_causal_weight_comes_about(open_page):
    view, *_ = neuron_view(causal=True)
    page = open_page(view, {"word": 2, "head": 0})
    assert abs(steps(page)[-1] - view.row(2, 0, 0).max()) < 0.01
    page.select_option("#partner", "3")
    assert "comes after the query" in page.inner_text("#steps")


def test_a_weight_that_another_scale_gave_is_told(open_page):
    view, *_ = neuron_view(scale=2.0)
    page = open_page(view, {"word": 2, "head": 0})
    assert "differs" in page.inner_text("#steps")
    assert abs(steps(page)[-1] - view.row(2, 0, 0).max()) < 0.001


def test_a_mean_has_no_query_and_a_view_without_has_none(open_page):
    page = open_page(neuron_view()[0], {"word": 2, "head": "mean"})
    assert page.is_visible("#neuron-none")
    assert not page.is_visible("#steps")
    assert not open_page().is_visible("#neuron")


def test_how_a_weight_comes_about_follows_the_pointer(open_page):
    page = open_page(neuron_view()[0], {"word": 3, "head": 1})
    title = page.inner_text("#neuron-title")
    page.hover("#queries .word >> nth=2")
    assert "the weight that “jumped” gives" in page.inner_text("#neuron-title")
    # Of a word on the other side it would have no query.
    page.hover("#keys .word >> nth=1")
    assert page.inner_text("#neuron-title") == title
    page.click("#keys .word >> nth=1")
    assert page.inner_text("#neuron-title").endswith("gives “<b>tiger</b>”")
    assert page.inner_text("#partner-side") == "Query"


# --- by keyboard alone, each control ---------------------------------------------------------------


def move_to(page, control):
    """Tab until a control has the focus, as one does who sees none of the page's parts."""
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("id => document.activeElement === document.querySelector(id)", control):
            return
    raise AssertionError(f"Tab does not come to {control}")


CONTROLS = {
    "layer": ("#layer", "ArrowDown", "figures[0].layer", 1),
    "head": ("#head", "ArrowDown", "figures[0].head", 1),
    "beside": ("#beside", "ArrowDown", "figures[1].head", 0),
    "all words": ("#all", "Space", "state.chosen", None),
    "threshold": ("#threshold", "ArrowRight", "state.threshold", 0.01),
    "strongest": ("#strongest", "ArrowDown", "state.strongest", 1),
    "find": ("#find", "n", "state.chosen.index", 2),
    "marks": ("#marks", "Space", "figures[0].buttons.queries[2].firstChild.textContent", "Ġran"),
    "word": ("#queries [tabindex='0']", "ArrowDown", "state.chosen.index", 2),
    "first key": ("#keys .word", "Enter", "[state.chosen.side, state.chosen.index].join()", "keys,0"),
    "key": ("#keys .word", "ArrowDown", "[state.chosen.side, state.chosen.index].join()", "keys,1"),
    "pair": ("#partner", "ArrowDown", "pairOf(state.chosen).join()", "1,0"),
    "dimensions": ("summary", "Enter", "document.querySelector('details').open", True),
    "grid": ("#grid [tabindex='0']", "ArrowDown Enter", "[figures[0].layer, figures[0].head].join()", "1,0"),
    "grid, beside": ("#grid [tabindex='0']", "ArrowRight Shift+Enter", "figures[1].head", 1),
}


def view_with_every_control():
    queries, keys = make_rng().standard_normal((2, 2, 2, 3, 8))
    _, weights = attention(queries, keys, keys, return_weights=True)
    return AttentionView(weights, ["The", "Ġtiger", "Ġran"], queries=queries, keys=keys)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize(("width", "scheme"), [(1100, "light"), (390, "dark")])
def test_each_control_by_keyboard_alone(width, scheme, control, open_page):
    at, keys, what, expected = CONTROLS[control]
    view = view_with_every_control()
    page = open_page(
        view, {"word": 1, "layer": 0, "head": 0}, viewport={"width": width, "height": 740}, color_scheme=scheme
    )
    move_to(page, at)
    for key in keys.split():
        page.keyboard.press(key)
    assert page.evaluate(what) == expected


def test_tab_changes_nothing(open_page):
    page = open_page(view_with_every_control(), {"word": 1, "head": 0, "layer": 1})
    state = "JSON.stringify(state) + location.hash"
    before = page.evaluate(state)
    move_to(page, "#grid [tabindex='0']")
    assert page.evaluate(state) == before


@pytest.mark.parametrize("kind", ["svg", "png"])
@pytest.mark.parametrize("width", [1100, 390])
def test_pictures_are_saved_by_keyboard_alone(width, kind, open_page):
    page = open_page(viewport={"width": width, "height": 740})
    move_to(page, f"#{kind}")
    with page.expect_download() as saved:
        page.keyboard.press("Enter")
    assert saved.value.suggested_filename == f"attention.{kind}"


def test_the_pair_and_its_dimensions_by_keyboard_alone(open_page):
    view, queries, keys = neuron_view()
    page = open_page(view, {"word": 3, "head": 1})
    move_to(page, "#partner")
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    scores = queries[1, 3] @ keys[0].T
    assert abs(steps(page)[0] - scores[2]) < 0.06
    assert page.inner_text("#neuron-title").endswith("gives “jumped”")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.locator("#dimensions tr").last.wait_for()
    products = [float(cell) for cell in page.locator("#dimensions td:last-child").all_inner_texts()]
    assert np.allclose(products, queries[1, 3] * keys[0, 2], atol=0.06)
    page.keyboard.press("Enter")
    assert not page.is_visible("#dimensions")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Home")
    assert page.inner_text("#neuron-title").endswith(f"gives “{TOKENS[int(np.argmax(scores))]}”")


# --- what it looks like ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_causal_view_opens_on_a_row_that_says_something(seed, open_page):
    """The first word sees only itself, and the second not much more."""
    query, key = make_rng(seed).standard_normal((2, 2, 8, 16))
    _, weights = attention(2 * query, key, key, causal=True, return_weights=True)
    page = open_page(AttentionView(weights, list("abcdefgh")), {"head": "certain"})
    rows = table(page)
    chosen = page.evaluate("state.chosen.index")
    assert chosen > 0
    assert rows[0][1] != chosen
    assert rows[0][2] > 0.5


def test_heat_maps_follow_the_weights(open_page):
    weights = np.array([[0, 0, 1], [0, 1, 0], [0.25, 0.75, 0]])
    page = open_page(AttentionView(weights, ["a", "b", "c"]), {"word": "a"})
    reds = page.evaluate("""() => {
        const canvas = document.querySelector("#grid canvas");
        return [...canvas.getContext("2d").getImageData(0, 0, 3, 3).data].filter((_, i) => i % 4 === 0);
    }""")
    # The ramp's three colours stand for 0, a quarter and 1, as the legend says.
    ramp = [0xEE, 0x4A, 0x06]
    assert np.allclose(reds, np.interp(np.sqrt(weights).ravel(), [0, 0.5, 1], ramp), rtol=0, atol=2)


def luminance(colour):
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


# What is left of linear red, green and blue where one kind of cone is missing (Machado, Oliveira and Fernandes, 2009).
CONES = {
    "none missing": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def seen(hexadecimal, cones):
    """A colour's L*a*b*, as somebody sees it."""
    channels = np.array([int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x, y, z = np.cbrt(to_xyz @ np.clip(CONES[cones] @ linear, 0.009, 1) / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("cones", CONES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_are_told_apart_by_colour_blind_eyes(scheme, cones, open_page):
    page = open_page(color_scheme=scheme)
    names = ["--line", "--mark", "--ramp-0", "--ramp-1", "--ramp-2", "--ground"]
    line, mark, *ramp, ground = (seen(page.evaluate("colour", name), cones) for name in names)
    assert np.linalg.norm(line - mark) > 30
    assert min(abs(colour[0] - ground[0]) for colour in (line, mark)) > 30
    steps = np.diff([colour[0] for colour in ramp])  # by lightness alone
    assert np.all(steps < -20) or np.all(steps > 20)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_in_light_and_dark(scheme, open_page):
    page = open_page(color_scheme=scheme)
    ground = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert ground > 0.8 if scheme == "light" else ground < 0.1
    # A colour that is changing is not yet the one that is meant.
    page.evaluate("Promise.all(document.getAnimations().map(animation => animation.finished))")
    for part in ("h1", ".lead", "#status", "caption", "th", ".word.faded", ".word.shown .text", ".note", ".grid span"):
        text = luminance(page.evaluate("part => getComputedStyle(document.querySelector(part)).color", part))
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 4.5, part


def test_a_phone_scrolls_only_the_grid_sideways(open_page):
    tokens = [*LOUD, "Donaudampfschifffahrtsgesellschaft" * 3, "a"]
    weights = np.broadcast_to(np.eye(5), (2, 12, 5, 5))
    page = open_page(AttentionView(weights, tokens), {"word": 3}, viewport={"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.evaluate("(s => s.scrollWidth > s.clientWidth)(document.querySelector('.scroll'))")
    boxes = [box.bounding_box() for box in page.locator("#queries .word, #keys .word").all()]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 360 for box in boxes)


def test_tokens_do_not_run(open_page):
    page = open_page(AttentionView(np.eye(3), LOUD), {"word": 1, "title": LOUD[0]})
    assert page.title() == LOUD[0]
    assert page.locator("#queries .text").all_text_contents() == LOUD
    assert page.locator("img, svg").count() == 0
    assert page.locator("script").count() == 2
    assert table(page) == [(LOUD[1], 1, 1.0)]


def test_other_keys_of_a_sparse_view(open_page):
    view = AttentionView.from_top_keys([[0], [-1]], [[0.75], [0.0]], ["a", "b"])
    page = open_page(view, {"word": "a"})
    assert table(page) == [("a", 0, 0.75), ("other words", None, 0.25)]
    page.click("#queries .word >> nth=1")
    assert table(page) == []
    assert page.inner_text("#status") == "Head 0: “b” looks at nothing."


def test_cross_attention(open_page):
    view = AttentionView(np.array([[0.25, 0.5, 0.25]]), ["one"], key_tokens=["un", "deux", "trois"])
    page = open_page(view, {"word": 0})
    assert shares(page) == ["0.25", "0.50", "0.25"]
    assert not page.is_visible("#layer")


def test_notebook_frame(open_page):
    notebook = open_page().context.new_page()
    notebook.set_content(AttentionView(WEIGHTS, TOKENS)._repr_html_())
    frame = notebook.frame_locator("iframe")
    frame.locator("tbody tr >> nth=0").wait_for(timeout=1e3 * HANG_SECONDS)
    assert frame.locator("#queries .text").all_text_contents() == TOKENS


def test_dark_mode_is_followed_while_the_page_is_open(open_page):
    page = open_page(color_scheme="light")
    first = "document.querySelector('#grid canvas').getContext('2d').getImageData(0, 0, 1, 1).data.join()"
    before = page.evaluate(first)
    page.emulate_media(color_scheme="dark")
    # Queries of media are told of a change when the next frame is drawn.
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert page.evaluate(first) != before


LONG = 65_536


def long_view():
    """Two heads of a long text, whose words give their shares to the one before, and to one far before."""
    at = np.arange(LONG)
    indices = np.stack([np.maximum(at - 1, 0), np.maximum(at - 20_000, -1)], axis=-1)
    indices[0, 1] = -1
    weights = np.where(indices < 0, 0, [0.5, 0.25])
    weights[indices[:, 1] == -1] = [1, 0]
    queries, keys = make_rng().standard_normal((2, 2, LONG, 4), np.float32)
    both = [np.broadcast_to(each, (2, LONG, 2)) for each in (indices, weights)]
    tokens = [f"Ġword{i % 1000}" for i in range(LONG)]
    return AttentionView.from_top_keys(*both, tokens, queries=queries, keys=keys), queries, keys


def test_a_part_of_a_long_text(open_page):
    page = open_page(long_view()[0], {"word": 40_000, "head": 1})
    assert page.inner_text("#part").startswith(
        "This page holds a part of the text: 64 of 65536 queries, at positions 39984 to 40047, and 128 of 65536 keys"
    )
    assert (
        page.inner_text("#status") == "Head 1: “word0” (position 40000) looks most at “word999” (position 39999), 0.50."
    )
    assert table(page) == [("word999", 39_999, 0.5), ("word0", 20_000, 0.25), ("other words", None, 0.25)]
    assert page.locator("#queries .at").all_inner_texts() == [str(at) for at in range(39_984, 40_048)]
    assert page.inner_text('#keys .word:has-text("word999") .at >> nth=0') == "19999"
    page.fill("#find", "word7")
    assert "“word7” (position 40007)" in page.inner_text("#status")
    page.fill("#find", "word500")
    assert page.inner_text("#status") == "No query of this part holds “word500”."
    page.click("#all")
    assert page.locator("tbody tr >> nth=0").locator("td >> nth=0").inner_text() == "39984 → 39983"


def test_the_address_of_a_part_holds_positions_in_the_text(open_page):
    view = long_view()[0]
    page = open_page(view, {"word": 40_000, "head": 1})
    page.click("#keys .word >> nth=2")
    address = page.evaluate("location.hash")
    assert address == "#layer=0&head=1&key=19986"
    assert "which words of this part look at “word986” (position 19986)" in page.inner_text("caption")
    again = open_page(view, {"word": 40_000, "head": 0}, address=address)
    assert again.evaluate("location.hash") == address
    # A position that is not in the part is passed over.
    other = open_page(view, {"word": 40_000, "head": 0}, address="#query=3")
    assert other.evaluate("location.hash") == "#layer=0&head=0&query=40000"


def test_a_part_does_not_call_a_key_the_strongest_where_another_may_be(open_page):
    weights = np.full((2000, 2000), 1 / 2000)
    weights[7] = 0
    page = open_page(AttentionView(weights, ["a"] * 2000), {"word": 1})
    assert page.inner_text("#status").endswith("0.00, of the keys on this page.")
    page.click("#keys .word >> nth=0")
    assert page.inner_text("#status").endswith("0.00, of the queries on this page.")
    page.click("#queries .word >> nth=7")
    assert page.inner_text("#status") == "Head 0: “a” (position 7) looks at nothing."


def test_how_a_weight_of_a_part_comes_about(open_page):
    view, queries, keys = long_view()
    page = open_page(view, {"word": 40_000, "head": 1})
    product = float(queries[1, 40_000] @ keys[1, 39_999])
    assert np.allclose(steps(page), [product, product / 2, 0.5], atol=0.06)
    assert "the scores of all keys, of which this page holds a part" in page.inner_text("#steps")
    page.select_option("#partner", label="word990 (19990)")
    assert page.inner_text("#steps td >> nth=-1") == "next to nothing, or not at all"
    product = float(queries[1, 40_000] @ keys[1, 19_990])
    assert abs(float(page.inner_text("#steps td >> nth=0")) - product) < 0.06


def test_a_part_that_has_every_key_tells_all_steps(open_page):
    queries, keys = make_rng().standard_normal((2000, 8)), make_rng(1).standard_normal((3, 8))
    _, weights = attention(queries, keys, keys, return_weights=True)
    view = AttentionView(weights, ["a"] * 2000, key_tokens=["b", "c", "d"], queries=queries, keys=keys)
    page = open_page(view, {"word": 1500})
    assert abs(steps(page)[-1] - view.row(1500).max()) < 0.01
    assert len(steps(page)) == 5


def test_a_small_view_of_the_top_keys_tells_all_steps(open_page):
    queries, keys = make_rng().standard_normal((2, 5, 8))
    _, weights = attention(queries, keys, keys, return_weights=True)
    order = np.argsort(-weights, axis=-1)[:, :2]
    listed = np.take_along_axis(weights, order, axis=-1)
    page = open_page(AttentionView.from_top_keys(order, listed, TOKENS, queries=queries, keys=keys), {"word": 2})
    for key in range(5):
        page.select_option("#partner", str(key))
        assert abs(steps(page)[-1] - weights[2, key]) < 0.01
        assert "differs" not in page.inner_text("#steps")
