"""explain and is_supported, and the command beside them: what they take, and how their answer is grouped."""

from __future__ import annotations

import broadhead
import pytest
import torch
from spelled_calls import int32, randn


def test_explain_takes_tensors_for_what_a_call_brings() -> None:
    asked = {"head_dim": 64, "head_dim_v": 512, "device": (9, 0)}
    for name, value in (("sinks", randn(4)), ("prefix_lens", int32(1, 2)), ("qv", randn(2, 6, 4, 16)),
                        ("descale", torch.ones(2, 2)), ("query_ranges", int32(1, 2).view(1, 1, 2)),
                        ("tree_mask", torch.ones(1, 1, dtype=torch.int64))):  # fmt: skip
        assert broadhead.explain(**asked, **{name: value}) == broadhead.explain(**asked, **{name: True})
        assert broadhead.is_supported(**asked, **{name: value}) == broadhead.is_supported(**asked, **{name: True})
        assert broadhead.explain(**asked, **{name: None}) == broadhead.explain(**asked, **{name: False})
        for wrong in ("yes", 1.5):
            with pytest.raises(broadhead.InvalidTypeError, match=f"explain: {name} must be True or False"):
                broadhead.explain(**asked, **{name: wrong})


def test_masks_that_are_values() -> None:
    """They are features of a call like others; what no function takes together is no description of a call."""
    asked = {"head_dim": 64, "seqlen_q": 40, "device": (9, 0)}
    each = torch.ones(2, dtype=torch.bool)
    text = broadhead.explain(**asked, causal=each, query_ranges=True, prefix_lens=True)
    assert "features: causal_by_sequence, lse, prefix_lens, query_ranges" in text
    assert "causal_by_sequence" not in broadhead.explain(**asked, causal=torch.tensor(True))
    assert "tree_mask" in broadhead.explain(**asked, tree_mask=True, window_size=(70, -1))
    for excluded, words in (
        ({"query_ranges": True}, "tree_mask and query_ranges exclude"),
        ({"prefix_lens": True, "causal": True}, "tree_mask and prefix_lens exclude"),
        ({"attention_chunk": 8}, "tree_mask and attention_chunk exclude"),
        ({"window_size": (8, 3)}, "tree_mask goes with a window_size"),
        ({"seqlen_q": 65}, "tree_mask takes at most 64 query tokens .*seqlen_q = 65"),
    ):
        with pytest.raises(broadhead.InvalidArgumentError, match=f"^explain: {words}"):
            broadhead.explain(**asked | {"tree_mask": True} | excluded)
    for gradient in ({"requires_grad": True}, {"direction": "backward"}):
        with pytest.raises(broadhead.UnsupportedError, match="tree_mask has no gradient"):
            broadhead.is_supported(**asked, **gradient, tree_mask=True)


def test_one_query_is_causal_or_not() -> None:
    """At the end of its sequence it sees every key: causality by sequence asks nothing of a kernel."""
    each, asked = torch.ones(2, dtype=torch.bool), {"head_dim": 64, "num_heads_q": 8, "device": (9, 0)}
    assert broadhead.is_supported(**asked, causal=each) == broadhead.is_supported(**asked, causal=False)
    assert "asked: forward" in broadhead.explain(**asked, causal=each)
    assert "causal_by_sequence" in broadhead.explain(**asked, causal=each)


def test_a_capability_as_text() -> None:
    assert broadhead.is_supported(head_dim=64, device="8.9") == broadhead.is_supported(head_dim=64, device=(8, 9))
    assert "compute capability 12.0" in broadhead.explain(head_dim=64, device="12.0")
    for wrong in ("8.x", "sm_90", ""):
        with pytest.raises(broadhead.InvalidArgumentError, match=r"is_supported: device must be .*such as \(8, 9\) or"):
            broadhead.is_supported(head_dim=64, device=wrong)


def test_reasons_are_grouped() -> None:
    for device in ("cpu", "8.9", "9.0"):
        lines = broadhead.explain(head_dim=128, device=device).splitlines()
        reasons = [line.rpartition(": ")[2] for line in lines if line.startswith("refused: ")]
        assert len(lines) < 25 and len(set(reasons)) == len(reasons) > 3


def test_the_command_asks_all_that_explain_does() -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    import inspect

    from broadhead.cli_commands import app

    text = runner.invoke(app, ["explain", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    for name in inspect.signature(broadhead.explain).parameters:
        option = "--window" if name == "window_size" else "--" + name.replace("_", "-")
        assert name in ("q", "k", "v", "build") or option in text, option
    result = runner.invoke(app, ["explain", "--causal-by-sequence", "--query-ranges", "--batch-size", "0"])
    assert result.exit_code == 0 and "causal_by_sequence, lse, query_ranges" in result.output, result.output
    options = (
        "--head-dim 64 --head-dim-v 512 --qv --descale --window 128,0 --attention-chunk 64 --tokens-per-split 128"
        " --device 9.0"
    )
    result = runner.invoke(app, ["explain", *options.split()])
    assert result.exit_code == 0, result.output
    for word in ("qv", "descale", "window", "attention_chunk", "tokens_per_split 128"):
        assert word in result.output
    assert len(result.output.splitlines()) < 25
    result = runner.invoke(app, ["explain", "--window", "wide"])
    assert result.exit_code == 2 and "--window must be" in result.output
