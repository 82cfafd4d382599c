"""Small and real things to test with: a byte-level tokenizer, a random model in Hugging Face layout, rows, a recipe."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: its kernels run on the CPU, slowly

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from upslope import cli
from upslope.kernels import cpu, gpu
from upslope.models.decoder import Decoder, DecoderConfig
from upslope.models.hf import save_decoder
from upslope.text.tokenizer import Tokenizer

os.environ.pop("TRITON_INTERPRET", None)  # the commands that tests start are as a user's

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Each test begins with one thread: several, each waiting for the other in a loop, crawl on cores that are busy."""
    torch.set_num_threads(1)


@pytest.fixture
def command_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, without the seconds that a new one takes to start: status, output, errors."""

    def run(*arguments: Any, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["upslope", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


@pytest.fixture
def gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The GPU's kernels serve: on a GPU where there is one, else in Triton's interpreter. The device to use."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")  # Triton looks at it again when a kernel begins
        monkeypatch.setattr(cpu, "serve", lambda *tensors: False)
        monkeypatch.setattr(gpu, "serve", lambda *tensors: tensors[0].dtype in gpu.DTYPES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter's, of -inf and nan
        yield DEVICE


TEXTS = ["a fine film, full of life", "a dull film, full of nothing", "the best of them all", "the worst of them all"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save_tokenizer(folder: Path) -> Path:
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        TEXTS * 5, trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Normal numbers from a seed of their own."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def tiny_config(**changes: Any) -> DecoderConfig:
    shape = dict(vocab_size=31, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_width=24, context=64)
    return DecoderConfig(**{**shape, **changes})


def tiny_decoder(seed: int = 0, scale: float = 8.0, **changes: Any) -> Decoder:
    """A random decoder with weights large enough that what it predicts is far from uniform."""
    model = Decoder(tiny_config(**changes)).init_weights(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(scale)
    return model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), tokenizer)


def save_tiny_model(folder: Path, tokenizer: Tokenizer, seed: int = 0) -> Path:
    save_decoder(tiny_decoder(seed, vocab_size=tokenizer.vocab_size, scale=3.0), folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    return make_rows()


def make_rows() -> list[dict[str, str]]:
    good = ["fine", "lovely", "great", "warm", "bright", "strong"]
    bad = ["dull", "weak", "cold", "bland", "flat", "grim"]
    made = []
    for film in range(24):
        for label, words in (("fresh", good), ("rotten", bad)):
            for n in range(3):
                word = words[(film + n) % len(words)]
                made.append(
                    {"text": f"a {word} film number {film}, {word} to the end", "film": f"film {film}", "label": label}
                )
    return made


@pytest.fixture
def recipe(model_dir: Path) -> dict[str, Any]:
    return make_recipe(model_dir)


def make_recipe(model_dir: Path) -> dict[str, Any]:
    """A whole recipe, three stages, that runs in a few seconds."""
    return {
        "name": "tiny",
        "model": str(model_dir),
        "dtype": "fp32",
        "seed": 3,
        "checkpoint_minutes": 0,
        "data": {
            "rows": "given",
            "text": "text",
            "group": "film",
            "label": "label",
            "prefer": "fresh",
            "prompt_words": 2,
            "max_tokens": 60,
            "valid": 0.2,
            "test": 0.2,
        },
        "optim": {"lr": 1e-3, "micro_tokens": 256},
        "sft": {"steps": 3, "batch": 4},
        "reward": {"steps": 3, "batch": 4},
        "rl": {"reward": "stage:reward", "steps": 3, "prompts": 6, "max_tokens": 8, "epochs": 2, "minibatches": 3},
        "eval": {"prompts": 8, "show": 2, "samples_every": 1},
    }
