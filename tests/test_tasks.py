from __future__ import annotations

import asyncio

import pytest

from gateway.tasks import beside


async def test_the_work_runs_while_the_block_does_and_is_over_afterwards():
    ended: list[str] = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("work")

    async with beside(work()):
        await asyncio.sleep(0)
        assert ended == []
    assert ended == ["work"]


async def test_work_that_fails_ends_the_block_with_its_failure():
    async def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        async with beside(fail()):
            await asyncio.Event().wait()


async def test_work_that_ends_by_itself_leaves_the_block_alone():
    async with beside(asyncio.sleep(0)):
        await asyncio.sleep(0.01)


async def test_a_block_that_fails_ends_the_work_and_keeps_its_own_failure():
    with pytest.raises(KeyError):
        async with beside(asyncio.Event().wait()):
            raise KeyError


async def test_cancelling_the_block_cancels_the_work_and_nothing_is_swallowed():
    async def both() -> None:
        async with beside(asyncio.Event().wait()):
            await asyncio.Event().wait()

    task = asyncio.create_task(both())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
