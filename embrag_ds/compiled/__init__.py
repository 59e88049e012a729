"""What compiled loops share: decorators of their parts, instructions, and functions of one number."""
