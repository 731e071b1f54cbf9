"""explain and is_supported, and the command beside them: what they take, and how their answer is grouped."""

from __future__ import annotations

import inspect
import json
import re
from typing import Any

import broadhead
import pytest
import torch
from broadhead.api.explain import explain_in_parts
from broadhead.api.explanation import HEADINGS
from broadhead.plan.device import hypothetical
from broadhead.plan.native import NO_KERNELS
from broadhead.support import ROWS
from described import FULL, build_of, h200, without_family
from spelled_calls import int32, randn

pytestmark = pytest.mark.usefixtures("first_rows")


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
        reasons = [line.rpartition(": ")[2] for line in lines if line.startswith("  ")]
        assert len(lines) < 25 and len(set(reasons)) == len(reasons) > 3


def test_the_answer_comes_first_and_what_to_do_second() -> None:
    command = 'BROADHEAD_CUDA_ARCHS="90a" pip install .'
    asked: dict[str, Any] = {"head_dim": 128, "seqlen_q": 1000}
    for options, answer, remedy in (
        ({"device": h200(), "build": FULL}, "cuda, kernel sm90_fwd_d128_bf16: ", None),
        ({"device": h200(), "build": NO_KERNELS}, "the torch fallback, because kernel sm90_fwd_d128_bf16 is", command),
        ({"device": h200(), "build": without_family("sm90")}, "cuda, kernel sm80_fwd_d128_bf16: ", "this runs; "),
        ({"device": "cpu"}, "the torch fallback, because the tensors", "use a CUDA device; `broadhead info`"),
        ({"device": "7.5", "build": FULL}, "the torch fallback, because no CUDA", "use a device that the answer names"),
        ({"device": "9.0", "build": FULL, "head_dim": 520}, "the torch fallback, because head_dim 520 ", "change "),
        ({"device": "9.0", "build": FULL, "head_dim": 100}, "nothing, the call is refused: head_dim must be a multiple",
         "change what the answer names: the call raises InvalidArgumentError"),
    ):  # fmt: skip
        lines = broadhead.explain(**asked | options).splitlines()
        assert lines[0].startswith(f"runs on: {answer}"), lines[0]
        assert command not in lines[0]
        if remedy is None:
            assert not any(line.startswith("what to do") for line in lines)
        else:
            assert lines[1].startswith("what to do: ") and remedy in lines[1], lines[1]


def test_a_call_of_which_explain_says_that_it_is_refused_is_refused() -> None:
    q = randn(1, 4, 2, 12)
    assert broadhead.explain(q, q, q).startswith("runs on: nothing, the call is refused: head_dim must be")
    with pytest.raises(broadhead.InvalidArgumentError, match="multiple of 8"):
        broadhead.flash_attn_func(q, q, q)


def test_reasons_stand_below_what_they_are_about() -> None:
    """A device of 8.0 and a build without one of its rows: each row of the direction stands under one heading."""
    left_out = "sm80_fwd_d128_bf16"
    device, build = hypothetical((8, 0)), build_of("80", "90a", without=(left_out,))
    text = broadhead.explain(head_dim=128, seqlen_q=1000, device=device, build=build)
    parts = re.split(r"refused by (this build|the device|the arguments):\n", text)
    assert parts[1::2] == ["this build", "the device", "the arguments"]
    assert f"  {left_out}: is left out of this build" in parts[2] and "takes" not in parts[2]
    assert "runs on compute capability 9.0, not 8.0" in parts[4] and "takes" not in parts[4]
    assert "takes head_dim up to 64, not 128" in parts[6] and "runs on" not in parts[6]


def test_the_parts_name_every_kernel_of_the_direction_once() -> None:
    defaults = {name: p.default for name, p in inspect.signature(broadhead.explain).parameters.items()}
    for direction in ("forward", "backward"):
        asked = defaults | {"head_dim": 96, "direction": direction, "device": (8, 9), "build": FULL}
        found = explain_in_parts(**asked)
        named = [kernel for reason in found.reasons for kernel in reason.kernels]
        able = {row.id for row in ROWS if row.direction == direction} - set(named)
        assert len(named) == len(set(named)) and found.backend == "cuda" and found.kernel in able
        assert found.text() == broadhead.explain(**asked)
        values = json.loads(json.dumps(found.as_json()))
        assert values["kernel"] == found.kernel and values["remedy"] is None and values["device"].endswith("unknown)")
        assert sum(len(refusal["kernels"]) for refusal in values["refusals"]) == len(named)


def test_the_command_asks_all_that_explain_does() -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
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


def test_the_command_in_json_and_as_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from broadhead import cli_commands, cli_tables
    from rich.console import Console

    question = ["explain", "--head-dim", "192", "--head-dim-v", "128", "--device", "9.0"]
    plain = runner.invoke(cli_commands.app, question).output
    values = json.loads(runner.invoke(cli_commands.app, [*question, "--json"]).output)
    assert plain.startswith(f"runs on: {values['answer']}\n") and values["device"] in plain
    assert values["asked"].startswith("forward, head_dim 192, head_dim_v 128, dtype bf16, ")
    assert values["refusals"][0]["by"] in HEADINGS and isinstance(values["refusals"][-1]["kernels"], list)

    defaults = {name: p.default for name, p in inspect.signature(broadhead.explain).parameters.items()}
    answers = ({"build": FULL}, {"build": NO_KERNELS}, {"build": FULL, "head_dim": 100})
    for options, colour in zip(answers, ("32m", "33m", "31m"), strict=True):
        found = explain_in_parts(**defaults | {"head_dim": 512, "device": (9, 0)} | options)
        for no_colour in (False, True):
            console = Console(width=100, force_terminal=True, no_color=no_colour, color_system="standard")
            with console.capture() as captured:
                cli_tables.print_explanation(found, console)
            shown = captured.get()
            text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", shown).split())
            assert text.startswith(f"runs on: {found.answer}") and (colour in shown) != no_colour
            assert all(heading in text for heading in found.grouped())
            assert not found.remedy or found.remedy in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert Console(force_terminal=True).no_color
