"""Text to token ids and back, by the model's own tokenizer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, logging

from upslope.errors import DataError

MASK = "<|mask|>"  # and of one for an encoder
BOS, EOS = "<|begin|>", "<|end|>"  # of a tokenizer that is trained here
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Tokenizer:
    """One tokenizer of transformers, with the few answers that training needs.

    for_sources: a prompt is a source that an encoder reads, so that it is encoded as the tokenizer encodes a text.
    """

    labels: tuple[str, ...] = ()  # see labels.py
    separator: int | None = None  # see passages.py

    def __init__(self, inner: Any, source: str, *, for_sources: bool = False) -> None:
        eos = inner.sep_token_id if inner.eos_token_id is None and for_sources else inner.eos_token_id
        if eos is None:
            raise DataError(
                f"the tokenizer of {source} has no EOS token", "set eos_token: without it nothing learns to end"
            )
        self.inner = inner
        self.source = source
        self.for_sources = for_sources
        self.eos_id: int = int(eos)
        self.end_id = self.eos_id  # of a text, also where labels are what is written (labels.py)
        self.bos_id: int | None = None if inner.bos_token_id is None else int(inner.bos_token_id)
        self.vocab_size: int = len(inner)
        encoded = inner("a").input_ids
        self.adds_bos: bool = self.bos_id is not None and len(encoded) > 0 and encoded[0] == self.bos_id
        vocabulary = "\n".join(f"{token}\t{number}" for token, number in sorted(inner.get_vocab().items()))
        self.fingerprint: str = hashlib.sha256(vocabulary.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @staticmethod
    def load(source: Path | str, *, for_sources: bool = False) -> Tokenizer:
        """From a folder in Hugging Face layout, a .gguf file or a hub id. Raises DataError."""
        path = Path(source)
        logging.set_verbosity_error()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if path.suffix == ".gguf":
                    inner = AutoTokenizer.from_pretrained(
                        str(path.parent), gguf_file=path.name, trust_remote_code=False
                    )
                else:
                    inner = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds for files it cannot use
            reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
            raise DataError(
                f"no usable tokenizer in {source}: {reason}", "name a folder with tokenizer.json, or a whole .gguf"
            ) from None
        return Tokenizer(inner, str(source), for_sources=for_sources)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text, with the one BOS in front that the model wants (none for `special` False), never an EOS."""
        ids: list[int] = self.inner.encode(text, add_special_tokens=False)
        if special and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of what a completion is written to.

        A source gets all that the tokenizer puts around a text (T5: an EOS, BART: a BOS and an EOS), and one without
        text is empty: there is nothing for an encoder to read.
        """
        if not self.for_sources:
            return self.encode(text)
        ids: list[int] = self.inner.encode(text, add_special_tokens=True) if text.strip() else []
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        text: str = self.inner.decode(list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
        return text

    def source_pieces(self, ids: Sequence[int]) -> list[str]:
        """The tokens of a prompt as text."""
        return self.pieces(ids)

    def pieces(self, ids: Sequence[int], *, skip_special: bool = False) -> list[str]:
        """The text that each token adds; a character of several tokens is added by its last one.

        Decoded from the last piece but one on, so that the work grows with the tokens and not with their square.
        """
        pieces, begin, shown = [], 0, 0  # ids[begin:shown] have been shown, and lead in what comes next
        for n in range(1, len(ids) + 1):
            before = self.decode(ids[begin:shown], skip_special=skip_special)
            text = self.decode(ids[begin:n], skip_special=skip_special)
            if text.endswith("\ufffd") and n < len(ids):
                pieces.append("")  # not a whole character yet
                continue
            pieces.append(text[len(before) :])
            begin, shown = shown, n
        return pieces

    def chat(self, messages: Sequence[Mapping[str, str]], *, generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation by the chat template, ready for the assistant to go on. Raises DataError."""
        return self.encode(self._chat_text(messages, generation_prompt), special=False)

    def chat_example(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[int], list[bool]]:
        """(ids, trained): what the assistant says is trained, its end-of-turn token included, nothing else."""
        ids: list[int] = []
        trained: list[bool] = []
        shown = ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._chat_text(messages[:turn], True)
            until = self._chat_text(messages[: turn + 1], False)
            if not until.startswith(before) or not before.startswith(shown):
                raise DataError(
                    f"the chat template of {self.source} does not grow turn by turn",
                    "use one row for each assistant turn",
                )
            # by parts, as when the model answers: an answer's first line break never melts into the prompt's last
            asked = self.encode(before[len(shown) :], special=False)
            answer = self.encode(until[len(before) :], special=False)
            trained += [False] * len(asked)
            end = max((i for i, token in enumerate(answer) if token == self.eos_id), default=len(answer) - 1)
            trained += [i <= end for i in range(len(answer))]
            ids += asked + answer
            shown = until
        return ids, trained

    def save(self, folder: Path) -> None:
        """Write it in Hugging Face layout."""
        self.inner.save_pretrained(str(folder))

    def _chat_text(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool) -> str:
        if not self.inner.chat_template:
            raise DataError(f"the tokenizer of {self.source} has no chat template", "use plain prompts")
        try:
            text: str = self.inner.apply_chat_template(
                [dict(m) for m in messages], tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template raises what its author wrote
            raise DataError(f"the chat template refuses these messages: {error}", "check roles and order") from None
        return text


def train_tokenizer(texts: Iterable[str], vocab: int, *, mask: bool = False) -> Tokenizer:
    """A byte-level BPE tokenizer of at most `vocab` tokens, learned from texts.

    All 256 bytes are tokens, so that no text is unknown; the other two are the BOS that stands in front of a text and
    the EOS that ends it. There is no pad. Few or short texts give fewer tokens.
    """
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, *([MASK] if mask else [])],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, raw.token_to_id(BOS))])
    inner = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=BOS, eos_token=EOS, **({"mask_token": MASK} if mask else {})
    )
    inner.chat_template = CHAT_TEMPLATE
    return Tokenizer(inner, "the recipe's rows")
