"""Block mode: statistics, tuning and evaluation with one transformer block in memory; needs shardq[tune]."""
