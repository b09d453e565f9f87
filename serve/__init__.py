"""The web page and OpenAI's API of sample.py --serve."""
