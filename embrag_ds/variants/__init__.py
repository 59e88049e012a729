"""Variant files, VCF and BCF: their records, site tables, dosages and output (numpy only)."""
