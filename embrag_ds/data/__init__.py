"""Data read from files: panels, genetic maps, sites, windows, masks and micro-batches (numpy only)."""
