"""What bench_attention.py measures, and what it expects."""
