"""Comparing two installations: the processes and their turns, what counts as slower, the calls of every row."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import broadhead
import pytest
import torch
from broadhead import support
from broadhead_bench import compare
from broadhead_bench.compare import Compared, Worker, WorkerError

PACKAGE = Path(broadhead.__file__).parent
#: Behind the new side's package: what its file ``mode`` says befalls each call.
MODES = """

import pathlib
import time

_right, _mode = flash_attn_with_kvcache, pathlib.Path(__file__).with_name("mode")


def flash_attn_with_kvcache(*args, **kwargs):
    if _mode.read_text() == "slow":
        time.sleep(0.8)
    if _mode.read_text() == "fail":
        raise OSError("no")
    return _right(*args, **kwargs)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the package."""
    folder = tmp_path_factory.mktemp("two")
    for name in ("base", "new"):
        shutil.copytree(PACKAGE, folder / name / "broadhead", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "new" / "broadhead" / "__init__.py").open("a") as init:
        init.write(MODES)
    (folder / "new" / "broadhead" / "mode").write_text("right")
    return folder / "base", folder / "new"


@pytest.fixture(scope="module")
def workers(two: tuple[Path, Path]) -> Iterator[tuple[Worker, Worker]]:
    started = Worker("base", two[0], "cpu"), Worker("new", two[1], "cpu")
    yield started
    for worker in started:
        worker.stop()


#: The new side may take so many times as long: other work on the machine makes a side look slower.
TOLERANCE = 3.0


def compare_rows(workers: tuple[Worker, Worker]) -> tuple[list[Compared], list[str]]:
    return compare.compare_kernels(*workers, torch.device("cpu"), "", TOLERANCE, rounds=1)


def test_two_installations(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command: each side imports its own package; kernels and host are measured and written."""
    out = tmp_path / "result.json"
    sides = ["--base", str(two[0]), "--new", str(two[1]), "--device", "cpu"]
    status = compare.main([*sides, "--rounds", "1", "--tolerance", "1000", "--out", str(out)])
    assert status in (compare.OK, compare.SLOWER)
    printed = capsys.readouterr().out
    assert str(two[0]) in printed and str(two[1]) in printed
    records = json.loads(out.read_text())
    assert {r["row"] for r in records} == {"torch", "host"}
    assert len(records) == 1 + 2 * len(compare.HOST_KINDS)
    assert all(r["base"] > 0 and r["new"] > 0 and r["samples"] >= 2 for r in records)


@pytest.mark.parametrize("mode", ["right", "slow", "fail"])
def test_what_befalls_a_side_is_told(mode: str, workers: tuple[Worker, Worker], two: tuple[Path, Path]) -> None:
    (two[1] / "broadhead" / "mode").write_text(mode)
    results, complaints = compare_rows(workers)
    (two[1] / "broadhead" / "mode").write_text("right")
    if mode == "fail":
        assert results == [] and complaints == ["torch short: new: OSError: no"]
        return
    assert complaints == []
    assert (compare.too_slow(results, TOLERANCE, 0.5) == results) == (mode == "slow"), results


def test_a_row_that_one_side_lacks_is_told(workers: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers[1], "ask", lambda do, **arguments: [])
    assert compare_rows(workers) == ([], ["torch: the new side does not have this row"])


def test_a_folder_without_the_package(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named, also where the environment has a broadhead."""
    sides = ["--base", str(tmp_path / "none"), "--new", str(tmp_path), "--device", "cpu"]
    assert compare.main(sides) == compare.BAD_USAGE
    assert "broadhead" in capsys.readouterr().err


def test_turns_alternate() -> None:
    class Fake:
        def __init__(self, name: str) -> None:
            self.name = name

        def ask(self, do: str, runs: int) -> list[float]:
            order.append(self.name)
            return [1.0] * runs

    order: list[str] = []
    base, new = compare.take_turns(Fake("base"), Fake("new"), 3, "time", runs=2)  # type: ignore[arg-type]
    assert order == ["base", "new", "new", "base", "base", "new"]
    assert len(base) == len(new) == 6


def test_what_counts_as_slower() -> None:
    def names(*results: Compared) -> list[str]:
        return [result.call for result in compare.too_slow(list(results), 1.01, 0.5)]

    assert names(Compared("row", "a", 1.0, 1.009, 1), Compared("row", "b", 1.0, 1.011, 1)) == ["b"]
    us = 1e-6
    host = [
        Compared("host", "dense, new out", 10 * us, 10.1 * us, 1),
        Compared("host", "decode, new out", 10 * us, 10.4 * us, 1),
        Compared("host", "dense, given out", 10 * us, 10.4 * us, 1),
        Compared("host", "append, new out", 10 * us, 10.4 * us, 1),
        Compared("host", "varlen, given out", 10 * us, 10.9 * us, 1),
    ]
    assert names(*host) == ["decode, new out", "varlen, given out"]


@pytest.mark.parametrize("row", support.ROWS, ids=lambda row: row.id)
def test_every_row_has_calls(row: support.KernelRow) -> None:
    """A long and a short one, within what the row takes."""
    described = {
        name: getattr(row, name) for name in ("id", "direction", "phase", "dtype", "kv_dtype", "head_dim", "head_dim_v")
    }
    calls = compare.calls_of_row({**described, "requires": list(row.requires), "tile_m": row.tile.tile_m})
    assert {"long", "short"} <= set(calls)
    for name, call in calls.items():
        assert (call["head_dim"], call["head_dim_v"], call["dtype"]) == (row.head_dim, row.head_dim_v, row.dtype)
        assert call["qv"] == ("qv" in row.requires)
        assert (max(call["window"]) >= 0) == (name == "window" or "window" in row.requires)
        assert call["backward"] == (row.direction == "backward")
        if row.kv_dtype:
            assert call["page_size"] > 0
        keys = call["batch"] * call["seqlen_k"] * call["heads_kv"] * (call["head_dim"] + call["head_dim_v"])
        assert keys < 2**30


def test_a_dead_process_is_an_error(workers: tuple[Worker, Worker]) -> None:
    """The last of the tests that need it."""
    workers[0]._process.kill()
    workers[0]._process.wait()
    with pytest.raises(WorkerError, match="base: the process ended"):
        workers[0].ask("rows")
