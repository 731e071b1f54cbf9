"""Fetches the Python code of a client package, and what importing it needs, into a folder for PYTHONPATH.

usage: python scripts/client_sources.py vllm|sglang|lmdeploy|megatron DIR [--version 0.33.0]

    python scripts/client_sources.py vllm build/clients --version 0.33.0
    BROADHEAD_REQUIRE_CLIENTS=vllm PYTHONPATH=build/clients:python pytest tests/integrations -k vllm

The wheel comes from the package index by pip. Compiled code is left out: it needs a GPU and the torch that it was
built for. Tests run the client's own functions on it. A folder that holds the version already is left as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple


class Client(NamedTuple):
    """A client's distribution, and what it imports before its attention, besides torch, transformers and their own."""

    distribution: str
    version: str  # that the tests were written for
    imports: tuple[str, ...]
    #: Options for pip: of these packages some ask for another torch or transformers than there is.
    options: tuple[str, ...] = ()


CLIENTS = {
    "vllm": Client("vllm", "0.33.0", (
        "aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "compressed-tensors", "depyf", "diskcache", "einops",
        "fastapi", "gguf", "ijson", "jsonschema", "lark", "llguidance", "mistral-common", "msgspec", "openai",
        "openai-harmony", "opencv-python-headless", "partial-json-parser", "pillow", "prometheus-client", "psutil",
        "py-cpuinfo", "pybase64", "pydantic", "pydantic-settings", "python-json-logger", "pyzmq", "regex", "requests",
        "sentencepiece", "setproctitle", "tiktoken", "typing-extensions", "uvloop", "watchfiles", "xgrammar",
    )),
    "sglang": Client("sglang", "0.5.23", (
        "aiohappyeyeballs", "aiohttp", "aiosignal", "annotated-doc", "annotated-types", "anyio", "apache-tvm-ffi",
        "attrs", "blobfile",
        "compressed-tensors", "datasets", "dill", "distro", "einops", "fastapi", "frozenlist", "h11", "hf_transfer",
        "httptools", "httpx", "httpcore", "interegular", "jiter", "llguidance", "loguru", "lxml", "mistral-common",
        "ml_dtypes", "modelscope", "msgspec", "multidict", "openai", "openai-harmony", "orjson", "outlines_core",
        "pandas",
        "partial-json-parser", "peft", "pillow", "prometheus-client", "propcache", "psutil", "pyarrow", "pybase64",
        "pycryptodomex", "pydantic", "pydantic-core", "python-multipart", "pyzmq", "requests", "sentencepiece",
        "setproctitle", "sniffio", "soundfile", "starlette", "tiktoken", "timm", "torchao", "triton",
        "typing-inspection",
        "uvicorn", "uvloop", "xgrammar", "xxhash", "yarl",
    ), ("--no-deps",)),
    "lmdeploy": Client("lmdeploy", "0.18.0", (
        "addict", "einops", "fire", "mmengine-lite", "pillow", "platformdirs", "psutil", "pybase64", "pyzmq",
        "requests", "rich",
        "sentencepiece", "shortuuid", "termcolor", "tiktoken", "triton", "yapf",
    ), ("--no-deps",)),
    "megatron": Client("megatron-core", "0.16.1", ()),
}  # fmt: skip
#: Compiled code.
LEFT_OUT = (".so", ".a", ".cubin")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    versions = ", ".join(f"{name} {client.version}" for name, client in CLIENTS.items())
    parser.add_argument("--version", help=f"default: {versions}")
    return parser.parse_args(arguments)


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"], check=True)


def unpack(wheel: Path, folder: Path) -> int:
    """All files of a wheel but compiled code; how many."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith(LEFT_OUT)]
        archive.extractall(folder, names)
    return len(names)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    client = CLIENTS[options.client]
    version = options.version or client.version
    if (options.folder / f"{client.distribution.replace('-', '_')}-{version}.dist-info").is_dir():
        print(f"{options.folder} has {client.distribution} {version} already")
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip("download", "--no-deps", "--dest", scratch, f"{client.distribution}=={version}")
        (wheel,) = Path(scratch).glob("*.whl")
        count = unpack(wheel, options.folder)
    # Into the environment of the tests: these are small, and some are there already.
    if client.imports:
        pip("install", *client.options, *client.imports)
    print(f"{options.folder}: {count} files of {wheel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
