"""What a run begins with: its rows, and the recipe's model, which a table [model] makes anew in RUN/start/model.

    tokenizer: byte-level BPE (Sennrich et al. 2016, arXiv 1508.07909) of the training side's texts, nothing else's
    weights:   from the recipe's seed alone

Everything later treats that folder as the recipe's model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from upslope.checkpoint import atomic_write_text
from upslope.config import Data, Recipe, Scratch
from upslope.errors import ModelError, RunError
from upslope.models.open import KINDS, Outline, new_model, outline
from upslope.observe.runs import read_json
from upslope.sources import resolve
from upslope.text.labels import LabelTokenizer, labels_of
from upslope.text.passages import PassageTokenizer, most_passages
from upslope.text.prepare import is_chat
from upslope.text.tokenizer import Tokenizer, train_tokenizer
from upslope.training.data import Book, Splits, load_splits
from upslope.training.export import write_model, writing
from upslope.training.run import Run, has_progress

PRINTED = 64  # rows of a side


def begin(run: Run, recipe: Recipe, models: Path, rows: Any = None) -> tuple[str, Tokenizer, Splits]:
    """The source of the recipe's model, its tokenizer, and the rows by side.

    models: the run's folder, below which a model from scratch is written unless it stands there; rows: stand in for
    data.rows. Raises UpslopeError, RunError where the run in that folder was begun with other rows.
    """
    if isinstance(recipe.model, str):
        source = resolve(recipe.model)
        model = outline(source)
        check_kind(recipe, model)
        tokenizer = Tokenizer.load(source, for_sources=model.needs_source)  # a wrong name is told first
        splits = load_splits(run, recipe.data, recipe.seed, rows)
        require_same_rows(models, splits, given=rows is not None)
        return recipe.model, labelled(run, tokenizer, splits, recipe.data, model), splits
    model = outline(recipe.model)
    check_kind(recipe, model)
    splits = load_splits(run, recipe.data, recipe.seed, rows)
    require_same_rows(models, splits, given=rows is not None)
    folder = models / "start" / "model"
    if not folder.is_dir():
        write_start(folder, recipe.model, recipe.seed, splits["train"], recipe.data)
    tokenizer = Tokenizer.load(folder, for_sources=model.needs_source)
    run.account(f"model: a new {recipe.model.kind}; {tokenizer.vocab_size} tokens, made from the training side alone")
    return str(folder), labelled(run, tokenizer, splits, recipe.data, model), splits


def require_same_rows(folder: Path, splits: Splits, *, given: bool) -> None:
    """The rows are those that the run in a folder was begun with, as far as their number and a sample tell.

    Raises RunError: a run that goes on with others, or is evaluated on them, is not the run that it says it is.
    """
    path, drawn = folder / "rows.json", hashlib.sha256()
    for rows in splits.values():  # each in an order of its own: the first ones are a sample
        for row in rows.select(range(min(len(rows), PRINTED))):
            drawn.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    now = {**{side: len(rows) for side, rows in splits.items()}, "print": drawn.hexdigest()[:16]}
    if not path.is_file() or not has_progress(folder):
        atomic_write_text(path, json.dumps({**now, "given": given}, indent=1))
        return
    then = read_json(path)
    if any(then[key] != value for key, value in now.items()):
        counts = ["/".join(str(found[side]) for side in splits) for found in (then, now)]
        what = f"{counts[0]} then, {counts[1]} now ({', '.join(splits)})"
        if counts[0] == counts[1]:
            what = f"{counts[0]} ({', '.join(splits)}) then as now, of another content"
        if then["given"] and not given:
            remedy = "its rows were given from Python: give them to upslope.train or upslope.reevaluate again"
        else:
            remedy = "bring those back, or choose another folder with -o"
        raise RunError(f"{folder} was begun with other rows: {what}", remedy)


def check_kind(recipe: Recipe, model: Outline) -> None:
    """The model is of the kind that the recipe is for: an encoder chooses labels and writes no text, no other chooses.

    Raises ModelError.
    """
    if recipe.kind and KINDS[model.kind].words != KINDS[recipe.kind].words:
        raise ModelError(
            f"the model is {KINDS[model.kind].words}, and the recipe {recipe.name} is for {KINDS[recipe.kind].words}",
            "name a model of that kind, or set kind = none to train this one all the same",
        )
    encoder = model.kind == "encoder"
    asked = [stage for stage in recipe.stages if stage in ("sft", "preference", "rl", "expert")]
    key = "data.classes" if recipe.data.classes else "data.passages" if recipe.data.passages else None
    if encoder and asked and key is None:
        raise ModelError(
            f"the model is an encoder, which writes no text, and [{asked[0]}] asks it to",
            "set data.classes to a column of labels or data.passages to one of lists, or choose a model that writes",
        )
    if key and not encoder:
        raise ModelError(f"{key} is set, and the model is no encoder", "remove it, or choose an encoder")


def labelled(run: Book, tokenizer: Tokenizer, splits: Splits, data: Data, model: Outline) -> Tokenizer:
    """The tokenizer, which writes labels where the data has classes (those of the training side, and no other), or the
    numbers of passages."""
    if data.passages:
        most = most_passages(splits, data.passages)
        run.account(f"passages: {most} at the most")
        return PassageTokenizer(tokenizer, most, model.context)
    if not data.classes:
        return tokenizer
    labels = labels_of(splits["train"], data.classes)
    run.account(f"labels: {len(labels)}, of the training side: {', '.join(labels[:10])}{', ...' * (len(labels) > 10)}")
    return LabelTokenizer(tokenizer, labels)


def write_start(folder: Path, shape: Scratch, seed: int, rows: Dataset, data: Data) -> None:
    """Train the tokenizer, draw the weights, write both in Hugging Face layout."""
    tokenizer = train_tokenizer(texts_of(rows, data), shape.vocab, mask=shape.kind == "encoder")
    with writing(folder.parent):
        write_model(folder, new_model(shape, tokenizer.vocab_size, seed), tokenizer)


def texts_of(rows: Dataset, data: Data) -> Iterator[str]:
    """Every text of the columns that the recipe names, row by row."""
    columns = [data.text, data.prompt, data.completion, data.chosen, data.rejected]
    for row in rows:
        yield from (row[c] for c in columns if c and isinstance(row[c], str))
        yield from (p for p in (row[data.passages] if data.passages else None) or [] if isinstance(p, str))
        if data.messages and is_chat(row[data.messages]):
            yield from (turn["content"] for turn in row[data.messages])
