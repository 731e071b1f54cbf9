"""Fetches the Python code of a client package, and what importing it needs, into a folder for PYTHONPATH.

usage: python scripts/client_sources.py vllm DIR [--version 0.33.0]

    python scripts/client_sources.py vllm build/clients --version 0.33.0
    BROADHEAD_REQUIRE_CLIENTS=vllm PYTHONPATH=build/clients:python pytest tests/integrations -k vllm

The wheel comes from the package index by pip. Only Python files are kept: compiled code needs a GPU and the torch that
it was built for. Tests run the client's own functions on it. A folder that holds the version already is left as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: What each client imports before its attention, besides torch, transformers and what these bring.
IMPORTS = {
    "vllm": (
        "aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed-tensors", "depyf", "diskcache", "einops",
        "fastapi", "gguf", "ijson", "jsonschema", "lark", "llguidance", "mistral-common", "msgspec", "openai",
        "openai-harmony", "opencv-python-headless", "partial-json-parser", "pillow", "prometheus-client", "psutil",
        "py-cpuinfo", "pybase64", "pydantic", "pydantic-settings", "python-json-logger", "pyzmq", "regex", "requests",
        "sentencepiece", "setproctitle", "tiktoken", "typing-extensions", "uvloop", "watchfiles", "xgrammar",
    ),
}  # fmt: skip
KEPT = (".py", ".json", ".pyi")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=IMPORTS)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    parser.add_argument("--version", help="default: the newest")
    return parser.parse_args(arguments)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def unpack(wheel: Path, folder: Path) -> int:
    """Files of a wheel that are text of Python, or about the distribution."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(KEPT) or ".dist-info/" in name]
        archive.extractall(folder, names)
    return len(names)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    name = f"{options.client}-{options.version}.dist-info"
    if options.version and (options.folder / name).is_dir():
        print(f"{options.folder} has {options.client} {options.version} already")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    requirement = options.client if options.version is None else f"{options.client}=={options.version}"
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "--dest", scratch, requirement)
        (wheel,) = Path(scratch).glob("*.whl")
        count = unpack(wheel, options.folder)
    # Into the environment of the tests: these are small, and some are there already.
    pip("install", *IMPORTS[options.client])
    print(f"{options.folder}: {count} files of {wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
