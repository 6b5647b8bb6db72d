"""Work spread over processes: in order, and never waiting for what will not come."""

import multiprocessing
import time

import pytest

from mamba_trainer.contract import UserError
from mamba_trainer.data.parallel import ordered_map


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_the_order_of_the_items_though_the_first_takes_longest(workers):
    items = ["__import__('time').sleep(0.5) or 0", *map(str, range(1, 60))]
    assert list(ordered_map(eval, items, workers)) == list(range(60))


def test_no_more_items_are_taken_than_are_needed_to_keep_all_workers_busy():
    taken = []
    items = ("__import__('time').sleep(0.5) or 0" if not i else taken.append(i) or str(i) for i in range(1_000))
    results = ordered_map(eval, items, 2)
    assert next(results) == 0
    assert len(taken) < 20
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.timeout(60)
def test_a_worker_killed_in_the_midst_of_a_large_result_is_an_error_and_not_an_endless_wait():
    results = ordered_map(bytes, [32 << 20] * 8, 2)
    next(results)
    time.sleep(0.5)  # by now the other worker waits for us to read the rest of its result
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(UserError, match="a worker process was killed"):
        list(results)
    assert not multiprocessing.active_children()


def test_an_error_of_a_worker_is_raised_here_and_tells_where_it_came_from():
    with pytest.raises(ZeroDivisionError) as failure:
        list(ordered_map(eval, ["1", "1/0", "2"], 2))
    assert "in a worker process:\nTraceback" in failure.value.__notes__[0]
    assert not multiprocessing.active_children()
