"""The machine: streams, timelines and samples of memory and devices (imports nothing of ours but errors)."""
