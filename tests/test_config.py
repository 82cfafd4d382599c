import subprocess
import sys

import pytest

from upslope.config import Recipe, describe, find_recipe, load_recipe, shipped_recipes
from upslope.errors import RecipeError

BASE = {"model": "m", "data": {"rows": "r", "text": "t", "prompt_words": [3, 5]}, "rl": {"reward": "a:b"}}


def refused(*overrides):
    with pytest.raises(RecipeError) as caught:
        load_recipe(BASE, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.lamb=1", "unknown key 'rl.lamb'; did you mean 'lam'?"),
        ("rl.optim.lrr=1", "unknown key 'rl.optim.lrr'; did you mean 'lr'?"),
        ("sede=1", "unknown key 'sede'; did you mean 'seed'?"),
        ("rl.lam=2", "rl.lam = 2; input should be less than or equal to 1"),
        ("rl.prompts='x'", "rl.prompts = 'x'"),
        ("rl.clip_low=0", "rl.clip_low = 0"),
        ("rl.minibatches=5", "64 episodes do not divide into 5 minibatches; set minibatches = 4"),
        ("sft=3", "sft = 3"),
        ("rl.critic=big", "'shared', 'detached' or 'separate'"),
        ("data.prefer=a", "label and prefer go together"),
        ("data.valid=0.9", "leaves nothing to train on"),
        ("rl.reward='stage:reward'", "there is no [reward] table"),
        ("foo", "override 'foo' has no value"),
        ("model.x=1", "model is a value, not a table"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(override, message):
    assert message in refused(override)


def test_a_recipe_needs_a_stage_and_its_keys():
    with pytest.raises(RecipeError, match="has no stage"):
        load_recipe({"model": "m", "data": {"rows": "r", "text": "t"}})
    with pytest.raises(RecipeError, match=r"'data\.rows' is missing"):
        load_recipe({"model": "m", "data": {"text": "t"}, "sft": {}})


def test_overrides_and_shared_optimizer_settings():
    recipe = load_recipe({**BASE, "optim": {"lr": 1e-3, "warmup": 7}}, ["rl.optim.lr=3e-6", "name=mine", "rl.lam=0.5"])
    assert recipe.rl.optim.lr == 3e-6 and recipe.rl.optim.warmup == 7
    assert recipe.name == "mine" and recipe.rl.lam == 0.5
    assert "optim" not in BASE["rl"]


def test_a_resolved_recipe_reads_back_as_itself():
    recipe = load_recipe("sentiment-ppo")
    assert load_recipe(recipe.model_dump(mode="json")) == recipe


def test_batch_arithmetic_is_told():
    (line,) = describe(load_recipe(BASE, ["rl.samples=2", "rl.steps=10"]))
    assert "10 rollouts x 64 prompts x 2 samples = 1280 episodes" in line
    assert "2 epochs x 4 minibatches of 32 episodes = 80 optimizer steps" in line


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_found_by_name_and_path(name):
    assert load_recipe(name).stages
    assert find_recipe(f"recipes/{name}.toml") == find_recipe(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a = ", "is not TOML"), (b"\xff\xfe", "is not UTF-8"), (b"model = 1", "recipe")],
)
def test_files_that_are_no_recipe(tmp_path, content, message):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"no recipe 'sentimentppo'.*sentiment-ppo"):
        load_recipe("sentimentppo")
    with pytest.raises(RecipeError, match="is a folder"):
        load_recipe(tmp_path)


def test_there_are_few_keys():
    def count(model):
        total = 0
        for field in model.model_fields.values():
            options = [field.annotation, *getattr(field.annotation, "__args__", ())]
            tables = [o for o in options if isinstance(o, type) and hasattr(o, "model_fields")]
            total += count(tables[0]) if tables and tables[0].__name__ != "Optim" else 1
        return total

    assert count(Recipe) < 130


def test_reading_a_recipe_needs_no_torch():
    code = "import sys; from upslope.config import load_recipe as r; r('sentiment-ppo'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
