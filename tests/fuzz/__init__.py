"""Fuzzer of every parser: mutated inputs by number, with a fixed seed.

``tests/fuzz/test_short.py`` runs some hundred inputs in ``make test``. The long run writes the table of
docs/results.md:

    python -m tests.fuzz --inputs 20000 --markdown TABLE.md

One input again, with its files kept in a folder:

    python -m tests.fuzz --only vcf --number 1234 --save FOLDER

An input holds if the parser reads it or refuses it with a :class:`embrag_ds.errors.UserError` of one line, within the
limits of time and memory. What is read from a variant file must be what bcftools reads. Everything else is a *finding*:

============== ======================================================================
finding        meaning
============== ======================================================================
traceback      an exception that is no UserError
poor error     a UserError of several lines, or one that names no file
misread        records, genotypes or dosages differ from those of bcftools
hang           longer than 10 seconds (imputation: 60, as it compiles)
crash          the process of the parser died, by a signal or htslib's ``exit``
left files     a refused input left files behind
memory         a greater peak than :data:`tests.fuzz.runner.PEAK_BYTES`
============== ======================================================================

Modules: :mod:`~tests.fuzz.seeds` makes valid inputs, :mod:`~tests.fuzz.mutate` changes them, :mod:`~tests.fuzz.inputs`
says what is made of which seed for each parser. :mod:`~tests.fuzz.targets` calls the parsers and
:mod:`~tests.fuzz.oracle` bcftools, each in a process of its own (:mod:`~tests.fuzz.child`), because htslib may end its
process. :mod:`~tests.fuzz.runner` compares and counts.
"""
