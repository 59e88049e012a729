"""Panels, sites, windows, masks and samples: everything read from files (lowest layer)."""
