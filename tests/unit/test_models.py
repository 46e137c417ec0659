"""Several models, and too little memory for all of them."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA
from fakes import whisper_model
from voxgate.audio.decode import decode
from voxgate.engines import Job
from voxgate.engines.batch_worker import BatchWorker, Options
from voxgate.engines.models import Models

PATIENCE = 30.0


class Model:
    """One that notes what happens to it in `story`, which it shares with others."""

    def __init__(self, name: str, size: int, story: list[str]) -> None:
        self.name = name
        self.bytes = size
        self._loaded = True
        self._story = story
        self.watched: Callable[[], None] | None = None

    @property
    def loaded(self) -> bool:
        if self.watched is not None:
            self.watched()
        return self._loaded

    def load(self) -> None:
        assert not self._loaded
        self._loaded = True
        self._story.append(f"+{self.name}")

    def unload(self) -> None:
        assert self._loaded
        self._loaded = False
        self._story.append(f"-{self.name}")

    def decode(self, tasks: Sequence[Any]) -> list[list[Any]]:
        assert self._loaded
        self._story.append(self.name)
        return [[task] for task in tasks]


def made(budget: int, **sizes: int) -> tuple[Models, list[str], dict[str, Model]]:
    story: list[str] = []
    models = Models(budget)
    each = {name: Model(name, size, story) for name, size in sizes.items()}
    for model in each.values():
        models.add(model)
    return models, story, each


def test_what_there_is_room_for_stays_loaded() -> None:
    models, story, _ = made(30, a=10, b=10, c=10)
    for name in "abcabc":
        assert models.decode(name, [name, 1]) == [[name], [1]]
    assert story == list("abcabc")
    assert dict(models.loaded) == {"a": True, "b": True, "c": True}


def test_without_a_budget_nothing_is_unloaded() -> None:
    models, story, _ = made(0, a=10**12, b=10**12)
    models.decode("a", [])
    models.decode("b", [])
    assert story == ["a", "b"]


def test_for_one_that_is_needed_the_least_recently_used_goes() -> None:
    models, story, _ = made(20, a=10, b=10, c=10)
    assert story == ["-a"]
    for name in "bcba":
        models.decode(name, [])
    assert story[1:] == ["b", "c", "b", "-c", "+a", "a"]
    assert dict(models.loaded) == {"a": True, "b": True, "c": False}


def test_for_a_big_one_as_many_go_as_it_takes_and_no_more() -> None:
    models, story, each = made(40, a=10, b=10, c=10, big=30)
    assert story == ["-a", "-b"]
    models.decode("c", [])
    models.decode("a", [])
    assert story[2:] == ["c", "-big", "+a", "a"]
    models.decode("big", [])
    assert story[6:] == ["-c", "+big", "big"]
    assert sum(model.bytes for model in each.values() if model.loaded) == 40


def test_one_that_takes_more_than_there_is_is_loaded_alone() -> None:
    models, story, _ = made(15, a=10, b=20)
    models.decode("a", [])
    models.decode("b", [])
    models.decode("b", [])
    assert story == ["-a", "-b", "+a", "a", "-a", "+b", "b", "b"]


def test_who_looks_which_are_loaded_is_not_disturbed_by_their_use() -> None:
    # A model is asked in one thread while another one uses a model.
    models, _, each = made(20, a=10, b=10)
    each["a"].watched = lambda: _use(models, each["a"])
    assert dict(models.loaded) == {"a": True, "b": True}


def _use(models: Models, model: Model) -> None:
    model.watched = None
    thread = threading.Thread(target=models.decode, args=("a", []))
    thread.start()
    thread.join(0.5)  # which may have to wait until we are done


# In the process that they are for, but without the process.


class Host:
    """What the worker tells, by the number of its job."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._changed = threading.Condition()

    def __call__(self, message: dict[str, Any]) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def of(self, number: int) -> list[dict[str, Any]]:
        return [message for message in self.messages if number in (message.get("job"), message.get("live"))]

    def end(self, number: int) -> dict[str, Any]:
        ends = {"done", "error", "late", "cancelled", "crash", "ended"}
        with self._changed:
            assert self._changed.wait_for(lambda: any(ends & each.keys() for each in self.of(number)), PATIENCE)
        return self.of(number)[-1]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    parent = tmp_path_factory.mktemp("models")
    return {
        "many": str(whisper_model.build(parent / "many")),
        "other": str(whisper_model.build(parent / "other", seed=1)),
        "english": str(whisper_model.build(parent / "english", multilingual=False, seed=2)),
    }


OPEN = {"compression": 1e9, "logprob": -1e9, "no_speech": 1.0}
Make = Callable[..., tuple[BatchWorker, Host]]


@pytest.fixture
def make(directories: dict[str, str]) -> Iterator[Make]:
    workers: list[BatchWorker] = []

    def begin(*names: str, **options: Any) -> tuple[BatchWorker, Host]:
        host = Host()
        given: dict[str, Any] = {"device": "cpu", "guards": OPEN, "batch_size": 4, "beam_size": 1} | options
        workers.append(BatchWorker(Options(models={name: directories[name] for name in names}, **given), host))
        return workers[-1], host

    yield begin
    for worker in workers:
        worker.close()


def one(directories: dict[str, str]) -> int:
    return (Path(directories["many"]) / "model.bin").stat().st_size


def ask(worker: BatchWorker, number: int, model: str = "", **options: Any) -> None:
    file: dict[str, Any] = {"path": str(DATA / "b-slt.mp3"), "container": "mp3", "max_seconds": 60.0, "model": model}
    worker.take({"job": number, "do": asdict(Job(**(file | options)))})


def test_a_worker_says_what_each_of_its_models_can(make: Make) -> None:
    worker, _ = make("many", "english")
    hello = worker.hello()
    assert list(hello["ready"]) == ["many", "english"]
    assert "de" in hello["ready"]["many"]["languages"]
    assert hello["ready"]["english"]["languages"] == ["en"]
    assert (hello["batch"], hello["sessions"]) == (4, 64)
    assert hello["speed"] > 0


def test_each_job_gets_the_model_that_it_asks_for_and_else_the_first(make: Make) -> None:
    worker, host = make("many", "other", "english")
    for number, model in enumerate(["many", "other", "english", "whisper-1", ""], start=1):
        ask(worker, number, model, language="en")
    ends = [host.end(number) for number in range(1, 6)]
    assert ends == [{"job": number, "done": True, "language": "en"} for number in range(1, 6)]
    texts = [[message["segment"]["tokens"] for message in host.of(number)[:-1]] for number in range(1, 6)]
    assert texts[0] == texts[3] == texts[4]
    assert texts[0] != texts[1] != texts[2] != texts[0]


def test_within_a_budget_a_worker_begins(make: Make, directories: dict[str, str]) -> None:
    worker, _ = make("many", "other", "english", budget=one(directories) * 3 // 2)
    assert sum(worker._models.loaded.values()) == 1


def said(messages: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    return [message["segment"]["tokens"] for message in messages if "segment" in message]


def test_models_come_and_go_under_load_and_nobody_notices(make: Make, directories: dict[str, str]) -> None:
    names = ["many", "other", "english"]
    worker, host = make(*names, budget=one(directories) * 3 // 2)
    for number in range(1, 19):
        ask(worker, number, names[number % 3], language="en")
    for number in range(1, 19):
        assert host.end(number) == {"job": number, "done": True, "language": "en"}
    for number in range(4, 19):
        # As numbers go that a batch of another size may change in their last digits: by its words.
        assert said(host.of(number)) == said(host.of((number - 1) % 3 + 1))
    assert sum(worker._models.loaded.values()) <= 1


def test_a_job_is_cancelled_and_the_others_are_not(make: Make) -> None:
    worker, host = make("many")
    for number in range(1, 9):
        ask(worker, number)
        if number % 2:
            worker.take({"cancel": number})
    for number in range(1, 9):
        end = host.end(number)
        assert "done" in end or (number % 2 and "cancelled" in end)
    assert "cancelled" in host.end(7)
    worker.take({"cancel": 7})
    worker.take({"cancel": 99})


def test_a_job_whose_time_is_over_is_late(make: Make) -> None:
    worker, host = make("many")
    ask(worker, 1, left=0.0)
    ask(worker, 2)
    assert "late" in host.end(1)
    assert "done" in host.end(2)
    assert len(host.of(1)) == 1


def test_a_file_that_cannot_be_decoded_is_the_askers_fault(make: Make) -> None:
    worker, host = make("many")
    ask(worker, 1, path=str(DATA / "empty.bin"), container="wav")
    assert "cannot be decoded" in host.end(1)["error"]


def test_silence_has_no_text_and_no_language(make: Make) -> None:
    worker, host = make("many")
    ask(worker, 1, path=str(DATA / "silence.flac"), container="flac")
    assert host.end(1) == {"job": 1, "done": True, "language": None}
    assert len(host.of(1)) == 1


def test_live_speech_goes_beside_recordings(make: Make) -> None:
    worker, host = make("many")
    pcm = b"".join(decode(str(DATA / "b-slt.mp3"), "mp3", max_seconds=60)) + bytes(64_000)
    worker.take({"live": 1, "open": {"language": "en", "model": "", "interim": False}})
    for number in range(2, 12):
        ask(worker, number, priority="batch")
    for at in range(0, len(pcm), 32_000):
        worker.take({"live": 1, "pcm": base64.b64encode(pcm[at : at + 32_000]).decode()})
    worker.take({"live": 1, "end": True})
    assert host.end(1) == {"live": 1, "ended": True}
    said = [message["segment"] for message in host.of(1) if "segment" in message and message["segment"]["text"]]
    assert len(said) == 1
    assert 0 <= said[0]["start"] <= said[0]["end"] <= len(pcm) / 32_000
    for number in range(2, 12):
        assert "done" in host.end(number)


def test_a_batch_that_does_not_fit_is_decoded_in_smaller_ones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, host = make("many")
    decode_all, sizes = worker._models.decode, list[int]()
    held = threading.Event()

    def decode(name: str, tasks: Sequence[Any]) -> Any:
        assert held.wait(PATIENCE)
        sizes.append(len(tasks))
        if len(tasks) > 1:
            raise RuntimeError("CUDA failed with error out of memory")
        return decode_all(name, tasks)

    monkeypatch.setattr(worker._models, "decode", decode)
    for number in range(1, 6):
        ask(worker, number, language="en")
    deadline = time.monotonic() + PATIENCE
    while sum(len(request.ready) for request in worker._batcher._requests) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    held.set()
    for number in range(1, 6):
        assert "done" in host.end(number)
    assert max(sizes) > 1
    assert worker._batcher.size == 1


def test_a_batch_that_fails_for_another_reason_is_not_tried_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, host = make("many")

    def decode(name: str, tasks: Sequence[Any]) -> Any:
        raise RuntimeError("No.")

    monkeypatch.setattr(worker._models, "decode", decode)
    ask(worker, 1, language="en")
    assert host.end(1) == {"job": 1, "crash": "RuntimeError"}
    assert worker._batcher.size == 4


def test_each_second_a_worker_says_what_it_did(make: Make) -> None:
    worker, host = make("many", "english")
    ask(worker, 1)
    host.end(1)
    deadline = time.monotonic() + PATIENCE
    while not any("stats" in message for message in host.messages):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (stats, *_) = [message["stats"] for message in host.messages if "stats" in message]
    assert stats["loaded"] == {"many": True, "english": True}
    assert stats["rows"] >= 1
    assert sum(size * count for size, count in stats["batches"].items()) == stats["rows"]


def test_a_closed_worker_leaves_no_thread(directories: dict[str, str]) -> None:
    before = set(threading.enumerate())
    host = Host()
    worker = BatchWorker(Options(models={"many": directories["many"]}, device="cpu", batch_size=1), host)
    ask(worker, 1)
    worker.take({"live": 2, "open": {"language": "en", "model": "", "interim": False}})
    worker.take({"live": 2, "drop": True})
    worker.close()
    assert host.end(1).keys() & {"done", "cancelled"}
    deadline = time.monotonic() + 3
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert set(threading.enumerate()) <= before
