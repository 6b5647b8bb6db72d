"""Which end of a rank becomes the launcher's exit code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamba_trainer.launch.spec import Limits
from mamba_trainer.launch.verdict import End, exit_code_of, grace_after, name_of, root_cause
from mamba_trainer.restart import Cause


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        pytest.param([End(0, 1, 0), End(0, 2, 1)], 0, id="all done"),
        pytest.param([End(75, 1, 0), End(75, 2, 1)], 75, id="all stopped"),
        pytest.param([End(0, 1, 0), End(75, 2, 1)], 75, id="one stopped"),
        pytest.param([End(75, 1, 0), End(1, 2, 1)], 1, id="one failed while stopping"),
        pytest.param([End(70, 1, 1), End(1, 2, 0)], 70, id="the first failure"),
        pytest.param([End(1, 1, 1), End(70, 2, 0)], 1, id="the first failure, also if it has no name"),
        pytest.param([End(76, 1, 0), End(70, 9, 1)], 70, id="a lost peer is never the cause if there is another"),
        pytest.param([End(76, 1, 0), End(76, 2, 1)], 76, id="nothing but lost peers"),
        pytest.param([End(76, 1, 0), End(0, 2, 1)], 76, id="a lost peer is a failure"),
        pytest.param([End(137, 3, 0, killed=True), End(73, 4, 1)], 73, id="whom we killed does not count"),
        pytest.param([End(0, 1, 0), End(137, 60, 1, killed=True)], 0, id="done, but one did not leave"),
        pytest.param([End(1, 1, 0), End(137, 1, 1)], 137, id="found dead together: the signal broke the other"),
        pytest.param([End(1, 1, 0), End(64, 1, 1)], 64, id="found dead together: the one with a name"),
    ],
)
def test_the_root_cause(ends: list[End], code: int) -> None:
    assert root_cause(ends).code == code
    assert root_cause(ends[::-1]).code == code


@pytest.mark.parametrize(("returncode", "code"), [(0, 0), (70, 70), (-9, 137), (-11, 139), (-15, 143)])
def test_a_death_by_signal_reads_as_in_a_shell(returncode: int, code: int) -> None:
    assert exit_code_of(returncode) == code


def test_codes_are_named_for_people() -> None:
    assert [name_of(code) for code in (137, 70, 3)] == ["137 (SIGKILL)", "70 (OUT_OF_MEMORY)", "3"]


@given(st.integers(0, 255))
def test_every_exit_code_has_a_cause_and_a_bounded_grace(code: int) -> None:
    assert Cause.of(code) in Cause
    limits = Limits()
    assert grace_after(code, limits) + limits.kill <= 80
    if code not in (0, 75):
        assert grace_after(code, limits) + limits.kill < 60
