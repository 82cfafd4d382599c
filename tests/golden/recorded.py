"""What the packages said, read back: cases by file and prefix, as tensors."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = Path(__file__).parent
EXACT = {"atol": 1e-6, "rtol": 1e-6}


class Case:
    """Inputs and outputs by attribute: lists of numbers as fp64 tensors, integers as such, the rest as it is."""

    def __init__(self, name: str, raw: dict[str, dict[str, Any]]) -> None:
        self.name = name
        for key, value in {**raw["inputs"], **raw["outputs"]}.items():
            setattr(self, key, _tensor(value) if isinstance(value, list) else value)

    def __getattr__(self, key: str) -> Any:
        raise AttributeError(f"{self.name} has no {key}")

    @property
    def starts(self) -> Tensor:
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])


def _tensor(value: list[Any]) -> Tensor:
    made = torch.tensor(value)
    return torch.tensor(value, dtype=torch.float64) if made.is_floating_point() else made


@cache
def _cases(file: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{file}.json").read_text())["cases"]


def names(file: str, prefix: str) -> list[str]:
    found = [name for name in _cases(file) if name.startswith(prefix)]
    assert found, f"{file}.json has no case {prefix}"
    return found


def load(file: str, name: str) -> Case:
    return Case(f"{file} {name}", _cases(file)[name])


def recorded(file: str, prefix: str) -> pytest.MarkDecorator:
    """Runs a test with `case`, for every case of the file whose name begins with prefix."""
    cases = [pytest.param(load(file, name), id=f"{file}-{name}".replace(" ", "_")) for name in names(file, prefix)]
    return pytest.mark.parametrize("case", cases)


def close(found: Tensor, expected: Tensor | float) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), **EXACT)


def gradient_is(loss: Tensor, x: Tensor, expected: Tensor | float) -> None:
    """expected may be one number for all elements."""
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    close(gradient, torch.as_tensor(expected).expand_as(gradient))
