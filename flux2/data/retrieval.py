"""More of what is rare: records of a pool whose prompts are nearest to a concept's, by BM25.

BM25 in Lucene's form (Robertson and Zaragoza 2009), by bm25s: score(q, d) is the sum over the
query's words of idf · tf / (tf + k1·(1 − b + b·|d|/mean|d|)).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flux2.data.order import (
    Law,
    describe,
    describe_all,
    digest,
    identity,
    law_of,
    table,
    tags_of,
)
from flux2.data.record import Dataset, Record
from flux2.errors import InputError

_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# Scripts that are written without spaces have no words to find: their characters stand for them.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Lower-case words; of Chinese and Japanese, characters."""
    return _WORD.findall(text.casefold())


@dataclass(frozen=True, eq=False, repr=False)
class ToppedUp:
    """A dataset and, behind it, records of a pool that are like its rare concepts.

    A concept is a tag that fewer than `below` of the records have, or one that is named. What is
    asked of the pool is the tag itself, or the prompts of the records that have it. A record that
    is found has the concept among its tags, and `meta["retrieved"]` names what it was found for;
    one whose prompt the dataset has already, word by word, is passed over. Records of the pool are
    drawn as often as the dataset's are on average.

    Attributes:
        dataset: what is topped up.
        pool: where the records come from.
        count: records for a concept, at most.
        tags: the field of the meta that has the concepts, a string or a list of strings.
        below: share of the records under which a tag is rare.
        concepts: what to top up instead, whether rare or not.
        by: what is asked: tag, or prompts.
        least: the lowest score that counts; 0 takes all that share a word with what is asked.

    Raises:
        InputError: no rare tag, an unknown `by`, numbers out of range, nothing found, or bm25s is
            not installed.
    """

    dataset: Dataset
    pool: Dataset
    count: int = 100
    tags: str = "tags"
    below: float = 0.01
    concepts: Sequence[str] | None = None
    by: str = "tag"
    least: float = 0.0
    _found: Mapping[int, tuple[str, ...]] = field(init=False)
    _extra: np.ndarray = field(init=False)
    _had: Counter[str] = field(init=False)

    def __post_init__(self) -> None:
        if self.by not in ("tag", "prompts"):
            raise InputError(f"data.dataset.by is {self.by!r}: choose tag or prompts")
        if self.count < 1:
            raise InputError(f"data.dataset.count is {self.count}: it must be at least 1")
        if not 0 < self.below <= 1:
            raise InputError(f"data.dataset.below is {self.below}: give a share above 0, up to 1")
        records = [r for r in describe_all(self.dataset) if r is not None]
        had = Counter(t for r in records for t in tags_of(r, self.tags))
        rare = [t for t, n in had.items() if n < self.below * len(self.dataset)]
        concepts = list(self.concepts) if self.concepts is not None else sorted(rare)
        if not concepts:
            raise InputError(
                f"no tag of {self.tags!r} is rarer than {self.below:g} of {len(self.dataset)} "
                "records: raise data.dataset.below, or name data.dataset.concepts"
            )
        found = self._search(records, concepts)
        if not found:
            raise InputError(
                f"the pool of {len(self.pool)} records has nothing for {', '.join(concepts[:4])}: "
                "give another pool, lower data.dataset.least, or set data.dataset.by=prompts"
            )
        extra = np.asarray(sorted(found))
        for name, value in (("_found", found), ("_extra", extra), ("_had", had)):
            object.__setattr__(self, name, value)

    def _search(
        self, records: Sequence[Record], concepts: Sequence[str]
    ) -> dict[int, tuple[str, ...]]:
        """Index in the pool → concepts that it was found for."""
        held = {tuple(words(r.prompt)) for r in records}
        pool = describe_all(self.pool)
        texts = [[] if r is None else words(r.prompt) for r in pool]
        open_ = np.array([bool(t) and tuple(t) not in held for t in texts])
        score = scorer(texts)
        found: dict[int, tuple[str, ...]] = {}
        for concept in concepts:
            scores = np.zeros(len(texts))
            for asked in self._queries(records, concept):
                scores = np.maximum(scores, score(words(asked)))
            scores[~open_] = 0
            # Equal scores in the pool's order: the same records on every machine.
            best = np.lexsort((np.arange(len(scores)), -scores))[: self.count]
            for index in best.tolist():
                if scores[index] > 0 and scores[index] >= self.least:
                    found[index] = (*found.get(index, ()), concept)
        return found

    def _queries(self, records: Sequence[Record], concept: str) -> list[str]:
        if self.by == "tag":
            return [concept]
        return [r.prompt for r in records if concept in tags_of(r, self.tags)]

    def __len__(self) -> int:
        return len(self.dataset) + len(self._extra)

    def __getitem__(self, index: int) -> Record:
        """Raises UnreadableRecord as the dataset and the pool do."""
        extra = self._place(index)
        return self.dataset[index] if extra is None else self._marked(index, self.pool[extra])

    def bucket_of(self, index: int) -> tuple[int, int, int]:
        """The dataset's, or the pool's."""
        extra = self._place(index)
        return (self.dataset if extra is None else self.pool).bucket_of(
            index if extra is None else extra
        )

    def describe(self, index: int) -> Record:
        """The record without images."""
        extra = self._place(index)
        if extra is None:
            return describe(self.dataset, index)
        return self._marked(index, describe(self.pool, extra))

    def _place(self, index: int) -> int | None:
        """The index in the pool; None for the dataset's own."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        behind = index - len(self.dataset)
        return None if behind < 0 else int(self._extra[behind])

    def _marked(self, index: int, record: Record) -> Record:
        concepts = self._found[int(self._extra[index - len(self.dataset)])]
        tags = tuple(dict.fromkeys([*tags_of(record, self.tags), *concepts]))
        return replace(
            record, id=index, meta={**record.meta, self.tags: tags, "retrieved": concepts}
        )

    def law(self, step: int) -> Law:
        """The dataset's; what was found has its mean weight, and is a part of batches like it."""
        law, more = law_of(self.dataset, step), len(self._extra)
        weights, parts = law.weights, law.parts
        if weights is not None:
            weights = np.concatenate([weights, np.full(more, weights.mean())])
        if parts is not None:
            parts = np.concatenate([parts, np.full(more, parts.max() + 1)])
        return replace(law, weights=weights, parts=parts)

    @property
    def identity(self) -> str:
        """Of the dataset, the pool, and what was found."""
        return digest("topped", identity(self.dataset), identity(self.pool), self.tags, self._found)

    @property
    def inner(self) -> Sequence[Dataset]:
        """The dataset, and the pool."""
        return self.dataset, self.pool

    def report(self) -> Iterator[str]:
        """A table of the concepts: how many records there were, and how many came."""
        came = Counter(c for concepts in self._found.values() for c in concepts)
        concepts = self.concepts if self.concepts is not None else sorted(came)
        rows = [[c, str(self._had[c]), str(came[c])] for c in concepts]
        rows.append(["all", str(len(self.dataset)), str(len(self._extra))])
        yield from table([self.tags, "had", "found"], rows)

    def __repr__(self) -> str:
        return f"ToppedUp({self.identity})"


def scorer(texts: Sequence[list[str]]) -> Any:
    """BM25 scores of texts (lists of words): (words of a query) → len(texts) float64.

    Raises:
        InputError: bm25s is not installed.
    """
    try:
        import bm25s
    except ImportError:
        raise InputError("retrieval needs bm25s: pip install bm25s") from None
    if not any(texts):
        return lambda query: np.zeros(len(texts))
    index = bm25s.BM25(method="lucene")
    index.index([list(t) for t in texts], show_progress=False)

    def scores(query: list[str]) -> np.ndarray:
        if not query:
            return np.zeros(len(texts))
        return np.asarray(index.get_scores(query), np.float64)

    return scores
