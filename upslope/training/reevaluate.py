"""A finished run, evaluated again: more prompts, other judges, another draw of completions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from upslope.config import load_recipe
from upslope.errors import RunError
from upslope.observe.report import write_report
from upslope.observe.runs import read_json
from upslope.training.closing import evaluate_run
from upslope.training.parts import Given, Pipeline
from upslope.training.run import Run
from upslope.training.start import begin


def reevaluate(
    folder: Path,
    *,
    prompts: int | None,
    judges: Sequence[str],
    draw: int,
    given: Given | None = None,
    plain: bool | None = None,
) -> Path:
    """Evaluate a finished run on its held-out prompts, into FOLDER/evaluations/N; the run itself stays as it is.

    given: the objects that stood in for what the recipe names. Raises RunError where the run has no finished rl stage
    or was begun with other rows.
    """
    given = given or Given()
    if not any((folder / stage / "done.json").is_file() for stage in ("rl", "eval")):
        raise RunError(f"{folder} has no finished rl stage", "name the folder of a finished run")
    table = read_json(folder / "recipe.json")
    asked = [*load_recipe(table).eval.judges, *judges]
    overrides = [f"eval.judges={json.dumps(asked)}"] + ([f"eval.prompts={prompts}"] if prompts is not None else [])
    recipe = load_recipe(table, overrides)
    number = 1 + sum(1 for _ in (folder / "evaluations").glob("*"))
    run = Run(recipe, folder / "evaluations" / str(number), plain=plain)
    try:
        with run.stopping_on_signals():
            model, tokenizer, splits = begin(run, recipe, folder, given.rows)
            run.terminal.stage("eval", "start")
            evaluate_run(Pipeline(run, recipe, model, tokenizer, splits, given, folder), draw)
            write_report(run.folder)
            run.terminal.note(f"report: {run.folder / 'report.html'}")
    finally:
        run.close()
    return run.folder
