"""One side of `broadhead_bench.compare`: times calls of the broadhead that it imports, as lines on its input ask.

Run as a file by its path, so that it needs nothing of the package that it measures but what every version has. Each
line of its input is a JSON object with "do": "rows", "prepare", "time", "host" or "quit"; each is answered by one line.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# The folder of this file holds modules of the newer package.
if __name__ == "__main__":
    sys.path.pop(0)

import torch
from torch import Tensor

#: Calls between two waits of a host measurement: less than a queue of the device holds.
HOST_BATCH = 25
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float8_e4m3fn": torch.float8_e4m3fn}
#: Where this and older versions of the package have a module.
PLACES = {
    "dispatch": ("plan.dispatch", "dispatch"),
    "cuda_backend": ("run.cuda_backend", "cuda_backend"),
    "append": ("api.append", "append_call"),
    "metadata": ("run.metadata", "metadata"),
}
#: What remembers a decision, by module and version: attributes with ``clear()`` or ``cache_clear()``, and functions.
MEMORIES = {
    "dispatch": ("_plans", "_decided"),
    "cuda_backend": ("forget_calls",),
    "append": ("clear_known",),
    "metadata": ("_prepared",),
}


def module_of(name: str) -> Any:
    """A module of the package that is measured, wherever its version has it."""
    places = [f"broadhead.{place}" for place in PLACES[name]]
    for place in places:
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is None or not place.startswith(error.name):
                raise
    raise ModuleNotFoundError(f"this broadhead has none of {', '.join(places)}")


def forget() -> None:
    """Forget every decision that this version of the package remembers."""
    for module, names in MEMORIES.items():
        found = module_of(module)
        for name in names:
            memory = getattr(found, name, None)
            if memory is not None:
                forget_it = getattr(memory, "cache_clear", None) or getattr(memory, "clear", memory)
                forget_it()


class Side:
    """The state between two lines: the device, the prepared call, the buffer that empties the L2."""

    def __init__(self, device: str) -> None:
        import broadhead

        self.broadhead, self.device, self.on_gpu = broadhead, torch.device(device), device.startswith("cuda")
        self.dispatch: Any = module_of("dispatch")
        self.table = self.dispatch.ROWS
        self.call: Callable[[], Any] = lambda: None
        self.flush: Callable[[], Any] = lambda: None
        self.flushes = 1  # the device is busy for so long that the host is ahead of it
        if self.on_gpu:
            l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or (64 << 20)
            self.flush = torch.empty(max(l2, 64 << 20), dtype=torch.int32, device=self.device).zero_

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table that this device and this build can run."""
        if not self.on_gpu:
            return [{"id": "torch", "phase": "prefill", "dtype": "bf16", "head_dim": 64, "head_dim_v": 64}]
        capability = torch.cuda.get_device_capability(self.device)
        return [
            {
                "id": row.id, "direction": row.direction, "phase": row.phase, "dtype": row.dtype,
                "kv_dtype": row.kv_dtype,
                "head_dim": row.head_dim, "head_dim_v": row.head_dim_v, "requires": list(row.requires),
                "tile_m": row.tile.tile_m,
            }
            for row in self.table
            if capability in row.capabilities
        ]  # fmt: skip

    def prepare(self, row: str, call: dict[str, Any]) -> dict[str, Any]:
        """Make the tensors of a call, force the row, run it; ``{"seconds": of a run}``."""
        if self.on_gpu:
            # Gradients need an out, from whatever row.
            self.dispatch.ROWS = tuple(
                x for x in self.table if x.id == row or (call["backward"] and x.direction == "forward")
            )
            forget()
        torch.manual_seed(0)
        self.flushes = 8 if call["backward"] else 1
        if call["backward"]:
            self.call = gradient_call(self.broadhead, call, self.device)
            self.call()
        else:
            self.call = attention_call(self.broadhead, call, self.device)
            self.call()
            ran = self.broadhead.last_dispatch()[1]
            if self.on_gpu and ran != row:
                raise RuntimeError(f"{ran} ran instead of {row}")
        for _ in range(2):
            self.time(1)
        return {"seconds": min(self.time(3))}

    def time(self, runs: int) -> list[float]:
        """Seconds of each of some runs, the L2 emptied before each."""
        if not self.on_gpu:
            return [_clock(self.call) for _ in range(runs)]
        events = []
        for _ in range(runs):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(self.flushes):
                self.flush()
            begin.record()
            self.call()
            end.record()
            events.append((begin, end))
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in events]

    def host(self, call: dict[str, Any], batches: int) -> list[float]:
        """Seconds that each call of some batches keeps the host; the device catches up between batches."""
        if self.dispatch.ROWS is not self.table:
            self.dispatch.ROWS = self.table
            forget()
        key = json.dumps(call)
        if getattr(self, "_host_key", "") != key:
            self._host_call, self._host_key = host_call(self.broadhead, call, self.device), key
        work = self._host_call
        samples: list[float] = []
        enabled = gc.isenabled()
        gc.disable()
        try:
            for batch in range(batches + 1):  # the first warms up
                some = [_clock(work) for _ in range(HOST_BATCH if self.on_gpu else 2)]
                samples += some if batch else []
                if self.on_gpu:
                    torch.cuda.synchronize(self.device)
        finally:
            if enabled:
                gc.enable()
        return samples


def _clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _normal(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16).to(dtype)


def attention_call(broadhead: Any, call: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """A call as `compare.calls_of_row` describes it: dense where page_size is 0, else over scattered pages."""
    batch, seqlen_q, seqlen_k, page = (call[name] for name in ("batch", "seqlen_q", "seqlen_k", "page_size"))
    dtype, keys = DTYPES[call["dtype"]], DTYPES[call["kv_dtype"] or call["dtype"]]
    q = _normal((batch, seqlen_q, call["heads_q"], call["head_dim"]), dtype, device)
    out = torch.empty(
        *q.shape[:-1], call["head_dim_v"], dtype=torch.bfloat16 if dtype.itemsize == 1 else dtype, device=device
    )
    options: dict[str, Any] = {"causal": call["causal"], "window_size": tuple(call["window"]), "out": out}
    options["backend"] = "cuda" if device.type == "cuda" else None
    if call["qv"]:
        options["qv"] = _normal((*q.shape[:-1], call["head_dim_v"]), dtype, device)
    rows = (batch * -(-seqlen_k // page), page) if page else (batch, seqlen_k)
    k = _normal((*rows, call["heads_kv"], call["head_dim"]), keys, device)
    v = _normal((*rows, call["heads_kv"], call["head_dim_v"]), keys, device)
    if not page and call["phase"] == "prefill":
        return lambda: broadhead.flash_attn_func(q, k, v, **options)
    options["cache_seqlens"] = torch.full((batch,), seqlen_k, dtype=torch.int32, device=device)
    if page:
        options["page_table"] = torch.randperm(rows[0], device=device).view(batch, -1).int()
    return lambda: broadhead.flash_attn_with_kvcache(q, k, v, **options)


def gradient_call(broadhead: Any, call: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """The gradients of such a dense call. A row that can not run it is an error."""
    batch, dtype = call["batch"], DTYPES[call["dtype"]]
    q = _normal((batch, call["seqlen_q"], call["heads_q"], call["head_dim"]), dtype, device)
    k = _normal((batch, call["seqlen_k"], call["heads_kv"], call["head_dim"]), dtype, device)
    v = _normal((batch, call["seqlen_k"], call["heads_kv"], call["head_dim_v"]), dtype, device)
    options: dict[str, Any] = {"causal": call["causal"], "window_size": tuple(call["window"])}
    options["backend"] = "cuda" if device.type == "cuda" else None
    out, softmax_lse = broadhead.flash_attn_func(q, k, v, return_softmax_lse=True, **options)
    dout, (dq, dk, dv) = torch.randn_like(out), (torch.empty_like(x) for x in (q, k, v))
    return lambda: broadhead.mha_bwd(dout, q, k, v, out, softmax_lse, dq=dq, dk=dk, dv=dv, **options)


def host_call(broadhead: Any, call: dict[str, Any], device: torch.device) -> Callable[[], Any]:
    """A small call of ``call["kind"]``, into a given ``out`` if ``call["out"]``."""
    dtype = torch.bfloat16
    decode = call["kind"] in ("decode", "append")
    lead = (4, 1) if decode else (1, 128)
    q = _normal((*lead, 8, 128), dtype, device)
    given = {"out": torch.empty_like(q)} if call["out"] else {}
    if call["kind"] == "dense":
        k, v = (_normal((1, 128, 8, 128), dtype, device) for _ in range(2))
        return lambda: broadhead.flash_attn_func(q, k, v, causal=True, **given)
    if call["kind"] == "varlen":
        packed = [_normal((128, 8, 128), dtype, device) for _ in range(3)]
        offsets = torch.tensor([0, 50, 128], dtype=torch.int32, device=device)
        given = {"out": torch.empty_like(packed[0])} if call["out"] else {}
        return lambda: broadhead.flash_attn_varlen_func(*packed, offsets, offsets, 78, 78, causal=True, **given)
    k, v = (_normal((64, 64, 2, 128), dtype, device) for _ in range(2))
    table = torch.arange(64, dtype=torch.int32, device=device).view(4, 16)
    lengths = torch.full((4,), 700, dtype=torch.int32, device=device)
    options = {"cache_seqlens": lengths, "page_table": table, "causal": True, **given}
    if call["kind"] == "append":
        new = [_normal((4, 1, 2, 128), dtype, device) for _ in range(2)]
        return lambda: broadhead.flash_attn_with_kvcache(q, k, v, *new, **options)
    return lambda: broadhead.flash_attn_with_kvcache(q, k, v, **options)


def main() -> None:
    """Answer lines until "quit" or the end of the input."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    side: Side | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        if what == "quit":
            return
        try:
            with torch.no_grad():
                if what == "start":
                    side = Side(asked["device"])
                    answer: Any = {"file": side.broadhead.__file__, "version": side.broadhead.__version__}
                else:
                    assert side is not None, "start comes first"
                    answer = getattr(side, what)(**asked)
            reply = {"answer": answer}
        except Exception as error:  # the other side goes on
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"[:500]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
