"""Benchmarks of broadhead and its peers: ``python -m broadhead.bench {forward,backward,decode,host}``."""
