"""The packages that this one works with: AutoAttack and RobustBench."""
