"""Block mode: statistics, tuning and evaluation with one transformer block of a model in memory.

The only part of shardq that needs torch and transformers (`shardq[tune]`): whoever imports a module of it calls
`packages.check_packages` first, and nothing else of shardq imports one at its top.
"""
