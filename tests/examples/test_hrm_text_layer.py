"""examples/hrm_text_layer.py: both ways are right, and a wrong mask is found."""

from __future__ import annotations

from typing import Any

import broadhead
import hrm_text_layer
import loss_curves
import pytest


@pytest.mark.parametrize("sequences", [1, 5])
def test_both_ways_are_right(sequences: int, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--sequences", str(sequences), "--seed", str(seed)]
    status = hrm_text_layer.main(options)
    said = capsys.readouterr().out
    assert status == loss_curves.OK, said
    assert "two passes out" in said and "one pass   out" in said


def test_a_missing_prefix_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    varlen = broadhead.flash_attn_varlen_func

    def causal_alone(*args: Any, prefix_lens: Any, **kwargs: Any) -> Any:
        return varlen(*args, **kwargs)

    monkeypatch.setattr(broadhead, "flash_attn_varlen_func", causal_alone)
    assert hrm_text_layer.main(["--device", "cpu"]) == loss_curves.FAILED
    assert "differs from attention in fp64" in capsys.readouterr().out
