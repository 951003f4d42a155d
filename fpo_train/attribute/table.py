"""What an attribution says: rows for a file, a table for a reader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from fpo_train.data.turns import Talk, messages_of, plain

from .baselines import ranks
from .influence import Influences
from .inputs import Reply, TrainingPair

SIDES = {"like": 1, "dislike": -1}  # what a pair taught, and the sign of its influence
SHOWN = 44  # characters of a text in the printed table
HEAD = ("", "influence", "cosine", "BM25", "embedding", "pair", "chosen", "rejected")


@dataclass(frozen=True, kw_only=True, eq=False)
class Attribution:
    """Of m replies and n pairs, everything that is told.

    Attributes:
        rewards: (m,) r of the replies. margins: (n,) Δ of the pairs. lexical, embedding: (m, n) the baselines' scores.
    """

    replies: Sequence[Reply]
    pairs: Sequence[TrainingPair]
    rewards: Tensor
    margins: Tensor
    influences: Influences
    lexical: Tensor
    embedding: Tensor

    def rows(self, top: int) -> Iterator[dict[str, Any]]:
        """A row for each reply, side and pair, the most influential first; at most `top` a side, 0: all.

        `like` are the pairs of influence above 0, `dislike` those below; ranks are among all pairs, 1 the most like it.
        """
        for m in range(len(self.replies)):
            for side in SIDES:
                yield from self._rows(m, side, top)

    def _rows(self, m: int, side: str, top: int) -> Iterator[dict[str, Any]]:
        reply, (lexical, embedding) = self.replies[m], self._ranks
        for rank, n in enumerate(self._taught(m, side)[: top or None], start=1):
            pair = self.pairs[n]
            yield {
                "asked": m + 1,
                "id": reply.name,
                "prompt": _written(reply.prompt),
                "reply": reply.text,
                "reward": float(self.rewards[m]),
                "taught": side,
                "rank": rank,
                "pair": n + 1,
                "where": pair.where,
                "influence": float(self.influences.influence[m, n]),
                "cosine": float(self.influences.cosine[m, n]),
                "bm25": float(self.lexical[m, n]),
                "bm25_rank": int(lexical[m, n]),
                "embedding": float(self.embedding[m, n]),
                "embedding_rank": int(embedding[m, n]),
                "margin": float(self.margins[n]),
                "preference": pair.preference,
                "pair_prompt": _written(pair.prompt),
                "chosen": pair.chosen,
                "rejected": pair.rejected,
            }

    def _taught(self, m: int, side: str) -> list[int]:
        """The pairs of a side, the most influential first; of equal ones the earlier."""
        values = self.influences.influence[m] * SIDES[side]
        return values.argsort(descending=True, stable=True)[: int((values > 0).sum())].tolist()

    @cached_property
    def _ranks(self) -> tuple[Tensor, Tensor]:
        return ranks(self.lexical), ranks(self.embedding)

    def text(self, top: int) -> str:
        """The same as aligned plain text, texts cut short."""
        parts = []
        for m, reply in enumerate(self.replies):
            parts.append(f"reply {reply.name}, reward {float(self.rewards[m]):+.3f}: {short(reply.text, 90)}")
            if reply.prompt:
                parts.append(f"to: {short(plain(reply.prompt), 90)}")
            for side in SIDES:
                count, rows = len(self._taught(m, side)), list(self._rows(m, side, top))
                shown = f", the first {len(rows)} of them" if len(rows) < count else ""
                parts.append(f"{count} of {len(self.pairs)} pairs taught the reward model to {side} it{shown}")
                parts += _aligned(rows)
            parts.append("")
        return "\n".join(parts).rstrip()


def short(text: str, most: int = SHOWN) -> str:
    """A text on one line, of at most so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _aligned(rows: Sequence[dict[str, Any]]) -> list[str]:
    table = [HEAD] if rows else []
    for row in rows:
        numbers = f"{row['influence']:+.3g}", f"{row['cosine']:+.3f}", str(row["bm25_rank"]), str(row["embedding_rank"])
        texts = short(row["chosen"]), short(row["rejected"])
        table.append((str(row["rank"]), *numbers, str(row["pair"]), *texts))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  " + "  ".join([*map(str.rjust, line[:6], widths[:6]), *map(str.ljust, line[6:], widths[6:])]).rstrip()
        for line in table
    ]


def _written(talk: Talk) -> Any:
    """A prompt as a file has it: a text, or messages."""
    return talk if isinstance(talk, str) else messages_of(talk)
