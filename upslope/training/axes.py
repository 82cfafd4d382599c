"""What a sweep goes over: `key=v1,v2` and `key=low..high` read, and the combinations with their recipes and names."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upslope.config import Recipe, load_recipe
from upslope.errors import RecipeError
from upslope.observe.runs import short_names

NUMBER = r"[-+]?(?:\d+\.\d*|\d+|\.\d+)(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(?P<log>log:)?(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})")
HELP = "write key=v1,v2,..., as in rl.lam=0.9,0.95,1.0"
LONGEST = 40  # characters of a value in a folder's name


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both within; log: even on a logarithmic scale; whole: integers."""

    low: float
    high: float
    log: bool
    whole: bool

    def text(self, value: float) -> str:
        """A value as it is set: whole, or to four digits and within the range."""
        return str(int(value)) if self.whole else repr(min(max(float(f"{value:.4g}"), self.low), self.high))


@dataclass(frozen=True)
class Axis:
    """A recipe key with its values, each as TOML text, or the range that a search may take them from."""

    key: str
    texts: tuple[str, ...]
    range: Range | None = None


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: the name of its folder, its recipe, and the texts that were set."""

    name: str
    recipe: Recipe
    setting: dict[str, str]


def parse_axis(text: str) -> Axis:
    """`rl.lam=0.9,0.95`, `rl.stop=["a,b"],["c"]`, `optim.lr=log:1e-6..1e-4`. Raises RecipeError."""
    key, equals, listed = (part.strip() for part in text.partition("="))
    if not equals or not key or not listed:
        raise RecipeError(f"sweep key {text!r} has no values", HELP)
    if key == "seed":
        raise RecipeError("the seed is no key of a sweep", "use --seeds 3, counted from the recipe's own (-s seed=7)")
    span = RANGE.fullmatch(listed)
    if span:
        whole = not re.search(r"[.eE]", span["low"] + span["high"])
        low, high = float(span["low"]), float(span["high"])
        if not low < high or (span["log"] and low <= 0):
            raise RecipeError(f"sweep range {text!r} is empty", "write low..high, above 0 where it is log:")
        return Axis(key, (span["low"], span["high"]), Range(low, high, bool(span["log"]), whole))
    texts = [part.strip() for part in split_values(listed)]
    if not all(texts):
        raise RecipeError(f"sweep key {text!r} has an empty value", HELP)
    twice = next((t for n, t in enumerate(texts) if t in texts[:n]), None)
    if twice is not None:
        raise RecipeError(f"sweep key {text!r} lists {twice} twice", "list each value once; --seeds repeats runs")
    return Axis(key, tuple(texts))


def axis_of(key: str, values: Any) -> Axis:
    """An axis from Python: a sequence of values, or a range as text. Raises RecipeError."""
    if isinstance(values, str):
        return parse_axis(f"{key}={values}")
    texts = [as_toml(value) for value in values]
    if not texts:
        raise RecipeError(f"sweep key {key!r} has no values", 'give a list, as in {"rl.lam": [0.9, 0.95]}')
    return parse_axis(f"{key}={texts[0]}") if len(texts) == 1 else Axis(parse_axis(f"{key}=0").key, tuple(texts))


def split_values(text: str) -> list[str]:
    """Text cut at its commas, but not at those inside brackets or quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for n, letter in enumerate(text):
        if quote:
            escaped = quote == '"' and text[n - 1] == "\\" and text[n - 2] != "\\"
            quote = "" if letter == quote and not escaped else quote
        elif letter in "\"'":
            quote = letter
        elif letter in "[{(":
            depth += 1
        elif letter in "]})":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:n])
            start = n + 1
    return [*parts, text[start:]]


def combinations(axes: Sequence[Axis]) -> list[dict[str, str]]:
    """Every combination of the listed values, the last key fastest."""
    return [
        dict(zip((a.key for a in axes), texts, strict=True)) for texts in itertools.product(*(a.texts for a in axes))
    ]


def plan(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str],
    settings: Sequence[Mapping[str, str]],
    seeds: int,
) -> list[Planned]:
    """The runs of some combinations, each with every seed; all combinations have their first seed before any second.

    Every recipe is read here: a wrong key or value raises RecipeError before anything runs.
    """
    first = load_recipe(source, [*overrides, *_sets(settings[0])]).seed
    planned = []
    for seed in range(first, first + seeds):
        for setting in settings:
            recipe = load_recipe(source, [*overrides, *_sets(setting), f"seed={seed}"])
            planned.append(Planned(run_name(recipe, list(setting)), recipe, dict(setting)))
    names = [one.name for one in planned]
    same = next((name for n, name in enumerate(names) if name in names[:n]), None)
    if same is not None:
        raise RecipeError(f"two values of the sweep mean the same: {same}", "list each value once")
    return planned


def run_name(recipe: Recipe, keys: Sequence[str]) -> str:
    """The folder of a run, as a person reads it: lam=0.9,seed=2."""
    table = recipe.model_dump(mode="json")
    short = short_names([*keys, "seed"])
    return ",".join(f"{short[key]}={_slug(_at(table, key))}" for key in (*keys, "seed"))


def as_toml(value: Any) -> str:
    """A value as TOML text. Raises RecipeError where TOML has none."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {as_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, bool | int | float):
        return str(value).lower()
    if isinstance(value, str | Path):
        return json.dumps(str(value))
    raise RecipeError(f"sweep value {value!r} cannot be written in a recipe", "use numbers, strings, lists and tables")


def _sets(setting: Mapping[str, str]) -> list[str]:
    return [f"{key}={text}" for key, text in setting.items()]


def _at(table: Any, key: str) -> Any:
    """The value under a dotted key, whose last parts may be one key with dots in it."""
    parts = key.split(".")
    for n, part in enumerate(parts):
        rest = ".".join(parts[n:])
        if isinstance(table, dict) and rest in table:
            return table[rest]
        table = table.get(part) if isinstance(table, dict) else None
    return table


def _slug(value: Any) -> str:
    """A value as a part of a folder's name; one that had to be changed ends with a few letters of its hash."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    plain = re.sub(r"[^\w.+\-:\[\]]+", "_", text)[-LONGEST:].strip("_")
    if plain == text:
        return plain
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
