"""Run the command line, as ``python -m ensemble_attacks``."""

from ensemble_attacks.cli.group import main

main()
