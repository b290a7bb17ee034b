"""The next batch, prepared while the present one is trained on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from weft.train.objective import Batch


class Feed:
    """`take(step)` gives batch `step` and begins to prepare the one after it in the background."""

    def __init__(self, batch: Callable[[int], Batch]) -> None:
        self._batch = batch
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def take(self, step: int) -> Batch:
        ready = self._ahead[1] if self._ahead is not None and self._ahead[0] == step else self._pool.submit(self._batch, step)
        batch = ready.result()
        self._ahead = (step + 1, self._pool.submit(self._batch, step + 1))
        return batch

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
