"""The closing evaluation: the models of a run and a baseline on the test side, which nothing before has opened.

baseline   what needs no model (task.baseline)
before     the policy as rl began: the supervised start. Without rl, the recipe's model
after      the policy after rl; without rl, after the last stage
expert     the model fitted to rl's own best samples, where there is such a stage behind rl
"""

from __future__ import annotations

import time

from upslope.rewards.reference import COLUMN
from upslope.text.baselines import BASELINES
from upslope.text.prepare import Prompt
from upslope.training.data import make_prompts
from upslope.training.encoder import encoder_folder
from upslope.training.final import Comparison, Trial, record_comparison, write_answers
from upslope.training.parts import Pipeline
from upslope.training.probe import ProbeSource
from upslope.training.scoring import Scorer, Source

Contender = tuple[str, str]  # label, model source


def evaluate_run(p: Pipeline, draw: int = 0) -> None:
    """Put the models and the baseline to the held-out prompts, write the table. All models are loaded frozen.

    draw numbers the set of random numbers that the completions are sampled with.
    """
    began = time.monotonic()
    prompts = make_prompts(p.run, p.splits["test"], p.tokenizer, "test", "rl" if p.recipe.rl else "eval")
    prompts = prompts[: p.recipe.eval.prompts]
    judges, scorer, metrics = _judges(p), p.scorer(), p.task_metrics()
    contenders = models_of(p)
    try:
        trial = Trial(
            prompts,
            p.sampling(),
            scorer,
            judges,
            metrics,
            p.trunk(original_of(p), trained=False),
            p.tokenizer,
            own_distribution=p.sampling().temperature == p.limit("temperature"),
        )
        outcomes, start = [], None
        for number, (_, source) in enumerate(contenders):
            policy = p.trunk(source, trained=False)
            start = start or policy
            p.require_room(policy, "test", prompts)
            p.run.progress("eval", 0.1 + number, len(contenders) + 0.5, "generate")
            episodes = trial.sampled(p.run, p.engine(policy, number), draw)
            p.run.progress("eval", 0.7 + number, len(contenders) + 0.5, "judges")
            outcomes.append(trial.outcome(episodes, policy, start))
        labels = [label for label, _ in contenders]
        if p.recipe.task.baseline:
            labels = ["baseline", *labels]
            outcomes = [trial.outcome(trial.given(baseline_answers(p, prompts)), None, None), *outcomes]
    finally:
        scorer.close()
        judges.close()
        metrics.close()
    found = record_comparison(p.run, prompts, outcomes, _comparison(p, labels))
    write_answers(p.run, prompts, labels, outcomes)
    closing = {name: {label: e.value for label, e in zip(labels, row, strict=False)} for name, row in found.items()}
    ends = {
        name: {label: [e.value, e.low, e.high] for label, e in zip([*labels, "change"], row, strict=True)}
        for name, row in found.items()
    }
    seconds = time.monotonic() - began
    p.run.mark_done("eval", closing, prompts=len(prompts), intervals=ends, seconds=seconds)


def original_of(p: Pipeline) -> str:
    """The model whose perplexity is told: the recipe's; for one from scratch, whose random weights measure nothing, the
    one that rl began with, or the last without rl."""
    if isinstance(p.recipe.model, str):
        return p.start
    return p.source_of("rl") if p.recipe.rl else models_of(p)[-1][1]


def models_of(p: Pipeline) -> list[Contender]:
    """(label, source) of the models that are compared, in the order of the table."""
    recipe = p.recipe
    if recipe.rl is None:
        last = recipe.policy_stages[-1]
        return [("before", p.start), ("after", str(p.stage_folder(last) / "model"))]
    found = [("before", p.source_of("rl")), ("after", str(p.stage_folder("rl") / "model"))]
    return [*found, ("expert", str(p.stage_folder("expert") / "model"))] if recipe.expert else found


def baseline_answers(p: Pipeline, prompts: list[Prompt]) -> list[str]:
    """The answers of task.baseline, learned from the training side alone."""
    task = p.recipe.task
    assert task.baseline is not None
    passages = p.recipe.data.passages
    columns = [c for c in (COLUMN, task.source_column) if c and c in p.splits["train"].column_names]
    train = p.splits["train"].select_columns(list(dict.fromkeys(columns)))
    rows = [prompt.row for prompt in prompts]
    return BASELINES[task.baseline](list(train), rows, task.source_column, COLUMN, passages)


def _comparison(p: Pipeline, labels: list[str]) -> Comparison:
    recipe = p.recipe
    stage = "rl" if recipe.rl else recipe.policy_stages[-1]
    before = [s for s in recipe.policy_stages[: recipe.policy_stages.index(stage)] if recipe.rl][-1:]
    own = recipe.rl.init if recipe.rl else None
    start = f"{own}, rl.init" if own else f"the model after {before[0]}" if before else "the recipe's model"
    parts = [f"'before' is {start}"]
    parts += [f"baseline: {recipe.task.baseline}"] if recipe.task.baseline else []
    temperature = p.sampling().temperature
    parts += [f"temperature {temperature:g}"] if recipe.task.metrics else []
    first = labels.index("before")
    return Comparison(labels, first, first + 1, f"Held-out prompts, before and after {stage}", "; ".join(parts))


def _judges(p: Pipeline) -> Scorer:
    """The recipe's judges and, where its encoder is installed and rows have labels, the probe."""
    data = p.recipe.data
    sources: list[Source] = [p.source(judge, "eval") for judge in p.recipe.eval.judges]
    folder = encoder_folder()
    if folder is not None and data.text and data.label and data.prefer:
        columns = {"text": data.text, "label": data.label, "prefer": data.prefer}
        probe = ProbeSource(folder, p.splits["train"], p.held_out, seed=p.recipe.seed, **columns)
        p.run.account(f"judge {probe.name}: right on {100 * probe.accuracy:.1f} % of unseen labelled rows", "eval")
        sources.append(probe)
    return Scorer(sources, [0.0] * len(sources), 1.0)
