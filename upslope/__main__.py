"""`python -m upslope`: the command where its script is not on the path."""

from upslope.cli import main

main()
