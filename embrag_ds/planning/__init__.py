"""What a training run would do and take: its batches, its files, and its memory, without training."""
