"""The comparison of launches with routes tells what did not arrive."""

from __future__ import annotations

import pytest
from routes import NOT_NULL, Route, differences

LAUNCHES = [
    {"entry": "append_kv", "q_out": "77"},
    {"entry": "forward", "window_left": "13", "window_right": "5", "q": "77", "softmax_lse": "8", "sinks": "0"},
    {"entry": "forward", "window_left": "2"},
]


@pytest.mark.parametrize(
    "route",
    [
        Route("forward", "window_left", "13"),
        Route("forward[1]", "window_left", "2"),
        Route("forward", "q", "append_kv.q_out"),
        Route("forward", "softmax_lse", NOT_NULL),
    ],
)
def test_what_arrived(route: Route) -> None:
    assert differences(LAUNCHES, {"argument": [route]}) == []


@pytest.mark.parametrize(
    ("route", "words"),
    [
        (Route("forward", "window_left", "5"), "argument: forward.window_left is 13, not 5"),
        (Route("forward[1]", "window_left", "13"), "forward[1].window_left is 2, not 13"),
        (Route("forward[2]", "window_left", "13"), "is None, not 13"),
        (Route("backward", "window_left", "13"), "is None, not 13"),
        (Route("forward", "softcap", "7.5"), "is None, not 7.5"),
        (Route("forward", "window_left", "append_kv.q_out"), "is 13, not 77"),
        (Route("forward", "softcap", "append_kv.lengths_out"), "is None"),
        (Route("forward", "sinks", NOT_NULL), "is 0, not not null"),
        (Route("backward", "sinks", NOT_NULL), "is None, not not null"),
    ],
)
def test_what_did_not_arrive(route: Route, words: str) -> None:
    (told,) = differences(LAUNCHES, {"argument": [route]})
    assert words in told
