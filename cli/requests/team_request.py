"""What the command line says of teams, before anything heavy is imported."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class TeamRequest:
    """What the command line says of teams; None: not given."""

    degrees: str | None
    devices: int | None
    kind: str | None
    per_host: int
    global_batch: int | None
    microbatch: int | None
    layers: str | None
    schedule: str | None
    recomputation: str | None
    modes: str | None
    eager: bool
    held: bool = False
    scatter: bool = True
    layer_times: str | None = None
    layer_entry: str | None = None

    @property
    def given(self) -> bool:
        """Whether any option of teams was given."""
        return any(value is not None for value in (self.degrees, self.devices, self.kind, self.global_batch,
                                                   self.microbatch, self.layers, self.schedule, self.recomputation,
                                                   self.layer_times, self.modes))
