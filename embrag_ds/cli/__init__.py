"""The command line: argparse, and nothing else. What a command does is a function of another room."""
