"""Questions whose answer's turn has begun: with given words, or with the first tokens of the answer itself."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_ssiuu.datamodules.splits import QAExample


@dataclass(frozen=True, repr=False)
class Begun(QAExample):
    """A question whose answer's turn begins with what is given; scored is what follows.

    Args:
        words: They stand where the answer begins, and the answer follows after a space; they carry no label.
        n_given: So many of the answer's first tokens carry no label either.

    Example:
        >>> Begun(7, "Who?", "Me", words="Sure, it is", n_given=0)
        Begun(example_id=7)
    """

    words: str = ""
    n_given: int = 0

    def __repr__(self) -> str:
        return f"Begun(example_id={self.example_id})"
