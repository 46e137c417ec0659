"""Whose turn it is, with rows that are words and a decoder that only notes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from typing import Any

import pytest

from voxgate.engines.batching import Again, Batcher, Cancelled, Late, Priority, Request, Row

PATIENCE = 20.0  # seconds, for what comes at once unless the machine is very busy
WINDOW = 30.0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Decoder:
    """Notes its batches, and stops at some of what it is given until it may go on."""

    def __init__(self, *stops: str, again: dict[str, str] | None = None, bad: str = "") -> None:
        self.batches: list[list[str]] = []
        self._at = {stop: (threading.Event(), threading.Event()) for stop in stops}
        self._again = again or {}
        self._bad = bad

    def __call__(self, contents: Sequence[str]) -> list[list[Any] | Again[str]]:
        self.batches.append(list(contents))
        for content in contents:
            if content in self._at:
                begun, go = self._at[content]
                begun.set()
                assert go.wait(PATIENCE)
        if self._bad in contents:
            raise RuntimeError("out of memory")
        return [self._outcome(content) for content in contents]

    def _outcome(self, content: str) -> list[Any] | Again[str]:
        if content in self._again:
            return Again(Row("", self._again[content], WINDOW), (f"part of {content}",))
        return [content]

    def reached(self, stop: str) -> None:
        assert self._at[stop][0].wait(PATIENCE)

    def go_on(self, *stops: str) -> None:
        for stop in stops or self._at:
            self._at[stop][1].set()

    @property
    def order(self) -> list[str]:
        return [content for batch in self.batches for content in batch]


class Asker:
    """A request and what it was told."""

    def __init__(
        self,
        rows: Iterable[str] | Callable[[], Iterator[str]],
        *,
        kind: Hashable = "",
        priority: Priority = Priority.INTERACTIVE,
        deadline: float = float("inf"),
        seconds: float | None = None,
    ) -> None:
        if seconds is None:
            seconds = 0.0 if callable(rows) else WINDOW * len(list(rows))
        self.told: list[Any] = []
        self.ends: list[BaseException | None] = []
        self.made: list[str] = []
        self.closed = False
        self._ended = threading.Event()
        self.request: Request[str] = Request(
            self._rows(rows, kind), self.told.append, self._finish, seconds, priority, deadline
        )

    def _rows(self, rows: Iterable[str] | Callable[[], Iterator[str]], kind: Hashable) -> Generator[Row[str]]:
        try:
            for content in rows() if callable(rows) else rows:
                self.made.append(content)
                yield Row(kind, content, WINDOW, audio=7.0)
        finally:
            self.closed = True

    def _finish(self, error: BaseException | None) -> None:
        self.ends.append(error)
        self._ended.set()

    def ended(self, seconds: float = PATIENCE) -> BaseException | None:
        """With what it ended, which it did once."""
        assert self._ended.wait(seconds), f"told {self.told}, and not that it is over"
        (end,) = self.ends
        return end

    @property
    def over(self) -> bool:
        return self._ended.is_set()

    def ready(self, count: int) -> None:
        until(lambda: len(self.request.ready) >= count)


Start = Callable[..., Batcher[str]]


def waiting(batcher: Batcher[str]) -> bool:
    return any(request.ready for request in batcher._requests)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a batcher, and closes it at the test's end."""
    started: list[tuple[Batcher[str], Decoder]] = []

    def begin(decoder: Decoder, *, of: type[Batcher[str]] = Batcher, **options: Any) -> Batcher[str]:
        batcher = of(decoder, **({"linger": 0.0} | options))
        started.append((batcher, decoder))
        return batcher

    yield begin
    for batcher, decoder in started:
        decoder.go_on()
        batcher.close()


def words(name: str, count: int) -> list[str]:
    return [f"{name}{number}" for number in range(count)]


def busy(start: Start, decoder: Decoder, **options: Any) -> Batcher[str]:
    """A batcher whose decoder is at "plug", so that what is submitted waits together."""
    batcher = start(decoder, **options)
    batcher.submit(Asker(["plug"], kind="plug").request)
    decoder.reached("plug")
    return batcher


def together(batcher: Batcher[str], decoder: Decoder, askers: list[Asker], *, rows: int) -> None:
    """All wait with so many rows each before one of them is decoded, and end well."""
    for asker in askers:
        batcher.submit(asker.request)
        asker.ready(rows)
    decoder.go_on()
    for asker in askers:
        assert asker.ended() is None


# Results.


def test_results_come_in_the_requests_own_order_and_then_its_end(start: Start) -> None:
    decoder = Decoder()
    batcher = start(decoder, size=3, threads=3)
    askers = [Asker(words(name, 17)) for name in "abcde"]
    for asker in askers:
        batcher.submit(asker.request)
    for name, asker in zip("abcde", askers, strict=True):
        assert asker.ended() is None
        assert asker.told == words(name, 17)
        assert asker.closed
    assert sorted(decoder.order) == sorted(word for name in "abcde" for word in words(name, 17))


def test_a_result_is_told_before_the_rest_is_even_there(start: Start) -> None:
    batcher = start(Decoder(), size=8)
    asker: list[Asker] = []

    def rows() -> Iterator[str]:
        for number in range(3):
            until(lambda: len(asker[0].told) == number)  # noqa: B023 - is over before the next number
            yield f"a{number}"

    asker.append(Asker(rows))
    batcher.submit(asker[0].request)
    assert asker[0].ended() is None
    assert asker[0].told == words("a", 3)


def test_a_request_without_a_row_ends_at_once(start: Start) -> None:
    decoder = Decoder()
    asker = Asker([])
    start(decoder).submit(asker.request)
    assert asker.ended() is None
    assert (asker.told, decoder.batches) == ([], [])


def test_what_is_to_be_decoded_again_is_and_keeps_its_place(start: Start) -> None:
    decoder = Decoder("plug", again={"a0": "a0 hotter", "a0 hotter": "a0 rest"})
    batcher = busy(start, decoder, size=4)
    asker = Asker(words("a", 4))
    batcher.submit(asker.request)
    asker.ready(4)
    decoder.go_on()
    assert asker.ended() is None
    assert asker.told == ["part of a0", "part of a0 hotter", "a0 rest", "a1", "a2", "a3"]
    assert decoder.batches[1:] == [words("a", 4), ["a0 hotter"], ["a0 rest"]]


def test_what_is_told_is_told_before_the_end(start: Start) -> None:
    # The rows end, in their thread, while the results of the last one are being told in another.
    telling = threading.Event()
    ends: list[BaseException | None] = []
    told: list[str] = []

    class Both(Decoder):
        def _outcome(self, content: str) -> list[Any] | Again[str]:
            return [f"{content} first", f"{content} second"]

    def rows() -> Generator[Row[str]]:
        yield Row("", "a0", WINDOW)
        telling.wait(PATIENCE)

    def tell(each: str) -> None:
        telling.set()
        over.wait(0.2)
        told.append(each)

    def finish(error: BaseException | None) -> None:
        ends.append(error)
        told.append("end")
        over.set()

    over = threading.Event()
    batcher = start(Both())
    batcher.submit(Request(rows(), tell, finish))
    assert over.wait(PATIENCE)
    batcher.close()
    assert told == ["a0 first", "a0 second", "end"]


# Turns.


def test_a_long_recording_does_not_starve_short_ones(start: Start) -> None:
    decoder = Decoder("long50")
    batcher = start(decoder)
    long = Asker(words("long", 480))  # of four hours
    batcher.submit(long.request)
    decoder.reached("long50")
    short = [Asker(words(name, 2)) for name in "abcde"]
    for asker in short:
        batcher.submit(asker.request)
    for asker in short:
        asker.ready(2)
    long.ready(4)
    decoder.go_on()
    for asker in short:
        assert asker.ended() is None
    after = decoder.order[51:]
    assert max(after.index(f"{name}1") for name in "abcde") <= 12
    assert long.ended() is None
    assert long.told == words("long", 480)


def test_short_ones_that_keep_coming_do_not_starve_a_long_recording(start: Start) -> None:
    decoder = Decoder("long50")
    batcher = start(decoder)
    long = Asker(words("long", 60))
    batcher.submit(long.request)
    decoder.reached("long50")
    short: list[Asker] = []

    def come(name: str) -> None:
        """One, and when it is done the next one."""
        asker = Asker(words(name, 4))
        short.append(asker)
        finish = asker.request.finish

        def next_one(error: BaseException | None) -> None:
            finish(error)
            if not long.over and len(short) < 200:
                come(f"{name}'")

        asker.request.finish = next_one
        batcher.submit(asker.request)

    for name in "abcde":
        come(name)
        short[-1].ready(4)
    long.ready(4)
    decoder.go_on()
    assert long.ended() is None
    # Nine rows that share with five others: 54 in all, and some for those who are done and not yet gone.
    assert decoder.order[51:].index("long59") <= 54 + 20
    for asker in tuple(short):
        assert asker.ended() is None


def test_of_equals_the_first_is_done_first_and_none_is_later_than_if_they_shared(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder)
    askers = [Asker(words(name, 4)) for name in "abc"]
    together(batcher, decoder, askers, rows=4)
    assert decoder.order[1:] == [*words("a", 4), *words("b", 4), *words("c", 4)]


def test_what_is_to_be_decoded_again_is_before_who_came_later(start: Start) -> None:
    decoder = Decoder("plug", again={"a": "a again", "a again": "a at last"})
    batcher = busy(start, decoder)
    askers = [Asker([name]) for name in "abc"]
    together(batcher, decoder, askers, rows=1)
    assert decoder.order[1:] == ["a", "a again", "a at last", "b", "c"]


def test_live_comes_before_interactive_and_that_before_batch(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder)
    ranks = [Priority.BATCH, Priority.INTERACTIVE, Priority.LIVE]
    askers = [Asker(words(rank.name, 3), priority=rank) for rank in ranks]
    together(batcher, decoder, askers, rows=3)
    assert decoder.order[1:] == [*words("LIVE", 3), *words("INTERACTIVE", 3), *words("BATCH", 3)]


def test_who_waited_for_a_higher_priority_does_not_starve_who_comes_after(start: Start) -> None:
    higher = Asker(words("d", 30))

    class Slow(Decoder):
        """So slow that there is always something of the higher priority."""

        def __call__(self, contents: Sequence[str]) -> list[list[Any] | Again[str]]:
            until(lambda: bool(higher.request.ready) or higher.request.exhausted or contents == ["c0"])
            return super().__call__(contents)

    decoder = Slow("c0", "d29")
    batcher = start(decoder)
    before, after = Asker(words("c", 60), priority=Priority.BATCH), Asker(words("e", 2), priority=Priority.BATCH)
    batcher.submit(before.request)
    decoder.reached("c0")
    batcher.submit(higher.request)
    higher.ready(4)
    decoder.go_on("c0")
    decoder.reached("d29")
    assert decoder.order == ["c0", *words("d", 30)]
    batcher.submit(after.request)
    after.ready(2)
    before.ready(4)
    decoder.go_on()
    after.ended()
    assert decoder.order.index("e1") - decoder.order.index("d29") <= 4


def test_who_had_nothing_to_decode_for_long_does_not_starve_who_comes_after(start: Start) -> None:
    # As a recording that begins with an hour of silence: there is no arrears of turns for it.
    decoder = Decoder("b39")
    batcher = start(decoder)
    go = threading.Event()

    def rows() -> Iterator[str]:
        yield "a0"
        go.wait(PATIENCE)
        yield from words("silent", 40)

    slow, other, after = Asker(rows), Asker(words("b", 60)), Asker(words("c", 2))
    batcher.submit(slow.request)
    until(lambda: slow.told == ["a0"])
    batcher.submit(other.request)
    decoder.reached("b39")
    go.set()
    slow.ready(4)
    batcher.submit(after.request)
    after.ready(2)
    other.ready(4)
    decoder.go_on()
    after.ended()
    assert decoder.order.index("c1") - decoder.order.index("b39") <= 6


# Batches.


def test_rows_of_unlike_kinds_never_share_a_batch_and_like_ones_do(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder, size=4)
    askers = [Asker(words(f"{kind}:{number}:", 3), kind=kind) for number in range(4) for kind in ("en", "de", "fr")]
    together(batcher, decoder, askers, rows=3)
    for batch in decoder.batches[1:]:
        assert len({content.partition(":")[0] for content in batch}) == 1
        assert len(batch) == 4
    assert len(decoder.batches[1:]) == 9


def test_a_full_batch_does_not_wait(start: Start) -> None:
    decoder = Decoder()
    asker = Asker(words("a", 4))
    start(decoder, size=2, linger=PATIENCE * 10).submit(asker.request)
    assert asker.ended() is None
    assert decoder.batches == [["a0", "a1"], ["a2", "a3"]]


def test_the_first_row_waits_for_others_and_then_goes_alone(start: Start) -> None:
    decoder = Decoder()
    batcher = start(decoder, size=8, linger=0.1)
    asker = Asker(["a0"])
    begun = time.monotonic()
    batcher.submit(asker.request)
    assert asker.ended() is None
    assert time.monotonic() - begun >= 0.09
    assert decoder.batches == [["a0"]]


def test_who_comes_while_the_first_one_waits_shares_its_batch(start: Start) -> None:
    decoder = Decoder()
    batcher = start(decoder, size=3, linger=PATIENCE * 10)
    askers = [Asker([name]) for name in "abc"]
    for asker in askers:
        batcher.submit(asker.request)
        until(lambda: asker.request.made == 1 and not waiting(batcher))  # noqa: B023 - it was taken, and waits
    for asker in askers:
        assert asker.ended() is None
    assert decoder.batches == [["a", "b", "c"]]


def test_one_at_a_time_never_waits(start: Start) -> None:
    asker = Asker(words("a", 3))
    start(Decoder(), size=1, linger=PATIENCE * 10).submit(asker.request)
    assert asker.ended() is None


# Preparing.


def test_no_more_is_prepared_than_soon_has_its_turn(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder)
    asker = Asker(words("a", 480))
    batcher.submit(asker.request)
    asker.ready(4)
    time.sleep(0.05)
    assert len(asker.made) == 4
    decoder.go_on()
    assert asker.ended() is None
    assert len(asker.made) == 480


def test_what_is_prepared_is_bounded_for_all_together_and_nobody_goes_without(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder, size=16)
    askers = [Asker(words(str(number), 40)) for number in range(20)]
    for asker in askers:
        batcher.submit(asker.request)
    for asker in askers:
        asker.ready(1)
    time.sleep(0.05)
    assert sum(len(asker.made) for asker in askers) <= 4 * len(askers)
    decoder.go_on()
    for asker in askers:
        assert asker.ended() is None
        assert len(asker.told) == 40


def test_a_long_recording_does_not_keep_the_only_thread_from_a_short_one(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder, threads=1)
    long, short = Asker(words("long", 480)), Asker(["short"])
    batcher.submit(long.request)
    batcher.submit(short.request)
    short.ready(1)
    assert len(long.made) <= 4


def test_what_is_live_is_prepared_before_what_is_not(start: Start) -> None:
    batcher = start(Decoder(), threads=1)
    begun, go = threading.Event(), threading.Event()

    def first() -> Iterator[str]:
        begun.set()
        go.wait(PATIENCE)
        yield "first"

    prepared: list[str] = []

    def noting(name: str) -> Callable[[], Iterator[str]]:
        def rows() -> Iterator[str]:
            prepared.append(name)
            yield name

        return rows

    askers = [Asker(first), *(Asker(noting(f"batch{n}"), priority=Priority.BATCH) for n in range(5))]
    askers.append(Asker(noting("live"), priority=Priority.LIVE))
    for asker in askers:
        batcher.submit(asker.request)
    assert begun.wait(PATIENCE)
    go.set()
    for asker in askers:
        assert asker.ended() is None
    assert prepared[0] == "live"


# Failures.


def test_a_request_whose_rows_fail_ends_with_that_and_no_other_does(start: Start) -> None:
    def rows() -> Iterator[str]:
        yield "a0"
        raise ValueError("damaged")

    batcher = start(Decoder(), size=4)
    bad, good = Asker(rows), Asker(words("b", 30))
    batcher.submit(good.request)
    batcher.submit(bad.request)
    assert isinstance(bad.ended(), ValueError)
    assert good.ended() is None
    assert good.told == words("b", 30)


def test_rows_that_fail_are_never_taken_for_rows_that_ended(start: Start) -> None:
    # What was decoded last is told while the failure is on its way.
    failing, over = threading.Event(), threading.Event()

    class Slow(Batcher[str]):
        def _end(self, request: Request[str], error: BaseException | None) -> None:
            if isinstance(error, ValueError):
                failing.set()
                over.wait(0.2)
            super()._end(request, error)

    def rows() -> Generator[Row[str]]:
        yield Row("", "a0", WINDOW)
        decoder.reached("a0")
        raise ValueError("damaged")

    ends: list[BaseException | None] = []

    def finish(error: BaseException | None) -> None:
        ends.append(error)
        over.set()

    decoder = Decoder("a0")
    start(decoder, of=Slow).submit(Request(rows(), lambda each: None, finish))
    assert failing.wait(PATIENCE)
    decoder.go_on()
    assert over.wait(PATIENCE)
    assert isinstance(ends[0], ValueError)


def test_a_batch_that_fails_fails_its_requests_and_no_others(start: Start) -> None:
    decoder = Decoder("plug", bad="bad")
    batcher = busy(start, decoder, size=2)
    bad, beside, other = Asker(["bad", "more"], kind=1), Asker(["beside"], kind=1), Asker(words("c", 9), kind=2)
    for asker in (bad, beside, other):
        batcher.submit(asker.request)
        asker.ready(1)
    decoder.go_on()
    assert isinstance(bad.ended(), RuntimeError)
    assert isinstance(beside.ended(), RuntimeError)
    assert other.ended() is None
    assert other.told == words("c", 9)
    until(lambda: bad.closed and beside.closed)
    after = Asker(["after"])
    batcher.submit(after.request)
    assert after.ended() is None


# Deadlines.


def test_what_has_passed_its_deadline_is_dropped_unserved(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder, size=2)
    late = Asker(words("late", 3), deadline=time.monotonic() + 0.02)
    in_time = Asker(words("b", 3), deadline=time.monotonic() + 600)
    for asker in (late, in_time):
        batcher.submit(asker.request)
        asker.ready(3)
    until(lambda: time.monotonic() > late.request.deadline)
    decoder.go_on()
    assert isinstance(late.ended(), Late)
    assert in_time.ended() is None
    assert not [word for word in decoder.order if word.startswith("late")]
    assert late.closed


def test_what_passes_its_deadline_under_way_is_not_gone_on_with(start: Start) -> None:
    decoder = Decoder("a1")
    batcher = start(decoder)
    asker = Asker(words("a", 10), deadline=time.monotonic() + 0.5)
    batcher.submit(asker.request)
    decoder.reached("a1")
    until(lambda: time.monotonic() > asker.request.deadline)
    decoder.go_on()
    assert isinstance(asker.ended(), Late)
    assert decoder.order == ["a0", "a1"]


def test_who_cannot_be_done_in_time_gives_way_to_those_who_can(start: Start) -> None:
    decoder = Decoder("slow")
    batcher = start(decoder)
    slow, hopeless, hopeful = Asker(["slow"]), Asker(["a"], deadline=time.monotonic() + PATIENCE), Asker(["b"])
    for asker in (slow, hopeless, hopeful):
        batcher.submit(asker.request)
    decoder.reached("slow")
    hopeless.ready(1)
    hopeful.ready(1)
    batcher.usual = 2 * PATIENCE
    decoder.go_on()
    assert hopeful.ended() is hopeless.ended() is None  # with nobody else there it is tried
    assert decoder.order == ["slow", "b", "a"]


def test_how_long_a_batch_takes_is_seen(start: Start) -> None:
    decoder = Decoder("slow")
    batcher = start(decoder)
    assert batcher.usual == 0
    slow = Asker(["slow"])
    batcher.submit(slow.request)
    decoder.reached("slow")
    time.sleep(0.1)
    decoder.go_on()
    assert slow.ended() is None
    assert batcher.usual >= 0.03


def test_a_deadline_binds_what_is_still_being_prepared(start: Start) -> None:
    batcher = start(Decoder())
    go = threading.Event()

    def rows() -> Iterator[str]:
        go.wait(PATIENCE)
        yield "a0"

    asker = Asker(rows, deadline=time.monotonic() + 0.05)
    batcher.submit(asker.request)
    try:
        assert isinstance(asker.ended(2.0), Late)
    finally:
        go.set()


# Cancelling.


def test_cancelled_while_it_is_prepared_nothing_of_it_is_decoded(start: Start) -> None:
    decoder = Decoder()
    batcher = start(decoder)
    begun, go = threading.Event(), threading.Event()

    def rows() -> Iterator[str]:
        begun.set()
        go.wait(PATIENCE)
        yield from words("a", 5)

    asker = Asker(rows)
    batcher.submit(asker.request)
    assert begun.wait(PATIENCE)
    batcher.cancel(asker.request)
    assert isinstance(asker.ended(), Cancelled)
    assert not asker.closed
    go.set()
    until(lambda: asker.closed)
    after = Asker(["after"])
    batcher.submit(after.request)
    assert after.ended() is None
    assert decoder.order == ["after"]
    assert asker.made == ["a0"]


def test_cancelled_before_a_thread_had_time_for_it_it_is_never_begun(start: Start) -> None:
    batcher = start(Decoder(), threads=1)
    begun, go = threading.Event(), threading.Event()

    def rows() -> Iterator[str]:
        begun.set()
        go.wait(PATIENCE)
        yield "a0"

    first, second = Asker(rows), Asker(["b0"])
    batcher.submit(first.request)
    batcher.submit(second.request)
    assert begun.wait(PATIENCE)
    batcher.cancel(second.request)
    assert isinstance(second.ended(), Cancelled)
    go.set()
    assert first.ended() is None
    assert second.made == []


def test_cancelled_while_it_waits_nothing_of_it_is_decoded(start: Start) -> None:
    decoder = Decoder("plug")
    batcher = busy(start, decoder)
    asker, other = Asker(words("a", 5)), Asker(["b0"])
    for each in (asker, other):
        batcher.submit(each.request)
        each.ready(1)
    asker.ready(4)
    batcher.cancel(asker.request)
    batcher.cancel(asker.request)
    assert isinstance(asker.ended(), Cancelled)
    assert asker.closed
    decoder.go_on()
    assert other.ended() is None
    assert decoder.order == ["plug", "b0"]


def test_cancelled_while_its_batch_waits_for_others_it_is_not_in_it(start: Start) -> None:
    decoder = Decoder()
    batcher = start(decoder, size=2, linger=PATIENCE * 10)
    gone, asker, other = Asker(["gone"]), Asker(["a"]), Asker(["b"])
    batcher.submit(gone.request)
    until(lambda: gone.request.made == 1 and not waiting(batcher))
    batcher.cancel(gone.request)
    assert isinstance(gone.ended(), Cancelled)
    for each in (asker, other):
        batcher.submit(each.request)
    batcher.submit(Asker(["c"]).request)
    assert asker.ended() is None
    assert "gone" not in decoder.order


def test_cancelled_at_work_it_is_told_nothing_more(start: Start) -> None:
    decoder = Decoder("a1", again={"a1": "a1 rest"})
    batcher = start(decoder)
    asker = Asker(words("a", 5))
    batcher.submit(asker.request)
    decoder.reached("a1")
    batcher.cancel(asker.request)
    assert isinstance(asker.ended(), Cancelled)
    decoder.go_on()
    after = Asker(["after"])
    batcher.submit(after.request)
    assert after.ended() is None
    assert asker.told == ["a0"]
    assert decoder.order == ["a0", "a1", "after"]
    assert asker.closed


def test_of_a_shared_batch_only_who_is_cancelled_goes_without(start: Start) -> None:
    decoder = Decoder("plug", "a0")
    batcher = busy(start, decoder, size=2)
    gone, stays = Asker(["a0"]), Asker(["b0"])
    for each in (gone, stays):
        batcher.submit(each.request)
        each.ready(1)
    decoder.go_on("plug")
    decoder.reached("a0")
    batcher.cancel(gone.request)
    decoder.go_on()
    assert stays.ended() is None
    assert decoder.batches[1:] == [["a0", "b0"]]
    assert (gone.told, stays.told) == ([], ["b0"])
    assert isinstance(gone.ended(), Cancelled)


def test_cancelling_what_is_over_changes_nothing(start: Start) -> None:
    batcher = start(Decoder())
    asker = Asker(["a0"])
    batcher.submit(asker.request)
    assert asker.ended() is None
    batcher.cancel(asker.request)
    assert asker.ended() is None


# The end.


def test_closing_ends_all_requests_and_threads() -> None:
    before = set(threading.enumerate())
    decoder = Decoder("plug")
    batcher: Batcher[str] = Batcher(decoder, linger=0.0, threads=3)
    begun, go = threading.Event(), threading.Event()

    def rows() -> Iterator[str]:
        begun.set()
        go.wait(PATIENCE)
        yield "a0"

    at_work, preparing, waiting = Asker(["plug"]), Asker(rows), Asker(words("b", 9))
    batcher.submit(at_work.request)
    decoder.reached("plug")
    batcher.submit(preparing.request)
    batcher.submit(waiting.request)
    assert begun.wait(PATIENCE)
    waiting.ready(4)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    for asker in (at_work, preparing, waiting):
        assert isinstance(asker.ended(), Cancelled)
    go.set()
    decoder.go_on()
    closing.join(PATIENCE)
    assert set(threading.enumerate()) <= before
    assert decoder.order == ["plug"]
    assert all(asker.closed and asker.told == [] for asker in (at_work, preparing, waiting))


def test_many_requests_that_come_and_go_at_once_each_end_once(start: Start) -> None:
    batcher = start(Decoder(again={"a1": "a1 rest"}), size=5, linger=0.0005, threads=4)
    askers = [Asker(words("a", number % 7), kind=number % 3, priority=Priority(number % 3)) for number in range(150)]

    def ask(mine: list[Asker]) -> None:
        for number, asker in enumerate(mine):
            batcher.submit(asker.request)
            if number % 3 == 0:
                batcher.cancel(mine[number // 2].request)

    threads = [threading.Thread(target=ask, args=(askers[first::4],)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for asker in askers:
        end = asker.ended()
        assert end is None or isinstance(end, Cancelled)
        whole = [out for word in asker.made for out in (["part of a1", "a1 rest"] if word == "a1" else [word])]
        assert asker.told == (whole if end is None else whole[: len(asker.told)])
        until(lambda: asker.closed or not asker.made)  # noqa: B023 - is over before the next one
    assert not waiting(batcher)


# Statistics.


def test_the_statistics_are_of_the_time_since_the_last_look(start: Start) -> None:
    decoder = Decoder("plug", "b0")
    batcher = busy(start, decoder, size=2)
    asker = Asker(words("a", 3))
    batcher.submit(asker.request)
    asker.ready(3)
    assert waiting(batcher)
    time.sleep(0.02)
    decoder.go_on("plug")
    assert asker.ended() is None
    stats = batcher.stats()
    assert stats.batches == {1: 2, 2: 1}
    assert (stats.rows, stats.seconds) == (4, 4 * 7.0)
    assert stats.waiting >= 3 * 0.02
    assert stats.decoding >= 0.02
    assert 0 < stats.preparing < PATIENCE
    assert not waiting(batcher)
    empty = batcher.stats()
    assert (empty.batches, empty.rows, empty.decoding, empty.preparing, empty.waiting) == ({}, 0, 0, 0, 0)
