"""The CNNs, and torch set up to compute them."""
