"""Text in, text out: a checkpoint that can be asked (sampler.py), and its faces in the terminal, on
a web page and as OpenAI's API."""
