"""The n-gram model that the embedded LM is measured against: interpolated modified Kneser-Ney."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence


class KneserNey:
    """A model of documents of token ids; the first id of each document is the beginning-of-text token.

    The three discounts per order are the closed-form estimates of Chen and Goodman (1999), who describe the
    method. Order 0 is uniform.
    """

    def __init__(self, documents: Sequence[list[int]], vocab_size: int, order: int = 5) -> None:
        self.order, self.vocab_size, self.bos = order, vocab_size, documents[0][0]
        counts: Counter[tuple[int, ...]] = Counter()
        for ids in documents:
            padded = [self.bos] * (order - 2) + ids
            counts.update(tuple(padded[i : i + order]) for i in range(len(padded) - order + 1))
        self.levels = []
        for _ in range(order):
            seen = Counter(counts.values())
            y = seen[1] / max(1, seen[1] + 2 * seen[2])
            discount = [0.0] + [max(0.0, k - (k + 1) * y * seen[k + 1] / max(1, seen[k])) for k in (1, 2, 3)]
            total: defaultdict[tuple[int, ...], float] = defaultdict(float)
            spared: defaultdict[tuple[int, ...], float] = defaultdict(float)
            for gram, count in counts.items():
                total[gram[:-1]] += count
                spared[gram[:-1]] += discount[min(count, 3)]
            self.levels.append((counts, total, spared, discount))
            # Below the top a gram counts its distinct left neighbours; at a text's start that is BOS alone.
            shorter: Counter[tuple[int, ...]] = Counter()
            for gram, count in counts.items():
                shorter[gram[1:]] += count if gram[1:2] == (self.bos,) else 1
            counts = shorter

    def bits(self, documents: Sequence[list[int]]) -> float:
        """Total bits of the tokenized documents."""
        total_bits = 0.0
        for ids in documents:
            padded = [self.bos] * (self.order - 2) + ids
            for i in range(len(padded) - self.order + 1):
                p = 1 / self.vocab_size
                for n in range(1, self.order + 1):
                    counts, total, spared, discount = self.levels[self.order - n]
                    gram = tuple(padded[i + self.order - n : i + self.order])
                    if gram[1:-1][:1] != (self.bos,) and total.get(gram[:-1]):
                        count = counts.get(gram, 0)
                        kept = max(0.0, count - discount[min(count, 3)])
                        p = (kept + spared[gram[:-1]] * p) / total[gram[:-1]]
                total_bits -= math.log2(p)
        return total_bits
