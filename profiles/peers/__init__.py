"""Other libraries' optimizers under the protocol of our own comparisons: `python -m profiles.bench_peers`."""
