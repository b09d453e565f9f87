"""What eval.py stands on: log-likelihoods by few passes (likelihood.py), a model that answers
questions (evaluator.py), and lm-eval that asks them (harness.py; tasks/ are ours, for off-line)."""
