"""Command line: argparse only; the work of a command is a function of another package."""
