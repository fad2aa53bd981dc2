import os
import signal
import threading

import pytest

from quickmerge.training.loop import LateSignals

pytestmark = pytest.mark.usefixtures("heard")


def test_a_first_signal_is_noted_and_a_second_ctrl_c_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), LateSignals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_what_nobody_asked_for_comes_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt):
        with LateSignals():
            os.kill(os.getpid(), signal.SIGINT)
            reached = True
        raise AssertionError("the signal was lost")
    assert reached


def test_other_threads_may_train() -> None:
    entered = []

    def enter() -> None:
        with LateSignals() as signals:
            entered.append(signals.received)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [None]


def test_what_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with LateSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        signals.received = None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
