"""Verdicts: objections to a picture or its caption, and the decision that several of them give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

REJECT, AMBIGUOUS = "reject", "ambiguous"


@dataclass(frozen=True)
class Verdict:
    """One objection: its kind, REJECT or AMBIGUOUS, and a reason with fixed wording."""

    kind: str
    reason: str


def decide(verdicts: Iterable[Verdict]) -> tuple[str, str]:
    """(status, reason) for the manifest: ("kept", ""), or the first reject, or else the first ambiguous one."""
    verdicts = list(verdicts)
    for kind, status in ((REJECT, "rejected"), (AMBIGUOUS, "ambiguous")):
        for verdict in verdicts:
            if verdict.kind == kind:
                return status, verdict.reason
    return "kept", ""
