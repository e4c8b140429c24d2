"""What tests, benchmarks and examples share: rank processes, a cluster on one machine, a toy GPT and its flags."""
