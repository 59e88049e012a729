"""The run folder and the process that fills it, without DeepSpeed."""
