"""``python -m ensemble_attacks``: the command line."""

from ensemble_attacks.cli.group import main

main()
