"""What words and embeddings say of the same question: which pairs are like a reply, whatever was learnt of them."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpo_train.data.sources import load_sequence_classifier
from fpo_train.data.turns import Talk, plain

K1, B = 1.5, 0.75  # of BM25, as usual
MINILM, LONGEST = "minilm", 256  # tokens, as the model's makers have it
WORD = re.compile(r"\w+")


def text_of(prompt: Talk, reply: str) -> str:
    """A prompt and a reply as one text."""
    return f"{plain(prompt)}\n\n{reply}" if prompt else reply


class Lexical:
    """BM25 over documents: Σ over the query's words of idf · f(K1 + 1) / (f + K1(1 − B + B·length/mean length)).

    idf = ln(1 + (N − n + ½)/(n + ½)); f counts a word in a document, n the documents that have it. Words are runs of
    letters and digits, in small letters; one that comes twice in a query counts twice.

    Source: Robertson and Zaragoza 2009, "The probabilistic relevance framework: BM25 and beyond".
    """

    def __init__(self, documents: Sequence[str]) -> None:
        self._lengths: list[int] = []
        self._found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for number, document in enumerate(documents):
            words = _words(document)
            self._lengths.append(len(words))
            for word, count in Counter(words).items():
                self._found[word].append((number, count))
        self._mean = sum(self._lengths) / max(1, len(self._lengths)) or 1.0

    def scores(self, query: str) -> Tensor:
        """The score of every document, (N,) float64, not negative."""
        total = [0.0] * len(self._lengths)
        for word, times in Counter(_words(query)).items():
            found = self._found.get(word, [])
            idf = math.log1p((len(total) - len(found) + 0.5) / (len(found) + 0.5))
            for number, count in found:
                damped = K1 * (1 - B + B * self._lengths[number] / self._mean)
                total[number] += times * idf * count * (K1 + 1) / (count + damped)
        return torch.tensor(total, dtype=torch.float64)


class Embedder:
    """MiniLM's embeddings of texts: the mean over tokens of its last hidden states, of norm 1."""

    def __init__(self, device: torch.device) -> None:
        """Raises: RunError: it cannot be fetched or loaded."""
        model, self._tokenizer, _ = load_sequence_classifier(MINILM, torch.float32)
        self.model: Any = model.base_model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(R, H) fp32."""
        options = {"padding": True, "truncation": True, "max_length": LONGEST, "return_tensors": "pt"}
        batch = self._tokenizer(list(texts), **options).to(self.model.device)
        hidden, mask = self.model(**batch).last_hidden_state, batch["attention_mask"][:, :, None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def nearest(queries: Tensor, pairs: Tensor) -> Tensor:
    """The greater cosine of a query with a pair's two texts: (m, H), (n, 2, H) → (m, n), float64."""
    q, texts = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (queries, pairs))
    return torch.einsum("mh,nth->mnt", q, texts).amax(2)


def ranks(scores: Tensor) -> Tensor:
    """1 for the greatest of each row, and so on; equal ones share the better rank. (m, n) → (m, n) int64."""
    rising = scores.sort(1).values.contiguous()
    return scores.shape[1] - torch.searchsorted(rising, scores.contiguous(), right=True) + 1


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())
