"""`python -m dfq_deploy` is the command line."""

from dfq_deploy.cli import main

main()
