"""Quantizers: float rows and a scheme in, canonical codes and scales out. They know no layout."""
