"""The command line of shardq: a thin skin over the library, and the only place that prints.

Worker processes import the console script again, so nothing but this function may be here: click and rich come with the
first call.
"""


def main() -> None:
    """Entry point of the console script `shardq`."""
    from shardq.cli.group import commands

    commands(prog_name="shardq")
