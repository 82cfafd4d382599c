"""Reading a recipe: TOML, overrides, defaults for every stage, and errors of one line."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from upslope.config.presets import PRESETS
from upslope.config.recipe import STAGES, Recipe
from upslope.config.rl import RL
from upslope.config.tables import Limits
from upslope.errors import RecipeError


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a TOML file, a shipped recipe's name or a mapping, with `key.sub=value` overrides.

    Raises RecipeError, in one line: the key, the value seen, and what to change.
    """
    raw = read_recipe(source)
    try:
        raw = json.loads(json.dumps(raw))  # a copy down to the leaves: the caller's tables stay as they are
    except TypeError as error:
        raise RecipeError(f"recipe: {error}", "use numbers, strings, lists and tables; paths as strings") from None
    raw = _with_chosen_algorithm(raw, overrides)
    for override in overrides:
        if not _is_of_an_algorithm(override):
            _apply(raw, override)
    _refuse_idle(raw, overrides)
    defaults = raw.get("optim", {})
    for stage in STAGES:
        table = raw.get(stage)
        if isinstance(table, dict) and isinstance(defaults, dict) and isinstance(table.get("optim", {}), dict):
            table["optim"] = {**defaults, **table.get("optim", {})}
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(*_explain(error)) from None


def _with_chosen_algorithm(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """[rl] with the chosen algorithm's own table, [rl.NAME], over it; overrides say which, and stand above both."""
    said = json.loads(json.dumps(raw))
    for override in overrides:
        _apply(said, override)
    rl = said.get("rl")
    if not isinstance(rl, dict) or not isinstance(raw.get("rl", {}), dict):
        return raw
    own = {name: rl[name] for name in PRESETS if isinstance(rl.get(name), dict)}
    for name, table in own.items():
        strange = next((key for key in table if key not in RL.model_fields or key == "algorithm"), None)
        if strange is not None:
            near = difflib.get_close_matches(strange, RL.model_fields, 1)
            raise RecipeError(
                f"recipe: unknown key 'rl.{name}.{strange}'", f"did you mean {near[0]!r}?" if near else "see [rl]"
            )
    written = {key: value for key, value in raw.get("rl", {}).items() if key not in own}
    return {**raw, "rl": _over(written, own.get(str(rl.get("algorithm", "ppo")), {}))}


def _refuse_idle(raw: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """Raise RecipeError for an override of [optim] that every stage has its own value above."""
    for override in overrides:
        table, _, name = override.partition("=")[0].strip().partition(".")
        stages = [stage for stage in STAGES if isinstance(raw.get(stage), dict)]
        own = [stage for stage in stages if isinstance(raw[stage].get("optim"), dict) and name in raw[stage]["optim"]]
        if table == "optim" and name != "micro_tokens" and stages and own == stages:  # scoring goes by micro_tokens too
            first = "rl" if "rl" in own else own[-1]
            raise RecipeError(
                f"override {override!r} changes nothing: each stage has its own {name}", f"write {first}.optim.{name}"
            )


def _over(table: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """One table over another, tables inside them key by key."""
    merged = dict(table)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "reward"
        merged[key] = _over(merged[key], value) if both else value
    return merged


def _is_of_an_algorithm(override: str) -> bool:
    """Whether an override is of a table [rl.NAME], which has been taken in already."""
    parts = override.partition("=")[0].strip().split(".")
    return len(parts) > 2 and parts[0] == "rl" and parts[1] in PRESETS


def read_recipe(source: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a recipe as they are written, unchecked."""
    return dict(source) if isinstance(source, Mapping) else _read_toml(find_recipe(source))


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))}


def find_recipe(source: str | Path) -> Path:
    """A recipe's file: a path as it stands, or the name (or recipes/NAME.toml) of a shipped one."""
    path = Path(source)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if path.stem in shipped and (path.parent == Path() or path.parent.name == "recipes"):
        return shipped[path.stem]
    if path.is_dir():
        raise RecipeError(f"recipe {str(path)!r} is a folder", "name a .toml file")
    near = difflib.get_close_matches(path.stem, shipped, 1) or list(shipped)
    raise RecipeError(
        f"no recipe {str(source)!r}", f"write a file of that name or use a shipped one: {', '.join(near)}"
    )


def describe(recipe: Recipe) -> list[str]:
    """The batch arithmetic of each stage, one line each, as printed before anything is loaded."""
    lines = []
    for name in ("pretrain", "sft"):
        stage = getattr(recipe, name)
        if stage:
            lines.append(f"{name}: {stage.steps} steps x {stage.batch} examples = {stage.steps * stage.batch} examples")
    for name in ("reward", "preference"):
        stage = getattr(recipe, name)
        if stage:
            lines.append(f"{name}: {stage.steps} steps x {stage.batch} pairs = {stage.steps * stage.batch} pairs")
    if recipe.idle_reward:
        lines.append("reward: nothing is paid or judged by it; reward = none leaves this stage out")
    if recipe.rl:
        rl = recipe.rl
        each, parts = rl.episodes // rl.minibatches, rl.epochs * rl.minibatches
        lines.append(
            f"rl, {rl.algorithm}: {rl.steps} rollouts x {rl.prompts} prompts x {rl.samples} samples = "
            f"{rl.steps * rl.episodes} episodes of up to {rl.max_tokens} tokens; {rl.epochs} epochs x {rl.minibatches} "
            f"minibatches of {each} episodes = {rl.steps * parts} optimizer steps"
        )
    if recipe.expert:
        e = recipe.expert
        lines.append(
            f"expert: {e.prompts} prompts x {e.samples} samples, the best {e.keep} of each kept; "
            f"{e.steps} steps x {e.batch} examples = {e.steps * e.batch} examples"
        )
    return lines


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path} is not TOML: {error}", "mend that line") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text: byte {error.start}", "save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", "check the path and its permissions") from None


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        what = "value" if key.strip() else "key"
        raise RecipeError(f"override {override!r} has no {what}", "write key.sub=value, as in -s rl.lam=0.9")
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text.strip()  # a bare word is a string: -s model=my/folder
    *tables, leaf = key.strip().split(".")
    place = raw
    for depth, name in enumerate(tables, 1):
        above, place = place, place.setdefault(name, {})
        if not isinstance(place, dict):
            inner = f"{'.'.join([*tables[depth:], leaf])} = {json.dumps(value)}"
            raise RecipeError(
                f"override {override!r}: {name} is {above[name]!r}, not a table",
                f"shorten the key, or write -s '{'.'.join(tables[:depth])}={{ {inner} }}' for a table in its place",
            )
    place[leaf] = value


def _explain(error: ValidationError) -> tuple[str, str]:
    """The first problem of a recipe as (what, remedy), with the nearest name for an unknown key."""
    problems = error.errors()
    first = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    where = _where(first)
    # of a value that may be of several types, what is wrong inside it says more than that it is not of the first one
    first = max((p for p in problems if _where(p).startswith(where)), key=lambda p: len(_where(p).split(".")))
    places = {_where(p) for p in problems if not _where(p).startswith(where)}
    where, others = _where(first), f" (and {len(places)} more)" if places else ""
    if first["type"] == "extra_forbidden":
        table, key = first["loc"][:-1], str(first["loc"][-1])
        names = _fields_at(table)
        above = [str(part) for part in table if not _is_union_tag(part)]
        close = [".".join([*above, name]) for name in difflib.get_close_matches(key, names, 1)]
        inside = [f"{name}.{key}" for name in names if not table and key in _fields_at((name,))]
        near = [f"limits.{key}"] if key in Limits.model_fields else inside or close
        remedy = f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(names)}"
        return f"recipe: unknown key {where!r}{others}", remedy
    if first["type"] == "missing":
        return f"recipe: {where!r} is missing{others}", "add it to the recipe or with -s"
    if first["type"] == "value_error":
        what, colon, remedy = str(first["ctx"]["error"]).partition(": ")
        return f"recipe: {where}: {what}{others}" if where else f"recipe: {what}{others}", remedy if colon else ""
    seen = first["input"]
    return f"recipe: {where} = {seen!r}{others}", PLAIN.get(first["type"], first["msg"][0].lower() + first["msg"][1:])


PLAIN = {  # what pydantic says in words of Python
    "tuple_type": 'write a list, as in ["a", "b"]',
    "list_type": 'write a list, as in ["a", "b"]',
    "model_type": "write a table, as in {key = 1}",
    "dict_type": "write a table, as in {key = 1}",
}


def _where(problem: Any) -> str:
    """The dotted key that a problem is of."""
    return ".".join(str(part) for part in problem["loc"] if not _is_union_tag(part))


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and (part in {"str", "int", "table"} or "[" in part or "constrained" in part)


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    model: Any = Recipe
    for part in (p for p in location if not _is_union_tag(p)):
        annotation = model.model_fields[str(part)].annotation
        options = [annotation, *(getattr(o, "__origin__", o) for o in getattr(annotation, "__args__", ()))]
        model = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if model is None:
            return []  # no table
    return list(model.model_fields)
