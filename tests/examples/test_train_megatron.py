"""examples/train_megatron.py: both specs train, and the layers are ours."""

from __future__ import annotations

import pytest
from clients import client
from training_examples import one_thread


@pytest.mark.parametrize("spec", ["megatron", "slime"])
def test_it_trains(spec: str, capsys: pytest.CaptureFixture[str]) -> None:
    client("megatron")
    import train_megatron

    with one_thread():
        status = train_megatron.main(["--spec", spec, "--steps", "31", "--seed", "1"])
    said = capsys.readouterr().out
    assert status == 0, said
    assert "2 layers run BroadheadCoreAttention" in said
    assert said.count("softmax offsets") == (2 if spec == "slime" else 0)
    for direction in ("forward", "backward"):
        assert f"{direction}, head_dim 64: 62 calls of " in said
