"""Measurements: latency of a bundle's encoders, the machine it was measured on, and the statistics behind every figure.

May import `runtime`; torch and `models` only in the one file that times the torch baseline.
"""
