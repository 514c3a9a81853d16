"""``python -m ensemble_attacks``: the command line."""

from ensemble_attacks.cli import main

main()
