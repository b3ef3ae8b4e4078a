"""What a search of degrees has found so far, which Ctrl-C leaves as it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mipipe.planner.teams.evaluate import TeamResult


@dataclass
class SoFar:
    """Results in the order in which they were found, and whether the search was interrupted."""

    results: list[TeamResult] = field(default_factory=list)
    interrupted: bool = False

    def note(self) -> None:
        """The search was interrupted."""
        self.interrupted = True

    def ask(self) -> None:
        """Go on only if nothing was noted: a solve inside ends at Ctrl-C, and the search with it.

        Raises:
            KeyboardInterrupt: it was.
        """
        if self.interrupted:
            raise KeyboardInterrupt

    def take(self, made: Iterable[TeamResult]) -> None:
        """Keep results as they are made; raises as `ask`."""
        for item in made:
            self.results.append(item)
            self.ask()
        self.ask()

    @property
    def ranked(self) -> list[TeamResult]:
        """The results, the best first."""
        return sorted(self.results, key=lambda item: item.seconds)
