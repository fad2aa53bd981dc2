"""What speculation did and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Stats"]


@dataclass
class Stats:
    """Counts of one ``generate``, or of several added up.

    A pass of the target that reads a batch counts once in ``passes`` and once for every unfinished row in
    ``row_passes``. Reading the prompt, which gives the first token of each row, counts in neither.

    Attributes:
        passes: of the target behind the prompt.
        row_passes: summed over the rows that were not finished.
        tokens: new tokens of all rows, up to and including the one that ended each.
        rows: rows of all batches.
        nodes: tree nodes that were read, roots included, padding not.
        offered: how many trees reached depth 1, 2, ...; a row that has no draft offers nothing.
        accepted: how many walks did.
        draft_seconds: in the drafter.
        target_seconds: in passes of the target behind the prompt.
        prompt_seconds: in reading the prompt.
        seconds: all of these and everything in between.
        measure_seconds: in timing the target, once for each model, and not in ``seconds``.
        lossless: False if a tree let a node see what is no part of its text, see `Tree.extra`.
    """

    passes: int = 0
    row_passes: int = 0
    tokens: int = 0
    rows: int = 0
    nodes: int = 0
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    target_seconds: float = 0.0
    prompt_seconds: float = 0.0
    seconds: float = 0.0
    measure_seconds: float = 0.0
    lossless: bool = True

    @property
    def tokens_per_pass(self) -> float:
        """New tokens of a row for each pass that read it, the target's own one at the end of a walk included.

        Tokens that come from reading the prompt are left out on both sides, so decoding without a draft has exactly 1.
        """
        return (self.tokens - self.rows) / self.row_passes if self.row_passes else 1.0

    @property
    def acceptance(self) -> list[float]:
        """For depth 1, 2, ...: the share of walks that went so far among all passes of a row."""
        return [count / self.row_passes for count in self.accepted]

    def count(self, offered: int, path: int, nodes: int) -> None:
        """Add one row of one pass: depth of its tree, depth that the walk reached, nodes read."""
        self.row_passes += 1
        self.nodes += nodes
        for counts, depth in ((self.offered, offered), (self.accepted, path)):
            counts.extend([0] * (depth - len(counts)))
            for i in range(depth):
                counts[i] += 1

    def __add__(self, other: Stats) -> Stats:
        counts = ("passes", "row_passes", "tokens", "rows", "nodes")
        times = ("draft_seconds", "target_seconds", "prompt_seconds", "seconds", "measure_seconds")
        total = {name: getattr(self, name) + getattr(other, name) for name in counts + times}
        total |= {name: _sum(getattr(self, name), getattr(other, name)) for name in ("offered", "accepted")}
        return Stats(**total, lossless=self.lossless and other.lossless)

    def summary(self) -> str:
        """A few lines for people."""
        rest = self.seconds - self.draft_seconds - self.target_seconds - self.prompt_seconds
        going = ", ".join(f"{share:.2f}" for share in self.acceptance) or "none"
        return "\n".join(
            [
                f"{self.tokens} tokens in {self.passes} passes of the target behind the prompt",
                f"{self.tokens_per_pass:.2f} tokens a pass and row (its own one included), "
                f"{self.nodes / max(1, self.row_passes):.1f} nodes read",
                f"walks that reached depth 1, 2, ...: {going}",
                f"seconds: prompt {self.prompt_seconds:.2f}, target {self.target_seconds:.2f}, "
                f"drafter {self.draft_seconds:.2f}, between them {rest:.2f}",
                "lossless: the text is what the target writes alone"
                if self.lossless
                else "LOSSY: nodes saw what was no part of their text, so the target alone may write another one",
            ]
        )


def _sum(a: list[int], b: list[int]) -> list[int]:
    wide = max(len(a), len(b))
    return [x + y for x, y in zip(a + [0] * (wide - len(a)), b + [0] * (wide - len(b)), strict=True)]
