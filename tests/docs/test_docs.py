"""The chapter and the table of algorithms: examples run, links resolve, both languages agree, pictures are as drawn."""

import doctest
import importlib.util
import json
import re
from collections import Counter
from html import unescape
from pathlib import Path

import pytest

from tests.learning.tasks import VARIANTS
from upslope.config import RL
from upslope.config.presets import PRESETS

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ENGLISH = [page for page in PAGES if not page.name.endswith(".zh.md")]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.M | re.S)
WORDS = {
    "en": {"critic": "critic", "reference": "reference", "teacher": "teacher", "groups": "groups", ", ": ", "},
    "zh": {"critic": "评论家", "reference": "参考模型", "teacher": "教师", "groups": "组", ", ": "、"},
}

spec = importlib.util.spec_from_file_location("docs_pictures", DOCS / "pictures.py")
assert spec is not None and spec.loader is not None
pictures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pictures)


def chinese(page):
    return page.with_name(f"{page.stem}.zh.md")


def prose(text):
    """Without code blocks and the targets of links."""
    return re.sub(r"\]\([^)]*\)", "]", BLOCK.sub("", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_examples_print_what_the_page_shows(page):
    text, names, seen = page.read_text(), {}, []
    runner = doctest.DocTestRunner(verbose=False)
    for block in BLOCK.finditer(text):
        line = text[: block.start()].count("\n") + 1
        test = doctest.DocTestParser().get_doctest(block[1], {}, page.name, page.name, line)
        test.globs = names  # a page is one session
        runner.run(test, out=seen.append, clear_globs=False)
    assert not seen, "".join(seen)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "README.zh.md"], ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert path.is_relative_to(ROOT)
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
            assert anchor in [re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings], target


def test_every_page_is_there_in_both_languages():
    assert {chinese(page) for page in ENGLISH} | set(ENGLISH) == set(PAGES)
    for name in ("README.md", "README.zh.md"):
        assert "docs/policy-gradient" in (ROOT / name).read_text()


@pytest.mark.parametrize("page", ENGLISH, ids=lambda p: p.name)
def test_both_languages_have_the_same_code_equations_pictures_and_numbers(page):
    here, there = page.read_text(), chinese(page).read_text()
    assert BLOCK.findall(here) == BLOCK.findall(there)
    for pattern in (r"^\$\$.*$", r"\$[^$\n]+\$", r"\((pictures/[^)]+)\)", r"\((\.\./upslope[^)]+)\)"):
        assert Counter(re.findall(pattern, here, re.M)) == Counter(re.findall(pattern, there, re.M))
    sections, other = (re.split(r"^## ", prose(text), flags=re.M) for text in (here, there))
    for one, two in zip(sections, other, strict=True):
        numbers, others = (Counter(re.findall(r"\d+(?:\.\d+)?", part)) for part in (one, two))
        assert numbers == others, one.splitlines()[0]


@pytest.mark.parametrize("page", ENGLISH, ids=lambda p: p.name)
def test_equations_keep_to_what_renders(page):
    for equation in re.findall(r"\$\$?([^$\n]+)\$\$?", page.read_text()):
        assert equation.count("{") == equation.count("}")
        assert equation.count("\\left") == equation.count("\\right")
        assert "|" not in equation and "}_" not in equation, "a table or emphasis would cut it"


def test_pictures_are_those_that_the_script_draws():
    assert sorted(p.stem for p in (DOCS / "pictures").iterdir()) == sorted(pictures.PICTURES)
    shown = "".join(page.read_text() for page in ENGLISH)
    for name, (numbers, _, _) in pictures.PICTURES.items():
        assert f"(pictures/{name}.svg)" in shown
        svg = (DOCS / "pictures" / f"{name}.svg").read_text()
        drawn = json.loads(unescape(re.search(r"<dc:description>(.*?)</dc:description>", svg, re.S)[1]))
        found = numbers()
        assert drawn.keys() == found.keys()
        for key, values in found.items():
            assert drawn[key] == pytest.approx(values, rel=1e-3, abs=1e-4), f"{name} {key}: make pictures"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_drawn_the_same_twice_and_small(name, tmp_path):
    for n in "12":
        pictures.draw(name, tmp_path / f"{n}.svg")
    assert (tmp_path / "1.svg").read_bytes() == (tmp_path / "2.svg").read_bytes()
    assert (tmp_path / "1.svg").stat().st_size < 64_000


def test_baselines_keep_the_mean_and_the_mean_of_the_others_is_the_groups_stretched():
    found = pictures.baseline_numbers(group=4)
    assert found["length"] == pytest.approx([1, 3 / 4, 1, 1])
    none, mean, others, critic = found["variance"]
    assert others == pytest.approx(mean * (4 / 3) ** 2)
    # by hand: E |(r - b)(e_a - p)|^2 - |grad|^2 over 4 samples, |e_a - p|^2 = 1 - 2 p_a + 0.38
    rows = [(0.5, 2.0, 0.38), (0.3, 1.0, 0.78), (0.2, 4.0, 0.98)]
    for b, variance in ((0.0, none), (2.1, critic)):
        gradient = [p * (r - 2.1) for p, r, _ in rows]
        by_hand = (sum(p * (r - b) ** 2 * d for p, r, d in rows) - sum(g * g for g in gradient)) / 4
        assert variance == pytest.approx(by_hand)


def test_lambda_trades_bias_for_variance():
    found = pictures.gae_numbers()
    # values of the two states differ by the sum of 0.6^k over the 9 steps left, and the critic says half
    assert found["bias"][0] == pytest.approx(0.5 * sum(0.6**k for k in range(1, 10)), abs=1e-5)
    assert found["bias"][-1] == pytest.approx(0, abs=1e-5) and found["deviation"][0] == pytest.approx(0, abs=1e-5)
    assert found["bias"] == sorted(found["bias"], reverse=True) and found["deviation"] == sorted(found["deviation"])

    def best(**options):
        numbers = pictures.gae_numbers(**options)
        return numbers["lambda"][numbers["error"].index(min(numbers["error"]))]

    assert best(critic=0.8) < best() < best(episodes=64)


def test_estimators_against_the_exact_kl():
    found = pictures.kl_numbers()
    for kind in ("k1", "k3"):
        assert found[f"{kind} mean"] == pytest.approx(found["exact mean"])
    assert found["k1 gradient"] == pytest.approx([0.0] * 49, abs=1e-9)
    assert found["k2 gradient"] == pytest.approx(found["exact gradient"])
    assert found["k3 gradient"] == pytest.approx([p - 0.25 for p in found["p"]])


def test_the_clip_and_the_weights_by_hand():
    clip = pictures.clip_numbers()
    assert max(clip["good clipped"]) == pytest.approx(1.2) and max(clip["bad clipped"]) == pytest.approx(-0.8)
    assert min(clip["bad clipped"]) == pytest.approx(-4.0) and min(clip["bad dual"]) == pytest.approx(-3.0)
    weights = pictures.weight_numbers()
    sums = {kind: (sum(w[:4]), sum(w[4:])) for kind, w in weights.items()}
    assert sums["token"] == pytest.approx((1 / 4, 3 / 4)) and sums["sequence"] == pytest.approx((1 / 2, 1 / 2))
    assert sums["constant"] == pytest.approx((1 / 8, 3 / 8))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_table_of_algorithms_is_the_presets(language):
    page = DOCS / ("algorithms.md" if language == "en" else "algorithms.zh.md")
    text = page.read_text()
    keys = re.search(r"<!-- keys -->\n(.*?)<!-- /keys -->", text, re.S)[1]
    rows = {row[0]: row[1:] for row in table(keys)}
    assert list(rows) == list(PRESETS)
    for name, preset in PRESETS.items():
        found = dict(span.split(" = ") for span in re.findall(r"`([^`]* = [^`]*)`", rows[name][0]))
        assert found == {key: written(value) for key, value in flat(preset)}, name
        assert rows[name][1] == needs(name, WORDS[language]), name
    between = text.split("<!-- /keys -->")[1].split("<!-- learning table -->")[0]
    losses = [row[0] for row in table(between)]
    assert losses == list(PRESETS)
    assert re.findall(r"^- \*\*(.+?)\*\*[:：]", text, re.M) == list(PRESETS)
    source = (ROOT / "upslope" / "config" / "presets.py").read_text()
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})", source)) <= set(re.findall(r"abs/(\d{4}\.\d{5})", text))
    learned = re.search(r"<!-- learning table -->\n(.*?)<!-- /learning table -->", text, re.S)[1]
    assert [row[0] for row in table(learned)] == list(VARIANTS)


def table(text):
    """The cells of a table's rows, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]


def flat(preset):
    for key, value in preset.items():
        if isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items())
        else:
            yield key, value


def written(value):
    if value is None:
        return "none"
    return value if isinstance(value, str) else f"{value:g}"


def needs(name, words):
    teacher = name == "gkd"
    rl = RL.model_validate({"algorithm": name} | ({"teacher": "given"} if teacher else {"reward": "file.py:score"}))
    wanted = {
        "critic": rl.uses_critic,
        "teacher": teacher,
        "reference": rl.uses_reference and not teacher,
        "groups": rl.samples > 1,
    }
    return words[", "].join(words[word] for word, on in wanted.items() if on)
