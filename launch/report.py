"""``embrag report`` from a checkout."""

from embrag_ds.cli.main import main

if __name__ == "__main__":
    main("report")
