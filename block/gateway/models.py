"""Which models the servers serve, adapters among them, and so where a request for one may go."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

Card = Mapping[str, Any]
"""What a server says of one of its models; `id` is its name."""


class Places:
    """The servers that may serve a model, as it changes."""

    def __init__(self) -> None:
        self._ids: Collection[int] = ()

    def __contains__(self, instance_id: object) -> bool:
        return instance_id in self._ids

    def are(self, ids: Collection[int]) -> None:
        """They are these, from now on."""
        self._ids = ids


class Models:
    """What each server has told last. A server that does not tell, as without its key, may serve any."""

    def __init__(self) -> None:
        self._told: dict[int, Sequence[Card] | None] = {}
        self._places: dict[str, Places] = {}  # by name
        self._untold = Places()  # of models that no server tells of
        self._silent: set[int] = set()
        self._longest: dict[str, int] = {}  # by name, the most tokens of a prompt and its response
        self.differ = False
        """Whether there is a model that not all may serve."""

    def tell(self, instance_id: int, cards: Sequence[Card] | None) -> None:
        """A server serves these; None: it does not say."""
        if instance_id not in self._told or cards != self._told[instance_id]:
            self._told[instance_id] = cards
            self._sort()

    def told(self, instance_id: int) -> Sequence[Card] | None:
        """What a server has told last."""
        return self._told.get(instance_id)

    def forget(self, instance_id: int) -> None:
        """There is no such server any more."""
        self._told.pop(instance_id, None)
        self._sort()

    def _sort(self) -> None:
        there: dict[str, set[int]] = {}
        self._longest = {}
        for i, cards in self._told.items():
            for card in cards or ():
                there.setdefault(str(card["id"]), set()).add(i)
                if type(longest := card.get("max_model_len")) is int:
                    self._longest[str(card["id"])] = longest
        self._silent = {i for i, cards in self._told.items() if cards is None}
        self.differ = any(len(ids) < len(self._told) for ids in there.values())
        for name, ids in there.items():
            self._places.setdefault(name, Places()).are(ids | self._silent)
        for name in self._places.keys() - there.keys():  # requests that wait may have them
            self._places.pop(name).are(self._silent)
        self._untold.are(self._silent)

    def places(self, name: object) -> Places | None:
        """The servers that may serve a model; None if any may. KeyError if none does."""
        if not isinstance(name, str) or not name:
            return None  # the server takes its own, or says what is wrong
        if name in self._places:
            return self._places[name]
        if self._told and not self._silent:
            raise KeyError(name)
        return self._untold

    def longest(self, name: object) -> int | None:
        """The most tokens that a prompt and its response may have together, of a model that tells it."""
        return self._longest.get(name) if isinstance(name, str) else None

    def of(self, instance_id: int) -> list[str]:
        """What a server serves, as far as it tells."""
        return [str(card["id"]) for card in self.told(instance_id) or ()]

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
