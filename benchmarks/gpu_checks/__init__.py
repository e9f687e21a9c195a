"""The checks of `benchmarks/gpu.py`, which need a GPU; `--tiny` runs the same code on a CPU."""
