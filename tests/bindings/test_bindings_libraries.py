"""The kernel libraries that the compiled module finds: what it says of them, and the errors of unfit ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import compile_stub, pytestmark, run, stub  # noqa: F401


def test_build_info(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        """
info = _C.build_info()
assert info["errors"] == {}, info
assert list(info["families"]) == ["sm80"]
family = info["families"]["sm80"]
assert family["archs"] == "80;90" and family["cuda"] == (13, 1) and family["path"] == str(library)
assert family["kernels"][:3] == ["sm80_fwd_d64_bf16", "counting", "prefill_8_bit"]
assert family["kernels"][-1] == "backward_bf16" and len(family["kernels"]) == 8
""",
    )


@pytest.mark.parametrize("families", [("sm80", "sm90"), ("sm90",)])
def test_shared_work_runs_in_the_portable_library(tmp_path: Path, families: tuple[str, ...]) -> None:
    """Combine and metadata are compiled for every architecture in sm80's library, for 90a alone in that of sm90."""
    for family in families:
        compile_stub(tmp_path, family=family)
    run(
        tmp_path,
        f"""
families = {list(families)}
info = _C.build_info()
assert list(info["families"]) == families and info["errors"] == {{}}, info
T = ExchangeTensor
_C.combine(T(4096, (3, 7, 4, 32), F32), T(8192, (3, 7, 4), F32), T(12288, (7, 4, 32)), None, 5)
called = [family for family in families if last_call(library.with_name(f"libbroadhead_{{family}}.so"))]
assert called == families[:1], called
""",
    )


def test_library_of_another_version(tmp_path: Path) -> None:
    compile_stub(tmp_path, "-DSTUB_ABI_VERSION=999")
    text = run(
        tmp_path,
        """
info = _C.build_info()
assert info["families"] == {} and "ABI version 999" in info["errors"]["sm80"], info
print(error(lambda: call(ExchangeTensor)))
""",
    )
    assert "ABI version 999" in text and "one build" in text


def test_file_that_is_no_library(tmp_path: Path) -> None:
    (tmp_path / "libbroadhead_sm80.so").write_text("no ELF")
    text = run(tmp_path, "info = _C.build_info()\nprint(info['errors']['sm80'])\nassert not info['families']")
    assert "does not load" in text


def test_no_library(tmp_path: Path) -> None:
    text = run(
        tmp_path,
        """
assert _C.build_info()["families"] == {} and _C.build_info()["errors"] == {}
print(error(lambda: call(ExchangeTensor)))
T = ExchangeTensor
print(error(_C.combine, T(1, (1, 1, 1, 8), F32), T(1, (1, 1, 1), F32), T(1, (1, 1, 8)), None, 0))
""",
    )
    assert text.count("built without CUDA kernels") == 2
