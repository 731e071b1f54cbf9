"""The commands `broadhead info`, `demo`, `explain`, `matrix` and `vllm-check`."""

from __future__ import annotations

import inspect
import json
from typing import Annotated, Any

import torch
import typer

import broadhead
from broadhead.api.explain import MANY_KEYS, explain_in_parts
from broadhead.capabilities import EXECUTED, capability_text
from broadhead.cli_tables import on_terminal, print_explanation
from broadhead.demo.run import DEFAULT_PROMPT
from broadhead.demo.run import run as run_demo

app = typer.Typer(
    help="Exact attention for PyTorch, for head_dim up to 512.",
    no_args_is_help=True,
    add_completion=False,
)

_DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
    "fp64": torch.float64,
    "float64": torch.float64,
    "e4m3": torch.float8_e4m3fn,
    "float8_e4m3fn": torch.float8_e4m3fn,
}


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(broadhead.__version__)
        raise typer.Exit


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what is installed, which kernels run on which device, what is missing and how to get it."""
    from broadhead.info import report

    typer.echo(report(as_json))


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="The user's message.")] = DEFAULT_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="Generate at most this many tokens.")] = 48,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16; default: bfloat16 on a GPU, float32 on a CPU.")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens a page of the KV cache.")] = 16,
    architecture: Annotated[
        str, typer.Option(help="smollm2: a real model from PyPI; gemma4: a small random Gemma 4 with head_dim 512.")
    ] = "smollm2",
) -> None:
    """Generate text through paged attention and check it against SDPA."""
    raise typer.Exit(run_demo(prompt, max_new_tokens, device, dtype, page_size, architecture))


@app.command()
def explain(
    head_dim: Annotated[int, typer.Option(help="Head dimension of q and k.")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="Head dimension of v; default: head_dim.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32, fp64 or e4m3.")] = "bf16",
    kv_dtype: Annotated[
        str | None, typer.Option(help="That of k and v: e4m3 under bf16 or fp16; default: dtype.")
    ] = None,
    num_heads_q: Annotated[int, typer.Option(help="Query heads.")] = 8,
    num_heads_kv: Annotated[int | None, typer.Option(help="Key and value heads; default: num_heads_q.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences.")] = 1,
    seqlen_q: Annotated[int, typer.Option(help="Longest query.")] = 1,
    seqlen_k: Annotated[int, typer.Option(help="Longest key sequence.")] = MANY_KEYS,
    causal: Annotated[bool, typer.Option(help="Causal mask.")] = False,
    window: Annotated[
        str | None,
        typer.Option(help="Keys seen to the left and right, as 128 or 128,0; -1: all; with --causal the right is 0."),
    ] = None,
    attention_chunk: Annotated[int, typer.Option(help="Positions of a chunk, which is seen alone; 0: none.")] = 0,
    softcap: Annotated[float, typer.Option(help="tanh cap of the scores; 0: none.")] = 0.0,
    page_size: Annotated[int | None, typer.Option(help="Tokens a page; default: not paged.")] = None,
    varlen: Annotated[bool, typer.Option(help="Packed sequences.")] = False,
    sinks: Annotated[bool, typer.Option(help="Learnable sinks.")] = False,
    prefix_lens: Annotated[bool, typer.Option(help="Prefix-LM mask.")] = False,
    causal_by_sequence: Annotated[bool, typer.Option(help="A tensor says which sequences are causal.")] = False,
    query_ranges: Annotated[bool, typer.Option(help="A range of keys that each query sees besides.")] = False,
    tree_mask: Annotated[bool, typer.Option(help="Trees of drafts.")] = False,
    qv: Annotated[bool, typer.Option(help="A second query for v: absorbed MLA.")] = False,
    descale: Annotated[bool, typer.Option(help="Factors of float8 q, k or v.")] = False,
    requires_grad: Annotated[bool, typer.Option(help="A gradient will be asked for.")] = False,
    deterministic: Annotated[bool, typer.Option(help="Gradients that are the same in every run.")] = False,
    num_splits: Annotated[int, typer.Option(help="Bound of the splits of a row of keys; 0: the heuristic.")] = 0,
    tokens_per_split: Annotated[int, typer.Option(help="Cut keys at multiples of this many; 0: off.")] = 0,
    direction: Annotated[str, typer.Option(help="forward or backward.")] = "forward",
    device: Annotated[
        str | None, typer.Option(help="cuda, cpu, or a compute capability such as 8.9; default: this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say which kernel runs a call, or why none does and what to do; then why others refuse it."""
    not_asked = {name: p.default for name, p in inspect.signature(broadhead.explain).parameters.items()}
    try:
        asked = {
            "head_dim": head_dim,
            "head_dim_v": head_dim_v,
            "dtype": _parse_dtype("--dtype", dtype),
            "kv_dtype": None if kv_dtype is None else _parse_dtype("--kv-dtype", kv_dtype),
            "num_heads_q": num_heads_q,
            "num_heads_kv": num_heads_kv,
            "batch_size": batch_size,
            "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k,
            "causal": torch.empty(batch_size) if causal_by_sequence else causal,
            "window_size": _parse_window(window),
            "attention_chunk": attention_chunk,
            "softcap": softcap,
            "page_size": page_size,
            "varlen": varlen,
            "sinks": sinks,
            "prefix_lens": prefix_lens,
            "query_ranges": query_ranges,
            "tree_mask": tree_mask,
            "qv": qv,
            "descale": descale,
            "requires_grad": requires_grad,
            "deterministic": deterministic,
            "num_splits": num_splits,
            "tokens_per_split": tokens_per_split,
            "direction": direction,
            "device": device,
        }
        found = explain_in_parts(**not_asked | asked)
    except (broadhead.BroadheadError, ValueError) as error:
        typer.echo(f"broadhead explain: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    elif on_terminal():
        print_explanation(found)
    else:
        typer.echo(found.text())


@app.command()
def matrix() -> None:
    """List every kernel: what it takes, where it runs, whether this installation holds it."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "phase", "dtype", "head_dim", "head_dim_v", "compute capability", "here")
    entries = broadhead.support_matrix()
    for entry in entries:
        capabilities = " ".join(f"{major}.{minor}" for major, minor in entry.capabilities)
        table.add_row(
            entry.kernel,
            entry.phase,
            entry.dtype if entry.kv_dtype == entry.dtype else f"{entry.dtype} over {entry.kv_dtype}",
            f"<= {entry.head_dim}",
            f"<= {entry.head_dim_v}",
            capabilities,
            "yes" if entry.in_build else "no",
        )
    Console(width=132).print(table)
    typer.echo(f"{sum(entry.in_build for entry in entries)} of {len(entries)} kernels are in this installation")
    executed = ", ".join(map(capability_text, EXECUTED))
    typer.echo(f"Kernels have been executed on compute capability {executed} alone; for others they are compiled only")


@app.command("vllm-check")
def vllm_check() -> None:
    """Say whether vLLM on this machine would take broadhead, and what is missing if not."""
    from broadhead.integrations.vllm.check import look, report

    usable, text = report(look())
    typer.echo(text)
    raise typer.Exit(0 if usable else 1)


def _parse_dtype(option: str, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"{option} must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _parse_window(text: str | None) -> Any:
    """ "128" as both sides, "128,0" as (left, right)."""
    if text is None:
        return None
    try:
        sides = tuple(int(part) for part in text.split(","))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2):
        raise ValueError(f"--window must be one or two ints such as 128 or 128,0, got {text!r}")
    return sides if len(sides) == 2 else sides[0]
