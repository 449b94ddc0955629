"""How inputs are damaged, and what counts as an answer: a result or one AdflowError, within ten seconds."""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from adflow.errors import AdflowError

from .stage import Count

SECONDS = 10


def quick(examples: int) -> Any:
    return settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@contextmanager
def limited() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def survives(kind: str, call: Callable[[], Any], count: Count, about: object) -> Any:
    """Call; an AdflowError of one line is an answer, all else is a defect."""
    try:
        with limited():
            found = call()
    except AdflowError as error:
        found = error
        if "\n" in str(error).strip() or len(str(error)) > 1000:
            count(kind, False)
            raise AssertionError(f"{kind}: {about!r:.300}: not one short line: {error}") from error
    except BaseException as error:
        count(kind, False)
        raise AssertionError(f"{kind}: {about!r:.300}: {type(error).__name__}: {error}") from error
    count(kind, True)
    return found


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "drop", "repeat", "zero", "number"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2**32 - 1),
    ),
    min_size=1,
    max_size=6,
)


def damage(content: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    """The content with some bytes changed, most of them near the front, where formats keep their sizes."""
    data = bytearray(content)
    for how, place, value in steps:
        if not data:
            break
        at = int(len(data) * place**2)
        if how == "flip":
            data[at] ^= 1 << value % 8
        elif how == "set":
            data[at] = (0, 255, 127, 128, 1)[value % 5]
        elif how == "cut":
            del data[at:]
        elif how == "drop":
            del data[at : at + value % 64]
        elif how == "repeat":
            data[at:at] = data[at : at + value % 64]
        elif how == "zero":
            data[at : at + value % 32] = bytes(len(data[at : at + value % 32]))
        else:
            data[at : at + 4] = struct.pack("<I" if value & 1 else ">I", value)
    return bytes(data)
