"""Work with the packages AutoAttack and RobustBench, and check how they are installed."""
