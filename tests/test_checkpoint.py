"""Checkpoints and locks under damage: torn, flipped and missing files, full and refusing disks, killed processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import names, newest, save
from upslope import checkpoint as module
from upslope.checkpoint import (
    load_checkpoint,
    save_checkpoint,
)
from upslope.errors import RunError
from upslope.version import VERSION


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    group: dict[str, Tensor] = {str(d): torch.randn(4, 3).mul(9).to(d) for d in module.DTYPES}
    group |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 7),
        "nonfinite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "strided": torch.arange(10)[::3],
        "a parameter/with.a name é": torch.nn.Parameter(torch.ones(2)),
    }
    path = save_checkpoint(tmp_path, 0, tensors={"model": group, "none": {}}, state={})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.path == path and loaded.skipped == []
    assert loaded.has("model") and loaded.has("none") and not loaded.has("state")
    assert loaded.tensors("none") == {}
    back = loaded.tensors("model")
    assert back.keys() == group.keys()
    for name, tensor in group.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape, name
        want, got = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (tensor, back[name]))
        assert torch.equal(want, got), name


def test_tensors_are_aligned_to_their_width(tmp_path: Path) -> None:
    group = {"odd": torch.ones(3, dtype=torch.uint8), "wide": torch.ones(2, dtype=torch.float64), "half": torch.ones(1)}
    data = (save_checkpoint(tmp_path, 1, tensors={"m": group}, state={}) / "m.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert [header[name]["data_offsets"] for name in ("wide", "half", "odd")] == [[0, 16], [16, 20], [20, 23]]


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {"kl": 0.1 + 0.2, "best": float("-inf"), "n": 2**63, "list": [1, None, True], "text": "żółw\n\u2028"}
    save_checkpoint(tmp_path, 1, tensors={}, state=state)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == state


def test_manifest_tells_sizes_checksums_and_versions(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    manifest = json.loads((path / "manifest.json").read_text())
    assert path.name == "step-00000012"
    assert (manifest["format"], manifest["step"], manifest["upslope"]) == (1, 12, VERSION)
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name, seal in manifest["files"].items():
        digest = subprocess.run(["sha256sum", path / name], capture_output=True, text=True, check=True).stdout
        assert seal == {"bytes": (path / name).stat().st_size, "sha256": digest.split()[0]}


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "missing") is None
    assert load_checkpoint(tmp_path) is None
    (tmp_path / "partial-00000003").mkdir()
    (tmp_path / "step-old").mkdir()
    (tmp_path / "step-00000009").write_text("a file, no folder")
    assert load_checkpoint(tmp_path) is None


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (3, [3, 4, 5]), (9, [1, 2, 3, 4, 5])])
def test_only_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    assert newest(tmp_path) == 100_000_000


def test_later_step_replaces_the_same_step(tmp_path: Path) -> None:
    save(tmp_path, 3)
    save_checkpoint(tmp_path, 3, tensors={"model": {}}, state={"again": True})
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.state == {"again": True}
    assert names(tmp_path) == ["step-00000003"]


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_truncate, _flip, _empty, _grow, _folder_instead, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_c56_damaged_newest_falls_back(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path / name)
    if name == "manifest.json" and damage in (_flip, _grow):  # may be harmless to what is loaded: see the next test
        (path / "manifest.json").write_text("{")
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1 and newest(tmp_path) == 1
    assert len(loaded.skipped) == 1 and "step-00000002" in loaded.skipped[0]
    assert name in loaded.skipped[0]


def test_c56_a_flipped_bit_anywhere_in_a_manifest_falls_back_or_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    data = path.read_bytes()
    fell_back = 0
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        fell_back += _newest_step_only(tmp_path) == 1
    assert fell_back > len(data) * 0.7  # white space and the version may flip
    path.write_bytes(data)
    assert newest(tmp_path) == 2


def _newest_step_only(folder: Path) -> int:
    loaded = load_checkpoint(folder)
    assert loaded is not None and loaded.state["step"] == loaded.step
    assert set(loaded.groups) == {"model", "optimizer"}
    return loaded.step


@pytest.mark.parametrize("manifest", ["[]", "3", "null", '{"format": 1}', '{"format": 1, "step": 2, "files": []}'])
def test_c56_a_manifest_of_another_kind_falls_back(tmp_path: Path, manifest: str) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text(manifest)
    assert newest(tmp_path) == 1


def test_c56_a_checkpoint_under_another_number_or_format_falls_back(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(save(tmp_path, 2), tmp_path / "step-00000007")
    assert newest(tmp_path) == 2
    path = tmp_path / "step-00000002" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1
    assert "format 2 is not 1" in loaded.skipped[1]


def test_c56_all_damaged_is_an_error_and_no_new_start(tmp_path: Path) -> None:
    for step in (1, 2):
        _empty(save(tmp_path, step) / "state.json")
    with pytest.raises(RunError, match=r"every checkpoint is damaged: .*step-00000002.*step-00000001.*remove"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [1, 2])
def test_c56_saving_after_a_fall_back_keeps_what_was_saved(tmp_path: Path, keep: int) -> None:
    for step in (10, 12, 14):
        save(tmp_path, step, keep=3)
    for step in (12, 14):
        _flip(tmp_path / f"step-{step:08d}" / "model.safetensors")
    assert newest(tmp_path) == 10
    save(tmp_path, 11, keep=keep)  # pruning by number alone would remove this one, or leave a damaged newest
    assert newest(tmp_path) == 11
    kept = ["step-00000010", "step-00000011"][-keep:]
    assert names(tmp_path) == ["damaged-step-00000012", "damaged-step-00000014", *kept]


def test_a_good_later_checkpoint_is_never_put_aside(tmp_path: Path) -> None:
    save(tmp_path, 14)
    with pytest.raises(RunError, match="holds step-00000014, later than step 12"):
        save(tmp_path, 12)
    assert names(tmp_path) == ["step-00000014"] and newest(tmp_path) == 14


def test_half_written_folder_is_never_read_and_goes_with_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "partial-00000002")
    assert newest(tmp_path) == 1
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    save(tmp_path, 3)
    (tmp_path / "step-00000003").rename(tmp_path / "replaced-00000003")
    assert newest(tmp_path) == 3
    save(tmp_path, 3)
    assert newest(tmp_path) == 3
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_c56_a_flipped_bit_of_a_larger_file_is_found(tmp_path: Path) -> None:
    """100 MB, so that the file spans many chunks of the checksum; the last byte of it is damaged."""
    save_checkpoint(tmp_path, 1, tensors={"model": {"w": torch.ones(4)}}, state={})
    tensors = {f"w{n}": torch.full((2_621_440,), float(n)) for n in range(10)}
    path = save_checkpoint(tmp_path, 2, tensors={"model": tensors}, state={}) / "model.safetensors"
    assert path.stat().st_size > 100_000_000
    assert load_file(path)["w9"][-1] == 9
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None and loaded.step == 1 and "does not match its checksum" in loaded.skipped[0]
