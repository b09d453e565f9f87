"""What eval.py stands on: a model that answers questions (evaluator.py), lm-eval that asks them (harness.py), and sets of hidden
tokens that say much for few passes (designs.py)."""
