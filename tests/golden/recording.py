"""What the record scripts share: seeded inputs of uneven lengths, and a JSON file that says what made it.

The scripts run where their package is installed; this file needs numpy alone.
"""

from __future__ import annotations

import datetime
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

LENGTHS = [1, 5, 3, 8, 1, 2]  # of the episodes, two of them a single token
FOLDER = Path(__file__).parent


class Recorder:
    """Cases by name, each with its inputs and what the package made of them."""

    def __init__(self, name: str, package: str, *beside: str, command: str, note: str = "") -> None:
        self.path = FOLDER / f"{name}.json"
        self.made = {
            "package": package,
            "versions": {p: metadata.version(p) for p in (package, *beside)},
            "python": platform.python_version(),
            "date": datetime.date.today().isoformat(),
            "command": command,
            **({"note": note} if note else {}),
        }
        self.cases: dict[str, dict[str, Any]] = {}

    def case(self, name: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        assert name not in self.cases, name
        self.cases[name] = {"inputs": plain(inputs), "outputs": plain(outputs)}

    def write(self) -> None:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in self.cases.items())
        self.path.write_text(f'{{"made": {json.dumps(self.made, indent=1)},\n"cases": {{\n{lines}\n}}}}\n')
        print(self.path.name, len(self.cases), "cases", self.path.stat().st_size, "bytes")


def plain(x: Any) -> Any:
    """Arrays and tensors as lists of numbers of twelve digits."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if hasattr(x, "detach"):
        x = x.detach()
    if hasattr(x, "tolist"):
        x = np.asarray(x.tolist())
        return x.tolist() if x.dtype.kind != "f" else np.vectorize(lambda v: float(f"{v:.12g}"))(x).tolist()
    return x


class Draw:
    """Seeded random inputs; ragged ones are flat, with LENGTHS beside them."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.total = sum(LENGTHS)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.normal(size=shape or (self.total,), scale=scale).round(4)

    def logps(self, *shape: int) -> np.ndarray:
        """Log-probabilities as a sampler has them: mostly near 0, some far below."""
        return -self.rng.exponential(1.5, size=shape or (self.total,)).round(4) - 1e-3

    def choice(self, n: int, *shape: int) -> np.ndarray:
        return self.rng.integers(0, n, size=shape or (self.total,))


def episodes(flat: np.ndarray) -> list[np.ndarray]:
    """A flat array cut into its episodes."""
    return np.split(np.asarray(flat), np.cumsum(LENGTHS)[:-1])


def padded(flat: np.ndarray, fill: float = 0.0) -> np.ndarray:
    """Episodes as the rows of a matrix, padded on the right."""
    rows = np.full((len(LENGTHS), max(LENGTHS)), fill, dtype=np.float64)
    for row, episode in zip(rows, episodes(flat), strict=True):
        row[: len(episode)] = episode
    return rows


def unpadded(rows: Any) -> list[float]:
    """The inverse of padded."""
    rows = plain(rows)
    return [x for row, n in zip(rows, LENGTHS, strict=True) for x in row[:n]]
