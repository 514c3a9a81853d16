"""Provide the attacks, in one module each."""
