"""Many machines make one output without a coordinator: a folder that all see, claims in it, and any of them ends it.

The unit is an output file. A worker claims some, makes them as a resumed run would that finds all others done, and
leaves each in the job with a record. What is left to the last one is what an interrupted run leaves to the next: its
journal is put together from the records, and an ordinary run publishes.
"""
