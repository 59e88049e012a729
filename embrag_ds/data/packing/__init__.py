"""Packing of a variant file's genotypes into a folder of bits: what panels and targets are read from."""
