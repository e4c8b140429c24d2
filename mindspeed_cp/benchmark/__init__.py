"""What the benchmarks in scripts/ are made of: cases, baselines, kernels that wait, tables."""
