import asyncio
import time
from collections.abc import Sequence

import pytest

from serve_apps.batching import Batcher, Entry, Late, Overloaded
from tests.serve_apps.rig import until


class Work:
    """Doubles numbers; a batch is finished when the test says so."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.cancelled: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, entries: Sequence[Entry[int, int]]) -> None:
        questions = [entry.question for entry in entries]
        self.batches.append(questions)
        if 100 in questions:
            entries[questions.index(100)].fallback = lambda: 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(questions)
            raise
        if -1 in questions:
            raise ValueError("minus one")
        for entry in entries:
            entry.answer(2 * entry.question)


def batcher(work: Work, **limits: int) -> Batcher[int, int]:
    return Batcher(work, **{"max_batch": 4, "max_running": 1, "max_waiting": 100, **limits})


def submit(b: Batcher[int, int], question: int, timeout_s: float = 5.0):
    return b.submit(question, time.monotonic() + timeout_s)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 10))


def test_alone_a_question_does_not_wait():
    async def main():
        work = Work()
        assert await submit(batcher(work), 3) == 6
        assert work.batches == [[3]]

    run(main())


def test_questions_of_one_turn_share_a_batch():
    async def main():
        work = Work()
        b = batcher(work)
        answers = await asyncio.gather(*(submit(b, i) for i in range(10)))
        assert answers == [2 * i for i in range(10)]
        assert work.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    run(main())


def test_under_load_batches_fill_and_places_are_bounded():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work, max_running=2)
        first = [asyncio.ensure_future(submit(b, 0))]
        await asyncio.sleep(0.01)
        first.append(asyncio.ensure_future(submit(b, 1)))
        await asyncio.sleep(0.01)
        rest = [asyncio.ensure_future(submit(b, i)) for i in range(2, 8)]
        await asyncio.sleep(0.01)
        assert work.batches == [[0], [1]]
        work.gate.set()
        await asyncio.gather(*first, *rest)
        assert work.batches == [[0], [1], [2, 3, 4, 5], [6, 7]]

    run(main())


def test_what_comes_together_is_spread_over_the_places():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work, max_batch=32, max_running=2)
        answers = [asyncio.ensure_future(submit(b, i)) for i in range(16)]
        await until(lambda: len(work.batches) == 2)
        assert [len(batch) for batch in work.batches] == [8, 8]
        work.gate.set()
        await asyncio.gather(*answers)

    run(main())


def test_a_few_that_come_together_are_not_spread():
    async def main():
        work = Work()
        b = batcher(work, max_batch=32, max_running=2, small_batch=4)
        await asyncio.gather(*(submit(b, i) for i in range(4)))
        assert work.batches == [[0, 1, 2, 3]]

    run(main())


def test_beside_another_batch_the_first_waits_until_its_share_has_come():
    """Else those that were answered together would come back as one alone and all the others."""

    async def main():
        work = Work()
        b = batcher(work, max_batch=32, max_running=2)
        b._batch_s = 40.0  # as if batches took so long: patience lasts longer than this test
        work.gate.clear()
        answers = [asyncio.ensure_future(submit(b, i)) for i in range(12)]
        await until(lambda: [len(batch) for batch in work.batches] == [6, 6])
        work.batches.clear()
        b.max_running = 3
        for question in range(20, 25):  # 12 are under way: 5 are a fair share of 17
            assert not work.batches
            answers.append(asyncio.ensure_future(submit(b, question)))
            await asyncio.sleep(0.01)
        assert work.batches == [[20, 21, 22, 23, 24]]
        work.gate.set()
        await asyncio.gather(*answers)

    run(main())


def test_beside_a_batch_in_its_last_stage_one_more_is_under_way():
    async def main():
        started: list[list[int]] = []
        ends = asyncio.Event()

        async def work(entries: Sequence[Entry[int, int]]) -> None:
            started.append([entry.question for entry in entries])
            with b.last_stage():
                await ends.wait()
            for entry in entries:
                entry.answer(entry.question)

        b: Batcher[int, int] = Batcher(work, max_batch=1, max_running=1, max_waiting=9)
        asked = [asyncio.ensure_future(submit(b, i)) for i in range(4)]
        for _ in range(9):
            await asyncio.sleep(0)
        # The second is in its last stage, too: there is no third.
        assert started == [[0], [1]]
        ends.set()
        assert await asyncio.gather(*asked) == [0, 1, 2, 3]
        assert b.running == 0

    run(main())


def test_patience_ends_after_a_part_of_what_a_batch_takes():
    async def main():
        work = Work()
        b = batcher(work, max_batch=32, max_running=2)
        work.gate.clear()
        answers = [asyncio.ensure_future(submit(b, i)) for i in range(9)]
        await until(lambda: len(work.batches) == 2)
        work.batches.clear()
        b.max_running = 3
        b._batch_s = 0.04
        answers.append(asyncio.ensure_future(submit(b, 10)))
        await asyncio.sleep(0)
        assert not work.batches
        await until(lambda: work.batches == [[10]])
        work.gate.set()
        await asyncio.gather(*answers)

    run(main())


def test_an_error_reaches_every_asker_of_its_batch_only():
    async def main():
        work = Work()
        b = batcher(work, max_batch=2)
        answers = await asyncio.gather(
            *(submit(b, i) for i in (5, -1, 6, 7)), return_exceptions=True
        )
        assert [type(a) for a in answers[:2]] == [ValueError, ValueError]
        assert answers[2:] == [12, 14]
        assert await submit(b, 1) == 2

    run(main())


def test_a_full_waiting_room_refuses():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work, max_waiting=2)
        running = asyncio.ensure_future(submit(b, 0))
        await asyncio.sleep(0.01)
        waiting = [asyncio.ensure_future(submit(b, i)) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(b, 3)
        work.gate.set()
        assert await asyncio.gather(running, *waiting) == [0, 2, 4]
        assert await submit(b, 3) == 6

    run(main())


def test_a_question_whose_asker_left_is_not_worked_on():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work)
        running = asyncio.ensure_future(submit(b, 0))
        await asyncio.sleep(0.01)
        gone, stays = (asyncio.ensure_future(submit(b, i)) for i in (1, 2))
        await asyncio.sleep(0)
        gone.cancel()
        running.cancel()
        await asyncio.sleep(0)
        work.gate.set()
        assert await stays == 4
        assert work.batches == [[0], [2]]
        assert work.cancelled == [[0]]

    run(main())


def test_a_batch_goes_on_for_those_who_stay():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work)
        gone, stays = (asyncio.ensure_future(submit(b, i)) for i in (1, 2))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        work.gate.set()
        assert await stays == 4
        assert work.cancelled == []

    run(main())


def test_at_the_deadline_the_best_there_is_is_answered():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work)
        assert await submit(b, 100, 0.02) == 1
        with pytest.raises(Late):
            await submit(b, 3, 0.02)
        await asyncio.sleep(0)
        assert work.cancelled == [[100], [3]]

    run(main())


def test_a_wait_that_would_outlast_the_deadline_is_refused():
    async def main():
        work = Work()
        b = batcher(work, max_batch=1)
        asyncio.get_running_loop().call_later(0.1, work.gate.set)
        work.gate.clear()
        await submit(b, 0)  # a batch takes 0.1 s
        work.gate.clear()
        waiting = [asyncio.ensure_future(submit(b, i)) for i in range(5)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await submit(b, 9, 0.2)
        work.gate.set()
        await asyncio.gather(*waiting)

    run(main())


def test_who_has_left_takes_no_place_in_the_waiting_room():
    async def main():
        work = Work()
        work.gate.clear()
        b = batcher(work, max_batch=1, max_waiting=3)
        first = asyncio.ensure_future(submit(b, 0))
        await until(lambda: work.batches == [[0]])
        impatient = [asyncio.ensure_future(submit(b, i)) for i in range(1, 4)]
        await until(lambda: b.waiting == 3)
        with pytest.raises(Overloaded):
            await submit(b, 9)
        for asker in impatient[:2]:
            asker.cancel()
        late = asyncio.ensure_future(submit(b, 4, timeout_s=0.01))
        await until(lambda: b.waiting == 2)
        with pytest.raises(Late):
            await late
        assert b.waiting == 1
        later = [asyncio.ensure_future(submit(b, i)) for i in (5, 6)]
        await until(lambda: b.waiting == 3)
        work.gate.set()
        assert await asyncio.gather(first, impatient[2], *later) == [0, 6, 10, 12]
        assert work.batches == [[0], [3], [5], [6]]

    run(main())
