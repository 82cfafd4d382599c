"""Records what rlax computes: returns, GAE, V-trace, losses and distributions, with gradients where it has them.

python -m venv /tmp/rlax && /tmp/rlax/bin/pip install rlax==0.1.9
/tmp/rlax/bin/python tests/golden/record_rlax.py
"""

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import rlax  # noqa: E402
from recording import LENGTHS, Draw, Recorder, episodes  # noqa: E402


def per_episode(function, *flats):
    """function(index of the episode, its part of each array), laid end to end."""
    parts = [function(i, *rows) for i, rows in enumerate(zip(*map(episodes, flats), strict=True))]
    return np.concatenate([np.asarray(part) for part in parts])


def returns(out: Recorder, draw: Draw, name: str, gamma: float, lam: float, ended: bool) -> None:
    reward, value, log_ratio = draw.normal(), draw.normal(scale=2.0), draw.normal(scale=1.5)
    tail = draw.normal(len(LENGTHS)) * (draw.choice(2, len(LENGTHS)) if ended else 1.0)
    inputs = {"lengths": LENGTHS, "reward_A": reward, "value_A": value, "bootstrap_B": tail}
    inputs |= {"gamma": gamma, "lam": lam}
    full = lambda x, like: np.full(len(like), x)
    after = lambda i, v: np.append(v[1:], tail[i])
    summed = lambda i, r: rlax.discounted_returns(r, full(gamma, r), full(tail[i], r))
    out.case(f"discounted_returns/{name}", inputs, {"return_A": per_episode(summed, reward)})

    estimate = rlax.truncated_generalized_advantage_estimation
    advantage = lambda i, r, v: estimate(r, full(gamma, r), lam, np.append(v, tail[i]))
    target = lambda i, r, v: rlax.lambda_returns(r, full(gamma, r), after(i, v), lam)
    found = {"advantage_A": per_episode(advantage, reward, value), "return_A": per_episode(target, reward, value)}
    out.case(f"gae/{name}", inputs, found)

    cap = 2.0
    error = lambda i, r, v, p: rlax.vtrace(v, after(i, v), r, full(gamma, r), np.exp(p), 0.0, cap, False)
    inputs |= {"log_ratio_A": log_ratio, "cap": cap}
    out.case(f"vtrace_one_step/{name}", inputs, {"error_A": per_episode(error, reward, value, log_ratio)})


def distributions(out: Recorder, draw: Draw, temperature: float, rows: int = 12, vocab: int = 7) -> None:
    logits, other = draw.normal(rows, vocab, scale=3.0), draw.normal(rows, vocab, scale=3.0)
    action = draw.choice(vocab, rows)
    policy = rlax.softmax(temperature)
    found = {}
    for name, f in {
        "logp": lambda z: policy.logprob(action, z),
        "entropy": policy.entropy,
        "kl": lambda z: rlax.categorical_kl_divergence(z, other, temperature),
    }.items():
        found[f"{name}_N"] = f(logits)
        found[f"{name}_gradient_NV"] = jax.grad(lambda z, f=f: jnp.sum(f(z)))(logits)
    inputs = {"logits_NV": logits, "other_NV": other, "action_N": action, "temperature": temperature}
    out.case(f"softmax/{temperature}", inputs, found)


def losses(out: Recorder, draw: Draw, rows: int = 40, vocab: int = 5) -> None:
    logits, other = draw.normal(rows, vocab, scale=1.5), draw.normal(rows, vocab, scale=1.5)
    action, advantage = draw.choice(vocab, rows), draw.normal(rows)
    ratio = lambda z: rlax.categorical_importance_sampling_ratios(z, other, action)
    inputs = {"logits_NV": logits, "old_logits_NV": other, "action_N": action, "advantage_N": advantage}
    out.case("ratio", inputs, {"ratio_N": ratio(logits)})
    score = lambda z: rlax.policy_gradient_loss(z, action, advantage, np.ones(rows))
    out.case("policy_gradient_loss", inputs, {"mean": score(logits), "gradient_NV": jax.grad(score)(logits)})
    for epsilon in (0.05, 0.2, 0.9):
        clip = lambda z, e=epsilon: rlax.clipped_surrogate_pg_loss(ratio(z), advantage, e)
        found = {"mean": clip(logits), "gradient_NV": jax.grad(clip)(logits)}
        out.case(f"clipped_surrogate_pg_loss/{epsilon}", inputs | {"epsilon": epsilon}, found)
    value, target = draw.normal(rows, scale=3.0), draw.normal(rows)
    found = {"squared_N": rlax.l2_loss(value, target), "huber_N": rlax.huber_loss(value - target, 1.0)}
    out.case("value_loss", {"value_N": value, "return_N": target}, found)


if __name__ == "__main__":
    command = "python tests/golden/record_rlax.py"
    recorder = Recorder("rlax", "rlax", "jax", "jaxlib", command=command, note="with jax_enable_x64")
    seeded = Draw(1)
    for i, pair in enumerate([(1.0, 1.0), (1.0, 0.95), (0.99, 0.95), (0.9, 0.5), (0.97, 0.0), (0.0, 0.7)]):
        returns(recorder, seeded, "gamma {} lam {}".format(*pair), *pair, ended=i % 2 == 1)
    for t in (1.0, 0.7, 2.5):
        distributions(recorder, seeded, t)
    losses(recorder, seeded)
    recorder.write()
