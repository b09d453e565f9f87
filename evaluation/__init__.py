"""What eval.py stands on: a model that answers lm-eval (evaluator.py), and sets of hidden tokens that say much for few passes (designs.py)."""
