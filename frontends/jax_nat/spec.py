"""The text that travels inside a compiled XLA program: enough to rebuild a call in another process."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from natcore.planning import Config
from natcore.problem import Call

SCHEMA = 2


class Source(NamedTuple):
    """Where an operand's memory is: a buffer of the custom call, and an offset into it in bytes."""

    is_result: bool
    buffer: int
    offset: int


@dataclass(frozen=True)
class Spec:
    """One custom call. ``sources`` follows ``OPERANDS[call.direction]``; None marks an absent operand.

    A result buffer after the first ``results`` ones, if there is one, is the workspace.
    """

    call: Call
    scale: float
    config: Config | None
    sources: tuple[Source | None, ...]
    results: int

    @cached_property
    def text(self) -> str:
        config = None if self.config is None else [self.config.kernel, self.config.options]
        fields = {
            "schema": SCHEMA,
            "call": json.loads(self.call.to_json()),
            "scale": self.scale,
            "config": config,
            "sources": self.sources,
            "results": self.results,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @cached_property
    def key(self) -> int:
        """A signed 64-bit digest of the text: the same in every process."""
        return int.from_bytes(hashlib.sha256(self.text.encode()).digest()[:8], "little", signed=True)

    @classmethod
    def parse(cls, text: str) -> Spec:
        fields = json.loads(text)
        if fields["schema"] != SCHEMA:
            raise ValueError(
                f"this program was compiled by another version of natcore (schema {fields['schema']}, here {SCHEMA}). "
                "Export it again, or clear the compilation cache."
            )
        config = fields["config"]
        return cls(
            Call.from_json(json.dumps(fields["call"])),
            fields["scale"],
            None if config is None else Config(config[0], tuple((name, value) for name, value in config[1])),
            tuple(None if source is None else Source(*source) for source in fields["sources"]),
            fields["results"],
        )
