"""The long run, and single inputs again: see :mod:`tests.fuzz`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.fuzz.inputs import KINDS, SEED, files_of
from tests.fuzz.runner import Tally, fuzzer, numbers, refusals, summary, table


def main() -> int:
    """Run the fuzzer; the exit status is 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Mutated inputs for every parser.")
    parser.add_argument("--inputs", type=int, default=20_000, help="over all parsers (%(default)s)")
    parser.add_argument("--only", action="append", choices=list(KINDS), help="kind of input; repeatable")
    parser.add_argument("--number", type=int, help="one input of the kind --only")
    parser.add_argument("--first", type=int, default=0, help="number of the first input of each kind (0)")
    parser.add_argument("--save", type=Path, metavar="DIR", help="write the files of --number here")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables here")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every result here")
    options = parser.parse_args()
    names = options.only or list(KINDS)
    if options.number is not None:
        return _one(names, options.number, options.save)
    begin = time.monotonic()
    tallies = []
    with fuzzer() as runner:
        for name, count in numbers(options.inputs, names).items():
            start = time.monotonic()
            tally = Tally(name)
            for number in range(options.first, options.first + count):
                tally.results.append(runner.run(KINDS[name], number))
            tallies.append(tally)
            found = sum(each.is_finding for each in tally.results)
            print(f"{name}: {count} inputs, {found} findings, {time.monotonic() - start:.0f} s", file=sys.stderr)
    results = [each for tally in tallies for each in tally.results]
    report = (
        f"{len(results):,} inputs, seed {SEED}, {(time.monotonic() - begin) / 60:.1f} min.\n\n{table(tallies)}\n"
        f"The most frequent errors by wording:\n\n{refusals(tallies)}"
    )
    findings = summary(results)
    if findings:
        report += f"\nFindings:\n\n```text\n{findings}```\n"
    sys.stdout.write(report)
    if options.markdown:
        options.markdown.write_text(report, encoding="utf-8")
    if options.json:
        options.json.write_text("".join(json.dumps(vars(each)) + "\n" for each in results), encoding="utf-8")
    return 1 if findings else 0


def _one(names: list[str], number: int, folder: Path | None) -> int:
    """Run one input of each kind named and print its result; keep its files if there is a folder for them."""
    status = 0
    with fuzzer() as runner:
        for name in names:
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for file, content in files_of(KINDS[name], number).items():
                    (folder / file).write_bytes(content)
            result = runner.run(KINDS[name], number)
            print(result)
            status |= result.is_finding
    return status


if __name__ == "__main__":
    sys.exit(main())
