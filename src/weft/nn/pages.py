"""Who holds which page of a paged arena. Host-side bookkeeping: it decides before the forward pass, and nothing compiled sees it."""

from weft.errors import UserError


class PageTable:
    """Pages of a pool given to rows, shared between forks by reference count. Page 0 is never given: it collects padding."""

    def __init__(self, num_pages: int, page: int, rows: int) -> None:
        self.page = page
        self.free = list(range(num_pages - 1, 0, -1))
        self.references = [0] * num_pages
        self.owned: list[list[int]] = [[] for _ in range(rows)]

    def reserve(self, row: int, committed: int, length: int) -> list[tuple[int, int]]:
        """Make `row` able to write tokens committed..length-1. Returns (from, to) pages whose content must be copied first.

        A page that another row shares and this one is about to write is replaced by a copy. Raises UserError when pages run out.
        """
        copies = []
        pages = self.owned[row]
        for index in range(committed // self.page, len(pages)):
            if self.references[pages[index]] > 1 and index * self.page < length:
                fresh = self._take()
                copies.append((pages[index], fresh))
                self._drop(pages[index])
                pages[index] = fresh
        while len(pages) * self.page < length:
            pages.append(self._take())
        return copies

    def release(self, row: int) -> None:
        for page in self.owned[row]:
            self._drop(page)
        self.owned[row] = []

    def fork(self, source: int, target: int, committed: int) -> None:
        """Let `target` share every page of `source` that holds a committed token, the half-filled last one included."""
        self.release(target)
        self.owned[target] = self.owned[source][: -(-committed // self.page)]
        for page in self.owned[target]:
            self.references[page] += 1

    def _take(self) -> int:
        if not self.free:
            raise UserError(f"all {len(self.references) - 1} pages of state are in use; allow more memory or fewer rows at a time.")
        page = self.free.pop()
        self.references[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            self.free.append(page)
