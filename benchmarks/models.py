"""The models and rows that every program reads, made once in a work folder from seeds alone.

    WORK/SIZE/MODEL/               random weights in Hugging Face layout, with the tokenizer
    WORK/SIZE/tokenizer.json       the tokenizer before it is padded to a model's vocabulary
    WORK/SIZE/rows/prompts.jsonl   prompt, ids (of exactly Size.prompt tokens), chosen, rejected
    WORK/SIZE/rows/sft.jsonl       text, ids (lognormal lengths, an EOS behind each)
    WORK/SIZE/rows/pairs.jsonl     prompt, chosen, rejected; prompt_ids, chosen_ids, rejected_ids (an EOS behind each)

Random weights let every completion run to its limit, so that all programs do the same work. The texts are sources of
Python's standard library.
"""

from __future__ import annotations

import json
import random
import shutil
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.sizes import Shape, Size
from upslope.models.decoder import Decoder, DecoderConfig
from upslope.models.open import save_model
from upslope.text.tokenizer import Tokenizer

PAIR_PROMPT = 8  # tokens that both sides of a pair share, counted into each side's length


def prepare(work: Path, size: Size, names: Sequence[str] | None = None) -> Path:
    """The folder of a size's rows and of the models named (all, unless any is), each made unless it is there."""
    folder = work / size.name
    if not (folder / "rows").is_dir():
        files = sources(size.files)
        raw = train_tokenizer(files, size.tokenizer)
        with partial(folder / "rows") as made:
            write_rows(made, files, Tokenizer(wrapped(raw), "the benchmarks"), size)
            raw.save(str(folder / "tokenizer.json"))
    for name in size.models if names is None else names:
        if not (folder / name).is_dir():
            shape = size.models[name]
            with partial(folder / name) as made:
                save_model(new_model(shape), made)
                raw = RawTokenizer.from_file(str(folder / "tokenizer.json"))
                wrapped(padded(raw, shape.vocab)).save_pretrained(str(made))
    return folder


@contextmanager
def partial(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all of it is there."""
    made = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    yield made
    made.rename(folder)


def new_model(shape: Shape) -> Decoder:
    """A decoder of a shape, its weights from seed 0."""
    return Decoder(config_of(shape)).init_weights(0)


def model_on(shape: Shape, device: torch.device) -> Decoder:
    """The same shape with other random weights, made where they are needed: without files, in no time."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Decoder(config_of(shape))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0.0, 0.02)
    return model


def config_of(shape: Shape) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=shape.vocab,
        width=shape.width,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.width // shape.heads,
        ffn_width=shape.ffn_width,
        context=shape.context,
        qkv_bias=shape.qkv_bias,
    )


def sources(count: int) -> list[Path]:
    """The first files of the standard library, by name: long enough to be cut into rows."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in sorted(folder.rglob("*.py")) if "site-packages" not in path.parts]
    return [path for path in found if path.stat().st_size > 8000][:count]


def train_tokenizer(files: list[Path], vocab: int) -> RawTokenizer:
    """Byte-level BPE with the three marks that the peers' trainers ask for, at the ids that Llama's defaults name."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator((path.read_text(errors="replace") for path in files), trainer)
    return raw


def padded(raw: RawTokenizer, vocab: int) -> RawTokenizer:
    """The same with tokens that no text has, so that every logit of the model is a token's: random weights choose all.

    Raises ValueError for a vocabulary smaller than the tokenizer's.
    """
    text = json.loads(raw.to_str())
    entries = text["model"]["vocab"]
    if len(entries) > vocab:
        raise ValueError(f"a vocabulary of {vocab} is less than the tokenizer's {len(entries)}")
    entries |= {f"unused{i}": i for i in range(len(entries), vocab)}
    return RawTokenizer.from_str(json.dumps(text))


def wrapped(raw: RawTokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def write_rows(folder: Path, files: list[Path], tokenizer: Tokenizer, size: Size) -> None:
    """All three tables, each row a piece of text that no other row has."""
    draw = random.Random(0)
    cuts = pieces(files, tokenizer, draw)
    low, high = size.sft_low, size.sft_high

    def length() -> int:
        return int(min(high, max(low, draw.lognormvariate(4.4, 0.6))))

    eos = tokenizer.eos_id
    prompts, fits, pairs = [], [], []
    for _ in range(size.rows):
        prompt, ids = cut(cuts, tokenizer, size.prompt)
        chosen, rejected = (cut(cuts, tokenizer, size.prompt // 4)[0] for _ in range(2))
        prompts.append({"prompt": prompt, "ids": ids, "chosen": chosen, "rejected": rejected})
        text, ids = cut(cuts, tokenizer, length() - 1)
        fits.append({"text": text, "ids": [*ids, eos]})
        shared = min(PAIR_PROMPT, low // 2)
        first = cut(cuts, tokenizer, shared)
        one, two = (cut(cuts, tokenizer, length() - shared - 1, after=first) for _ in range(2))
        ids_of = {"prompt_ids": first[1], "chosen_ids": [*one[1], eos], "rejected_ids": [*two[1], eos]}
        pairs.append({"prompt": first[0], "chosen": one[0], "rejected": two[0], **ids_of})
    for name, rows in (("prompts", prompts), ("sft", fits), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def pieces(files: list[Path], tokenizer: Tokenizer, draw: random.Random) -> Iterator[list[int]]:
    """An endless walk over places in the files: the ids of a text that begins there."""
    texts = [" ".join(path.read_text(errors="replace").split()) for path in files]
    while True:
        text = draw.choice(texts)
        start = draw.randrange(max(1, len(text) - 4000))
        yield tokenizer.encode(text[start : start + 4000])


def cut(
    cuts: Iterator[list[int]], tokenizer: Tokenizer, length: int, after: tuple[str, list[int]] = ("", [])
) -> tuple[str, list[int]]:
    """A text of exactly so many tokens, read back as the same ids by itself and behind the text `after`."""
    before, shown = after
    while True:
        ids = next(cuts)[:length]
        text = tokenizer.decode(ids)
        alone, behind = tokenizer.encode(text) == ids, tokenizer.encode(before + text) == [*shown, *ids]
        if len(ids) == length and text.strip() and alone and behind:
            return text, ids


def read_rows(model: Path, name: str) -> list[dict[str, Any]]:
    """The rows that stand beside a model."""
    path = model.parent / "rows" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
