"""Publishing of a variant file: text in, a bgzipped VCF or a BCF out, with its index, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import pysam
import pysam.bcftools

from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, written_together
from embrag_ds.variants.container import bgzf_written
from embrag_ds.variants.sites import SiteTable

_TBI_LIMIT = 2**29
_BCF, _VCF = ".bcf", ".vcf.gz"


def check_output(path: Path) -> None:
    """Raise :class:`UserError` for an ending other than .vcf.gz or .bcf, or if ``path`` cannot be written.

    A pipe or a device, to which a link may lead, is refused: htslib would put a file with an index in its place.
    """
    if not path.name.endswith((_VCF, _BCF)):
        raise UserError(f"{path}: the output is a bgzipped VCF or a BCF; give it a name ending in .vcf.gz or .bcf")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: it is a pipe or a device, which cannot have an index; give the name of a file")
    require_writable(path)


@contextmanager
def published(path: Path, sites: SiteTable) -> Iterator[Any]:
    """Context with a BGZF file for the text of a VCF, which becomes ``path`` with its index on success.

    A failure leaves nothing. If ``path`` ends in .bcf, htslib converts the finished text, which lies beside it until
    then.
    """
    # A .tbi cannot hold positions from 512 Mb on, which some plant and animal chromosomes reach.
    is_bcf = path.name.endswith(_BCF)
    suffix, other = (".csi", ".tbi") if is_bcf or _last_position(sites) >= _TBI_LIMIT else (".tbi", ".csi")
    files = written_together(path, Path(f"{path}{suffix}"), obsolete=[Path(f"{path}{other}")])
    with files as (temporary, index):
        try:
            if is_bcf:
                with NamedTemporaryFile(prefix=".tmp-", suffix=_VCF, dir=temporary.parent) as text:
                    with bgzf_written(Path(text.name), "wb1") as out:
                        yield out
                    pysam.bcftools.view("--no-version", "-Ob", "-o", str(temporary), text.name, catch_stdout=False)
                pysam.bcftools.index("--csi", "--force", "-o", str(index), str(temporary), catch_stdout=False)
            else:
                # Level 3 takes a third of the default level's time for a quarter more bytes.
                with bgzf_written(temporary, "wb3") as out:
                    yield out
                pysam.tabix_index(str(temporary), preset="vcf", force=True, csi=suffix == ".csi", index=str(index))
        except pysam.SamtoolsError as fault:
            raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
        except OSError as fault:
            if fault.errno is None:  # pysam's: it knows no more
                raise UserError(f"{path}: cannot write it ({fault}); free some space in {path.parent}") from fault
            raise


def _last_position(sites: SiteTable) -> int:
    """The last position that a site covers, as an index sees it."""
    ends = [int(text[4:].partition(";")[0]) for text in sites.extent.values() if text.startswith("END=")]
    return max([int(sites.pos.max(initial=0)), *ends])
