"""What the stages of a run share."""

from upslope.config import load_recipe
from upslope.training.heldout import MetricSource
from upslope.training.parts import Given, Pipeline, with_room
from upslope.training.run import Run
from upslope.training.scoring import FunctionSource


def test_micro_batches_grow_with_a_gpu_unless_the_recipe_says_how_large_they_are(recipe):
    del recipe["optim"]["micro_tokens"]
    recipe["rl"]["optim"] = {"micro_tokens": 300}
    made = load_recipe(recipe)
    large, small = with_room(made, 85.0), with_room(made, 4.0)
    assert (made.sft.optim.micro_tokens, made.rl.optim.micro_tokens) == (2048, 300)
    assert (large.sft.optim.micro_tokens, large.reward.optim.micro_tokens, large.rl.optim.micro_tokens) == (
        10880,
        10880,
        300,
    )
    assert small.sft.optim.micro_tokens == 2048
    assert large.sft.optim.lr == made.sft.optim.lr and large.rl.prompts == made.rl.prompts


def test_completions_end_as_the_stage_that_writes_them_ends_them(recipe, tmp_path):
    recipe["expert"] = {"reward": "length_words", "stop": ["\n"], "max_tokens": 16}

    def stops(**changes):
        made = load_recipe(recipe | changes)
        return Pipeline(None, made, "none", None, {}, Given(), tmp_path).sampling().stop

    assert stops(rl=None) == ("\n",)
    assert stops(rl=recipe["rl"] | {"stop": ["!"]}) == ("!",)
    del recipe["expert"]
    assert stops(rl=None, task={"metrics": ["length_words"]}) == ()


def test_what_evaluates_the_text_has_a_process_of_its_own(recipe, tmp_path):
    recipe["task"] = {"metrics": ["vader", "verifier"]}
    run = Run(load_recipe(recipe), tmp_path / "run", plain=True)
    metrics = Pipeline(run, run.recipe, "none", None, {}, Given(), tmp_path).task_metrics()
    try:
        assert isinstance(metrics.sources["verifier"], FunctionSource)
        assert isinstance(metrics.sources["vader"], MetricSource)
    finally:
        metrics.close()
        run.close()
