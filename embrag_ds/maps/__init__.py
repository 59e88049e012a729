"""Genetic maps: recombination along the contigs, from files of many formats."""
