"""Headers of tar members against those of Python's `tarfile`."""

import io
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from glide_ray.data.tar_headers import QuickTarInfo, header_of

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=()), min_size=1)
NAMES |= st.text("abc./-_0123456789 ", min_size=1, max_size=110)
SIZES = st.integers(0, 2**40)


def of_tarfile(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf()


@settings(derandomize=True)
@given(NAMES, SIZES)
def test_a_header_has_the_bytes_that_tarfile_writes(name, size):
    try:
        wanted = of_tarfile(name, size)
    except UnicodeEncodeError:
        with pytest.raises(UnicodeEncodeError):
            header_of(name, size)
    else:
        assert header_of(name, size) == wanted


def parsed(kind, header):
    """What a header says of a member, or the error that it raises."""
    try:
        member = kind.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        return type(error)
    return member.name, member.size, member.type, member.linkname, member.chksum


FORMATS = tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT
TYPES = tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


# A regular file with a link's name; one whose owner is no number
@example("a", 0, tarfile.REGTYPE, tarfile.USTAR_FORMAT, [(157, 1)], True)
@example("a", 0, tarfile.REGTYPE, tarfile.USTAR_FORMAT, [(108, 57)], True)
@settings(derandomize=True)
@given(
    st.text("abcé/.", min_size=1, max_size=150),
    SIZES,
    st.sampled_from(TYPES),
    st.sampled_from(FORMATS),
    st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=3),
    st.booleans(),
)
def test_a_header_is_read_as_tarfile_reads_it(name, size, kind, form, changes, mend):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    try:
        header = bytearray(member.tobuf(form)[-512:])
    except ValueError:  # too long or too large for this format
        return
    for place, value in changes:
        header[place] = value
    if mend:  # the checksum of the changed header
        total = sum(header) - sum(header[148:156]) + 256
        header[148:156] = b"%06o\0 " % total
    assert parsed(QuickTarInfo, bytes(header)) == parsed(tarfile.TarInfo, bytes(header))


def test_a_tar_of_many_kinds_of_members_is_read_as_tarfile_reads_it():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name in ("a.jpg", "long/" * 40 + "b.jpg", "é.txt"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode("latin-1")))
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        tar.addfile(link)

    def members(**options):
        file.seek(0)
        with tarfile.open(fileobj=file, **options) as tar:
            return [(one.name, one.size, one.type, one.linkname, one.offset_data) for one in tar]

    assert members(tarinfo=QuickTarInfo) == members()
