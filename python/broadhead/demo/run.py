"""Runs the demo and says what happened; the exit status says whether it was right."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

import broadhead
from broadhead.demo import models, verify
from broadhead.demo.generate import Generation, generate_paged
from broadhead.demo.paged_cache import PagedKVCache

DEFAULT_PROMPT = "Explain in two sentences why the sky is blue."
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ARCHITECTURES = ("smollm2", "gemma4")

#: Exit status: right; a check failed; the demo could not run.
OK, FAILED, CANNOT_RUN = 0, 1, 2


def run(
    prompt: str = DEFAULT_PROMPT,
    max_new_tokens: int = 48,
    device: str | None = None,
    dtype: str | None = None,
    page_size: int = 16,
    architecture: str = "smollm2",
) -> int:
    """Generate, check, report.

    Args:
        prompt: the user's message (smollm2 only).
        max_new_tokens: at most this many tokens.
        device: "cpu", "cuda", "cuda:1"; default: a GPU if torch sees one.
        dtype: a key of DTYPES; default: bfloat16 on a GPU, float32 on a CPU.
        page_size: tokens a page of the KV cache.
        architecture: one of ARCHITECTURES.

    Returns:
        OK, FAILED or CANNOT_RUN.
    """
    from rich.console import Console

    console = Console(soft_wrap=True)
    try:
        where, kind = _choose(device, dtype, max_new_tokens, page_size, architecture)
        _print_header(console, where, kind, page_size)
        if architecture == "gemma4":
            verdicts = _run_gemma4(console, where, kind, max_new_tokens, page_size)
        else:
            verdicts = _run_smollm2(console, where, kind, prompt, max_new_tokens, page_size)
    except (models.MissingPackageError, ValueError) as error:
        console.print(f"[bold red]cannot run:[/] {error}", highlight=False)
        return CANNOT_RUN
    console.print()
    for verdict in verdicts:
        mark = "[bold green]ok[/]  " if verdict.ok else "[bold red]FAIL[/]"
        console.print(f"{mark} {verdict.text}", highlight=False)
    return OK if all(v.ok for v in verdicts) else FAILED


def _choose(
    device: str | None, dtype: str | None, max_new_tokens: int, page_size: int, architecture: str
) -> tuple[torch.device, torch.dtype]:
    """Check the options and fill in the defaults. Raises ValueError naming the option."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"--architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be >= 1, got {max_new_tokens}")
    if page_size < 1:
        raise ValueError(f"--page-size must be >= 1, got {page_size}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device must be a torch device such as cpu or cuda, got {device!r}") from error
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    if dtype is None:
        dtype = "bfloat16" if where.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if where.type == "cuda" and dtype == "float32":
        raise ValueError(
            "--dtype float32: the kernels compute in bfloat16 or float16; use one of them, or --device cpu"
        )
    return where, DTYPES[dtype]


def _print_header(console: Any, device: torch.device, dtype: torch.dtype, page_size: int) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    console.print(
        f"broadhead {broadhead.__version__} · torch {torch.__version__} · Python {platform.python_version()} · {name} "
        f"· {str(dtype).removeprefix('torch.')} · pages of {page_size} tokens",
        style="dim",
        highlight=False,
    )


def _load_with_progress(console: Any, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Load SmolLM2 under a progress bar."""
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

    models.check_packages()
    total = models.tensor_count(models.find_gguf())
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("SmolLM2-135M-Instruct: importing transformers", total=total)
        loaded = models.load_smollm2(
            dtype,
            device,
            on_stage=lambda text: progress.update(task, description=f"SmolLM2-135M-Instruct: {text}"),
            on_tensor=lambda: progress.advance(task),
        )
        progress.update(task, completed=total, description="SmolLM2-135M-Instruct: loaded")
    return loaded


def _run_smollm2(
    console: Any, device: torch.device, dtype: torch.dtype, prompt: str, max_new_tokens: int, page_size: int
) -> list[verify.Verdict]:
    """Generate text with the real model and compare its tokens with SDPA's."""
    if not prompt.strip():
        raise ValueError("--prompt must not be empty")
    model, tokenizer = _load_with_progress(console, dtype, device)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"].to(device)
    eos = models.end_tokens(model, tokenizer)

    console.print(f"\n[bold]prompt:[/] {prompt}\n", highlight=False)
    if device.type == "cuda":
        generate_paged(model, ids, 2, page_size)  # so that the rates below hold no lazy loading
    printer = _TextPrinter(tokenizer, eos)
    ours, cache = generate_paged(model, ids, max_new_tokens, page_size, eos, printer)
    printer.finish()
    _print_run(console, ids.shape[1], ours, cache)
    with console.status("checking against SDPA"):
        return [
            verify.check_backend(cache.dispatches, device),
            verify.check_tokens(model, ids, ours, max_new_tokens, eos),
        ]


def _run_gemma4(
    console: Any, device: torch.device, dtype: torch.dtype, max_new_tokens: int, page_size: int
) -> list[verify.Verdict]:
    """Generate with a random Gemma 4 and compare its logits with SDPA's."""
    model = models.random_gemma4(dtype, device)
    config = model.config
    local, whole = (config.layer_types.count(kind) for kind in ("sliding_attention", "full_attention"))
    console.print(
        f"Gemma 4, randomly initialised: {local} local layers with head_dim 256, window {config.sliding_window}, "
        f"{whole} global with head_dim 512, softmax scale 1",
        highlight=False,
    )
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, models.GEMMA4_VOCABULARY, (1, 61), generator=generator).to(device)
    if device.type == "cuda":
        generate_paged(model, ids, 2, page_size)
    ours, cache = generate_paged(model, ids, max_new_tokens, page_size)
    _print_run(console, ids.shape[1], ours, cache)
    with console.status("checking against SDPA"):
        return [verify.check_backend(cache.dispatches, device), verify.check_logits(model, ids, ours)]


class _TextPrinter:
    """Prints text as its tokens come; a character whose bytes span several tokens waits for the last of them."""

    def __init__(self, tokenizer: Any, eos: set[int]) -> None:
        self._tokenizer = tokenizer
        self._eos = eos
        self._tokens: list[int] = []
        self._printed = 0

    def __call__(self, token: int) -> None:
        if token in self._eos:
            return
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)

    def finish(self) -> None:
        """Print what waited, and end the line."""
        self._write(self._tokenizer.decode(self._tokens, skip_special_tokens=True))
        sys.stdout.write("\n\n")
        sys.stdout.flush()

    def _write(self, text: str) -> None:
        sys.stdout.write(text[self._printed :])
        sys.stdout.flush()
        self._printed = len(text)


def _print_run(console: Any, prompt_tokens: int, ours: Generation, cache: PagedKVCache) -> None:
    """Rates, and which backend and row ran each phase and why."""
    from rich.table import Table

    prefill_rate = prompt_tokens / ours.prefill_seconds if ours.prefill_seconds else 0.0
    console.print(
        f"[bold]{ours.decode_rate:.1f} tokens/s[/] decoding ({len(ours.tokens)} tokens), "
        f"{prefill_rate:.0f} tokens/s prefill ({prompt_tokens} tokens)",
        highlight=False,
    )
    table = Table("phase", "head_dim", "backend", "row", "calls")
    ordered = sorted(cache.dispatches.items(), key=lambda item: (item[0].phase != "prefill", item[0].head_dim))
    for dispatch, calls in ordered:
        table.add_row(dispatch.phase, str(dispatch.head_dim), dispatch.backend, dispatch.row or "-", str(calls))
    console.print(table)
    for reason in dict.fromkeys(dispatch.reason for dispatch, _ in ordered):
        console.print(f"why: {reason}", highlight=False)
