"""What needs a CUDA GPU: latency and throughput of every backend against torch in one run, and the GPU's own roof.

`python -m dualmatch.bench.gpu` runs it (`make gpu-check` does). `networks.py` alone imports torch, the networks and their export.
"""
