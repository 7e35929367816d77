"""Which models the servers serve, adapters among them, and so where a request for one may go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Card = Mapping[str, Any]
"""What a server says of one of its models; `id` is its name."""


class Models:
    """What each server has told last. A server that does not tell, as without its key, may serve any."""

    def __init__(self) -> None:
        self._told: dict[int, Sequence[Card] | None] = {}
        self._places: dict[str, Collection[int] | None] = {}  # by name, as of `places`
        self._silent: set[int] = set()
        self._longest: dict[str, int] = {}  # by name, the most tokens of a prompt and its response

    def tell(self, instance_id: int, cards: Sequence[Card] | None) -> None:
        """A server serves these; None: it does not say."""
        if instance_id not in self._told or cards != self._told[instance_id]:
            self._told[instance_id] = cards
            self._sort()

    def forget(self, instance_id: int) -> None:
        """There is no such server any more."""
        if self._told.pop(instance_id, None) is not None or instance_id in self._silent:
            self._sort()

    def _sort(self) -> None:
        self._silent = {i for i, one in self._told.items() if one is None}
        names = {str(card["id"]) for one in self._told.values() for card in one or ()}
        self._longest = {
            str(card["id"]): longest
            for one in self._told.values()
            for card in one or ()
            if type(longest := card.get("max_model_len")) is int
        }
        self._places = {}
        for name in names:
            there = {i for i, one in self._told.items() if one is None or any(card["id"] == name for card in one)}
            self._places[name] = None if len(there) == len(self._told) else there

    def places(self, name: object) -> Collection[int] | None:
        """The servers that may serve a model; None if all may. KeyError if none does."""
        if not isinstance(name, str) or not name:
            return None  # the server takes its own, or says what is wrong
        if name in self._places:
            return self._places[name]
        if self._told and not self._silent:
            raise KeyError(name)
        return None if len(self._silent) == len(self._told) else self._silent

    def longest(self, name: object) -> int | None:
        """The most tokens that a prompt and its response may have together, of a model that tells it."""
        return self._longest.get(name) if isinstance(name, str) else None

    @property
    def differ(self) -> bool:
        """Whether there is a model that not all may serve."""
        some_tell = len(self._silent) < len(self._told)
        return some_tell and (bool(self._silent) or any(there is not None for there in self._places.values()))

    def of(self, instance_id: int) -> list[str]:
        """What a server serves, as far as it tells."""
        return [str(card["id"]) for card in self._told.get(instance_id) or ()]

    @property
    def names(self) -> list[str]:
        """All that are served, as far as servers tell."""
        return sorted(self._places)

    def cards(self) -> list[Card]:
        """Each model once, as the first server that has it tells of it."""
        found: dict[str, Card] = {}
        for cards in self._told.values():
            for card in cards or ():
                found.setdefault(str(card["id"]), card)
        return list(found.values())
