"""The tests, a package of their own: robustbench's wheel installs another top-level ``tests``."""
