"""The command line of shardq: a thin skin over the library, and the only place that prints.

Worker processes import the console script again, so nothing but this function may be here: click and rich come with the
first call.
"""


def main() -> None:
    """Entry point of the console script `shardq`."""
    import importlib

    importlib.import_module("shardq.executors.preload")  # idle threads of numeric libraries cost 0.1 CPU-s a run
    from shardq.cli.group import commands

    commands(prog_name="shardq")
