"""Copying model along a stretch of a chromosome, with all reference haplotypes as its states, on a CPU."""
