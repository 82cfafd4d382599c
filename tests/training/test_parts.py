"""What the stages of a run share."""

from upslope.config import load_recipe
from upslope.training.parts import with_room


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
