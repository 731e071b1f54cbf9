"""examples/context_parallel.py: two processes agree with one; a wrong result, a slow run and a wrong start are told."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import context_parallel
import loss_curves
import pytest
import torch
from ranks import run_ranks, torchrun

from scripts import ROOT

HAS_REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_registry = pytest.mark.skipif(not HAS_REGISTRY, reason=f"torch {torch.__version__} has no registry")


@needs_registry
def test_torchrun_starts_it(tmp_path: Path) -> None:
    options = ["--device", "cpu", "--seqlen", "64", "--rotate", "alltoall", "--out", str(tmp_path / "out.json")]
    result = torchrun(ROOT / "examples/context_parallel.py", *options)
    assert result.returncode == loss_curves.OK, result.stdout + result.stderr
    assert "64 tokens, 4/2 heads, head_dim 32, torch.float32" in result.stdout
    records = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [record["case"]["head_dim"] for record in records] == [32, 64]
    for record in records:
        assert record["processes"] == 2 and record["rotate"] == "alltoall" and record["passed"]
        assert record["versions"]["torch"] == torch.__version__ and "--seqlen=64" in record["command"]
        assert record["speedup"] == pytest.approx(record["seconds_alone"] / record["seconds_parallel"])
        assert set(record["differences"]) == {"out", "dq", "dk", "dv"} and len(record["kernels"]) == 2
    assert result.stdout.count("2 parallel") == 2 and result.stdout.count("calls of the torch reference") == 4


def check_wrong_results(rank: int) -> None:
    """A process whose keys are wrong makes the example fail in both."""
    from broadhead.integrations import torch_attention

    draw = context_parallel.attend_in_parallel

    def wrong(whole: Any, *others: Any) -> Any:
        results, seconds = draw(whole, *others)
        return [results[0] + 0.01 * rank, *results[1:]], seconds

    context_parallel.attend_in_parallel = wrong  # type: ignore[assignment]
    options = argparse.Namespace(size="tiny", seed=0, rotate="allgather")
    case = context_parallel.Case(32, 2, 1, 16)
    with torch_attention.activate("cpu"):
        passed, record = context_parallel.compare(case, options, torch.device("cpu"))
        assert not passed and not record["passed"]


def check_staging(rank: int) -> None:
    """What processes of one GPU do: everything goes through the CPU, and the results are the same."""
    import torch.distributed._functional_collectives as collectives
    from broadhead.integrations import torch_attention
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    options = argparse.Namespace(size="tiny", seed=rank, rotate="allgather")  # the drawn tensors are those of process 0
    gathers = "all_gather_single" if hasattr(collectives, "all_gather_single") else "all_gather_tensor"
    plain = getattr(collectives, gathers)
    told: list[str] = []
    for rotate, name in (("allgather", gathers), ("alltoall", "permute_tensor")):
        set_rotate_method(rotate)
        with torch_attention.activate("cpu"), context_parallel.staged_through_cpu():
            staged = getattr(collectives, name)
            assert staged is not plain
            setattr(
                collectives, name, lambda *args, staged=staged, **kwargs: told.append("") or staged(*args, **kwargs)
            )
            passed, _ = context_parallel.compare(context_parallel.Case(64, 2, 1, 16), options, torch.device("cpu"))
        assert passed and told, rotate
        told.clear()
    assert getattr(collectives, gathers) is plain


@needs_registry
def test_processes_of_one_gpu_go_through_the_cpu() -> None:
    run_ranks(check_staging)


@needs_registry
@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device", "cuda", "--size", "real"]])
def test_a_shared_gpu_shows_no_speed(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert context_parallel.main(["--share-gpu", *words]) == loss_curves.CANNOT_RUN
    assert "--share-gpu is for a GPU, and for --size tiny or middle" in capsys.readouterr().err


@needs_registry
def test_wrong_results_are_told() -> None:
    run_ranks(check_wrong_results)


def test_differences_are_relative() -> None:
    one = [torch.full((4,), value) for value in (1.0, 2.0, 3.0, 4.0)]
    other = [one[0], one[1] * 1.5, *one[2:]]
    assert context_parallel.differences(one, other) == {"out": 0.0, "dq": 0.5, "dk": 0.0, "dv": 0.0}


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WORLD_SIZE", "2")
    yield


@needs_registry
def test_one_process_is_told_to_use_torchrun(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert context_parallel.main([]) == loss_curves.CANNOT_RUN
    assert "torchrun --nproc-per-node 2" in capsys.readouterr().err


@needs_registry
def test_the_real_size_is_for_gpus(capsys: pytest.CaptureFixture[str], two_processes: None) -> None:
    assert context_parallel.main(["--size", "real", "--device", "cpu"]) == loss_curves.CANNOT_RUN
    assert "is for GPUs" in capsys.readouterr().err


@needs_registry
def test_a_process_without_a_gpu(
    capsys: pytest.CaptureFixture[str], two_processes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert context_parallel.main(["--device", "cuda"]) == loss_curves.CANNOT_RUN
    assert "a GPU of its own: process 1" in capsys.readouterr().err


def test_an_older_torch_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    assert context_parallel.main([]) == loss_curves.CANNOT_RUN
    assert "torch >= 2.10 is needed" in capsys.readouterr().err


def test_the_work_is_that_of_seven_products() -> None:
    """Causal, one head of dim 8 over 4 tokens: 7 products of 2 * 8 * 16 / 2 operations."""
    assert context_parallel.teraflops(context_parallel.Case(4, 1, 1, 8)) * 1e12 == pytest.approx(7 * 2 * 8 * 16 / 2)
