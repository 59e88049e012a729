"""Retrieval of reference haplotypes and the reference cache (imports only ``data``)."""
