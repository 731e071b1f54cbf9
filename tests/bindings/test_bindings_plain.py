"""The compiled module without a GPU: it reads plain memory alone, says what it wrote, and lets other threads run."""

from __future__ import annotations

from pathlib import Path

import pytest
from stub_process import KNOWN, pytestmark, run, stub  # noqa: F401

#: A call of each function that launches, by lambdas of a function that makes its tensors.
READERS = """
def chunks(T, size):
    return make_launch(T, attention_chunk=size)

# name -> (its tensors, how it is called with them, the size that makes the stub wait)
def metadata_of(t, size=64):
    schedule = (2, 1, size, 0, -1, -1, 0, 1, 1, 16, 64, 1, 132, 7)
    return _C.run_new_metadata(0, None, "made for", schedule, *t, None)
def combine_of(t):
    return _C.combine(*t, -1)
def append_of(t):
    return _C.append_kv(*t, 1, 0, -1)
def merge_of(t):
    return _C.run_new_merge(0, *((lambda _: made, None, None) for made in (None, t[5])), *t[:5])
def readers(T, size=16):
    return {
        "metadata": (metadata_of, [T(1 << 12, (2,), INT), T(2 << 12, (3,), INT), T(3 << 12, (2,), INT),
                                   T(4 << 12, (17,), INT), T(5 << 12, (2, 7), INT)]),
        "combine": (combine_of, [T(1 << 12, (3, size, 4, 32), F32), T(2 << 12, (3, size, 4), F32),
                                 T(3 << 12, (size, 4, 32)), T(4 << 12, (size, 4), F32)]),
        "append": (append_of, [
            T(1 << 12, (5, size, 2, 64)), T(2 << 12, (5, size, 2, 32)), T(3 << 12, (6, 2, 64)), T(4 << 12, (6, 2, 32)),
            T(5 << 12, (2,), INT), T(6 << 12, (2,), INT), T(7 << 12, (9, 4, 64)), T(8 << 12, (9, 4, 64)),
            T(9 << 12, (20, 16), F32), T(10 << 12, (20, 16), F32), T(11 << 12, (2,), INT), T(12 << 12, (3,), INT),
            T(13 << 12, (3,), INT), T(14 << 12, (2, 7), INT), T(15 << 12, (2,), INT), T(16 << 12, (2, 2), F32),
            T(17 << 12, (2, 2), F32)]),
        "merge": (merge_of, [T(1 << 12, (size, 4, 32)), T(2 << 12, (4, size), F32), T(3 << 12, (size, 4, 32)),
                             T(4 << 12, (4, size), F32), T(5 << 12, (size, 4, 32)), T(6 << 12, (4, size), F32)]),
    }
"""


@pytest.mark.parametrize("kind", ["AttributeTensor", "ExchangeTensor"])
def test_an_address_of_null_is_an_error_of_every_reader(stub: Path, kind: str) -> None:  # noqa: F811
    """DLPack gives null, and no error, for tensors that wrap others."""
    run(
        stub,
        READERS
        + f"""
T = {kind}
def without_memory(tensor):
    return T(0, tensor.shape, tensor.dtype)
for name, (call, tensors) in readers(T).items():
    call(tensors)
    for i in range(len(tensors)):
        wrapper = [*tensors[:i], without_memory(tensors[i]), *tensors[i + 1:]]
        assert f"{kind} has" in error(lambda: call(wrapper)), (name, i)
        assert "no memory of its own" in error(lambda: call(wrapper)), (name, i)
qv = T(1 << 12, (2, 3, 4, 32))
descales = dict(k_descale=T(2 << 12, (2, 2), F32), v_descale=T(3 << 12, (2, 2), F32), seqused_q=T(4096, (2,), INT))
given = dict(zip(ARGUMENTS, arguments(T, qv=qv, **descales)))
_C.run_new(make_launch(T), "new", True, tuple(given.values()))
assert _C.run_known("known", True, tuple(given.values())) is not None
for name, value in given.items():
    if isinstance(value, T):
        call = tuple((given | {{name: without_memory(value)}}).values())
        assert "no memory of its own" in error(lambda: _C.run_new(make_launch(T), "new", True, call)), name
        assert _C.run_known("known", True, call) is None, name
""",
    )


def test_other_types_are_not_known(stub: Path) -> None:  # noqa: F811
    """Every tensor argument, not q alone: what a subclass does with its memory only torch knows."""
    run(
        stub,
        KNOWN
        + """
class Other(ExchangeTensor):
    pass
T = ExchangeTensor
qv = dict(qv=T(1 << 12, (2, 3, 4, 32)), k_descale=T(2 << 12, (2, 2), F32), seqused_q=T(4096, (2,), INT))
remember(T, **qv)
given = dict(zip(ARGUMENTS, arguments(T, **qv)))
assert known(T, **qv) is not None
for name, value in given.items():
    if isinstance(value, T):
        other = Other(value.data_ptr(), value.shape, value.dtype, value.stride())
        assert known(T, **qv | {name: other}) is None, name
""",
    )


def test_pending_negation_and_active_modes_are_not_known(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + """
T = ExchangeTensor
import copy
floats = ("q", "k", "v", "out", "sinks", "k_descale")
more = dict(k_descale=T(2 << 12, (2, 2), F32))
remember(T, **more)
def negated(name):
    given = dict(zip(ARGUMENTS, arguments(T, **more)))
    given[name] = copy.copy(given[name])
    given[name].is_negative = True
    return tuple(given.values())
for name in floats:
    assert _C.run_known("known", True, negated(name)) is None, name
hooks.modes = 1
assert known(T, **more) is None, "FakeTensorMode and its like"
hooks.modes, hooks.forward_ad["_current_level"] = 0, 0
assert known(T, **more) is None, "forward-mode AD"
hooks.forward_ad["_current_level"] = -1
assert known(T, **more) is not None
""",
    )


def test_a_given_out_is_marked_as_written(stub: Path) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + """
T = ExchangeTensor
remember(T)
assert hooks.written == [4 << 12]
known(T)
assert hooks.written == [4 << 12] * 2
remember(T, out=None), known(T, out=None)
assert len(hooks.written) == 2, "what was allocated here nobody has saved"
error(lambda: remember(T, launch=dict(softcap=-1.0), sm_margin=1))
assert len(hooks.written) == 2, "a launch that failed wrote nothing"
""",
    )


def test_a_call_that_is_forgotten_while_python_runs_keeps_its_launch(stub: Path) -> None:  # noqa: F811
    """is_grad_enabled may run Python code, and so another thread, whose insertion forgets all calls at the bound."""
    run(
        stub,
        KNOWN
        + """
import gc, weakref
T = ExchangeTensor
launch = make_launch(T)
# What the launch holds, and nobody else.
class Dispatch:
    pass
dispatch = Dispatch()
launch = make_launch(T, dispatch=dispatch)
alive = weakref.ref(dispatch)
hooks.last = None
_C.run_new(launch, "new", True, arguments(T))
del launch, dispatch
hooks.last = None
seen = []
def forget():
    _C.forget_calls()
    gc.collect()
    seen.append(alive() is not None)
    return False
connect(is_grad_enabled=forget)
assert known(T) is not None and seen == [True]
hooks.last = None
assert known(T) is None and alive() is None, "it was forgotten, and freed afterwards"
""",
    )


@pytest.mark.parametrize("function", ["forward", "metadata", "combine", "append", "merge"])
def test_other_threads_run_while_a_launch_waits(stub: Path, function: str) -> None:  # noqa: F811
    run(
        stub,
        KNOWN
        + READERS
        + f"""
import threading, time
T = ExchangeTensor
if {function!r} == "forward":
    remember(T, launch=dict(attention_chunk=77))
    launch = lambda: known(T)
elif {function!r} == "metadata":
    launch = lambda: metadata_of(readers(T)["metadata"][1], 77)
else:
    call, tensors = readers(T, 77)[{function!r}]
    launch = lambda: call(tensors)
sys.setswitchinterval(1e-4)
stamps, done = [], threading.Event()
def tick():
    while not done.is_set():
        stamps.append(time.perf_counter())
        time.sleep(0.002)
thread = threading.Thread(target=tick)
thread.start()
time.sleep(0.02)
begin = time.perf_counter()
assert (launch() is None) == ({function!r} in ("combine", "append"))
end = time.perf_counter()
done.set()
thread.join()
during = [begin, *(t for t in stamps if begin < t < end), end]
assert end - begin >= 0.3, "the stub waits"
assert max(b - a for a, b in zip(during, during[1:])) < 0.2, "the other thread stood still"
""",
    )
