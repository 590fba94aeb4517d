import asyncio

import pytest

from serve_apps.recent import Recent


def test_a_question_is_asked_once_and_answered_to_all():
    asked: list[int] = []

    async def ask() -> int:
        asked.append(1)
        await asyncio.sleep(0)
        return len(asked)

    async def main() -> None:
        recent = Recent(ask, keep_s=60)
        first = [asyncio.ensure_future(recent.get()) for _ in range(3)]
        await asyncio.sleep(0)
        first[0].cancel()
        assert await asyncio.gather(*first[1:]) == [1, 1]
        assert await recent.get() == 1

    asyncio.run(main())
    assert len(asked) == 1


def test_an_old_outcome_is_not_told_any_more_and_an_error_is_one():
    outcomes = iter([ValueError("no"), 2])

    async def ask() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    async def main() -> None:
        recent = Recent(ask, keep_s=0)
        with pytest.raises(ValueError, match="no"):
            await recent.get()
        assert await recent.get() == 2

    asyncio.run(main())
