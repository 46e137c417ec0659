"""Several models in one process, as many of them loaded as there is memory for."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from voxgate.engines.batching import Again

logger = logging.getLogger(__name__)


class Unloadable(Protocol):
    """A model whose weights come and go; `bytes` is what they take."""

    name: str
    bytes: int

    @property
    def loaded(self) -> bool: ...

    def load(self) -> None: ...

    def unload(self) -> None: ...

    def decode(self, tasks: Sequence[Any]) -> Sequence[list[Any] | Again[Any]]: ...


class Models:
    """`budget` is in bytes, 0 for no bound. The one that is needed is always there, whatever it takes."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._used: OrderedDict[str, Unloadable] = OrderedDict()  # the least recently used first
        self._lock = threading.Lock()

    def add(self, model: Unloadable) -> None:
        """One that has just been loaded, after `make_room` for it."""
        with self._lock:
            self._used[model.name] = model
        self.make_room(0, keep=model)

    def need(self, name: str) -> Unloadable:
        """That model, loaded. By the thread that decodes, and no other: a model at work is never unloaded."""
        with self._lock:
            model = self._used[name]
            self._used.move_to_end(name)
        if not model.loaded:
            self.make_room(model.bytes)
            logger.info("loading %s", name)
            model.load()
        return model

    def decode(self, name: str, tasks: Sequence[Any]) -> Sequence[list[Any] | Again[Any]]:
        return self.need(name).decode(tasks)

    def make_room(self, size: int, *, keep: Unloadable | None = None) -> None:
        """For one that is not loaded yet."""
        for other in [model for model in self._used.values() if model.loaded and model is not keep]:
            taken = sum(each.bytes for each in self._used.values() if each.loaded)
            if not self._budget or taken + size <= self._budget:
                return
            logger.info("unloading %s", other.name)
            other.unload()

    @property
    def loaded(self) -> Mapping[str, bool]:
        with self._lock:
            return {name: model.loaded for name, model in self._used.items()}
