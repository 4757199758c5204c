"""`python -m shardq.cli` is the console script."""

from shardq.cli import main

if __name__ == "__main__":
    main()
