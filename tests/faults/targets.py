"""What must meet any input with an answer or one line: a function of a folder and bytes for each reader, with seeds.

An UpslopeError of one line is right; any other exception, a crash or a hang is a fault. Shared by the hypothesis tests
(test_readers.py) and by `make fuzz`.
"""

from __future__ import annotations

import functools
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import torch
from datasets import Dataset

from tests.conftest import make_recipe, make_rows, save_tokenizer, tiny_decoder
from tests.faults.harness import to_toml
from tests.text.packages import FILES, SENSES, put
from upslope.config import load_recipe
from upslope.errors import UpslopeError
from upslope.models.hf import load_decoder, save_decoder
from upslope.observe.events import EventLog, read_events
from upslope.sources import cache_folder
from upslope.text import corpora, labelled
from upslope.text.rows import load_rows
from upslope.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Target:
    """read(folder, data) puts the data where the reader finds it; seeds are inputs that it accepts."""

    read: Callable[[Path, bytes], object]
    seeds: Callable[[], list[bytes]]


def meets(target: Target, folder: Path, data: bytes) -> str:
    """Give the input to the reader: "accepted", or the one line that it was refused with. Anything else is raised."""
    try:
        target.read(folder, data)
    except UpslopeError as error:
        said = str(error)
        if "\n" in said or not said.strip():
            raise AssertionError(f"not one line: {said!r}") from error
        return said
    return "accepted"


def _recipe(folder: Path, data: bytes) -> object:
    (folder / "r.toml").write_bytes(data)
    return load_recipe(folder / "r.toml")


def _rows(ending: str) -> Callable[[Path, bytes], object]:
    def read(folder: Path, data: bytes) -> object:
        (folder / f"rows.{ending}").write_bytes(data)
        return load_rows(folder / f"rows.{ending}").to_list()

    return read


def _corpus(name: str, source: str) -> Callable[[Path, bytes], object]:
    """A corpus of small packages that are whole but for one file of theirs."""

    def read(folder: Path, data: bytes) -> object:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(folder))
            if not cache_folder().exists():
                put({**FILES, **(SENSES if name == "senses" else {})})
            put({source: data})
            return load_rows(f"corpus:{name}").to_list()

    return read


def _events(folder: Path, data: bytes) -> object:
    (folder / "events.jsonl").write_bytes(data)
    return read_events(folder / "events.jsonl")


def _config(folder: Path, data: bytes) -> object:
    _decoder_folder(folder)
    (folder / "config.json").write_bytes(data)
    return load_decoder(folder)


def _safetensors(folder: Path, data: bytes) -> object:
    _decoder_folder(folder)
    (folder / "model.safetensors").write_bytes(data)
    return load_decoder(folder)


def _index(folder: Path, data: bytes) -> object:
    _decoder_folder(folder)
    try:
        (folder / "model.safetensors.index.json").write_bytes(data)
        return load_decoder(folder)
    finally:
        (folder / "model.safetensors.index.json").unlink()


def _gguf(folder: Path, data: bytes) -> object:
    (folder / "m.gguf").write_bytes(data)
    return load_decoder(folder / "m.gguf")


def _tokenizer_file(folder: Path, data: bytes) -> object:
    (folder / "tokenizer_config.json").write_bytes((_tokenizer()[1] / "tokenizer_config.json").read_bytes())
    (folder / "tokenizer.json").write_bytes(data)
    return Tokenizer.load(folder).encode("a fine film")


def _tokenizer_text(folder: Path, data: bytes) -> object:
    """Any text there is comes back whole, is the sum of its pieces, and is a turn of a conversation."""
    tokenizer, text = _tokenizer()[0], data.decode("utf-8", "replace")
    ids = tokenizer.encode(text, special=False)
    special = any(token in text for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    if tokenizer.decode(ids, skip_special=False) != text or "".join(tokenizer.pieces(ids[:50])) != tokenizer.decode(
        ids[:50], skip_special=False
    ):
        raise AssertionError(f"{text!r} does not come back")
    made, trained = tokenizer.chat_example([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    if len(made) != len(trained) or (not special and trained.count(True) != len(ids) + 1):
        raise AssertionError(f"{text!r}: {trained.count(True)} trained tokens of {len(ids)} and an end")
    return made


@functools.cache
def _tokenizer() -> tuple[Tokenizer, Path]:
    folder = save_tokenizer(Path(tempfile.mkdtemp(prefix="upslope-fuzz-")))
    return Tokenizer.load(folder), folder


@functools.cache
def _decoder_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        save_decoder(tiny_decoder(), Path(folder))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _decoder_folder(folder: Path) -> None:
    for name, data in _decoder_files().items():
        if not (folder / name).exists() or (folder / name).read_bytes() != data:
            (folder / name).write_bytes(data)


def _gguf_seed() -> list[bytes]:
    model = tiny_decoder()
    c = model.config
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder) / "m.gguf", "llama")
        writer.add_context_length(c.context)
        writer.add_embedding_length(c.width)
        writer.add_block_count(c.layers)
        writer.add_feed_forward_length(c.ffn_width)
        writer.add_head_count(c.heads)
        writer.add_head_count_kv(c.kv_heads)
        writer.add_key_length(c.head_dim)
        writer.add_layer_norm_rms_eps(c.norm_eps)
        parts = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up"}
        parts |= {"down": "ffn_down", "attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
        writer.add_tensor("token_embd.weight", model.embed.weight.detach().numpy())
        writer.add_tensor("output_norm.weight", model.norm.weight.detach().numpy())
        for i, block in enumerate(model.blocks):
            for ours, theirs in parts.items():
                writer.add_tensor(f"blk.{i}.{theirs}.weight", getattr(block, ours).weight.detach().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return [(Path(folder) / "m.gguf").read_bytes()]


def _event_seed() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        log = EventLog(Path(folder) / "e.jsonl")
        log.write("step", stage="rl", step=1, metrics={"reward/mean": 0.5, "bad": float("nan")})
        log.write("account", text="naïve \ud800")
        log.close()
        return [(Path(folder) / "e.jsonl").read_bytes()]


def _jsonl() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in make_rows()[:6])


def _csv(separator: str) -> bytes:
    lines = [f'"{row["text"]}"{separator}{row["film"]}{separator}{row["label"]}' for row in make_rows()[:6]]
    return "\n".join([separator.join(("text", "film", "label")), *lines, ""]).encode()


def _parquet() -> bytes:
    buffer = io.BytesIO()
    Dataset.from_list(make_rows()[:6]).to_parquet(buffer)
    return buffer.getvalue()


# what a corpus is made of: a name for the file, the corpus, the file
CORPORA: Mapping[str, tuple[str, str]] = {
    "sword index": ("bible", f"{corpora.KING_JAMES}/ot.bzs"),
    "sword places": ("bible", f"{corpora.KING_JAMES}/ot.bzv"),
    "sword text": ("bible", f"{corpora.KING_JAMES}/ot.bzz"),
    "codespell": ("spelling", corpora.CODESPELL),
    "wordnet glosses": ("words", f"{corpora.WORDNET}/data.noun"),
    "wordnet senses": ("words", f"{corpora.WORDNET}/index.sense"),
    "wordnet meanings": ("senses", f"{corpora.WORDNET}/data.noun"),
    "dictionary": ("german-english", corpora.DING),
    "conversations": ("dialogue", corpora.CHATS),
    "mail": ("mail", f"{labelled.MAIL}/spam-2/00002.json"),
    "newswire": ("newswire", labelled.NEWSWIRE.format(side="test")),
    "apt packages": ("descriptions", "apt:en/a_Packages"),
    "apt descriptions": ("descriptions", "apt:en/a_Translation-en"),
    "apt translations": ("synopses", "apt:de/a_Translation-de"),
}


def _file(corpus: str, source: str) -> Callable[[], list[bytes]]:
    data = (SENSES if corpus == "senses" else FILES)[source]
    return lambda: [data if isinstance(data, bytes) else data.encode()]


TARGETS: Mapping[str, Target] = {
    "recipe": Target(_recipe, lambda: [to_toml(make_recipe(Path("m"))).encode()]),
    "jsonl": Target(_rows("jsonl"), lambda: [_jsonl(), b'{"a": [{"b": null}]}\n{"a": []}\n{"c": 1}\n{"c": 0.5}\n']),
    "jsonl.gz": Target(_rows("jsonl.gz"), lambda: [gzip.compress(_jsonl(), mtime=0)]),
    "json": Target(_rows("json"), lambda: [json.dumps(make_rows()[:6]).encode()]),
    "csv": Target(_rows("csv"), lambda: [_csv(",")]),
    "tsv": Target(_rows("tsv"), lambda: [_csv("\t")]),
    "parquet": Target(_rows("parquet"), lambda: [_parquet()]),
    "events": Target(_events, _event_seed),
    "config.json": Target(_config, lambda: [_decoder_files()["config.json"]]),
    "safetensors": Target(_safetensors, lambda: [_decoder_files()["model.safetensors"]]),
    "index.json": Target(_index, lambda: [b'{"weight_map": {"embed": "model.safetensors"}}']),
    "gguf": Target(_gguf, _gguf_seed),
    "tokenizer.json": Target(_tokenizer_file, lambda: [(_tokenizer()[1] / "tokenizer.json").read_bytes()]),
    "tokenizer text": Target(_tokenizer_text, lambda: [b"a fine film", "naïve \U0001f600\r\n\0<|im_end|>".encode()]),
    **{name: Target(_corpus(*of), _file(*of)) for name, of in CORPORA.items()},
}

torch.set_num_threads(1)
