"""SIGKILL at every write and at random moments: the rerun ends with the bytes of an undisturbed run.

Two ways: at the n-th time a command is about to touch the file system (every state between two writes), and after a
random time (inside writes and computations).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from children import left_over

from .stage import COMMANDS, Count, Stage, all_whole, spread

# Random kills of each command, besides one at every write (at most MOST + 1 of them, spread evenly).
RANDOM, MOST = 4, 6


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_and_run_again(name: str, stage: Callable[[str], Stage], count: Count) -> None:
    command = stage(name)
    command.prepare()
    undisturbed = command.run(fault={"log": True})
    assert undisturbed.code == 0, undisturbed.err
    wanted = command.state()
    assert wanted and left_over(command.out) == []
    if name == "export":
        command.keep()
    moments = random.Random(name)
    kills: list[dict[str, Any]] = [{"fault": {"at": at, "kill": True}} for at in spread(len(undisturbed.events), MOST)]
    kills += [{"kill_after": moments.uniform(0.02, undisturbed.seconds)} for _ in range(RANDOM)]
    for kill in kills:
        command.prepare()
        killed = command.run(**kill)
        assert killed.code in (-9, 0), killed.err
        all_whole(command.out)
        again = command.run()
        assert again.code == 0, (kill, again.err)
        found = command.state()
        assert set(found) == set(wanted), kill
        assert found == wanted, (kill, [key for key in wanted if found[key] != wanted[key]])
        assert left_over(command.out) == [], kill
        if killed.code == -9:
            count(f"SIGKILL during {name}", True)
