"""What computes dosages: the network on windows, or the loop along stretches, and the blending of either."""
