"""Look at anybody's model: votes, ensembles, stand-ins, and the one door through which every tool goes to a model."""
