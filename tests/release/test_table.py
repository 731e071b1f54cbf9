"""The table is the only list: the generated sources, the registry of an installed library and the matrix equal it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from broadhead import capabilities, support, tiles
from generator import GENERATE, load_generate
from installed import FAMILIES, needs_kernels

ROOT = Path(__file__).resolve().parents[2]
#: What releases are built for.
(ALL_ARCHS,) = {build["archs"] for build in json.loads((ROOT / ".github/cuda-matrix.json").read_text())}
#: PTX of the newest architecture that also serves 11.0.
PTX = "103-virtual"
#: Rows by the architectures where they have no register to spare, so that ptxas spills or may: then a build stops.
SPILLS = {"sm80_fwd_d128": {"100", "103", "120", "121"}, "sm80_fwd_d128_n48": {"100"}}


def run_generate(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(GENERATE), *arguments], capture_output=True, text=True)


def generated_ids(directory: Path) -> list[str]:
    """Row ids in the generated registries, in order."""
    return [
        name
        for path in sorted(directory.glob("*/registry.cpp"))
        for name in re.findall(r'^    \{\{sizeof\(KernelInfo\), kAbiVersion, "(\w+)", ', path.read_text(), re.MULTILINE)
    ]


def test_ids_are_unique_and_say_what_the_row_is() -> None:
    ids = [row.id for row in support.ROWS]
    assert len(set(ids)) == len(ids)
    for row in support.ROWS:
        suffix = support.ID_SUFFIXES[row.dtype] + ("_kve4m3" if row.kv_dtype else "")
        assert row.id.startswith(f"{row.family}_") and row.id.endswith(f"_{suffix}"), row.id
        name = row.id.replace(f"_{row.dtype}", "")
        if row.dtype == "float8_e4m3fn" and row.phase == "decode":
            name = row.id.replace("_e4m3", "_kve4m3")  # one source with the rows of 16-bit q over e4m3 K and V
        assert row.name == name, row.id
        assert row.kv_dtype in ("", "float8_e4m3fn") and row.kv_dtype != row.dtype, row.id
        assert not row.kv_dtype or "descale" in row.features, row.id
        assert set(row.requires) <= set(row.features) & {*support.EXTRA_FEATURES, *support.MASK_FEATURES}, row.id
        assert (f"v{row.head_dim_v}" in row.id) == (row.head_dim_v != row.head_dim), row.id
        assert f"d{row.head_dim}" in row.id and ("decode" in row.id) == (row.phase == "decode"), row.id
        assert set(row.features) <= {*support.FEATURES, *support.EXTRA_FEATURES}, row.id
        assert row.tile.min_blocks >= 1 and row.cluster >= 1, row.id
        assert row.template.header.startswith("decode/" if row.phase == "decode" else f"{row.family}/"), row.id


def test_a_row_for_some_masks_stands_before_one_for_all() -> None:
    """Else calls without the mask had no kernel, or those with it never saw theirs."""
    for i, row in enumerate(support.ROWS):
        if set(row.requires) & set(support.MASK_FEATURES):
            size = (row.family, row.phase, row.dtype, row.kv_dtype, row.head_dim, row.head_dim_v)
            others = [
                j
                for j, other in enumerate(support.ROWS)
                if j != i
                and not other.by_cost  # they come last, wherever they stand
                and size == (other.family, other.phase, other.dtype, other.kv_dtype, other.head_dim, other.head_dim_v)
            ]
            assert others and min(others) > i and any(not support.ROWS[j].requires for j in others), row.id


@pytest.mark.parametrize("row", support.ROWS, ids=lambda row: row.id)
def test_a_row_fits_the_shared_memory_of_its_devices(row: support.KernelRow) -> None:
    for capability in row.capabilities:
        assert row.smem_limit <= capabilities.SMEM_BY_CAPABILITY[capability], capability


@pytest.mark.parametrize("archs", ["", ALL_ARCHS])
@pytest.mark.parametrize("capability", support.CAPABILITIES)
def test_every_device_has_every_head_dim_up_to_512(capability: tuple[int, int], archs: str) -> None:
    """With a tile made for it: head_dim 128 must not fall to the kernel of 192. In a release the code is there, too."""
    generate = load_generate()
    for dtype in support.DTYPES:
        for phase, sizes in (("prefill", (64, 96, 128, 192, 256, 512)), ("decode", (64, 128, 256, 512))):
            able = {
                row.head_dim
                for row in support.ROWS
                if (row.dtype, row.kv_dtype, row.phase) == (dtype, "", phase)
                and row.family == "sm80"
                and row.head_dim == row.head_dim_v
                and capability in row.capabilities
                and set(row.features) >= set(support.FEATURES)
                and (not archs or runs(generate, row, archs, capability))
            }
            assert able >= set(sizes), (dtype, phase)


def runs(generate, row: support.KernelRow, archs: str, capability: tuple[int, int]) -> bool:
    """Whether a build for `archs` holds code of the row that a device of `capability` runs."""
    names = generate.row_archs(row, generate.family_archs(row.family, archs.split(";")))
    return any(capabilities.arch_covers(name, capability) for name in names)


@pytest.mark.parametrize("archs", [ALL_ARCHS, "100", "100a", "100f", "103", "80;90a;100;103;120;121"])
def test_no_row_is_compiled_where_it_spills(archs: str) -> None:
    generate = load_generate()
    for row in support.ROWS:
        names = generate.row_archs(row, generate.family_archs(row.family, archs.split(";")))
        assert not SPILLS.get(row.name, set()) & set(names), row.id


@pytest.mark.parametrize(
    ("arch", "covered"),
    [
        ("80", {(8, 0), (8, 6), (8, 7), (8, 9)}),
        ("86-real", {(8, 6), (8, 7), (8, 9)}),
        ("90a", {(9, 0)}),
        ("100", {(10, 0), (10, 3)}),
        ("100a-real", {(10, 0)}),
        ("100f", {(10, 0), (10, 3)}),
        ("120", {(12, 0), (12, 1)}),
        ("103-virtual", {(10, 3), (12, 0), (12, 1)}),
    ],
)
def test_arch_covers(arch: str, covered: set[tuple[int, int]]) -> None:
    assert {c for c in support.CAPABILITIES if capabilities.arch_covers(arch, c)} == covered


def test_generated_sources_equal_the_table(tmp_path: Path) -> None:
    result = run_generate("sources", "--archs", ALL_ARCHS, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert sorted(generated_ids(tmp_path)) == sorted(row.id for row in support.ROWS)
    sources = "".join(path.read_text() for path in tmp_path.glob("*/*.cu"))
    elements = {"bf16": "cutlass::bfloat16_t", "fp16": "cutlass::half_t", "float8_e4m3fn": "cutlass::float_e4m3_t"}
    templates = {
        tiles.Tile: ("sm80::ForwardTraits", "sm80::launch_forward", "sm80/forward/launch.cuh"),
        tiles.DecodeTile: ("decode::DecodeTraits", "decode::launch_decode", "decode/launch.cuh"),
        tiles.AbsorbedDecodeTile: ("decode::AbsorbedTraits", "decode::launch_decode", "decode/launch.cuh"),
        tiles.HopperTile: ("sm90::ForwardTraits", "sm90::launch_forward", "sm90/forward/launch.cuh"),
        tiles.WideTile: ("sm90::WideTraits", "sm90::launch_wide", "sm90/forward_wide/launch.cuh"),
        tiles.Fp8Tile: ("sm90::Fp8Traits", "sm90::launch_fp8", "sm90/forward_fp8/launch.cuh"),
        tiles.AbsorbedTile: ("sm90::AbsorbedTraits", "sm90::launch_wide", "sm90/forward_wide/launch.cuh"),
        tiles.BackwardTile: ("sm80::BackwardTraits", "sm80::launch_backward", "sm80/backward/launch.cuh"),
        tiles.PortableFusedBackwardTile: (
            "sm80::FusedBackwardTraits",
            "sm80::launch_fused",
            "sm80/backward/launch.cuh",
        ),
        tiles.FusedBackwardTile: ("sm90::FusedBackwardTraits", "sm90::launch_fused", "sm90/backward/launch.cuh"),
        tiles.HopperBackwardTile: ("sm90::BackwardTraits", "sm90::launch_backward", "sm90/backward/launch.cuh"),
        tiles.PairBackwardTile: (
            "sm90::PairBackwardTraits",
            "sm90::launch_pair_backward",
            "sm90/backward_wide/launch.cuh",
        ),
    }
    for row in support.ROWS:
        traits, launcher, header = templates[type(row.tile)]
        one = row.family == "sm80" and "qv" not in row.requires
        head_dims = (row.head_dim,) if one else (row.head_dim, row.head_dim_v)
        values = ", ".join(map(str, (*head_dims, *row.tile, row.smem_limit)))
        # Decode kernels are made for the dtype of K and V, and read that of 8-bit calls' q from the call.
        element = elements[row.kv_dtype or row.dtype]
        assert row.phase == "decode" or not row.kv_dtype
        assert f"Traits_{row.id} = {traits}<{element}, {values}>;" in sources
        assert f'return {launcher}<Traits_{row.id}>("{row.id}"' in sources
        workspace = f"return {row.template.workspace}<Traits_{row.id}>(params);"
        params = "AttnParams" if row.direction == "forward" else "AttnBwdParams"
        assert f"workspace_{row.id}(const {params}& params) {{ {workspace} }}" in sources
        unit = (tmp_path / row.family / f"{row.name}.cu").read_text()
        assert row.id in unit and re.findall(r'#include "(.+)"', unit) == [header]


def test_the_registry_tells_what_a_row_is(tmp_path: Path) -> None:
    """Direction, phase, dtypes, sizes and features, as host/params.h has them."""
    assert run_generate("sources", "--archs", ALL_ARCHS, "--out", str(tmp_path)).returncode == 0
    types = {"bf16": "kBFloat16", "fp16": "kFloat16", "float8_e4m3fn": "kFloat8E4M3"}
    for row in support.ROWS:
        (line,) = (
            line for line in (tmp_path / row.family / "registry.cpp").read_text().splitlines() if f'"{row.id}"' in line
        )
        kinds = f"Direction::k{row.direction.capitalize()}, Phase::k{row.phase.capitalize()}"
        dtypes = f"DataType::{types[row.dtype]}, DataType::{types[row.kv_dtype or row.dtype]}"
        sizes = f"{row.head_dim}, {row.head_dim_v}, {row.tile.tile_m}, {row.tile.tile_n}"
        assert f'"{row.id}", {kinds}, {dtypes}, {sizes}, "{" ".join(row.features)}"}}' in line
        own, none = f"&launch_{row.id}, &workspace_{row.id}", "nullptr, nullptr"
        functions = f"{own}, {none}" if row.direction == "forward" else f"{none}, {own}"
        assert line.endswith(f"&shared_memory_{row.id}, {functions}}},")


@pytest.mark.parametrize(
    ("archs", "families"),
    [
        ("80", {"sm80": "80"}),
        ("103-virtual", {"sm80": "103-virtual"}),
        ("90a;103a-virtual", {"sm80": "90;103-virtual", "sm90": "90a"}),
        ("90", {"sm80": "90"}),  # code for plain 90 holds no wgmma
        ("90a", {"sm80": "90", "sm90": "90a"}),
        ("80;90a-real;120", {"sm80": "80;90;120", "sm90": "90a"}),
    ],
)
def test_hopper_kernels_are_built_for_90a_alone(tmp_path: Path, archs: str, families: dict[str, str]) -> None:
    result = run_generate("sources", "--archs", archs, "--out", str(tmp_path))
    assert result.returncode == 0, result.stderr
    listing = (tmp_path / "instantiations.cmake").read_text()
    found = {
        path.parent.name: re.search(r'kBuildArchs = "(.*)"', path.read_text())[1]  # type: ignore[index]
        for path in tmp_path.glob("*/registry.cpp")
    }
    assert found == families
    (named,) = re.findall(r'BROADHEAD_FAMILIES "(.*)"', listing)
    assert set(named.split(";")) == families.keys()
    for family in families:
        rows = [row.name for row in support.ROWS if row.family == family]
        assert {path.stem for path in (tmp_path / family).glob("*.cu")} <= set(rows)
        for source in ("append_kv.cu", "combine.cu", "merge_states.cu", "scheduler_metadata.cu"):
            assert listing.count(source) == len(families), source


@pytest.mark.parametrize("archs", ["80;90a", "86", "100a", "120", ALL_ARCHS])
def test_rows_are_built_where_a_device_can_run_them(archs: str) -> None:
    generate = load_generate()
    for row in support.ROWS:
        names = generate.family_archs(row.family, archs.split(";"))
        chosen = generate.row_archs(row, names)
        runnable = [c for c in row.capabilities if any(capabilities.arch_covers(a, c) for a in names)]
        for capability in runnable:
            assert any(capabilities.arch_covers(a, capability) for a in chosen), (row.id, capability)
        for arch in chosen:
            assert any(capabilities.arch_covers(arch, c) for c in row.capabilities), (row.id, arch)
        # A device class that a build names gets code of its own only for rows that are meant for it.
        for arch in chosen:
            own = generate.capability_of(arch)
            assert own in row.capabilities or not any(
                capabilities.arch_covers(a, c) for c in row.capabilities for a in set(chosen) - {arch}
            ), (row.id, arch)


def test_ptx_is_of_the_rows_for_every_capability(tmp_path: Path) -> None:
    """And of what every library holds: a device that the table does not know runs nothing else."""
    assert run_generate("sources", "--archs", ALL_ARCHS, "--out", str(tmp_path)).returncode == 0
    listing = (tmp_path / "instantiations.cmake").read_text()
    groups = re.findall(
        r'set\(BROADHEAD_ARCHS_(\w+) "(.*)"\)\nset\(BROADHEAD_SOURCES_\1\n(.*?)\n\)', listing, re.DOTALL
    )
    with_ptx = {name for _, archs, text in groups if PTX in archs.split(";") for name in re.findall(r"(\w+)\.cu", text)}
    expected = {row.name for row in support.ROWS if row.portable}
    assert with_ptx == expected | {Path(source).stem for source in load_generate().COMMON_SOURCES}
    for _, archs, _ in groups:
        assert all(arch == PTX or arch.endswith("-real") for arch in archs.split(";")), archs


def test_an_arch_that_the_table_does_not_know_has_the_portable_rows(tmp_path: Path) -> None:
    """What errors tell a user of such a device to build."""
    assert run_generate("sources", "--archs", "110", "--out", str(tmp_path)).returncode == 0
    assert sorted(generated_ids(tmp_path)) == sorted(row.id for row in support.ROWS if row.portable)


def test_a_second_run_changes_no_file(tmp_path: Path) -> None:
    arguments = ("sources", "--archs", "80;90a", "--out", str(tmp_path))
    assert run_generate(*arguments).returncode == 0
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run_generate(*arguments).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert run_generate(*arguments, "--filter", "d64_bf16$").returncode == 0
    assert set(generated_ids(tmp_path)) == {
        "sm80_bwd_d64_bf16", "sm80_fwd_d64_bf16", "sm80_fwd_decode_d64_bf16", "sm90_bwd_d64_bf16",
        "sm90_fwd_d64_bf16",
    }  # fmt: skip
    assert len(list(tmp_path.glob("sm80/*.cu"))) == 3, "sources of rows that are not built any more must go"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--archs", "sm_90"), '"sm_90" is not an architecture'),
        (("--archs", "70"), "no kernel of the table fits"),
        (("--archs", "90a", "--filter", "no_such"), "no kernel of the table fits"),
    ],
)
def test_generate_refuses(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run_generate("sources", *arguments, "--out", str(tmp_path))
    assert result.returncode != 0 and words in result.stderr


def test_the_page_has_the_matrix_of_the_table() -> None:
    result = run_generate("matrix", str(ROOT / "docs/support.md"), "--check")
    assert result.returncode == 0, result.stderr


def test_a_stale_matrix_is_found(tmp_path: Path) -> None:
    generate = load_generate()
    page = tmp_path / "support.md"
    page.write_text(f"before\n{generate.MATRIX_BEGIN}\nstale\n{generate.MATRIX_END}\nafter\n")
    assert generate.update_matrix(page, check=True) == 1
    assert generate.update_matrix(page, check=False) == 0
    assert generate.update_matrix(page, check=True) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale" not in text
    common = [feature for feature in support.FEATURES if all(feature in row.features for row in support.ROWS)]
    assert "executed on compute capability 9.0 alone" in text
    assert "On 8.0, 8.6, 8.7, 8.9, 10.0, 10.3, 12.0, 12.1 they are **compiled, never executed**" in text
    for feature in common:
        assert f"no {feature}" not in text, f"a row says that it lacks {feature}"
    for row in support.ROWS:
        bounds = f"| up to {row.head_dim} | up to {row.head_dim_v} |"
        (line,) = (line for line in text.splitlines() if f"`{row.name}`" in line)
        assert bounds in line and row.dtype in line and row.kv_dtype in line, row.id
        assert ("| descale |" in line) == ("descale" in row.features), row.id
        assert ("| all |" in line) == (row.capabilities == support.CAPABILITIES), row.id
        for feature in ("qv", "window"):
            assert (f"| {feature}: only calls with it |" in line) == (feature in row.requires), row.id


def test_a_row_says_what_it_lacks() -> None:
    (plain,) = (row for row in support.ROWS if row.id == "sm80_fwd_d64_bf16")
    row = plain._replace(features=tuple(name for name in support.FEATURES if name != "softcap"))
    generate = load_generate()
    assert generate.special_text(support, row) == "no softcap" and generate.special_text(support, plain) == "-"


def test_rows_of_another_dtype_of_keys_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids, the names that rows of both 16-bit dtypes share, and a column of the matrix where there are such rows."""
    plain = [row for row in support.ROWS if not row.kv_dtype]
    twins = [row for row in plain if row.name == "sm80_fwd_d64"]
    ids = [f"{row.name}_{support.id_suffix(row.dtype, 'float8_e4m3fn')}" for row in twins]
    assert ids == ["sm80_fwd_d64_bf16_kve4m3", "sm80_fwd_d64_fp16_kve4m3"]
    features = (*support.FEATURES, "descale")
    mixed = [row._replace(kv_dtype="float8_e4m3fn", features=features) for row in twins]
    assert [row.id for row in mixed] == ids
    assert {row.name for row in mixed} == {"sm80_fwd_d64_kve4m3"}
    assert {row.kv_element_bytes for row in mixed} == {1} and {row.kv_element_bytes for row in twins} == {2}
    generate = load_generate()
    for rows, expected in ((plain, False), (plain + mixed, True)):
        table = SimpleNamespace(ROWS=rows, FEATURES=support.FEATURES, CAPABILITIES=support.CAPABILITIES)
        monkeypatch.setattr(generate, "load_table", lambda table=table: table)
        lines = [line for line in generate.support_matrix().splitlines() if line.startswith("|")]
        assert ("| dtype | K/V dtype | special |" in lines[0]) == expected
        assert {line.count("|") for line in lines} == {11 if expected else 10}
    (line,) = (line for line in lines if "`sm80_fwd_d64_kve4m3`" in line)
    assert "| bf16, fp16 | float8_e4m3fn | descale |" in line
    assert "| bf16, fp16 | as q | - |" in next(line for line in lines if "`sm80_fwd_d64`" in line)


@needs_kernels
def test_installed_library_equals_the_table() -> None:
    for name, family in FAMILIES.items():
        archs = family["archs"].split(";")
        expected = {
            row.id
            for row in support.ROWS
            if row.family == name and any(capabilities.arch_covers(a, c) for a in archs for c in row.capabilities)
        }
        assert set(family["kernels"]) == expected, f"{family['path']} (built with BROADHEAD_KERNEL_FILTER?)"
        assert len(family["kernels"]) == len(expected)
