"""Published checkpoints: found, read, turned into a `model.Transformer`, and written again."""
