"""What is found of a claim."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """holds is None where the claim is not decided; why is then the word for it."""

    sentence: str
    measured: str
    holds: bool | None
    why: str = "not evaluated"

    @property
    def word(self) -> str:
        return {True: "holds", False: "does not hold", None: self.why}[self.holds]

    def __str__(self) -> str:
        """A line of a Markdown table."""
        return f"| {self.sentence} | {self.measured} | {self.word} |"
