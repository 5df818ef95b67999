"""Studies of random features: each module writes one table of the manual.

``python -m tools.features.variance``, ``attention``, ``classification`` and ``minilm``
write their pages of ``docs/_generated``; ``--quick`` makes the long ones short.
"""
