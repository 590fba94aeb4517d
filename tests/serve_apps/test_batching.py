import asyncio
from collections.abc import Sequence

import pytest

from serve_apps.batching import Batcher, Overloaded


class Work:
    """Doubles numbers; a batch is finished when the test says so."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, questions: Sequence[int]) -> list[int]:
        self.batches.append(list(questions))
        await self.gate.wait()
        if -1 in questions:
            raise ValueError("minus one")
        return [2 * question for question in questions]


def batcher(work: Work, **limits: int) -> Batcher[int, int]:
    return Batcher(work, **{"max_batch": 4, "max_running": 1, "max_waiting": 100, **limits})


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_alone_a_question_does_not_wait():
    async def main():
        work = Work()
        answer, waited_ms = await batcher(work).submit(3)
        assert (answer, work.batches) == (6, [[3]])
        assert waited_ms < 50

    run(main())


def test_questions_of_one_turn_share_a_batch():
    async def main():
        work = Work()
        b = batcher(work)
        answers = await asyncio.gather(*(b.submit(i) for i in range(10)))
        assert [a for a, _ in answers] == [2 * i for i in range(10)]
        assert work.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    run(main())


def test_under_load_batches_fill_and_places_are_bounded():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work, max_running=2)
        first = [asyncio.ensure_future(b.submit(0))]
        await asyncio.sleep(0.01)
        first.append(asyncio.ensure_future(b.submit(1)))
        await asyncio.sleep(0.01)
        rest = [asyncio.ensure_future(b.submit(i)) for i in range(2, 8)]
        await asyncio.sleep(0.01)
        assert work.batches == [[0], [1]]
        work.gate.set()
        await asyncio.gather(*first, *rest)
        assert work.batches == [[0], [1], [2, 3, 4, 5], [6, 7]]
        assert rest[0].result()[1] > 5

    run(main())


def test_an_error_reaches_every_asker_of_its_batch_only():
    async def main():
        work = Work()
        b = batcher(work, max_batch=2)
        answers = await asyncio.gather(
            *(b.submit(i) for i in (5, -1, 6, 7)), return_exceptions=True
        )
        assert [type(a) for a in answers[:2]] == [ValueError, ValueError]
        assert [a[0] for a in answers[2:]] == [12, 14]
        assert (await b.submit(1))[0] == 2

    run(main())


def test_a_full_waiting_room_refuses():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work, max_waiting=2)
        running = asyncio.ensure_future(b.submit(0))
        await asyncio.sleep(0.01)
        waiting = [asyncio.ensure_future(b.submit(i)) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await b.submit(3)
        work.gate.set()
        assert [a for a, _ in await asyncio.gather(running, *waiting)] == [0, 2, 4]
        assert (await b.submit(3))[0] == 6

    run(main())


def test_a_question_whose_asker_left_is_not_worked_on():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work)
        running = asyncio.ensure_future(b.submit(0))
        await asyncio.sleep(0.01)
        gone, stays = (asyncio.ensure_future(b.submit(i)) for i in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        running.cancel()
        await asyncio.sleep(0)
        work.gate.set()
        assert (await stays)[0] == 4
        assert work.batches == [[0], [2]]

    run(main())
