"""Studies of embeddings: each module writes one table of the manual.

``python -m tools.embedding.communities``, ``gradients``, ``words``, ``peers`` and
``scale`` write ``benchmarks/results/embedding_<name>.json``, and from it their page of
``docs/_generated``; ``--quick`` is a try of seconds that writes nothing.
"""
