"""Executors: where jobs run. All of them speak the protocol of `base.py`."""
