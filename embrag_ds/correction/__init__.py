"""The transformer's correction of copied dosages on a CPU, by a loop without torch, in tiles of a stretch."""
