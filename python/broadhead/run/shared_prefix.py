"""Whether a call of flash_attn_with_shared_prefix runs as one decode launch and its merge, and running it so."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..call import validation as check
from ..call.arguments import AttentionArgs
from ..call.check import CheckedCall, check_forward
from ..plan.device import describe
from ..plan.dispatch import Plan, resolve
from ..support import DECODE_MAX_ROWS
from .cuda_backend import make_launch, run_new_shared
from .metadata_records import check_buffer

FUNCTION = "flash_attn_with_shared_prefix"

#: How the reason of a composed call begins.
COMPOSED = "composed: over the prefix, "

#: Elements of q times the length of the prefix up to which a decode kernel reads it: a tile's rows read it once, mostly
#: from the L2. More is work for the prefill kernels, whose calls cost some 40 us more together.
#: PERF(H200, 8k shared, us in one launch and composed, below and above the bound: 32/8 heads of 128 x 32 sequences
#: 90, 100, x 64 141, 117; 16/2 of 256 x 32 70, 82, x 64 111, 90; 32/4 of 512 x 8 79, 99, x 16 131, 113)
MAX_WORK = 2**30
#: Elements of q at most, as the call declares it (batch x max_seqlen_q): every tile has a place of 16 rows or more in
#: the workspace, in fp32, and may hold one only.
MAX_ELEMENTS = 2**19


@dataclass(frozen=True)
class Composed:
    """It runs as two calls and a merge. ``last_dispatch()`` then has the row over the prefix, and this reason."""

    why: str


@dataclass(frozen=True)
class OneLaunch:
    """It runs as one launch of the plan's kernel."""

    call: CheckedCall
    plan: Plan


def decide(args: AttentionArgs, length: int) -> OneLaunch | Composed:
    """How a call over ``length`` shared keys runs. ``args``: of the part of each sequence behind them."""
    q = args.q
    if length == 0:
        return Composed("there is no prefix")
    device = describe(q.device)
    if device.type != "cuda" or args.backend == "torch":
        return Composed("no kernel is asked for, or the device is none for them")
    if args.num_splits == 1:
        return Composed("num_splits=1 forbids parts, which one launch is made of")
    check.check_backend(FUNCTION, args.backend)
    call = check_forward(FUNCTION, args)
    problem = call.problem._replace(shared_tokens=call.total_q)
    token = problem.num_heads_q * problem.head_dim
    elements, declared = call.total_q * token, problem.batch * problem.seqlen_q * token
    # One tile reads the prefix once, however long it is.
    one_tile = problem.shared_rows <= DECODE_MAX_ROWS
    if max(elements, declared) > MAX_ELEMENTS or (elements * length > MAX_WORK and not one_tile):
        return Composed(
            f"{elements} elements of q ({declared} declared) over {length} shared keys; one launch takes up to"
            f" {MAX_ELEMENTS}, and {MAX_WORK} multiplied"
        )
    if call.total_q == 0 or problem.batch == 0 or problem.seqlen_q == 0 or problem.seqlen_k == 0:
        return Composed("there is no query, or page_table is empty")
    if q.dim() == 4 and q.shape[0] > 1 and q.shape[1] > 1 and q.stride(0) != q.shape[1] * q.stride(1):
        return Composed(f"the tokens of q do not lie at equal distances, it has strides {q.stride()}")
    if length > check.MAX_SEQLEN_K:
        return Composed("the prefix is longer than any sequence of a kernel")
    if not call.problem.is_decode:
        return Composed(f"no decode kernel is for {call.problem.query_rows} query rows of a KV head behind the prefix")
    own = resolve(call.problem, device)
    # Another row than the first may take less time for what follows, but not for the prefix as well.
    if own.first is None or own.first.phase != "decode":
        return Composed(f"no decode kernel is for what follows the prefix: {own.reason}")
    if args.scheduler_metadata is not None:
        check_buffer(FUNCTION, "scheduler_metadata", args.scheduler_metadata, problem.batch, q.device)
    plan = resolve(problem, device)
    return Composed(plan.reason) if plan.row is None else OneLaunch(call._replace(problem=problem), plan)


def run_first(
    decision: OneLaunch, need_lse: bool, args: AttentionArgs, page_table: Tensor, length: int
) -> tuple[Tensor, Tensor | None]:
    """Run the first call of a kind; known.run_known_shared runs those that follow."""
    launch = make_launch(args, decision.call, decision.plan)
    return run_new_shared(launch, FUNCTION, need_lse, args, page_table, length)
