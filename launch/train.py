"""Training under the launcher: ``deepspeed launch/train.py --deepspeed_config ds_configs/v18.json``."""

from embrag_ds.cli.main import main

if __name__ == "__main__":
    main("train")
