"""Several streams as one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing

from cartridges.engines.base import TokenEvent


async def merge(streams: list[AsyncIterator[TokenEvent]]) -> AsyncIterator[tuple[int, TokenEvent]]:
    """(index, event) of several streams as they come. An error in one ends all."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as events:
            async for event in events:
                yield 0, event
        return
    queue: asyncio.Queue[tuple[int, TokenEvent | BaseException | None]] = asyncio.Queue()
    async with AsyncExitStack() as stack:
        for index, stream in enumerate(streams):
            task = asyncio.create_task(_pump(index, stream, queue))
            stack.push_async_callback(_stop, task)
        for _ in streams:
            while (item := await queue.get())[1] is not None:
                if isinstance(item[1], BaseException):
                    raise item[1]
                yield item


async def _pump(index: int, stream: AsyncIterator[TokenEvent], queue: asyncio.Queue) -> None:
    try:
        async with aclosing(stream) as events:
            async for event in events:
                queue.put_nowait((index, event))
    except Exception as error:  # noqa: BLE001  It is raised again in `merge`.
        queue.put_nowait((index, error))
    queue.put_nowait((index, None))


async def _stop(task: asyncio.Task) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
