"""Training, the only home of DeepSpeed (imports every room below but ``imputation``)."""

from embrag_ds.training import deepspeed_log as deepspeed_log
