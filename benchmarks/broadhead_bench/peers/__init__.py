"""Adapters of the implementations: each imports ``base`` alone of this folder; ``registry`` lists them all."""
