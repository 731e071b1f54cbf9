"""Compute capabilities that the table does not know run its portable rows within 99 KB, by PTX, and are labelled so."""

from __future__ import annotations

import broadhead
import pytest
from broadhead import capabilities
from broadhead.plan.device import hypothetical
from broadhead.plan.dispatch import refusals, resolve
from broadhead.plan.native import FamilyBuild
from broadhead.support import CAPABILITIES, ROWS, SMEM_99KB
from described import ALL_ARCHS, FULL, build_of, problem

pytestmark = pytest.mark.usefixtures("first_rows")

LATER = ((8, 8), (10, 1), (11, 0), (12, 5), (13, 0))
#: A release: PTX of 10.3 is the newest that also serves 11.0.
RELEASE = build_of(*ALL_ARCHS, "103-virtual")


@pytest.mark.parametrize("capability", [(11, 0), (13, 0)])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256, 512])
@pytest.mark.parametrize(
    "asked", [{}, {"seqlen_q": 1}, {"direction": "backward"}], ids=["prefill", "decode", "backward"]
)
def test_ptx_serves_every_head_dim(asked: dict, head_dim: int, capability: tuple[int, int]) -> None:
    plan = resolve(problem(head_dim=head_dim, **asked), hypothetical(capability), RELEASE)
    assert plan.row is not None, plan.reason
    assert plan.row.portable and plan.row.family == "sm80" and plan.row.smem_limit <= SMEM_99KB
    # Decode kernels have fewer buckets.
    assert plan.row.head_dim >= head_dim if "seqlen_q" in asked else plan.row.head_dim == head_dim


@pytest.mark.parametrize("capability", LATER)
def test_only_rows_for_every_known_capability_run(capability: tuple[int, int]) -> None:
    """Whatever a device offers: what it has beyond 99 KB has not been seen."""
    device = hypothetical(capability)._replace(smem_per_block=227 * 1024)
    running = {row.id for row in ROWS if row.runs_on(capability)}
    assert running == {row.id for row in ROWS if set(row.capabilities) == set(CAPABILITIES)}
    refused = {refusal.row_id for refusal in refusals(problem(head_dim=512), device, RELEASE)}
    assert refused >= {row.id for row in ROWS} - running
    plan = resolve(problem(head_dim=512), device, RELEASE)
    assert plan.row is not None and plan.row.id == "sm80_fwd_d512_smem99_bf16"


def test_rows_for_every_capability_fit_99_kb() -> None:
    assert all(row.smem_limit <= SMEM_99KB for row in ROWS if row.portable)
    assert hypothetical((11, 0)).smem_per_block == SMEM_99KB and hypothetical((7, 5)).smem_per_block == 48 * 1024


def test_a_build_without_ptx_names_what_to_build() -> None:
    plan = resolve(problem(), hypothetical((11, 0)), FULL)
    assert plan.row is None and plan.left_out
    assert "left out of this build for compute capability 11.0" in plan.reason and 'ARCHS="110"' in plan.reason


def test_ptx_needs_a_driver_as_new_as_its_compiler() -> None:
    """Machine code needs one of its major version."""
    build = build_of("100", "103-virtual", cuda=(13, 2))
    old = hypothetical((11, 0))._replace(cuda_version=(13, 1))
    plan = resolve(problem(), old, build)
    assert plan.row is None and "needs CUDA 13.2 or newer to compile its PTX, the driver serves 13.1" in plan.reason
    assert resolve(problem(), old._replace(cuda_version=(13, 2)), build).row is not None
    assert resolve(problem(), hypothetical((10, 0))._replace(cuda_version=(13, 0)), build).row is not None


@pytest.mark.parametrize(
    ("archs", "capability", "covered", "ptx"),
    [
        (("103-virtual",), (11, 0), True, True),
        (("103-virtual",), (10, 0), False, True),
        (("103-virtual", "120"), (12, 1), True, False),
        (("121-virtual",), (11, 0), False, True),
        (("121-virtual",), (13, 0), True, True),
        (("110",), (11, 0), True, False),
    ],
)
def test_what_ptx_covers(archs: tuple[str, ...], capability: tuple[int, int], covered: bool, ptx: bool) -> None:
    family = FamilyBuild("sm80", archs, (13, 0), frozenset())
    assert family.covers(capability) == covered and family.needs_ptx(capability) == ptx


@pytest.mark.parametrize("device", ["8.0", "8.6", "10.3", "12.1"])
def test_explain_labels_what_was_never_executed(device: str) -> None:
    text = broadhead.explain(head_dim=128, device=device, build=RELEASE)
    assert "runs on: cuda" in text and "note: compiled, never executed" in text and "9.0 alone" in text
    assert "does not know" not in text


def test_explain_labels_a_later_capability() -> None:
    text = broadhead.explain(head_dim=128, device="11.0", build=RELEASE)
    assert "never executed" in text and "The table does not know 11.0" in text and "99 KB" in text


def test_nothing_is_said_where_kernels_have_run() -> None:
    assert capabilities.execution_note((9, 0)) == ""
    for device in ("9.0", "7.5", "cpu"):
        assert "never executed" not in broadhead.explain(head_dim=128, device=device, build=RELEASE)
