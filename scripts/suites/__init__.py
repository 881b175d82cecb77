"""The suites of ``scripts/benchmark.py``, a module each with a ``run(settings) -> Outcome``."""
