"""The benchmarks: each a script, run as ``python benchmarks/table1.py`` or ``python -m benchmarks.table1``."""
