"""What `dfq-deploy` and `python -m dfq_deploy` start: the command line, which takes a moment to load.

Whoever interrupts it by then gets three lines as at any later time, from here, where nothing is loaded yet.
"""

import importlib
import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit."""
    try:
        cli = importlib.import_module("dfq_deploy.cli")
    except KeyboardInterrupt:
        print("error: stopped.\n  why: you interrupted the start.\n  fix: run the same command again.", file=sys.stderr)
        sys.exit(3)
    sys.exit(cli.run(sys.argv[1:]))


if __name__ == "__main__":
    main()
