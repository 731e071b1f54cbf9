"""scripts/make_index.py writes an index from which pip installs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).resolve().parents[2]
METADATA = "Metadata-Version: 2.1\nName: broadhead\nVersion: {version}\n"


def make_wheel(folder: Path, version: str, tags: str = "py3-none-any") -> Path:
    """A wheel of one file that pip takes on every machine."""
    folder.mkdir(exist_ok=True)
    wheel = folder / f"broadhead-{version}-{tags}.whl"
    info = f"broadhead-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("broadhead_of_a_test.py", f"version = '{version}'\n")
        archive.writestr(f"{info}/METADATA", METADATA.format(version=version))
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def run(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/make_index.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


class Links(HTMLParser):
    """The anchors of a page: (attributes, text)."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.append((dict(attributes), ""))

    def handle_data(self, data: str) -> None:
        if self.found and self.get_starttag_text() is not None and not self.found[-1][1] and data.strip():
            self.found[-1] = (self.found[-1][0], data)


def asset(name: str, **changes: object) -> dict[str, object]:
    url = f"https://example.org/download/v9.1.0/{name.replace('+', '%2B')}"
    return {"name": name, "browser_download_url": url, "digest": "sha256:" + "a" * 64, "size": 7, **changes}


def releases(folder: Path, *assets: dict[str, object], **changes: object) -> Path:
    release = {"tag_name": "v9.1.0", "draft": False, "prerelease": False, "assets": list(assets), **changes}
    path = folder / "releases.json"
    path.write_text(json.dumps([[], [release]]))  # as gh prints pages
    return path


def test_each_label_has_an_index(tmp_path: Path) -> None:
    names = ["9.1.0+cu129", "9.1.0+cu130", "9.2.0+cu130", "9.1.0"]
    wheels = {name: make_wheel(tmp_path / "wheels", name) for name in names}
    result = run(tmp_path / "out", *wheels.values())
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cu129", "cu130", "pypi"}
    folder = tmp_path / "out/cu130/broadhead"
    links = Links(folder / "index.html").found
    assert [text for _, text in links] == [wheels[name].name for name in names[1:3]]
    listing = json.loads((folder / "index.json").read_text())
    assert listing["name"] == "broadhead" and listing["versions"] == ["9.1.0+cu130", "9.2.0+cu130"]
    assert listing["meta"]["api-version"] == "1.0"
    for (attributes, name), entry, version in zip(links, listing["files"], names[1:3], strict=True):
        href = str(attributes["href"])
        path, _, fragment = href.partition("#")
        assert "+" not in path and unquote(path) == name, "a + in an address may be read as a blank"
        assert (folder / name).read_bytes() == wheels[version].read_bytes()
        digest = hashlib.sha256(wheels[version].read_bytes()).hexdigest()
        assert fragment == f"sha256={digest}" and entry["hashes"] == {"sha256": digest}
        metadata = (folder / f"{name}.metadata").read_bytes()
        assert metadata.decode() == METADATA.format(version=version)
        assert attributes["data-core-metadata"] == f"sha256={hashlib.sha256(metadata).hexdigest()}"
        assert entry["core-metadata"] == {"sha256": hashlib.sha256(metadata).hexdigest()}
        assert attributes["data-requires-python"] == entry["requires-python"] == ">=3.10"
        assert entry["filename"] == name and entry["size"] == (folder / name).stat().st_size
    ((attributes, text),) = Links(tmp_path / "out/cu130/index.html").found
    assert (attributes["href"], text) == ("broadhead/", "broadhead")
    assert json.loads((tmp_path / "out/cu130/index.json").read_text())["projects"] == [{"name": "broadhead"}]


def test_pip_installs_from_it(tmp_path: Path) -> None:
    """By a file:// address, the newest version of the label alone."""
    wheels = [make_wheel(tmp_path / "wheels", name) for name in ("9.1.0+cu130", "9.2.0+cu130", "9.3.0+cu129")]
    assert run(tmp_path / "index", *wheels).returncode == 0
    index = (tmp_path / "index/cu130").as_uri()
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "broadhead",
        "--target",
        str(tmp_path / "there"),
        "--index-url",
        index,
    ]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    result = subprocess.run(
        [*command, "--no-cache-dir"], env={**kept, "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "there/broadhead_of_a_test.py").read_text() == "version = '9.2.0+cu130'\n"


def test_pip_refuses_a_wheel_that_was_changed(tmp_path: Path) -> None:
    assert run(tmp_path / "index", make_wheel(tmp_path / "wheels", "9.1.0+cu130")).returncode == 0
    (wheel,) = (tmp_path / "index/cu130/broadhead").glob("*.whl")
    wheel.write_bytes(make_wheel(tmp_path / "other", "9.1.0+cu130", "py3-none-any").read_bytes() + b"x")
    command = [sys.executable, "-m", "pip", "install", "broadhead", "--target", str(tmp_path / "there")]
    command += ["--no-cache-dir", "--index-url", (tmp_path / "index/cu130").as_uri()]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "DO NOT MATCH THE HASHES" in result.stdout + result.stderr


def test_the_wheels_of_releases_are_linked(tmp_path: Path) -> None:
    name = "broadhead-9.1.0+cu130-cp312-cp312-manylinux_2_28_x86_64.whl"
    path = releases(tmp_path, asset(name), asset("broadhead-9.1.0.tar.gz"), asset("SHA256SUMS"))
    assert run(tmp_path / "out", "--releases", path).returncode == 0
    ((attributes, text),) = Links(tmp_path / "out/cu130/broadhead/index.html").found
    assert text == name
    assert attributes["href"] == f"https://example.org/download/v9.1.0/{name.replace('+', '%2B')}#sha256={'a' * 64}"
    assert "data-core-metadata" not in attributes, "no METADATA lies beside it"
    (entry,) = json.loads((tmp_path / "out/cu130/broadhead/index.json").read_text())["files"]
    assert entry["core-metadata"] is False and entry["size"] == 7


@pytest.mark.parametrize(("prerelease", "options"), [(True, ()), (False, ("--prereleases",))])
def test_releases_and_prereleases_do_not_mix(tmp_path: Path, prerelease: bool, options: tuple[str, ...]) -> None:
    path = releases(tmp_path, asset("broadhead-9.1.0+cu130-cp312-cp312-any.whl"), prerelease=prerelease)
    result = run(tmp_path / "out", "--releases", path, *options)
    assert result.returncode == 1 and "there are no wheels" in result.stderr
    other = ("--prereleases",) if not options else ()
    assert run(tmp_path / "out", "--releases", path, *other).returncode == 0


def test_drafts_are_left_out(tmp_path: Path) -> None:
    path = releases(tmp_path, asset("broadhead-9.1.0+cu130-cp312-cp312-any.whl"), draft=True)
    assert "there are no wheels" in run(tmp_path / "out", "--releases", path).stderr


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"digest": None}, "has no SHA-256 digest"),
        ({"digest": "sha1:abc"}, "has no SHA-256 digest"),
    ],
)
def test_a_wheel_without_a_digest_is_refused(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    path = releases(tmp_path, asset("broadhead-9.1.0+cu130-cp312-cp312-any.whl", **changes))
    result = run(tmp_path / "out", "--releases", path)
    assert result.returncode == 1 and words in result.stderr


def test_foreign_and_doubled_wheels_are_refused(tmp_path: Path) -> None:
    foreign = tmp_path / "other-1.0-py3-none-any.whl"
    foreign.write_bytes(b"")
    assert "is no wheel of broadhead" in run(tmp_path / "out", foreign).stderr
    wheel = make_wheel(tmp_path / "wheels", "9.1.0+cu130")
    assert "is there twice" in run(tmp_path / "out", wheel, wheel).stderr


def test_the_pages_are_html_of_pep_503(tmp_path: Path) -> None:
    assert run(tmp_path / "out", make_wheel(tmp_path / "wheels", "9.1.0+cu130")).returncode == 0
    for path in (tmp_path / "out").rglob("index.html"):
        text = path.read_text()
        assert text.startswith("<!DOCTYPE html>")
        assert re.search(r'<meta name="pypi:repository-version" content="1\.\d+">', text)
