import subprocess
import sys
from typing import get_args

import pytest

from upslope.config import PRESETS, RL, Recipe, describe, find_recipe, load_recipe, shipped_recipes
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
        ("rl.lamb=1", "unknown key 'rl.lamb'; did you mean 'rl.lam'?"),
        ("rl.optim.lrr=1", "unknown key 'rl.optim.lrr'; did you mean 'rl.optim.lr'?"),
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
        (
            "rl.reward='a.py:mean'",
            "rl.reward = 'a.py:mean' would be taken for the metric reward/mean; rename the function",
        ),
        ("rl.reward={'a.py:f'=1, 'b.py:f'=1}", "names 'a.py:f' and 'b.py:f', both called f; rename one function"),
        ("eval.judges=['a.py:f', 'b.py:f']", "eval.judges names 'a.py:f' and 'b.py:f', both called f"),
        ("optim.beta1=1.0", "optim.beta1 = 1.0 (and 1 more); input should be less than 1"),
        ("data.test=0", "data.test = 0 leaves no rows for the table at the end; set it above 0"),
        ("data.rows=' '", "data: rows is empty; name one, or write none"),
        ("data.text=''", "data: text is empty"),
        ("seed=9223372036854775808", "input should be less than 9223372036854775808"),
        ("model=''", "model is empty"),
        ("name=''", "name is empty"),
        ("name='a/../../b'", "name = 'a/../../b' leads out of the folder runs"),
        ("data.prompt_words=[5, 3]", "prompt_words = [5, 3] is empty; write the smaller number first"),
        ("task.metrics=['a.py:f', 'b.py:f']", "task.metrics names 'a.py:f' and 'b.py:f', both called f"),
        ("task.metrics=['a.py:reward']", "would be taken for the metric task/reward; rename the function"),
        ("eval.judges=vader", 'eval.judges = \'vader\'; write a list, as in ["a", "b"]'),
        ("rl.reward={'a:b'='x'}", "rl.reward.a:b = 'x'; input should be a valid number"),
        ("rl=3", "rl = 3; write a table"),
        ("data.max_tokens=64", "rl.max_tokens = 64 leaves no room for a prompt within data.max_tokens = 64"),
        ("eval.judges=['stage:reward']", "eval.judges is stage:reward but there is no [reward] table"),
        ("task.prompt='{t!z}'", "formats its field 't', which is taken as it is; write {t}"),
        ("task.prompt='{t:>9}'", "formats its field 't'"),
        ("rl.slots=8", "unknown key 'rl.slots'; did you mean 'limits.slots'?"),
        ("limits.max_failures=2", "limits.max_failures = 2"),
        ("foo", "override 'foo' has no value"),
        ("=3", "override '=3' has no key"),
        ("rl.kll=0.1", "unknown key 'rl.kll'; did you mean 'rl.kl'?"),
        ("lr=1", "unknown key 'lr'; did you mean 'optim.lr'?"),
        ("model.x=1", ", not a table; shorten the key"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(override, message):
    assert message in refused(override, *(["data.prompt_words=none"] if "task.prompt" in override else []))


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


def test_a_reward_model_that_nothing_asks_is_told():
    pairs = {"data": {**BASE["data"], "chosen": "c", "rejected": "d"}, "reward": {"steps": 1}}
    told = "reward: nothing is paid or judged by it; reward = none leaves this stage out"
    assert told in describe(load_recipe(BASE | pairs))
    assert told not in describe(load_recipe(BASE | pairs, ["rl.reward=stage:reward"]))
    assert told not in describe(load_recipe(BASE | pairs, ["eval.judges=['stage:reward']"]))
    assert told not in describe(load_recipe(BASE | pairs, ["rl=none"]))


def test_there_are_few_keys():
    def count(model):
        total = 0
        for field in model.model_fields.values():
            options = [field.annotation, *getattr(field.annotation, "__args__", ())]
            tables = [o for o in options if isinstance(o, type) and hasattr(o, "model_fields")]
            total += count(tables[0]) if tables and tables[0].__name__ != "Optim" else 1
        return total

    assert count(Recipe) <= 160


def test_reading_a_recipe_needs_no_torch():
    code = "import sys; from upslope.config import load_recipe as r; r('sentiment-ppo'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


GROUPED = ["rl.algorithm=grpo"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*GROUPED, "rl.samples=1"], "compares the samples of a prompt and there is one (samples = 1)"),
        (["rl.algorithm=rloo", "rl.samples=1"], "set samples to 2 or more"),
        (
            ["rl.top_p=0.9"],
            "top_p = 0.9 samples from a cut distribution that the ratio would not know; set mask_every = 1",
        ),
        (["rl.top_k=5"], "top_k = 5 samples from a cut distribution"),
        (["rl.mask_every=3"], "mask_every = 3 and nothing is cut"),
        (["rl.critic=none"], "credit = gae asks a critic and critic = none; set critic = shared"),
        ([*GROUPED, "rl.critic=shared"], "critic = shared would be trained and never asked; set critic = none"),
        (["rl.algorithm=reinforce", "rl.baseline=critic", "rl.critic=none"], "baseline = critic asks a critic"),
        ([*GROUPED, "rl.limit=bootstrap", "rl.critic=none"], "limit = bootstrap asks a critic"),
        (["rl.kl_in=loss", "rl.kl_estimator=k1"], "k1 in the loss has a gradient of mean 0 and holds nothing"),
        (["rl.kl_estimator=k3"], "kl_estimator = k3 in the reward leads to another point"),
        (["rl.clip_high=0"], "rl.clip_high = 0; input should be greater than 0"),
        (["rl.clip_low=1.5"], "clip_low = 1.5 bounds a ratio below 0"),
        (["rl.lam=-0.1"], "rl.lam = -0.1; input should be greater than or equal to 0"),
        ([*GROUPED, "rl.critic_lr=1e-3"], "critic_lr = 0.001 has no effect with critic = none; remove it"),
        (["rl.algorithm=reinforce", "rl.lam=0.9"], "lam = 0.9 has no effect with credit = to_go; remove it"),
        (["rl.algorithm=reinforce", "rl.epochs=2"], "2 optimizer steps a rollout leave them behind; set epochs = 1"),
        (["rl.algorithm=trpo", "rl.critic=shared"], "the critic's steps would move the policy past its bound"),
        (["rl.algorithm=trpo", "rl.loss=clip"], "improves loss = surrogate, not clip"),
        (["rl.update=trust_region", "rl.loss=surrogate", "rl.critic=detached"], "has no bound; set trust.max_kl"),
        (["rl.loss=surrogate"], "unbounded over several steps; set trust.penalty or trust.max_kl"),
        (["rl.trust.target=0.1"], "trust.target leads a penalty that is 0"),
        (["rl.algorithm=gkd", "rl.reward='a:b'"], "gkd has no teacher"),
        (["rl.teacher=x"], "teacher has no place in ppo"),
        ([*GROUPED, "rl.gamma=0.9"], "gamma = 0.9 discounts nothing where an episode is one action"),
        (["rl.baseline=group"], "credit = gae reads a critic's values, not baseline = group"),
        (["rl.scale=group"], "scale = group"),
        (["rl.resample=2"], "resample = 2 looks for groups and samples = 1"),
        ([*GROUPED, "rl.baseline=best"], "scale = group needs a group's baseline, not best"),
        ([*GROUPED, "rl.baseline=best", "rl.scale=none"], "baseline = best learns by likelihood"),
        (["rl.kl=0", "rl.kl_target=1"], "kl_target adapts a coefficient that is 0"),
        (["rl.importance_cap=3"], "importance_cap = 3.0 has no effect with importance = none"),
        (["rl.algorithm=raft", "rl.scale=batch"], "baseline = best with scale = batch would push the others down"),
        (["rl.overlong=0.2", "rl.limit=bootstrap"], "overlong prices a cut that limit = bootstrap does not pay for"),
        (["rl.value_weight=0"], "value_weight = 0 never trains the critic"),
        ([*GROUPED, "rl.trust.max_kl=0.1"], "trust.max_kl bounds what several optimizer steps drift and there is one"),
        (["rl.kl_target=1", "rl.kl_horizon=10"], "kl_horizon = 10 is too short for 64 episodes a rollout"),
        (["rl.algorithm=trpo", "rl.importance=mask"], "importance = 'mask' has no effect with update = trust_region"),
        (["rl.trust.cg_steps=5"], "trust.cg_steps = 5 has no effect with update = gradient"),
        (["rl.algorithm=pppo"], "rl.algorithm = 'pppo'"),
        (["expert.keep=5"], "keep = 5 of 4 samples"),
        (["preference.margin=1.0"], "margin = 1 has no place in dpo; it is simpo's"),
        (["preference.steps=5"], "[preference] needs pairs"),
    ],
)
def test_combinations_that_cannot_be_right_are_refused_with_the_remedy(overrides, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(BASE, overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_every_row_of_the_table_of_algorithms_is_a_recipe_that_reads_back(name):
    own = {"teacher": "t"} if name == "gkd" else {"reward": "a:b"}
    recipe = load_recipe(BASE | {"rl": {"algorithm": name, **own}})
    assert load_recipe(recipe.model_dump(mode="json")) == recipe
    for key, value in PRESETS[name].items():
        found = getattr(recipe.rl, key)
        assert found == value or all(getattr(found, k) == v for k, v in value.items()), key


def test_the_names_of_algorithms_are_the_rows_of_the_table():
    assert set(get_args(RL.model_fields["algorithm"].annotation)) == set(PRESETS)


def test_what_a_recipe_says_stands_above_the_algorithms_row():
    rl = load_recipe(BASE, ["rl.algorithm=trpo", "rl.trust.damping=0.3", "rl.lam=0.5"]).rl
    assert rl.trust.damping == 0.3 and rl.trust.max_kl == 0.01 and rl.lam == 0.5
    assert load_recipe(BASE, ["rl.algorithm=reinforce", "rl.baseline=critic"]).rl.critic == "shared"


def test_none_switches_off_what_may_be_absent():
    rl = load_recipe(BASE, ["rl.value_clip=none"]).rl
    assert rl.value_clip is None
    assert "rl.lam = 'none'" in refused("rl.lam=none")
    assert load_recipe(BASE | {"data": BASE["data"] | {"group": "film"}}, ["data.group=none"]).data.group is None
    assert "data: names no column" in refused("data.text=none")


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "gkd"])
def test_one_word_changes_the_algorithm_of_a_shipped_recipe(name):
    rl = load_recipe("sentiment-ppo", [f"rl.algorithm={name}"]).rl
    assert rl.algorithm == name and rl.max_tokens == 24
    for key, value in PRESETS[name].items():
        if name != "ppo" and key != "trust":
            assert getattr(rl, key) == value


def test_a_table_of_an_algorithm_holds_for_it_alone_above_rl_and_below_the_command_line():
    own = {
        "ppo": {"epochs": 7, "optim": {"lr": 1e-3}},
        "grpo": {"samples": 3, "trust": {"max_kl": 0.5}, "minibatches": 4},
    }
    raw = BASE | {"rl": {**BASE["rl"], "prompts": 8, "epochs": 2, "optim": {"eps": 1e-5}, **own}}
    ppo = load_recipe(raw).rl
    assert (ppo.epochs, ppo.optim.lr, ppo.optim.eps) == (7, 1e-3, 1e-5)
    assert load_recipe(raw, ["rl.epochs=1", "rl.optim.lr=1"]).rl.epochs == 1
    assert load_recipe(raw, ["rl.optim.lr=1"]).rl.optim.lr == 1
    assert load_recipe(raw, ["rl.ppo.epochs=5"]).rl.epochs == 5
    grouped = load_recipe(raw, ["rl.algorithm=grpo"]).rl
    assert (grouped.samples, grouped.epochs, grouped.trust.max_kl, grouped.optim.lr) == (3, 2, 0.5, 1e-5)
    for bad, near in (
        ({"sampels": 3}, "did you mean 'samples'"),
        ({"algorithm": "ppo"}, "unknown key 'rl.grpo.algorithm'"),
    ):
        with pytest.raises(RecipeError, match=near):
            load_recipe(BASE | {"rl": dict(BASE["rl"], grpo=bad)})


def test_a_side_without_rows_is_told_where_something_is_measured_on_it():
    assert load_recipe(BASE, ["data.valid=0"]).data.valid == 0  # rl alone is watched by its rollouts
    fitted = {**BASE, "sft": {}}
    with pytest.raises(RecipeError, match=r"data.valid = 0 leaves \[sft\] no rows to be watched by; set it above 0"):
        load_recipe(fitted, ["data.valid=0"])


def test_labels_are_prompts_enough_for_a_task():
    data = {"rows": "r", "text": "t", "classes": "kind"}
    recipe = load_recipe(
        {"model": "m", "data": data, "task": {"reference": "kind", "metrics": ["accuracy"]}, "sft": {}}
    )
    assert recipe.evaluated


def test_a_label_or_a_passage_is_one_token_long_whatever_writes_it():
    for name in ("topic-classification", "retrieval"):
        assert load_recipe(name).max_completion == load_recipe(name, ["rl=none"]).max_completion == 1


def test_first_words_are_of_a_text():
    data = {"rows": "r", "chosen": "c", "rejected": "d", "prompt_words": 3}
    for columns in (data, {"rows": "r", "text": "t", "prompt": "p", "prompt_words": 3}):
        with pytest.raises(
            RecipeError, match=r"prompt_words are the first words of text; set text, and no data.prompt or task.prompt"
        ):
            load_recipe({"model": "m", "data": columns, "reward": {"steps": 1}, "rl": {"reward": "a:b"}})


def test_a_reference_is_what_is_learned_behind_a_column_of_prompts_too():
    recipe = {"model": "m", "data": {"rows": "r", "prompt": "q"}, "task": {"reference": "a"}, "sft": {"steps": 1}}
    assert load_recipe(recipe).data.completion == "a"
    assert load_recipe(recipe, ["data.completion=b"]).data.completion == "b"
    passages = recipe | {"data": {"rows": "r", "prompt": "q", "passages": "p"}}
    assert load_recipe(passages).data.completion == "a"


@pytest.mark.parametrize("name", shipped_recipes())
def test_what_a_recipe_leaves_open_is_open_still_when_a_process_is_given_it(name):
    made = load_recipe(name)
    again = load_recipe(made.model_dump(mode="json", exclude_unset=True))
    assert again == made
    for stage in made.stages:
        one, other = (getattr(getattr(recipe, stage), "optim", None) for recipe in (made, again))
        assert one is None or one.model_fields_set == other.model_fields_set
