"""Missing, unphased and haploid calls, alleles of all kinds, strands and several contigs, through the commands."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.cases.files import (
    FILES,
    PLACE,
    ROLES,
    Cases,
    Outcome,
    assert_base,
    assert_refused,
    at,
    column,
    genotype,
    renamed,
    second_contig,
)

PANEL, TARGET, TRUTH, IMPUTED = (FILES[role] for role in ROLES)


def samples(found: Outcome, place: int) -> list[str]:
    """Columns of both samples in the output's records at a position."""
    return [value for each in found.records if each[1] == str(place) for value in each[9:]]


def without(text: str, *places: int) -> str:
    """The text without the records at these positions."""
    return "\n".join(
        line for line in text.split("\n") if not line.startswith(tuple(f"7\t{place}\t" for place in places))
    )


# --- missing calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["./.", ".|.", ".", "./1"])
def test_a_missing_call_of_a_target_is_imputed_as_if_it_were_not_typed(cases: Cases, call: str) -> None:
    found = cases.of("target", at(300, genotype(call))(TARGET))
    # Without the record, the first sample has the same calls. The shares of its windows' typed sites differ a little.
    untyped = cases.of("target", without(TARGET, 300))
    for one, other in zip(found.records, untyped.records, strict=True):
        assert float(one[9].split(":")[1]) == pytest.approx(float(other[9].split(":")[1]), abs=0.01)
    assert [line[10] for line in found.records] == [line[10] for line in cases.base("target").records]
    assert found.warnings == []


def test_half_of_a_phased_call_is_kept(cases: Cases) -> None:
    found = cases.of("target", at(300, genotype(".|1"))(TARGET))
    first, _ = samples(found, 300)
    assert re.fullmatch(r"[01]\|1:1\.\d+:0\.\d+,1:.*", first)


def test_a_target_without_any_call(cases: Cases) -> None:
    empty = re.sub(r"[01]\|[01]", "./.", TARGET)
    assert_refused(cases.of("target", empty), "target", "every call", "is missing")
    assert cases.of("target", TARGET.replace("0|0", ".|.").replace("1|0", ".|.")).status == 0


@pytest.mark.parametrize(
    ("call", "problem"), [("./.", "missing"), (".|1", "missing"), (".", "missing"), ("0/1", "not phased")]
)
@pytest.mark.parametrize("command", ["impute", "evaluate"])
def test_an_incomplete_panel_is_refused_and_the_remedies_work(
    cases: Cases, call: str, problem: str, command: str
) -> None:
    files = {"panel": at(400, genotype(call))(PANEL)}
    line = assert_refused(cases.run(command, files), "panel", "7:400", "sample P1", problem)
    assert "--panel-missing drop" in line and "--panel-missing major" in line
    dropped = cases.run(command, files, "--panel-missing", "drop")
    major = cases.run(command, files, "--panel-missing", "major")
    assert dropped.status == major.status == 0
    if command == "impute":
        if call != ".|1":  # P1 has the major allele in the panel without the edit, too
            assert major.result == cases.base("panel").result
        assert "panel: sites with the major allele for missing calls  1" in re.sub(" {2,}", "  ", major.log)
        assert [each[1] for each in dropped.records] == ["100", "200", "300", "500", "600", "700", "800"]
        assert "panel: left out, missing or unphased calls  1" in re.sub(" {2,}", "  ", dropped.log)


def test_missing_genotypes_of_a_truth_are_not_scored(cases: Cases) -> None:
    base = cases.base("truth").result
    for call in ("./.", ".|.", ".", ".|1"):
        found = cases.of("truth", at(400, genotype(call))(TRUTH))
        assert found.status == 0 and found.result["missing_truth_genotypes"] == 1, call
        assert found.result["sites"] == base["sites"]


# --- phase and ploidy -------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["0/1", "/0/1", "|0/1"])
def test_an_unphased_target_is_refused_with_the_command_that_phases_it(cases: Cases, call: str) -> None:
    found = cases.of("target", at(300, genotype(call))(TARGET))
    assert_refused(
        found,
        "target",
        "7:300",
        "T1",
        "--phase beagle",
        f"beagle gt={found.paths['target']} ref={found.paths['panel']}",
    )


def test_evaluation_takes_an_unphased_target_but_not_for_the_baselines(cases: Cases) -> None:
    files = {"target": TARGET.replace("|", "/")}
    assert_base(cases.run("evaluate", files), cases.base("truth"))
    line = assert_refused(
        cases.run("evaluate", files, "--baselines"), "target", "7:100", "leave out the baselines", "beagle gt="
    )
    assert "--phase" not in line


def test_homozygotes_have_one_phase(cases: Cases) -> None:
    for role in ("panel", "target"):
        assert_base(cases.of(role, FILES[role].replace("0|0", "0/0").replace("1|1", "1/1")), cases.base(role))
    for role in ("truth", "imputed"):
        assert_base(cases.of(role, FILES[role].replace("|", "/")), cases.base(role))


@pytest.mark.skipif(shutil.which("beagle") is None, reason="Beagle is not installed")
def test_beagle_phases(cases: Cases) -> None:
    found = cases.of("target", TARGET.replace("|", "/"), "--phase", "beagle")
    assert found.status == 0 and "Beagle phases" in found.log
    assert found.made == {"out.vcf.gz", "out.vcf.gz.tbi", "out.vcf.gz.beagle.log"}


def test_phase_beagle_without_beagle(cases: Cases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    found = cases.of("target", TARGET.replace("|", "/"), "--phase", "beagle")
    assert_refused(found, "target", "Beagle is not installed", "beagle gt=")


def _haploid(text: str) -> str:
    return re.sub(r"\t[01]\|([01])", r"\t\1", text)


@pytest.mark.parametrize("panel", [PANEL, _haploid(PANEL)], ids=["diploid panel", "haploid panel"])
@pytest.mark.parametrize("contig", ["7", "X", "MT"])
def test_haploid_in_haploid_out(cases: Cases, panel: str, contig: str) -> None:
    found = cases.run("impute", {"panel": renamed(contig)(panel), "target": renamed(contig)(_haploid(TARGET))})
    assert found.status == 0 and len(found.records) == 8
    number = r"(0|1|0\.\d{1,3})"
    for record in found.records:
        for call in record[9:]:
            assert re.fullmatch(rf"[01]:{number}:{number}:{number},{number}", call)
    # bcftools +fixploidy writes them so
    doubled = re.sub(r"\t([01])(?=[\t\n])", r"\t\1/\1", _haploid(TARGET).replace("GT\t", "GT\t"))
    assert cases.run("impute", {"panel": panel, "target": doubled}).status == 0


def test_haploid_and_diploid_calls_in_one_sample(cases: Cases) -> None:
    found = cases.of("target", TARGET.replace("7\t600\tf\tG\tT\t.\t.\t.\tGT\t1|1", "7\t600\tf\tG\tT\t.\t.\t.\tGT\t1"))
    assert found.status == 0
    assert samples(found, 600)[0].startswith("1:1:1:") and samples(found, 100)[0].startswith("0|1:")


def test_a_haploid_truth_is_scored(cases: Cases) -> None:
    found = cases.of("truth", _haploid(TRUTH))
    assert found.status == 0 and "truth genotypes are haploid" in found.log


# --- probabilities and dosages ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ("0.2,0.2,0.2", "sum 0.6"),
        ("-5,7,-1", "not from 0 to 1"),
        ("-0.1,-0.8,-2", "log10-scaled"),
        ("30,0,40", "phred-scaled"),
        ("nan,0,0", "not a number"),
        ("inf,0,0", "not a number"),
        ("0.2,0.8", "not a number"),
        (".", "missing"),
        ("high", "not a number"),
    ],
)
def test_probabilities_that_are_none(cases: Cases, values: str, what: str) -> None:
    assert_refused(cases.of("imputed", IMPUTED.replace("0.2,0.7,0.1", values)), "imputed", "7:400", "T1", what)


@pytest.mark.parametrize("value", ["2.5", "-0.1", "nan", "1e999", "high", ".", ""])
def test_dosages_that_are_none(cases: Cases, value: str) -> None:
    assert_refused(cases.of("imputed", IMPUTED.replace(":0.9:", f":{value}:")), "imputed", "7:400", "T1")


def test_an_r2_that_is_none(cases: Cases) -> None:
    assert_refused(cases.of("imputed", at(400, column(7, "DR2=high"))(IMPUTED)), "imputed", "7:400", "DR2")


def test_a_left_over_dosage_of_a_truth_does_not_count(cases: Cases) -> None:
    for value in ("0", "2.5", "nan", "x"):
        edited = at(400, lambda line, value=value: line.replace("\tGT\t0|1\t0|0", f"\tGT:DS\t0|1:{value}\t0|0:0"))(
            TRUTH
        )  # type: ignore[misc]
        assert_base(cases.of("truth", edited), cases.base("truth"))


# --- alleles and strands ----------------------------------------------------------------------------


def _deletions(text: str) -> str:
    """The record at 400 as two deletions that end elsewhere."""

    def two(line: str) -> str:
        more = "" if line.split("\t")[7] == "." else line.split("\t")[7] + ";"
        return "\n".join(column(4, "<DEL>")(column(7, f"{more}END={end}")(line)) for end in (450, 480))

    return at(400, two)(text)


def test_two_deletions_at_a_position(cases: Cases) -> None:
    found = cases.of("panel", _deletions(PANEL))
    deletions = [each for each in found.records if each[1] == "400"]
    assert [each[4] for each in deletions] == ["<DEL>"] * 2 and deletions[0][9:] == deletions[1][9:]
    assert [end in each[7] for each, end in zip(deletions, ("END=450", "END=480"), strict=True)] == [True, True]
    scored = cases.run("evaluate", {role: _deletions(FILES[role]) for role in ("panel", "truth", "imputed")})
    assert scored.result["sites"]["all"] == cases.base("truth").result["sites"]["all"] + 1
    for end in ("x", "99999999999999999999"):
        assert_refused(
            cases.of("panel", _deletions(PANEL).replace("END=450", f"END={end}")), "panel", "7:400", f"END is '{end}'"
        )


def test_several_alts(cases: Cases) -> None:
    panel = at(400, column(4, "C,G,*"))(PANEL)
    found = cases.of("panel", panel)
    assert [each[4] for each in found.records if each[1] == "400"] == ["C", "G", "*"]
    assert all(re.match(r"0\|0:0(\.0|:)", each[-1]) for each in found.records if each[1] == "400" and each[4] != "C")
    joined = cases.of("panel", panel, "--join-multiallelic")
    assert [each[4] for each in joined.records if each[1] == "400"] == ["C,G,*"]
    assert_base(cases.of("truth", at(400, column(4, "C,G"))(TRUTH)), cases.base("truth"))


def test_strands(cases: Cases) -> None:
    other = at(300, lambda line: line.replace("\tG\tA\t", "\tC\tT\t"))(TARGET)
    for strand, right in (("report", False), ("drop", False), ("flip", True)):
        found = cases.of("target", other, "--strand", strand)
        assert (found.result == cases.base("target").result) is right
        assert ("dropped, on the other strand" in found.log) is not right
        assert ("matched, on the other strand" in found.log) is right
    exchanged = at(300, lambda line: line.replace("\tG\tA\t.\t.\t.\tGT\t0|1\t1|0", "\tA\tG\t.\t.\t.\tGT\t1|0\t0|1"))(
        TARGET
    )
    assert_base(cases.of("target", exchanged), cases.base("target"))


def _palindromic(text: str, alleles: str) -> str:
    return text.replace("\tG\tA\t", f"\t{alleles}\t")


def test_palindromic_sites(cases: Cases) -> None:
    panel = _palindromic(PANEL, "A\tT")
    for role, strand, alleles, dropped in (
        ("target", "report", "T\tA", True),
        ("target", "report", "A\tT", False),
        ("target", "drop", "A\tT", True),
        ("target", "flip", "T\tA", True),  # too few samples for frequencies to decide
    ):
        found = cases.run("impute", {"panel": panel, role: _palindromic(FILES[role], alleles)}, "--strand", strand)
        assert ("dropped, palindromic, strand unclear  1" in found.log) is dropped, (strand, alleles)
    for role in ("truth", "imputed"):
        files = {each: FILES[each].replace("\tT\tC\t", "\tA\tT\t") for each in ("panel", "truth", "imputed")}
        found = cases.run("evaluate", files | {role: FILES[role].replace("\tT\tC\t", "\tT\tA\t")})
        assert "palindromic, strand unclear" in found.log and found.result["sites"]["all"] == 3


# --- contigs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("panel", "other"), [("7", "chr7"), ("X", "23"), ("chrX", "23"), ("23", "X"), ("chrM", "MT"), ("MT", "26")]
)
def test_contigs_are_reconciled_in_one_line(cases: Cases, panel: str, other: str) -> None:
    files = {"panel": renamed(panel)(PANEL)}
    found = cases.run("impute", files | {"target": renamed(other)(TARGET)})
    assert_base(found, cases.base("target"))
    assert {each[0] for each in found.records} == {panel}
    assert found.log.count(f"its contig {other} is the panel's {panel}") == 1
    scored = cases.run("evaluate", files | {role: renamed(other)(FILES[role]) for role in ROLES[1:]})
    assert_base(scored, cases.base("truth"))
    assert scored.log.count(f"its contig {other} is the panel's {panel}") == 3


@pytest.mark.parametrize("role", ROLES)
def test_several_contigs_in_one_file(cases: Cases, role: str) -> None:
    warnings = ("is not typed on 8, which 8 sites",) if role == "panel" else ()
    assert_base(cases.of(role, second_contig("8")(FILES[role])), cases.base(role), *warnings)


def test_several_contigs_in_all_files(cases: Cases) -> None:
    both = {role: second_contig("8")(FILES[role]) for role in ROLES}
    found = cases.run("impute", both)
    one, two = ([each[1:] for each in found.records if each[0] == name] for name in "78")
    assert one == two and len(found.records) == 16
    assert cases.run("evaluate", both).result["sites"]["all"] == 8


def test_contigs_without_typed_sites(cases: Cases) -> None:
    panel = second_contig("8")(PANEL)
    found = cases.of("panel", panel, "--untyped-contigs", "frequency")
    assert found.result[:8] == cases.base("panel").result
    assert len(found.records) == 16 and "allele frequencies" in found.warnings[0]
    found = cases.of("panel", panel, "--region", "8:200-400")
    assert [each[:2] for each in found.records] == [["8", "200"], ["8", "300"], ["8", "400"]]


@pytest.mark.parametrize("role", ROLES[1:])
def test_no_contig_in_common(cases: Cases, role: str) -> None:
    assert_refused(cases.of(role, renamed("9")(FILES[role])), role, "its contigs are 9", "7", "--rename-chrs")


@pytest.mark.parametrize("role", ROLES[1:])
def test_no_site_in_common(cases: Cases, role: str) -> None:
    assert_refused(
        cases.of(role, FILES[role].replace("00\t", "01\t")),
        role,
        "no site in common",
        "not in the panel",
        "genome build",
    )


def test_few_sites_in_common(cases: Cases) -> None:
    found = cases.of("target", TARGET.replace("300\t", "301\t").replace("600\t", "601\t").replace("800\t", "801\t"))
    (warning,) = found.warnings
    assert found.status == 0 and "only 1 of its 4 sites" in warning and "build" in warning


def test_a_target_with_a_site_twice_in_evaluation(cases: Cases) -> None:
    twice = at(300, lambda line: f"{line}\n{line}")(TARGET)
    assert_base(cases.run("evaluate", {"target": twice}), cases.base("truth"))
    assert_refused(
        cases.run("evaluate", {"target": twice}, "--duplicates", "error"), "target", "7:300", "appears twice"
    )


def test_a_truth_that_does_not_vary(cases: Cases) -> None:
    found = cases.of("truth", re.sub(r"[01]\|[01]", "0|0", TRUTH))
    assert found.status == 0 and "none of the 4 scored sites varies in it; r2 is undefined" in found.warnings[0]


def test_a_panel_of_one_sample(cases: Cases) -> None:
    one = "\n".join("\t".join(line.split("\t")[:10]) for line in PANEL.split("\n"))
    assert_refused(cases.of("panel", one), "panel", "2 reference haplotypes", "give a panel of more samples")


def test_regions(cases: Cases) -> None:
    for region, places in (("7:300", "3"), ("chr7:300-400", "34"), ("7:650-", "78"), ("7", "12345678")):
        found = cases.run("impute", {}, "--region", region)
        assert [each[1] for each in found.records] == [f"{place}00" for place in places]
        assert found.result == [each for each in cases.base("panel").result if each[0][0] in places]
    for region in ("9:1-2", "7:900-", "7:310-390", "7:5-2", "7:x-y", "", ":1-2"):
        found = cases.run("impute", {}, "--region", region)
        (line,) = found.said("error")
        assert found.status == 2 and line.startswith(f"--region {region}: ") and found.made == set()


def test_samples_in_both_files(cases: Cases) -> None:
    target = TARGET.replace("\tT1\t", "\tP1\t")
    assert_refused(cases.of("target", target), "target", "1 samples are also in the panel", "P1", "--allow-overlap")
    assert cases.of("target", target, "--allow-overlap").status == 0
    for role in ("truth", "imputed"):
        found = cases.of(role, FILES[role].replace("\tT1\t", "\tT9\t"))
        assert_refused(found, "imputed", "1 of the 2 samples", "T9" if role == "truth" else "T1")


@pytest.mark.parametrize("role", PLACE)
def test_order_of_samples_is_no_matter(cases: Cases, role: str) -> None:
    if role in ("truth", "imputed"):

        def swapped(line: str) -> str:
            fields = line.split("\t")
            return (
                line if line.startswith("##") or len(fields) < 11 else "\t".join([*fields[:9], fields[10], fields[9]])
            )

        found = cases.of(role, "\n".join(map(swapped, FILES[role].split("\n"))))
        assert (
            found.status == 0
            and found.result["tools"]["x"]["aggregate_r2"] == cases.base(role).result["tools"]["x"]["aggregate_r2"]
        )
