"""From text to token files: prepare.py writes them, tokenizer.py turns text into ids, loader.py serves batches."""
