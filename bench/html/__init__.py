"""`dualmatch report`: what lies in a folder (runs, bundles, reports of the benchmarks) as one HTML page that needs nothing else.

May import what `bench` may: the runtime, never torch.
"""
