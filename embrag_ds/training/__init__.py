"""Training with DeepSpeed, which is imported nowhere else."""

from embrag_ds.training import deepspeed_log as deepspeed_log
