"""Processes that stop at one point, with a coordination service of one dictionary."""

import threading
import time

import pytest
from coordination import Service

from transfusion_jax.parallel import stopping as stopping_module
from transfusion_jax.parallel.stopping import Stopping


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(stopping_module, "POLL", 20)
    service = Service(3)
    made = [Stopping(service, number) for number in range(3)]
    yield made
    for one in made:
        one.close()


def agreed(processes) -> None:
    """Waits until no listener is at work any more."""
    for one in processes:
        one._listener.join(10)
        assert not one._listener.is_alive()


def test_all_stop_right_after_the_one_that_is_ahead(three):
    for one, points in zip(three, (4, 7, 6), strict=True):
        assert [one.passed() for _ in range(points)] == [None] * points
    three[2].ask("SIGTERM to process 2")
    agreed(three)  # though no main thread says another word
    for one, left in zip(three, (4, 1, 2), strict=True):
        reasons = [one.passed() for _ in range(left)]
        assert reasons == [None] * (left - 1) + ["SIGTERM to process 2"]


def test_nobody_stops_unasked_and_a_run_ends_without_waiting(three):
    time.sleep(0.1)
    assert [one.passed() for one in three] == [None] * 3
    begin = time.monotonic()
    for one in three:
        one.close()
    assert time.monotonic() - begin < 1 and not any(one._listener.is_alive() for one in three)


def test_processes_that_move_on_while_they_are_asked_stop_together(three):
    stopped = {}

    def work(number):
        point = 0
        while True:
            time.sleep(0.001 * (number + 1))
            point += 1
            if three[number].passed():
                stopped[number] = point
                return

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    three[0].ask("SIGTERM")
    three[1].ask("SIGINT")  # both at once
    for thread in threads:
        thread.join(20)
    assert len(set(stopped.values())) == 1 and len(stopped) == 3
