"""Panels, sites, windows, masks and people: everything read from files (lowest layer)."""
