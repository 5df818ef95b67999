"""Studies of sparse factors: tables of the manual.

``python -m tools.factors.growth`` and ``tasks`` write their pages of
``docs/_generated``; ``tasks --quick`` is a try of seconds.
"""
