"""Embeddings of anything with an affinity, in linear time: EDRep.

The estimator and the operators that it embeds: random walks on graphs, co-occurrence of
words, walks through events in time.
"""

from subquad._affinities import (
    Vocabulary,
    cooccurrence,
    random_walk,
    temporal_walk,
)
from subquad._edrep import EDRep

__all__ = [
    "EDRep",
    "Vocabulary",
    "cooccurrence",
    "random_walk",
    "temporal_walk",
]
