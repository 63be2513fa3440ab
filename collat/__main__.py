"`python -m collat`: the command line."

from collat.cli import main

main()
