"""Quantization-aware training: every estimator on one network, paired over seeds."""
