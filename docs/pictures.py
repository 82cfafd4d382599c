"""The pictures of the chapter on policy gradients: numbers from upslope.algo, drawn by matplotlib.

    make pictures        or        python docs/pictures.py [folder]

Each picture is a function of numbers that another function computes exactly, by enumeration: nothing is sampled. The
numbers stand in the file as well (the SVG's description, as JSON), where a test compares them with what the functions
compute today.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from upslope.algo import clipped_policy_loss, gae, group_advantages, kl_estimate, policy_gradient_loss, token_weights

Numbers = dict[str, list[float]]

INK = "#76808c"  # as dark on white as it is light on black
BLUE, RED, GREEN, VIOLET = "#3f83d1", "#d9603b", "#2f9e66", "#9a6bd0"
LOOK: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: small files, and found by a search
    "svg.hashsalt": "upslope",  # the same picture is the same file
}


def clip_numbers() -> Numbers:
    """What PPO maximises at one token, by its ratio, for an advantage of 1 and of -1."""
    ratio = torch.linspace(0.02, 4.0, 200)
    found = {"ratio": ratio.tolist()}
    for name, advantage in (("good", 1.0), ("bad", -1.0)):
        args = ratio.log(), torch.zeros_like(ratio), torch.full_like(ratio, advantage)
        found[f"{name} plain"] = (ratio * advantage).tolist()
        found[f"{name} clipped"] = (-clipped_policy_loss(*args)[0]).tolist()
        found[f"{name} dual"] = (-clipped_policy_loss(*args, dual_clip=3.0)[0]).tolist()
    return found


def gae_numbers(steps: int = 10, stay: float = 0.8, critic: float = 0.5, episodes: int = 16) -> Numbers:
    """How well GAE tells two first actions apart, for each lambda, where the critic says `critic` times the truth.

    A state is 0 or 1, pays what it is, and is kept with probability `stay`; the first action chooses the first state.
    Estimated is the difference of the two actions' advantages, in which the value of the first state cancels, from
    `episodes` episodes of each. All paths are enumerated: bias, deviation and root mean square error are exact.
    """
    values = [torch.zeros(2)]  # of the state that is entered with t steps left
    for _ in range(steps):
        after = values[-1] + torch.tensor([0.0, 1.0])
        values.append(torch.stack([stay * after[0] + (1 - stay) * after[1], stay * after[1] + (1 - stay) * after[0]]))
    paths = torch.tensor(list(itertools.product([0, 1], repeat=steps - 1)))
    starts = torch.arange(len(paths) + 1) * steps
    truth = 1.0 + float(values[steps - 1][1] - values[steps - 1][0])
    found: Numbers = {"lambda": [n / 20 for n in range(21)], "bias": [], "deviation": [], "error": []}
    for lam in found["lambda"]:
        difference, variance = 0.0, 0.0
        for action in (0, 1):
            path = torch.cat([torch.full((len(paths), 1), action), paths], dim=1)
            kept = (path[:, 1:] == path[:, :-1]).double()
            chance = (kept * stay + (1 - kept) * (1 - stay)).prod(1)
            value = torch.stack([values[steps - t][path[:, t - 1] if t else 0 * path[:, 0]] for t in range(steps)], 1)
            advantage, _ = gae(path.double().view(-1), critic * value.double().view(-1), starts, gamma=1.0, lam=lam)
            first = advantage[starts[:-1]]
            mean = float((chance * first).sum())
            difference += mean if action else -mean
            variance += float((chance * (first - mean) ** 2).sum()) / episodes
        found["bias"].append(abs(difference - truth))
        found["deviation"].append(variance**0.5)
        found["error"].append(((difference - truth) ** 2 + variance) ** 0.5)
    return found


def baseline_numbers(group: int = 4) -> Numbers:
    """Mean and variance of the gradient that one group of samples gives, on a bandit of three actions.

    One number each for no baseline, the group's mean, the mean of the others, and a critic that knows the expected
    reward. Every group that can be drawn is enumerated.
    """
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    reward = torch.tensor([2.0, 1.0, 4.0], dtype=torch.float64)
    p = logits.detach().exp()
    expected = float((p * reward).sum())
    truth = p * (reward - expected)
    found: Numbers = {"variance": [], "length": []}
    for name in ("none", "mean", "leave_one_out", "critic"):
        mean, square = torch.zeros(3, dtype=torch.float64), 0.0
        for drawn in itertools.product(range(3), repeat=group):
            action = torch.tensor(drawn)
            if name == "critic":
                advantage = reward[action] - expected
            else:
                advantage = group_advantages(reward[action], torch.zeros(group, dtype=torch.int64), baseline=name)
            loss = policy_gradient_loss(torch.log_softmax(logits, 0)[action], advantage)[0].mean()
            gradient = -torch.autograd.grad(loss, logits)[0]
            chance = float(p[action].prod())
            mean += chance * gradient
            square += chance * float(gradient.square().sum())
        found["variance"].append(square - float(mean.square().sum()))
        found["length"].append(float(mean @ truth / (truth @ truth)))
    return found


def kl_numbers() -> Numbers:
    """The estimators for a policy (p, 1 - p) and a reference (1/4, 3/4): mean, deviation, and mean of the gradient
    that each has in a loss, by the logit of the first action."""
    ref = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    ps = [n / 50 for n in range(1, 50)]
    found: Numbers = {"p": ps}
    for p in ps:
        chance = torch.tensor([p, 1 - p], dtype=torch.float64)
        logits = chance.log().requires_grad_()
        logp = torch.log_softmax(logits, 0)
        exact = (logp.exp() * (logp - ref)).sum()
        rows = {"exact": (exact.item(), 0.0, torch.autograd.grad(exact, logits, retain_graph=True)[0][0].item())}
        for kind in ("k1", "k2", "k3"):
            kl = kl_estimate(logp, ref, kind)
            mean = (chance * kl).sum()
            spread = (chance * (kl - mean) ** 2).sum().sqrt().item()
            rows[kind] = (mean.item(), spread, torch.autograd.grad(mean, logits, retain_graph=True)[0][0].item())
        for kind, numbers in rows.items():
            for what, number in zip(("mean", "deviation", "gradient"), numbers, strict=True):
                found.setdefault(f"{kind} {what}", []).append(number)
    return found


def weight_numbers(lengths: tuple[int, int] = (4, 12), limit: int = 16) -> Numbers:
    """The weight of each token of a short and of a long episode under the three reductions."""
    starts = torch.tensor([0, lengths[0], sum(lengths)])
    return {kind: token_weights(starts, kind, limit=limit).tolist() for kind in ("token", "sequence", "constant")}


def draw_clip(figure: Figure, found: Numbers) -> None:
    for axes, name, title in zip(figure.subplots(1, 2), ("good", "bad"), ("advantage +1", "advantage −1"), strict=True):
        axes.plot(found["ratio"], found[f"{name} plain"], color=INK, linestyle=":", linewidth=1.5, label="r A")
        axes.plot(found["ratio"], found[f"{name} clipped"], color=BLUE, label="clip 0.2")
        if name == "bad":
            axes.plot(found["ratio"], found["bad dual"], color=RED, linestyle="--", label="and dual clip 3")
        axes.plot([1], [1 if name == "good" else -1], "o", color=INK, markersize=5)
        axes.set_title(title)
        axes.set_xlabel("ratio r")
        axes.legend(loc="lower right" if name == "good" else "upper right")
        axes.set_xticks([0, 0.8, 1.2, 2, 3, 4], ["0", "0.8", "1.2", "2", "3", "4"])
        _guides(axes, 0.8, 1.2)
        axes.set_ylim((-0.1, 2.6) if name == "good" else (-4.2, 0.1))
    figure.axes[0].set_ylabel("what is maximised")


def draw_gae(figure: Figure, found: Numbers) -> None:
    axes = figure.subplots()
    axes.plot(found["lambda"], found["bias"], color=BLUE, label="|bias|: the critic's error")
    axes.plot(found["lambda"], found["deviation"], color=RED, label="standard deviation: the episodes' noise")
    axes.plot(found["lambda"], found["error"], color=GREEN, linewidth=2.6, label="both: root mean square error")
    best = min(range(len(found["lambda"])), key=lambda n: found["error"][n])
    axes.plot(found["lambda"][best], found["error"][best], "o", color=GREEN)
    axes.annotate(
        f"least at λ = {found['lambda'][best]:g}",
        (found["lambda"][best], found["error"][best]),
        xytext=(-8, 22),
        textcoords="offset points",
        ha="center",
        color=GREEN,
    )
    axes.set_xticks([n / 5 for n in range(6)], ["0\nTD error", "0.2", "0.4", "0.6", "0.8", "1\nMonte Carlo"])
    axes.set_xlabel("λ")
    axes.set_ylabel("error of an advantage")
    axes.set_ylim(0, 1.25 * max(found["error"]))
    axes.legend(loc="upper center")


def draw_baselines(figure: Figure, found: Numbers) -> None:
    names = ["none", "group's mean", "mean of the others", "critic, exact"]
    left, right = figure.subplots(1, 2)
    for axes, what, title in (
        (left, "variance", "variance of a group's gradient"),
        (right, "length", "its mean, over the true gradient"),
    ):
        bars = axes.barh(range(4), found[what], color=[INK, RED, BLUE, GREEN], height=0.6)
        axes.bar_label(bars, fmt="%.3f" if what == "variance" else "%.2f", padding=4, color=INK)
        axes.set_yticks(range(4), names if axes is left else [""] * 4)
        axes.set_ylim(3.6, -0.6)
        axes.set_xlim(0, 1.25 * max(found[what]))
        axes.set_title(title)
        axes.tick_params(left=False)


def draw_kl(figure: Figure, found: Numbers) -> None:
    for axes, what, title in zip(
        figure.subplots(1, 3),
        ("mean", "deviation", "gradient"),
        ("mean value", "standard deviation", "mean gradient in a loss"),
        strict=True,
    ):
        if what != "deviation":
            axes.plot(found["p"], found[f"exact {what}"], color=INK, linewidth=5, alpha=0.45, label="exact")
        for kind, colour, style in (("k1", VIOLET, "-"), ("k2", RED, "--"), ("k3", BLUE, (0, (1, 1.2)))):
            axes.plot(found["p"], found[f"{kind} {what}"], color=colour, linestyle=style, label=kind)
        axes.set_title(title)
        axes.set_xlabel("policy's p, reference 1/4")
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "¼", "½", "¾", "1"])
        _guides(axes, 0.25)
        if what == "mean":
            axes.set_ylim(-0.05, 1.4)
            axes.legend(loc="upper center")
        elif what == "deviation":
            axes.set_ylim(-0.05, 1.4)
        else:
            axes.set_ylim(-0.3, 0.8)


def draw_weights(figure: Figure, found: Numbers) -> None:
    highest = max(max(weights) for weights in found.values())
    for axes, (kind, weights) in zip(figure.subplots(1, 3, sharey=True), found.items(), strict=True):
        axes.bar(range(1, 5), weights[:4], color=BLUE, width=0.8, label="short")
        axes.bar(range(6, 18), weights[4:], color=RED, width=0.8, label="long")
        for place, part, colour in ((2.5, weights[:4], BLUE), (11.5, weights[4:], RED)):
            height = max(part) + 0.03 * highest
            axes.text(place, height, f"Σ {sum(part):.3g}", ha="center", va="bottom", color=colour)
        axes.set_title(kind)
        axes.set_xticks([2.5, 11.5], ["4 tokens", "12 tokens"])
        axes.tick_params(bottom=False)
        axes.set_ylim(0, 1.2 * highest)
    figure.axes[0].set_ylabel("weight of a token")


def _guides(axes: Axes, *places: float) -> None:
    for place in places:
        axes.axvline(place, color=INK, linewidth=0.8, alpha=0.4)


PICTURES: dict[str, tuple[Callable[[], Numbers], Callable[[Figure, Numbers], None], tuple[float, float]]] = {
    "baselines": (baseline_numbers, draw_baselines, (7.6, 2.3)),
    "gae": (gae_numbers, draw_gae, (5.6, 3.2)),
    "clip": (clip_numbers, draw_clip, (7.6, 3.1)),
    "kl": (kl_numbers, draw_kl, (8.6, 2.9)),
    "weights": (weight_numbers, draw_weights, (7.6, 2.5)),
}


def rounded(found: Numbers) -> Numbers:
    return {name: [float(f"{x:.5g}") for x in numbers] for name, numbers in found.items()}


def draw(name: str, path: Path) -> None:
    """Write one picture as the kind of file that the path's name says (svg, png)."""
    numbers, picture, size = PICTURES[name]
    found = numbers()
    with rc_context(LOOK):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        picture(figure, found)
        metadata = {"Date": None, "Description": json.dumps(rounded(found))} if path.suffix == ".svg" else {}
        figure.savefig(path, dpi=110, metadata=metadata, transparent=path.suffix == ".svg")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        draw(name, folder / f"{name}.svg")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
