"""Weights and checkpoints are safetensors and JSON; nothing that a model's folder holds is ever run."""

import ast
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_decoder
from tests.rewards.test_limits import Trap
from upslope.errors import DataError, ModelError
from upslope.models.hf import load_decoder, save_decoder
from upslope.text.tokenizer import Tokenizer

SOURCES = sorted((Path(__file__).parent.parent / "upslope").rglob("*.py"))


def test_nothing_in_the_package_unpickles_but_processes_that_it_starts_itself():
    """They read what their own starter sends: the user's function, a recipe. Nothing comes back that way."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = f"{ast.unparse(node.func.value)}.{node.func.attr}"
                if called.rpartition(".")[0] in ("torch", "pickle", "cloudpickle", "np", "joblib", "marshal") and (
                    node.func.attr in ("load", "loads")
                ):
                    found.append((path.name, called))
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
    assert set(found) == {("worker.py", "cloudpickle.loads"), ("child.py", "cloudpickle.loads")}


def test_pickled_weights_are_refused_in_one_line_and_not_opened(tmp_path):
    save_decoder(tiny_decoder(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    with pytest.raises(ModelError, match=r"has no model.safetensors; upslope reads no pickled weights") as caught:
        load_decoder(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"pytorch_model.bin is a file but not .gguf"):
        load_decoder(tmp_path / "pytorch_model.bin")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path):
    save_decoder(tiny_decoder(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(pickle.dumps(Trap(str(tmp_path / "ran"))))
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_decoder(tmp_path)
    torch.save({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="damaged or cut short"):
        load_decoder(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_code_in_a_tokenizers_folder_is_not_run(tmp_path, tokenizer_dir):
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    (tmp_path / "t" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    (tmp_path / "t" / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", null]}}'
    )
    try:
        Tokenizer.load(tmp_path / "t")
    except DataError as error:
        assert "\n" not in str(error)
    assert not (tmp_path / "ran").exists()
