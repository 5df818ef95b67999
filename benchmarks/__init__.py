"""Benchmarks: what an operation costs, beside peers and beside what the machine allows.

``python -m benchmarks --list`` names the operations, ``--help`` the options. Every
timing is gated by a check against a float64 truth.
"""
