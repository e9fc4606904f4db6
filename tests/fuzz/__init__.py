"""Fuzzing of the request path: the corpus, and the properties that no input may break."""
