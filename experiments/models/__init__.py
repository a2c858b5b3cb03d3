"""Networks that experiments and benchmarks share; they know nothing of quantization."""
