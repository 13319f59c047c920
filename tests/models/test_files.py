"""Weight files: every layout that has to load, and everything that must not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgead.errors import WeightsError
from edgead.models.files import (
    load_directions,
    load_mobilenet,
    load_teacher,
    read_state_dict,
    save_safetensors,
)
from edgead.models.pdn import PDN, Size

INDICES = {"s": ("0", "3", "6", "8"), "m": ("0", "3", "6", "8", "10", "12")}


def nelson_layout(teacher: PDN) -> dict[str, Tensor]:
    names = {f"conv{i + 1}": index for i, index in enumerate(INDICES[teacher.size])}
    return {f"{names[k.split('.')[0]]}.{k.split('.')[1]}": v for k, v in teacher.state_dict().items()}


@pytest.mark.parametrize("size", ["s", "m"])
def test_own_nelson_and_anomalib_layouts_give_the_same_network(tmp_path: Path, size: str) -> None:
    teacher = PDN(size)
    state = teacher.state_dict()
    files = {
        "own.safetensors": state,
        "nelson.pth": nelson_layout(teacher),
        "anomalib.pth": state,
        "wrapped.pth": {"state_dict": {f"model.teacher.{k}": v for k, v in state.items()}},
        "module.pth": {f"module.{k}": v for k, v in nelson_layout(teacher).items()},
        "rximg.pth": {f"pdn.{k}": v for k, v in state.items()},
    }
    for name, content in files.items():
        path = tmp_path / name
        if path.suffix == ".safetensors":
            save_safetensors(path, content, {"steps": "3"})
        else:
            torch.save(content, path)
        loaded, info = load_teacher(path)
        assert loaded.size == size and not loaded.training
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, state[key]), (name, key)
        assert info.name == name and len(info.sha256) == 64


def test_fp16_files_become_fp32(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    save_safetensors(path, {k: v.half() for k, v in PDN("s").state_dict().items()}, {})
    teacher, _ = load_teacher(path)
    assert all(p.dtype == torch.float32 for p in teacher.parameters())


def test_directions_come_with_a_teacher_or_not_at_all(tmp_path: Path, random_teacher: Path) -> None:
    assert load_directions(random_teacher) is None
    state = PDN("s").state_dict()
    extra = {"directions": torch.eye(384).flip(0), "energy": torch.full((384,), 1 / 384)}
    path = tmp_path / "t.safetensors"
    save_safetensors(path, state | extra, {})
    assert load_teacher(path)[0].size == "s"
    found = load_directions(path)
    assert found is not None
    assert torch.equal(found[0], extra["directions"]) and torch.equal(found[1], extra["energy"])
    for wrong in ({"directions": torch.eye(64), "energy": torch.ones(64)}, {"energy": extra["energy"]}):
        save_safetensors(path, state | wrong, {})
        with pytest.raises(WeightsError, match="directions and energy have shapes"):
            load_directions(path)


def test_pickled_module_is_refused_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "teacher_final.pth"
    torch.save(PDN("s"), path)
    with pytest.raises(WeightsError, match=r"state_dict\(\)"):
        load_teacher(path)


def test_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    flag = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(flag)!r}, 'w').close()",))

    path = tmp_path / "evil.pth"
    torch.save({"conv1.weight": Evil()}, path)
    with pytest.raises(WeightsError):
        load_teacher(path)
    assert not flag.exists()


def _drop(state: dict[str, Tensor]) -> None:
    del state["conv3.bias"]


def _add(state: dict[str, Tensor]) -> None:
    state["conv9.weight"] = torch.zeros(1)


def _reshape(state: dict[str, Tensor]) -> None:
    state["conv4.weight"] = torch.zeros(768, 256, 4, 4)


def _nan(state: dict[str, Tensor]) -> None:
    state["conv2.weight"][0, 0, 0, 0] = float("nan")


def _other_first(state: dict[str, Tensor]) -> None:
    state["conv1.weight"] = torch.zeros(64, 3, 7, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing conv3\.bias \(256,\)"),
        (_add, r"surplus conv9\.weight \(1,\)"),
        (_reshape, r"conv4\.weight has shape \(768, 256, 4, 4\), expected \(384, 256, 4, 4\)"),
        (_nan, "NaN or infinite values in conv2.weight"),
        (_other_first, r"no PDN teacher.*conv1\.weight \(64, 3, 7, 7\)"),
    ],
)
def test_whatever_does_not_fit_is_listed(tmp_path: Path, change: object, message: str) -> None:
    state = PDN("s").state_dict()
    change(state)  # type: ignore[operator]
    path = tmp_path / "t.safetensors"
    save_safetensors(path, state, {})
    with pytest.raises(WeightsError, match=message):
        load_teacher(path)


@pytest.mark.parametrize("name", ["t.safetensors", "t.pth"])
def test_missing_truncated_and_empty_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with pytest.raises(WeightsError, match="no such weight file"):
        read_state_dict(path)
    if path.suffix == ".safetensors":
        save_safetensors(path, PDN("s").state_dict(), {})
    else:
        torch.save(PDN("s").state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="cannot be read as weights .[^)]"):
            read_state_dict(path)


def test_a_teacher_is_no_backbone(tmp_path: Path, random_teacher: Path) -> None:
    with pytest.raises(WeightsError, match="does not fit MobileNetV2"):
        load_mobilenet(random_teacher)


@pytest.mark.parametrize(("size", "most_bytes"), [("s", 6_000_000), ("m", 17_000_000)])
def test_shipped_teacher_loads_and_says_where_it_comes_from(size: Size, most_bytes: int) -> None:
    from edgead.models.files import shipped_teacher

    teacher, info = load_teacher(shipped_teacher(size))
    assert teacher.size == size
    assert shipped_teacher(size).stat().st_size < most_bytes
    assert int(info.metadata["steps"]) >= 500 and float(info.metadata["held_out_loss"]) < 0.6
    card = shipped_teacher(size).with_suffix(".md").read_text(encoding="utf-8")
    assert info.metadata["backbone_sha256"] in card and info.sha256 in card
