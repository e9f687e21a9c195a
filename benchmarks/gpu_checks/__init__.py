"""The checks of `benchmarks/gpu.py`: what only a GPU can prove, and what the same code does on a CPU with `--tiny`."""
