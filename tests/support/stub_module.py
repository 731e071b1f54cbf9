"""Stands in for the compiled module in both directions: the torch reference computes what kernels would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from broadhead import reference
from broadhead.call.arguments import AttentionArgs
from broadhead.call.check import check_forward
from broadhead.plan import dispatch, native
from broadhead.plan.device import describe
from broadhead.plan.native import BuildDescription
from broadhead.run import backward, choice, cuda_backend, forward, known
from described import forget_plans, h200


class Module:
    """Stands in for the compiled module: computes by the reference, and keeps what it was given."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.given: list[tuple[Any, ...]] = []

    def run_known(self, *call: Any) -> None:
        return None

    def Launch(self, **fields: Any) -> dict[str, Any]:
        return fields

    def BackwardLaunch(self, **fields: Any) -> dict[str, Any]:
        self.launches.append(fields)
        return fields

    def run_new(self, launch: dict[str, Any], function: str, need_lse: bool, args: AttentionArgs) -> Any:
        self.launches.append(launch)
        return reference.run(self.described(args), None)

    def run_backward(self, launch: dict[str, Any], args: AttentionArgs, *given: Any) -> None:
        self.given.append((args, *given))
        dout, lse, dlse, dq, dk, dv, dsinks = given
        found = reference.gradients(self.described(args._replace(out=None)), dout, dlse, args.out, lse)
        for target, gradient in zip((dq, dk, dv, dsinks), (*found[:3], found[4]), strict=True):
            if target is not None:
                target.copy_(gradient)

    def described(self, args: AttentionArgs) -> reference.Call:
        with torch.no_grad():
            return choice.describe_call(args, check_forward("f", args))


def install_module(monkeypatch: pytest.MonkeyPatch, build: BuildDescription) -> Module:
    """Tensors of the CPU count as those of an H200 with the kernels of ``build``."""
    found = Module()
    for place in (choice, backward, forward):
        monkeypatch.setattr(place, "describe", lambda device: h200())
    monkeypatch.setattr(dispatch, "build_description", lambda: build)
    monkeypatch.setattr(native, "extension", lambda: found)
    monkeypatch.setattr(cuda_backend, "connected_module", lambda: found)
    monkeypatch.setattr(known, "run_known", found.run_known)
    forget_plans(monkeypatch)
    assert describe(torch.device("cpu")).type == "cpu"
    return found


def row_of(launch: dict[str, Any]) -> str:
    """The id of the row that a launch was made for."""
    return launch["plan"].row.id
