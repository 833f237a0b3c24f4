"""The helper that awaits ranks: what it calls a death, and that only a death is tried again."""

import subprocess
import sys

import pytest
from ranks import Died, finish, finish_or_again

FINE, WRONG = "pass", "raise ValueError('they differ')"
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
STUCK = "import time; time.sleep(60)"


def processes(*programs: str) -> list[subprocess.Popen]:
    return [subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True) for program in programs]


@pytest.mark.parametrize("programs", [(KILLED, FINE), (FINE, KILLED), (WRONG, KILLED)])
def test_a_signal_is_a_death(programs):
    with pytest.raises(Died, match="-11"):
        finish(processes(*programs))


def test_a_wait_without_end_is_a_death():
    made = processes(STUCK, STUCK)
    with pytest.raises(Died, match="not done after 1 s"):
        finish(made, 1)
    assert [process.wait(10) for process in made] == [-9, -9]


def test_what_python_raises_is_none_and_is_not_tried_again():
    begun = []
    with pytest.raises(AssertionError, match="they differ") as found:
        finish_or_again(lambda: begun.append(0) or processes(WRONG, FINE), 30)
    assert not isinstance(found.value, Died) and len(begun) == 1


def test_a_death_is_tried_once_more(capsys):
    tries = [(KILLED, FINE), (FINE, FINE)]
    finish_or_again(lambda: processes(*tries.pop(0)), 30)
    assert not tries and "a rank died and all were started again" in capsys.readouterr().out
    tries = [(KILLED, FINE), (KILLED, FINE), (FINE, FINE)]
    with pytest.raises(Died):
        finish_or_again(lambda: processes(*tries.pop(0)), 30)
    assert len(tries) == 1
