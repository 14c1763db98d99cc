"""Evaluation: one short script for each benchmark, over one runner. EVALUATION.md explains them."""
