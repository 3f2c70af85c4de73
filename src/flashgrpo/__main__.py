"""`python -m flashgrpo` is the command line."""

from flashgrpo.cli import main

main()
