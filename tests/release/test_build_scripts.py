"""How a CUDA compiler is found: the one from PyPI must link, and one that does not work is not called absent."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WHEELS = ROOT / "scripts/build_wheels.sh"
SCRIPT = ROOT / "scripts/cuda_from_pypi.sh"

#: A pip that unpacks what the packages of CUDA 13 hold: no lib64, no libcudart.so, an nvcc that links by one folder.
PIP = """\
#!/bin/sh
while [ $# -gt 0 ]; do [ "$1" = --target ] && root="$2/nvidia/cu13"; last="$1"; shift; done
case "$last" in *==13.0.*) folder=lib64 ;; *) folder=lib ;; esac
mkdir -p "$root/bin" "$root/lib" "$root/include" "$root/nvvm"
echo x >"$root/lib/libcudart.so.13"
[ "$BROKEN" ] || echo x >"$root/lib/libcudart_static.a"
cat >"$root/bin/nvcc" <<END
#!/bin/sh
top="\\$(dirname "\\$0")/.."
[ "\\$1" = --version ] && exec echo "release of the packages"
[ -e "\\$top/$folder/libcudart_static.a" ] && exit 0
echo "ld: cannot find -lcudart_static" >&2
exit 1
END
chmod +x "$root/bin/nvcc"
"""


def run_script(tmp_path: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The script with a pip of ours behind `python3 -m pip`."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    python = tmp_path / "bin/python3"
    python.write_text(PIP)
    python.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *arguments], env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
    )


def offered() -> list[str]:
    return subprocess.run([str(SCRIPT), "--list"], capture_output=True, text=True, check=True).stdout.split()


def test_the_versions_are_listed() -> None:
    assert offered() == ["13.0", "13.2"]
    assert "scripts/cuda_from_pypi.sh --list" in (ROOT / ".ci/run").read_text(), "CI tries each of them"


@pytest.mark.parametrize("version", ["13.0", "13.2"])
def test_a_compiler_from_pypi_links(tmp_path: Path, version: str) -> None:
    """nvcc 13.0 looks for its libraries in lib64, nvcc 13.2 in lib."""
    result = run_script(tmp_path, version, str(tmp_path / "cuda"))
    assert result.returncode == 0, result.stderr
    nvcc = result.stdout.strip()
    assert nvcc == str(tmp_path / "cuda/toolkit/bin/nvcc")
    assert subprocess.run([nvcc, "x.cu"]).returncode == 0
    for folder in ("lib", "lib64"):
        assert (tmp_path / "cuda/toolkit" / folder / "libcudart.so").exists()


def test_a_toolkit_without_lib_is_made_anew(tmp_path: Path) -> None:
    """One that an older version of the script left."""
    assert run_script(tmp_path, "13.2", str(tmp_path / "cuda")).returncode == 0
    (tmp_path / "cuda/toolkit/lib").unlink()
    assert run_script(tmp_path, "13.2", str(tmp_path / "cuda")).returncode == 0
    assert (tmp_path / "cuda/toolkit/lib/libcudart_static.a").exists()


@pytest.mark.parametrize("version", ["13.0", "13.2"])
def test_a_compiler_that_does_not_link_is_not_handed_out(tmp_path: Path, version: str) -> None:
    result = run_script(tmp_path, version, str(tmp_path / "cuda"), BROKEN="1")
    assert result.returncode != 0 and result.stdout == ""
    assert "cannot compile and link a kernel" in result.stderr and "cannot find -lcudart_static" in result.stderr


def test_another_version_is_refused(tmp_path: Path) -> None:
    result = run_script(tmp_path, "12.9", str(tmp_path / "cuda"))
    assert result.returncode == 2 and "12.9 is not offered; accepted: 13.0 13.2" in result.stderr


@pytest.mark.parametrize(
    "arguments", [(), ("--out", "x"), ("cu130", "--out"), ("cu130", "out"), ("cu130", "--pythons", "python3")]
)
def test_build_wheels_says_how_it_is_called(arguments: tuple[str, ...]) -> None:
    result = subprocess.run([str(WHEELS), *arguments], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "usage: scripts/build_wheels.sh LABEL [--out DIR] [--python P]... [--archs LIST]\n"


def test_build_wheels_refuses_a_label_that_no_build_has(tmp_path: Path) -> None:
    result = subprocess.run([str(WHEELS), "13.0", "--out", str(tmp_path / "out")], capture_output=True, text=True)
    assert result.returncode == 1 and "label 13.0; accepted: cu129, cu130, cu132" in result.stderr
    assert not (tmp_path / "out").exists()


def test_build_wheels_refuses_a_compiler_of_another_version(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.86'\n")
    nvcc.chmod(0o755)
    env = {**os.environ, "CUDACXX": str(nvcc)}
    command = [str(WHEELS), "cu130", "--out", str(tmp_path / "out")]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 1
    assert "CUDA 13.0 is asked for, but CUDACXX names another" in result.stderr and "12.9" in result.stderr


def cmake_version() -> tuple[int, ...]:
    cmake = shutil.which("cmake")
    if cmake is None:
        return (0,)
    words = subprocess.run([cmake, "--version"], capture_output=True, text=True).stdout.split()
    return tuple(int(part) for part in words[2].split(".")[:2])


def configure(tmp_path: Path, path: str, **environment: str) -> str:
    """What CMake says of a build for 80, in one line: its errors are wrapped."""
    # What the build reads of its environment is the caller's alone: CI itself names kernels that were built before.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BROADHEAD_", "CUDA"))}
    command = [str(shutil.which("cmake")), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Unix Makefiles"]
    command += ["-DBROADHEAD_CUDA_ARCHS=80", "-DBROADHEAD_BINDINGS=OFF"]
    result = subprocess.run(command, env={**kept, "PATH": path, **environment}, capture_output=True, text=True)
    assert result.returncode != 0
    return " ".join((result.stdout + result.stderr).split())


needs_cmake = pytest.mark.skipif(
    cmake_version() < (3, 26) or shutil.which("make") is None or shutil.which("c++") is None,
    reason="CMake 3.26, make and a C++ compiler are needed",
)


def folder_without_nvcc(tmp_path: Path) -> str:
    """A PATH with the tools that CMake needs and no CUDA compiler."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for tool in ("make", "c++", "g++", "cc", "gcc", "ld", "as", "ar", "ranlib", "python3", "sh", "uname"):
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


@needs_cmake
@pytest.mark.parametrize("way", ["CUDACXX", "PATH"])
def test_a_compiler_that_does_not_work_is_not_called_absent(tmp_path: Path, way: str) -> None:
    path = folder_without_nvcc(tmp_path)
    nvcc = Path(path, "nvcc") if way == "PATH" else tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'ld: cannot find -lcudart_static' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    said = configure(tmp_path, path, **({} if way == "PATH" else {"CUDACXX": str(nvcc)}))
    assert f"the CUDA compiler {nvcc}, which {way}" in said and "does not work, for the reason above" in said
    assert "no nvcc was found" not in said
    reason = said[said.index("CMake says of the CUDA compiler: CMake Error") :]
    assert ("is not able to compile" if way == "CUDACXX" else "find CUDA library root") in reason
    # The next run in the folder looks again, for the compiler may have been mended.
    assert "does not work" in configure(tmp_path, path, CUDACXX=str(nvcc))


@needs_cmake
def test_no_compiler_is_said_to_be_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the caller names kernels that were built before, as CI does: with them no compiler is needed."""
    monkeypatch.setenv("BROADHEAD_KERNEL_DIR", str(tmp_path))
    said = configure(tmp_path, folder_without_nvcc(tmp_path))
    assert 'BROADHEAD_CUDA_ARCHS is "80" but no nvcc was found. Put one on PATH, name it by CUDACXX' in said
