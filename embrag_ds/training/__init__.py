"""Training with DeepSpeed: the loop, validation, checkpoints and profiles."""

from embrag_ds.engine import deepspeed_log as deepspeed_log
