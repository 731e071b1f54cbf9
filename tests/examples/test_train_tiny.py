"""examples/train_tiny.py: it trains, both curves agree, and attention that is wrong is found."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import loss_curves
import python_text
import tiny_gpt
import train_tiny
from training_examples import one_thread

MINIMAL = tiny_gpt.SIZES["tiny"]._replace(
    hidden=32, intermediate=64, window=16, context=64, batch=2, steps=12, learning_rate=6e-3
)


@pytest.fixture(autouse=True)
def minimal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(tiny_gpt.SIZES, "tiny", MINIMAL)
    with one_thread():
        yield
    torch.use_deterministic_algorithms(False)


def train(folder: Path, *arguments: str) -> int:
    return train_tiny.main(["--device", "cpu", "--seed", "3", "--plot", str(folder / "loss.png"), *arguments])


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_it_trains_like_sdpa(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--checkpoint", "--deterministic"] if layout == "packed" else []
    status = train(tmp_path, "--layout", layout, *options)
    said = capsys.readouterr().out
    assert status == loss_curves.OK, said
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    for direction in ("forward", "backward"):
        for head_dim, layers in ((256, 5), (512, 1)):
            # Checkpoints run the forward pass of a layer twice.
            calls = layers * MINIMAL.steps * (2 if options and direction == "forward" else 1)
            assert f"{direction}, head_dim {head_dim}: {calls} calls of the torch reference" in said


def test_bf16_against_the_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = train(tmp_path, "--dtype", "bf16", "--against", "torch", "--context", "32")
    said = capsys.readouterr().out
    assert status == loss_curves.OK, said
    assert "torch reference: the loss went from" in said


@pytest.mark.parametrize("fault", ["window", "document"])
def test_a_wrong_mask_is_found(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A window one token too short, and packed sequences that see each other."""
    right = tiny_gpt.sdpa_attention

    def wrong(q: Any, k: Any, v: Any, window: int | None, packing: Any) -> torch.Tensor:
        if fault == "window":
            return right(q, k, v, None if window is None else window - 1, packing)
        return right(q, k, v, window, None)

    monkeypatch.setattr(train_tiny, "sdpa_attention", wrong)
    assert train(tmp_path, "--layout", "dense" if fault == "window" else "packed") == loss_curves.FAILED
    assert "FAIL broadhead and SDPA: the first 10 losses differ" in capsys.readouterr().out


def test_a_loss_that_does_not_fall_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tiny_gpt.SIZES, "tiny", MINIMAL._replace(learning_rate=0.0, steps=3))
    assert train(tmp_path) == loss_curves.FAILED


def test_judge_takes_no_nan_and_no_other_end() -> None:
    falling = [5.0 - 0.1 * step for step in range(20)]
    nan = [*falling[:-1], float("nan")]
    parted = [*falling[:15], *(loss + 0.3 for loss in falling[15:])]
    for curve, accepted in ((falling, True), (nan, False), (parted, False)):
        verdicts = loss_curves.judge({"a": curve, "b": falling}, 1e-6)
        assert all(verdict.ok for verdict in verdicts) == accepted


def test_packed_batches_end_with_their_paragraphs() -> None:
    """Each sequence is a piece of one paragraph, and the label of each token is what follows it there."""
    paragraphs = python_text.read_paragraphs()
    text = python_text.PythonText(4, 2000, packed=True, seed=5)
    tokens, labels, packing = text.next()
    assert packing is not None
    offsets = packing.cu_seqlens.tolist()
    assert len(offsets) > 5, "no paragraph ends within these rows"
    assert offsets[0] == 0 and offsets[-1] == 4 * 2000 and packing.max_seqlen == max(packing.cu_seqlens.diff()).item()
    for begin, end in pairwise(offsets):
        piece = bytes(tokens[0, begin:end].tolist())
        assert any(piece in paragraph for paragraph in paragraphs)
        assert labels[0, begin : end - 1].tolist() == list(piece[1:]) and labels[0, end - 1] == python_text.IGNORED
        assert packing.positions[begin:end].tolist() == list(range(end - begin))


@pytest.mark.parametrize("missing", ["matplotlib", "tqdm"])
def test_a_missing_package_is_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else find_spec(name))
    assert train(tmp_path) == loss_curves.CANNOT_RUN
    assert f"pip install {missing}\n" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--size", "vast"), ("--steps", "0"), ("--layout", "paged")])
def test_a_bad_option_is_named(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train_tiny.main([option, value])
    assert stopped.value.code == loss_curves.CANNOT_RUN
    said = capsys.readouterr().err
    assert option in said and repr(value) in said


def test_a_device_that_is_not_here_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "--device", "abacus") == loss_curves.CANNOT_RUN
    assert "--device must be a torch device such as cpu or cuda, got 'abacus'" in capsys.readouterr().err
