"""DeepSpeed below the training loop: process group, settings, engine and weights. Only ``training`` imports it, too."""

from embrag_ds.engine import deepspeed_log as deepspeed_log
