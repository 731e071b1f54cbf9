"""The benchmark program. ``benchmarks/run.py`` and ``benchmarks/compare_installations.py`` start it."""
