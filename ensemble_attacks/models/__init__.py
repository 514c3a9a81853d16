"""Anybody's model: votes, ensembles, stand-ins, and the one door through which every tool looks at them."""
