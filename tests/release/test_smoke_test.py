"""scripts/smoke_test.py compares with attention that is right, and fails where a wheel has no kernels."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from installed import FAMILIES

from scripts import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/smoke_test.py"


def test_what_it_compares_with_is_causal_attention() -> None:
    """Key by key in Python: query i of 3 sees the first i + 3 of 5 keys, heads 0 and 1 share a KV head."""
    q, k, v = torch.randn(2, 3, 4, 8).double(), torch.randn(2, 5, 2, 8).double(), torch.randn(2, 5, 2, 8).double()
    found = load_script(SCRIPT).attention(q, k, v)
    for batch in range(2):
        for head in range(4):
            for i in range(3):
                scores = [float(q[batch, i, head] @ k[batch, j, head // 2]) / math.sqrt(8) for j in range(i + 3)]
                weights = [math.exp(score) for score in scores]
                wanted = sum(weight * v[batch, j, head // 2] for j, weight in enumerate(weights)) / sum(weights)
                torch.testing.assert_close(found[batch, i, head], wanted)


@pytest.mark.skipif(bool(FAMILIES), reason="this installation holds kernels")
def test_an_installation_without_kernels_fails() -> None:
    result = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert result.returncode == 1 and "kernel libraries: there are none" in result.stderr, result.stderr
