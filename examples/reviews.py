"""Film reviews, pulled towards praise and away from offence: a reward × an optimality variable × a constraint.

    pip install 'lmppl[examples]'
    lmppl compare examples/reviews.py
    python examples/reviews.py

`sentiment` is VADER's compound score in [−1, 1]. The classifier of alt-profanity-check gives P(offensive), so the log
of its complement is exactly log p(O=1|x) with O = "not offensive". The constraint reuses the same scorer, which
therefore runs once on each text.
"""

import numpy as np
from profanity_check import predict_prob
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import lmppl

analyzer = SentimentIntensityAnalyzer()


def sentiment(texts: list[str]) -> list[float]:
    """VADER's compound score of each text."""
    return [analyzer.polarity_scores(text)["compound"] for text in texts]


def log_not_offensive(texts: list[str]) -> np.ndarray:
    """log P(not offensive) of each text."""
    return np.log1p(-predict_prob(texts))


prior = lmppl.LM("tiny", context="The film was", max_new_tokens=24)
model = (
    prior
    * lmppl.Reward(sentiment, beta=0.5, upper=1.0)
    * lmppl.Optimality(log_not_offensive)
    * lmppl.Constraint(log_not_offensive, where=lambda log_p: log_p > np.log(0.5), name="clean")
)
engines = [lmppl.Rejection(), lmppl.Importance(2048), lmppl.BestOfN(8)]


if __name__ == "__main__":
    comparison = lmppl.compare(model, engines, num_draws=500)
    print(model, comparison, sep="\n\n")
