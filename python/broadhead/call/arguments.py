"""The one list of the arguments of an attention call, `AttentionArgs`; what needs all of them is made from it.

The operators' schemas (ops/attention.py) and the C++ enumeration (cmake/generate.py) follow its order. The module
imports nothing of torch: the build reads it.
"""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple, get_type_hints


class Argument(NamedTuple):
    """What is known of an argument besides its name, its place and its default."""

    schema: str  # its type in an operator's schema; "": the operator has another form of it
    differentiable: bool = False
    aligned: bool = False  # kernels choose by the alignment of its address

    @property
    def is_tensor(self) -> bool:
        return self.schema.startswith("Tensor")


class AttentionArgs(NamedTuple):
    """The arguments of one forward call under their canonical names, as given."""

    q: Annotated[Any, Argument("Tensor", differentiable=True, aligned=True)]
    k: Annotated[Any, Argument("Tensor", differentiable=True, aligned=True)]
    v: Annotated[Any, Argument("Tensor", differentiable=True, aligned=True)]
    qv: Annotated[Any, Argument("Tensor?", differentiable=True, aligned=True)] = None
    out: Annotated[Any, Argument("Tensor(a!)", aligned=True)] = None
    cu_seqlens_q: Annotated[Any, Argument("Tensor?")] = None
    cu_seqlens_k: Annotated[Any, Argument("Tensor?")] = None
    seqused_q: Annotated[Any, Argument("Tensor?")] = None
    seqused_k: Annotated[Any, Argument("Tensor?")] = None
    max_seqlen_q: Annotated[Any, Argument("SymInt?")] = None
    max_seqlen_k: Annotated[Any, Argument("SymInt?")] = None
    page_table: Annotated[Any, Argument("Tensor?")] = None
    kv_batch_idx: Annotated[Any, Argument("Tensor?")] = None
    leftpad_k: Annotated[Any, Argument("Tensor?")] = None
    q_descale: Annotated[Any, Argument("Tensor?")] = None
    k_descale: Annotated[Any, Argument("Tensor?")] = None
    v_descale: Annotated[Any, Argument("Tensor?")] = None
    softmax_scale: Annotated[Any, Argument("float?")] = None
    causal: Annotated[Any, Argument("bool")] = False
    window_size: Annotated[Any, Argument("")] = (-1, -1)  # in a schema: WINDOW_SIDES
    attention_chunk: Annotated[Any, Argument("SymInt")] = 0
    softcap: Annotated[Any, Argument("float")] = 0.0
    scheduler_metadata: Annotated[Any, Argument("Tensor?")] = None
    num_splits: Annotated[Any, Argument("SymInt")] = 0
    pack_gqa: Annotated[Any, Argument("bool?")] = None
    sm_margin: Annotated[Any, Argument("SymInt")] = 0
    sinks: Annotated[Any, Argument("Tensor?", differentiable=True)] = None
    prefix_lens: Annotated[Any, Argument("Tensor?")] = None
    backend: Annotated[Any, Argument("str?")] = None
    tokens_per_split: Annotated[Any, Argument("SymInt")] = 0
    query_ranges: Annotated[Any, Argument("Tensor?")] = None
    ranges_in_window: Annotated[Any, Argument("bool")] = False
    causal_by_sequence: Annotated[Any, Argument("Tensor?")] = None  # public functions take it as their ``causal``
    tree_mask: Annotated[Any, Argument("Tensor?")] = None


#: By name, in the order of AttentionArgs.
ARGUMENTS: dict[str, Argument] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(AttentionArgs, include_extras=True).items()
}
#: The arguments that have a gradient, in the order in which gradients are returned.
DIFFERENTIABLE = tuple(name for name, argument in ARGUMENTS.items() if argument.differentiable)
#: The values among the arguments that are one number or one bool.
SCALARS = tuple(
    name for name, argument in ARGUMENTS.items() if argument.schema.rstrip("?") in ("SymInt", "float", "bool")
)
#: Those of them that are a bool, in whatever form they come.
FLAGS = tuple(name for name, argument in ARGUMENTS.items() if argument.schema.rstrip("?") == "bool")
#: What window_size is in a schema.
WINDOW_SIDES = ("window_left", "window_right")


def _operator_arguments() -> dict[str, str]:
    """The arguments of the operators by name: those with a gradient first, then the others in their order."""
    found = {name: ARGUMENTS[name].schema for name in DIFFERENTIABLE}
    for name, argument in ARGUMENTS.items():
        if name == "window_size":
            found.update(dict.fromkeys(WINDOW_SIDES, "SymInt"))
        elif name != "out":
            found.setdefault(name, argument.schema)
    # How the call is differentiated: whether its sums must have an order, and whether it will be at all.
    found |= {"deterministic": "bool", "differentiable": "bool", "function": "str"}
    return found


#: Names and schema types of what an operator takes, and the same as a schema.
OPERATOR_ARGUMENTS = _operator_arguments()
OPERATOR_NAMES = tuple(OPERATOR_ARGUMENTS)
OPERATOR_SCHEMA = ", ".join(f"{kind} {name}" for name, kind in OPERATOR_ARGUMENTS.items())
