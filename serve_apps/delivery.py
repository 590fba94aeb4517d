"""What a call of a stage says of itself, to the router and to the replica that this one chooses."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Delivery:
    """One part of a batch on its way to a replica, once or again."""

    lone: bool = False
    """Whether it is the only part of the only batch."""
    tried: set[str] = field(default_factory=set)
    """Ids of replicas that failed it; any other is better."""
    chosen: str | None = None
    """Id of the replica that it is sent to; set by the router, which is in
    the same process."""

    def failed(self) -> None:
        """The chosen replica did not answer it; the next one has no reason to hurry."""
        self.lone = False
        if self.chosen is not None:
            self.tried.add(self.chosen)
