"""Who holds which page of a paged arena. Host-side bookkeeping: it decides before the forward pass, and nothing compiled sees it."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from weft.errors import UserError

BLANK, PADDING, RESERVED = 0, 1, 2
PAGE = 64  # tokens a page, where nobody says otherwise


class PagesExhausted(UserError):
    """No page is free and none can be taken back: a row has to give up its own."""


class PageTable:
    """Pages of a pool given to rows, shared by reference count.

    Two pages are never given: nobody writes the first, to which unused columns of tables point, and nobody reads the second, which
    collects padding. Were they one, a number in one row's padding that is not finite would reach others, 0 * nan being nan.

    num_pages  of the pool, these two included.

    A page that nobody refers to any more is free, unless it is `kept`: then its content may be wanted again, and it is taken only when
    no page is free, the one that was let go first before the others. `on_evict` is told its number.
    """

    def __init__(self, num_pages: int, page: int, rows: int) -> None:
        self.page = page
        self.references = [0] * num_pages
        self.owned: list[list[int]] = [[] for _ in range(rows)]
        self.kept: set[int] = set()
        self.on_evict: Callable[[int], None] = lambda page: None
        self._free = list(range(num_pages - 1, RESERVED - 1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that hold nothing anybody wants."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Pages that can be had without growing the pool: free ones, and kept ones that nobody refers to."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        """Pages that some row refers to."""
        return len(self.references) - RESERVED - self.num_available

    def extend(self, num_pages: int) -> None:
        """The pool has grown to this many pages."""
        self._free[:0] = range(num_pages - 1, len(self.references) - 1, -1)
        self.references += [0] * (num_pages - len(self.references))

    def needed(self, row: int, committed: int, length: int) -> int:
        """How many pages `reserve` with these arguments would take."""
        pages = self.owned[row]
        last = min(len(pages), -(-length // self.page))
        shared = sum(self.references[page] > 1 for page in pages[committed // self.page : last])
        return shared + max(0, -(-length // self.page) - len(pages))

    def reserve(self, row: int, committed: int, length: int) -> list[tuple[int, int]]:
        """Make `row` able to write tokens committed..length-1. Returns (from, to) pages whose content must be copied first.

        A page that another row shares and this one is about to write is replaced by a copy. Raises PagesExhausted where pages run out,
        and then takes none.
        """
        if self.needed(row, committed, length) > self.num_available:
            raise PagesExhausted(
                f"all {len(self.references) - RESERVED} pages of state are in use; allow more memory or fewer rows at a time."
            )
        copies = []
        pages = self.owned[row]
        for index in range(committed // self.page, min(len(pages), -(-length // self.page))):
            if self.references[pages[index]] > 1:
                fresh = self._take()
                copies.append((pages[index], fresh))
                self._drop(pages[index])
                pages[index] = fresh
        while len(pages) * self.page < length:
            pages.append(self._take())
        return copies

    def release(self, row: int) -> None:
        """Give a row's pages back, the last ones first: of a text, the beginning is the likeliest to be wanted again."""
        for page in reversed(self.owned[row]):
            self._drop(page)
        self.owned[row] = []

    def share(self, row: int, pages: Sequence[int]) -> None:
        """Let `row` refer to these pages, in place of its own."""
        for page in pages:
            if self.references[page] == 0:
                del self._idle[page]
            self.references[page] += 1
        self.release(row)
        self.owned[row] = list(pages)

    def fork(self, source: int, target: int, committed: int) -> None:
        """Let `target` share every page of `source` that holds a committed token, the half-filled last one included."""
        self.share(target, self.owned[source][: -(-committed // self.page)])

    def move(self, source: int, target: int) -> None:
        """Hand all pages of `source` to `target`, those that are reserved included."""
        self.release(target)
        self.owned[target], self.owned[source] = self.owned[source], []

    def forget(self, page: int) -> None:
        """Nobody will want a kept page's content again."""
        self.kept.discard(page)
        if page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self.kept.discard(page)
            self.on_evict(page)
        self.references[page] = 1
        return page

    def _drop(self, page: int) -> None:
        self.references[page] -= 1
        if self.references[page] == 0:
            if page in self.kept:
                self._idle[page] = None
            else:
                self._free.append(page)
