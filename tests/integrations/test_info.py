"""`broadhead info`: what it says of machines written by hand, what comes first, and when commands show it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import broadhead
import pytest
import torch
from broadhead import cli, info
from broadhead.info import Information, Torch
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import refusal_text, resolve
from broadhead.plan.native import NO_KERNELS, BuildDescription
from broadhead.support import ROWS
from described import FULL, build_of, h200, problem, without_family

TORCH = Torch("2.11.0+cu130", "13.0", None, ())
SOURCE = 'BROADHEAD_CUDA_ARCHS="90a" pip install .'
RELEASE = "pip install --force-reinstall --no-deps broadhead"


def machine(build: BuildDescription, *devices: Any, asked: Torch = TORCH, driver: str | None = "580.95") -> Information:
    """What is told of an installation on a machine with these GPUs."""
    found = tuple(info.examine(number, each, build, 141 << 30) for number, each in enumerate(devices))
    problems = tuple(info.problems_of(asked, driver, build, found))
    return Information(
        "0.2.0",
        "/site/broadhead",
        "3.12.1",
        "Linux",
        asked,
        driver,
        build,
        found,
        {"BROADHEAD_STRICT": "1"},
        {},
        problems,
    )


def test_all_is_well() -> None:
    found = machine(FULL, h200(), h200())
    assert found.problems == () and found.label == "cu130"
    assert found.text().startswith("broadhead 0.2.0: kernels run on 2 of 2 CUDA devices\n\n")
    for words in (
        "libraries of cu130", "sm90: ", "torch        2.11.0+cu130, built with CUDA 13.0", "driver       580.95",
        "serves CUDA 13.0", "cuda:1", "NVIDIA H200", "compute capability 9.0", "141 GiB", "BROADHEAD_STRICT=1",
    ):  # fmt: skip
        assert words in found.text(), words
    assert "missing" not in found.text() and "never executed" not in found.text()
    untried = machine(FULL, hypothetical((8, 9)))
    assert "compiled, never executed" in untried.text() and untried.problems == ()
    assert "never executed" in untried.as_json()["devices"][0]["note"] and found.as_json()["devices"][0]["note"] is None
    of_hopper = {row.id for row in ROWS if (9, 0) in row.capabilities}
    values = json.loads(json.dumps(found.as_json()))
    assert (
        values["ok"] and {kernel for rows in values["devices"][1]["kernels"].values() for kernel in rows} == of_hopper
    )
    counted = [line for line in found.text().splitlines() if "kernels run (" in line][:2]
    assert sum(int(line.split()[1]) for line in counted) == len(of_hopper)


@pytest.mark.parametrize(
    ("build", "device", "words"),
    [
        (NO_KERNELS, h200(), ("the GPU is fine", SOURCE, RELEASE)),
        (build_of("80"), h200(), ('was built for "80", not for', SOURCE)),
        (FULL, hypothetical((7, 5)), ("older than compute capability 8.0",)),
        (BuildDescription(True, (), (("sm90", "no such symbol"),)), h200(), ("does not load (no such symbol)", "anew")),
        (FULL, h200()._replace(cuda_version=(12, 4)), ("serves CUDA 12.4, and kernels need CUDA 13.0", "update")),
    ],
    ids=["no kernels", "other arch", "old GPU", "no load", "old driver"],
)
def test_what_is_wrong_comes_first(build: BuildDescription, device: Any, words: tuple[str, ...]) -> None:
    found = machine(build, device)
    first, *rest = found.text().splitlines()
    assert first == "broadhead 0.2.0: no kernels run here: calls run on the torch reference, which is right, and slow"
    missing = [line for line in rest if line.startswith("  missing: ")]
    assert rest[: len(missing)] == missing and rest[len(missing)] == ""
    for word in words:
        assert any(word in line for line in missing), (word, missing)
    assert not found.as_json()["ok"]


def test_a_part_is_missing() -> None:
    found = machine(without_family("sm90"), h200())
    assert found.headline() == "kernels run on 1 of 1 CUDA devices, but something is missing"
    (problem,) = found.problems
    hopper = sum(row.family == "sm90" for row in ROWS)
    assert f"and {hopper - 1} more kernels: is left out of this build" in problem and SOURCE in problem
    assert f"{hopper} kernels for this device do not run, see above" in found.text()
    # An Ampere device lacks nothing: those kernels are not for it.
    assert machine(without_family("sm90"), hypothetical((8, 0))).problems == ()
    mixed = machine(build_of("90a"), h200(), hypothetical((8, 0))._replace(name="NVIDIA A100"))
    assert mixed.headline() == "kernels run on 1 of 2 CUDA devices, but something is missing"
    assert any(problem.startswith("cuda:1: ") and 'BROADHEAD_CUDA_ARCHS="80"' in problem for problem in mixed.problems)


@pytest.mark.parametrize(
    ("asked", "driver", "hidden", "words"),
    [
        (TORCH, None, None, ("no NVIDIA driver is found", "docker run --gpus all")),
        (Torch("2.11.0+cpu", None, None, ()), "580.95", None, ("built without CUDA", "install a CUDA build of torch")),
        (TORCH, "580.95", "", ("CUDA_VISIBLE_DEVICES hides all of them",)),
        (TORCH._replace(warnings=("too old",)), "470.1", None, ("torch says: too old", "update the driver")),
        (TORCH._replace(cuda=None, hip="6.3"), None, None, ("this torch is for AMD GPUs",)),
    ],
    ids=["no driver", "CPU torch", "hidden", "old driver", "AMD"],
)
def test_why_there_is_no_device(
    asked: Torch, driver: str | None, hidden: str | None, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    found = machine(FULL, asked=asked, driver=driver)
    (problem,) = found.problems
    assert all(word in problem for word in words), problem
    assert "devices      no CUDA device" in found.text()
    assert len(machine(NO_KERNELS, asked=asked, driver=driver).problems) == 2


def test_the_compiled_module_is_missing() -> None:
    problems = info.problems_of(TORCH, "580.95", NO_KERNELS, (), "No module named 'broadhead._C'")
    assert any("does not load (No module named 'broadhead._C')" in problem for problem in problems)
    assert info.module_error(FULL) is None


def test_the_driver_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2\n"
    )
    monkeypatch.setattr(info, "DRIVER_FILE", file)
    assert info.driver_version() == "580.95.05"
    monkeypatch.setattr(info, "DRIVER_FILE", tmp_path / "absent")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert info.driver_version() is None


def test_this_machine() -> None:
    """Only what holds on every machine."""
    found = json.loads(info.report(as_json=True))
    assert found["broadhead"]["version"] == broadhead.__version__ and found["torch"]["version"] == torch.__version__
    assert len(found["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert found["ok"] == (not found["problems"]) and (found["devices"] or found["problems"])
    assert info.report().startswith(f"broadhead {broadhead.__version__}: ")


def test_it_needs_no_package_of_the_other_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain installation has neither typer nor rich."""

    def absent() -> Any:
        raise ModuleNotFoundError("No module named 'typer'", name="typer")

    monkeypatch.setattr(cli, "build_app", absent)
    monkeypatch.setattr(sys, "argv", ["broadhead", "info", "--json"])
    assert cli.main() == 0
    assert json.loads(capsys.readouterr().out)["broadhead"]["version"] == broadhead.__version__
    monkeypatch.setattr(sys, "argv", ["broadhead", "explain"])
    assert cli.main() == 2
    assert "pip install typer rich (`broadhead info` needs neither)" in capsys.readouterr().err


def test_it_loads_neither_typer_nor_rich() -> None:
    code = "import sys, broadhead.info; assert not {'typer', 'rich'} & set(sys.modules), 'loaded'"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(("end", "shown"), [(SystemExit(1), True), (SystemExit(2), False), (SystemExit(0), False),
                                            (RuntimeError("no"), True)], ids=repr)  # fmt: skip
def test_a_command_that_fails_shows_what_is_missing(
    end: BaseException, shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app(**_: Any) -> None:
        raise end

    monkeypatch.setattr(cli, "build_app", lambda: app)
    monkeypatch.setattr(info, "look", lambda: machine(NO_KERNELS, h200()))
    with pytest.raises(type(end)):
        cli.main()
    told = capsys.readouterr().err
    assert (SOURCE in told and "`broadhead info` shows more" in told) == shown


def test_the_command() -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    result = runner.invoke(cli.build_app(), ["info", "--json"])
    assert result.exit_code == 0 and json.loads(result.output)["broadhead"]["location"]
    assert runner.invoke(cli.build_app(), ["info"]).output == info.report() + "\n"


@pytest.mark.parametrize("build", [NO_KERNELS, build_of("80")], ids=["no kernels", "other arch"])
def test_an_error_for_want_of_kernels_names_it(build: BuildDescription) -> None:
    asked = problem()
    text = refusal_text("mha_fwd", asked, h200(), resolve(asked, h200(), build))
    assert SOURCE in text and RELEASE in text and "`broadhead info` shows what this installation holds" in text
    wide = problem(head_dim=520)
    assert "broadhead info" not in refusal_text("mha_fwd", wide, h200(), resolve(wide, h200(), build))
