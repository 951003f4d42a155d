"""How a forward went through the tapped modules, and what follows from that for what their taps will deliver."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from torch import nn

from .gradients import Stream
from .layers import Site, _outer

Calls = list[tuple[nn.Module, int]]


class Course:
    """The uses of tapped modules in a forward, in order; worked out once for all passes that go the same way.

    Attributes:
        calls: (module, group) of every use; uses of one group read the same input.
        times: module → how often it was called.
        served: module → the sites it serves, each with its rule, and its group where one delivery completes it. Sites
            of one group are siblings.
        weights: module → the site and group of its linear weight, where that is all it serves and one delivery
            completes it.
        missing: site → how many deliveries complete it, of those that are not complete with one.
        awaited: group → how many such sites it has. unread: group → how many uses.
        odd: modules that were called without the batch in front.
        looked: whether examples were seen to keep apart in modules called this way.
        reads: how often the modules' parameters were asked for.
    """

    def __init__(self, calls: Calls, sites: Sequence[Site], odd: AbstractSet[nn.Module]) -> None:
        self.calls = list(calls)
        self.sites, self.odd = sites, set(odd)
        self.times = Counter(module for module, _ in calls)
        groups = dict(calls)
        counts = {site: sum(self.times[module] for module in site.rules) for site in sites}
        self.missing = {site: count for site, count in counts.items() if count != 1}
        family = {
            site: groups[next(m for m in site.rules if self.times[m])] for site, count in counts.items() if count == 1
        }
        self.served: dict[nn.Module, list[tuple[Site, Callable[[nn.Module, Any], Stream], int | None]]] = {}
        for site in sites:
            for module, rule in site.rules.items():
                self.served.setdefault(module, []).append((site, rule.stream, family.get(site)))
        self.weights = {
            module: (served[0][0], served[0][2])
            for module, served in self.served.items()
            if len(served) == 1 and served[0][2] is not None and served[0][1] is _outer
        }
        self.awaited = Counter(family.values())
        self.unread = Counter(group for _, group in calls)
        self.looked = False
        self.reads: list[int] = []

    def is_of(self, calls: Calls, sites: Sequence[Site], odd: AbstractSet[nn.Module]) -> bool:
        """Whether a forward with these calls went this way."""
        return sites is self.sites and odd == self.odd and calls == self.calls
