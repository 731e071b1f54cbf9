"""examples/train_transformers.py: the Trainer's loss is that of SDPA, and attention that is wrong is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

import loss_curves
import train_transformers
from training_examples import one_thread


@pytest.fixture(autouse=True)
def in_one_thread() -> Iterator[None]:
    with one_thread():
        yield


def train(folder: Path, *arguments: str) -> int:
    minimal = ["--steps", "12", "--context", "32", "--device", "cpu", "--plot", str(folder / "loss.png")]
    return train_transformers.main([*minimal, *arguments])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_it_trains_like_sdpa(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = train(tmp_path, "--dtype", dtype)
    said = capsys.readouterr().out
    assert status == loss_curves.OK, said
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # One layer of four has attention, and checkpoints run its forward pass twice.
    assert "forward, head_dim 256: 24 calls of the torch reference" in said
    assert "backward, head_dim 256: 12 calls of the torch reference" in said


def test_wrong_attention_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import broadhead

    right = broadhead.flash_attn_func

    def wrong(*args: Any, **options: Any) -> Any:
        return right(*args, **{**options, "window_size": (16, 0)})

    monkeypatch.setattr(broadhead, "flash_attn_func", wrong)
    assert train(tmp_path) == loss_curves.FAILED
    assert "FAIL broadhead and SDPA: the first 10 losses differ" in capsys.readouterr().out


def test_the_model_has_both_kinds_of_layers() -> None:
    """Attention of head_dim 256 by the implementation that was asked for, and the same weights for one seed."""
    size = train_transformers.SIZES["tiny"]
    models = [train_transformers.make_model(size, "sdpa", seed) for seed in (4, 4, 5)]
    layers = [name for name, _ in models[0].named_modules() if name.endswith("self_attn")]
    assert 1 <= len(layers) <= size.layers
    first, same, other = (torch.cat([p.flatten() for p in model.parameters()]) for model in models)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_gpu_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_transformers.main(["--device", "cuda"]) == loss_curves.CANNOT_RUN
    assert "use --device cpu" in capsys.readouterr().err
