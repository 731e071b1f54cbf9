"""reject_or_correct on the CPU: a random call raises a BroadheadError or matches the judge; a mistake raises one."""

from __future__ import annotations

import random
import time

import broadhead
import pytest
import torch
from calls import build
from checks import check_call
from compare import assert_attention, max_error
from judge import judge
from random_calls import LEGAL, random_call, wrong_mutations

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 16, 24, 40, 64, 72)
SECONDS = 4.0  # of each chunk
CHUNKS = 5


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_reject_or_correct(chunk: int, seed: int) -> None:
    """Valid calls, e4m3 and qv among them, a third with odd strides: the fallback takes every one.

    Every second chunk is of decode: few queries, sometimes of many sequences.
    """
    torch.set_num_threads(1)
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or count < 20:
        rng = random.Random(seed + count)
        dtypes = (*DTYPES, torch.float8_e4m3fn)
        longest, decode = rng.choice((6, 40, 40, 130)), 1.0 if chunk % 2 else 0.5
        call = random_call(rng, dtypes, longest, HEAD_DIMS, qv=0.2, decode=decode)
        torch.manual_seed(seed + count)
        built = build(call, CPU, rng)
        oddity = rng.choice((None, None, *LEGAL))
        if oddity is not None and not call.num_new:
            oddity(built, rng)
        try:
            check_call(built)
        except Exception as error:
            name = None if oddity is None else oddity.__name__
            raise AssertionError(f"case {count} (seed {seed + count}, {name}): {call}") from error
        count += 1


def test_mistakes_raise(seed: int) -> None:
    """Every mistake, in calls of every kind, raises our error and names the function."""
    names: set[str] = set()
    end, count = time.monotonic() + SECONDS, 0
    while time.monotonic() < end or count < 60:
        rng = random.Random(seed + count)
        call = random_call(rng, DTYPES, longest=9, head_dims=(16, 24))
        built = build(call.with_(metadata=False), CPU, rng)
        wrong = wrong_mutations(built)
        name = rng.choice(sorted(set(wrong) - names) or sorted(wrong))
        wrong[name](built, rng)
        names.add(name)
        try:
            built.run()
        except broadhead.BroadheadError as error:
            assert isinstance(error, (ValueError, TypeError, NotImplementedError)), name
            assert "flash_attn" in str(error), f"{name}: the text does not name the function: {error}"
        except Exception as error:
            raise AssertionError(
                f"case {count} (seed {seed + count}), {name}: {type(error).__name__}: {call}"
            ) from error
        else:
            pytest.fail(f"case {count} (seed {seed + count}): {name} was accepted: {call}")
        count += 1


def test_judge_equals_oracle(seed: int) -> None:
    """The judge of these tests and the oracle, which share one mask predicate, agree on what they are given."""
    from cases import Spec
    from cases import build as build_case

    for i in range(3):
        case = build_case(Spec(layout_q="varlen", layout_k="paged", sinks=True, softcap=3.0), seed + i)
        backend = broadhead.reference.attention(**case.arguments())
        assert_attention(case, *backend)
    rng = random.Random(seed)
    for _ in range(5):
        call = random_call(rng, (torch.float64,), longest=20, head_dims=(16,)).with_(function="func")
        call = call.with_(
            seqlens_q=(7,) * call.batch,
            seqlens_k=(11,) * call.batch,
            page_size=0,
            leftpad=(),
            num_new=(),
            batch_idx=False,
            ragged_q=False,
            slack_q=0,
            slack_k=0,
            tail=0,
            metadata=False,
            k_layout="plain",
            q_layout="plain",
        )
        built = build(call, CPU, rng)
        import oracle

        left, right = call.normalized_window
        q, k, v = (torch.stack(x) for x in (built.q, built.k, built.v))
        prefix = torch.tensor(call.prefix, dtype=torch.int32) if call.prefix else None
        out, lse = oracle.attention(
            q,
            k,
            v,
            softmax_scale=call.scale,
            window_left=left,
            window_right=right,
            attention_chunk=call.attention_chunk,
            softcap=call.softcap,
            sinks=built.sinks,
            prefix_lens=prefix,
        )
        outs, lses = judge(built)
        assert max_error(out, torch.stack(outs)) < 1e-12
        torch.testing.assert_close(lse, torch.stack(lses))
