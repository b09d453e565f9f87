"""From text to token files: prepare.py writes them, loader.py and chat.py serve batches,
tokenizer.py turns text into ids and back."""
