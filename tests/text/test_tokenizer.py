import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from upslope.errors import DataError
from upslope.text.tokenizer import Tokenizer


@pytest.mark.parametrize("text", ["a fine film", "naïve 😀 漢字", "", " spaces  and\ttabs\n"])
def test_round_trip_and_pieces(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert "".join(tokenizer.pieces(ids)) == text


@given(text=st.text(max_size=20))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_survives(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert "".join(tokenizer.pieces(ids)) == text


def test_c6_one_bos_and_never_two(tokenizer, tokenizer_dir, tmp_path):
    assert tokenizer.encode("a")[0] != tokenizer.bos_id
    inner = Tokenizer.load(tokenizer_dir).inner
    inner.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", inner.bos_token_id)]
    )
    wants = Tokenizer(inner, "made here")
    assert wants.adds_bos
    assert wants.encode("a")[0] == wants.bos_id and wants.encode("a").count(wants.bos_id) == 1
    assert wants.encode("<|im_start|>a").count(wants.bos_id) == 1
    assert wants.encode("a", special=False)[0] != wants.bos_id


def test_chat_is_ready_for_the_answer(tokenizer):
    ids = tokenizer.chat([{"role": "user", "content": "hi"}])
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.fingerprint == tokenizer.fingerprint and again.eos_id == tokenizer.eos_id


def test_without_eos_or_files_it_is_refused(tokenizer_dir, tmp_path):
    inner = Tokenizer.load(tokenizer_dir).inner
    inner.eos_token = None
    with pytest.raises(DataError, match="has no EOS token"):
        Tokenizer(inner, "made here")
    with pytest.raises(DataError, match="no usable tokenizer"):
        Tokenizer.load(tmp_path)
    shutil.copy(tokenizer_dir / "tokenizer.json", tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="no usable tokenizer"):
        Tokenizer.load(tmp_path)


def test_pieces_without_special_tokens_have_the_characters_of_the_text(tokenizer):
    ids = [
        *tokenizer.encode("a fine"),
        tokenizer.eos_id,
        *tokenizer.encode(" film \u00e9\U0001f600", special=False),
        tokenizer.eos_id,
    ]
    pieces = tokenizer.pieces(ids, skip_special=True)
    assert "".join(pieces) == tokenizer.decode(ids) and len(pieces) == len(ids)
    assert pieces[ids.index(tokenizer.eos_id)] == "" == pieces[-1]
