"""What a constructor refuses, in one sentence each; the keywords are the names that the user typed."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from adflow.errors import InputError, UsageError, unknown


def one_of(name: str, value: str, known: Collection[str]) -> None:
    """Refuse a word that is not known."""
    if value not in known:
        raise unknown(name, str(value), known)


def at_least(lowest: float, **numbers: float) -> None:
    """Refuse numbers below ``lowest``."""
    for name, number in numbers.items():
        if number < lowest:
            raise UsageError(f"{name} is {number}, expected at least {lowest}")


def some_or_all(**numbers: int | None) -> None:
    """Refuse numbers below 1; None stands for all."""
    for name, number in numbers.items():
        if number is not None and int(number) < 1:
            raise UsageError(f"{name} is {number}, expected 1 or more, or none for all")


def above_0(**numbers: float) -> None:
    """Refuse 0 and numbers below."""
    for name, number in numbers.items():
        if number <= 0:
            raise UsageError(f"{name} is {number}, expected more than 0")


def within(lowest: float, highest: float, **numbers: float) -> None:
    """Refuse numbers below ``lowest`` or above ``highest``."""
    for name, number in numbers.items():
        if not lowest <= number <= highest:
            raise UsageError(f"{name} is {number}, expected {lowest:g} to {highest:g}")


def fraction(**numbers: float) -> None:
    """Refuse what is no part of a whole: more than 0 and at most 1."""
    for name, number in numbers.items():
        if not 0 < number <= 1:
            raise UsageError(f"{name} is {number}, expected more than 0 and at most 1")


def need_pixels(
    backbone: str, channels: Sequence[int], grids: Sequence[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Refuse features that are not the image itself, for deep nets of their own.

    Raises:
        InputError: they are features of ``backbone``.
    """
    if list(channels) != [3] or list(grids) != [size]:
        raise InputError(
            f"the deep net learns from pixels, found features of {backbone}",
            hint="Use --backbone pixels, or --set net=linear.",
        )
