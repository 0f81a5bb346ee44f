"""Blanks what one GPU architecture never reads in a shared library, so that it packs small.

Owns the rule for what is blanked: machine code of other GPU architectures and debug sections. It
overwrites bytes with zeros and moves nothing: the file keeps its length, its sections and every
header, and loads as before.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

ELF_MAGIC = b"\x7fELF\x02\x01"
"""64 bits, least significant byte first."""

GPU_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
UNLOADED_SECTIONS = (".symtab", ".strtab")
_ALLOCATED = 0x2
_NO_BYTES = 8
"""Section type of what occupies no bytes in the file."""

_CONTAINER_MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")
"""Magic, version, bytes of this header, bytes of the images after it."""

_IMAGE = struct.Struct("<HHIQIIII")
"""Kind, version, bytes of this header, bytes of the payload, then fields up to the architecture."""

_PTX, _MACHINE_CODE = 1, 2


@dataclass(frozen=True, slots=True)
class Section:
    """A section of an ELF file.

    Attributes:
        name: its name.
        start: where its bytes begin in the file.
        length: how many there are.
        loaded: whether it becomes part of a process.
    """

    name: str
    start: int
    length: int
    loaded: bool


@dataclass(frozen=True, slots=True)
class Image:
    """Code for one GPU architecture.

    Attributes:
        container: number of the container that it is in; the driver takes one image of each.
        machine_code: whether it runs as it is; else it is PTX, which the driver compiles.
        architecture: compute capability, such as 90.
        start: where the payload begins in the section.
        length: bytes of the payload.
    """

    container: int
    machine_code: bool
    architecture: int
    start: int
    length: int


def sections(elf: bytes | bytearray) -> list[Section]:
    """Read the section table.

    Args:
        elf: the file's content.

    Returns:
        Its sections that have bytes; none if it is no 64-bit ELF file.
    """
    if elf[:6] != ELF_MAGIC:
        return []
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    if table == 0 or count == 0:
        return []
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * entry) for i in range(count)]
    names_start = headers[names_index][4]
    found = []
    for name_offset, kind, flags, _, start, length in headers:
        begin = names_start + name_offset
        name = bytes(elf[begin : elf.index(b"\0", begin)]).decode()
        if kind != _NO_BYTES:
            found.append(Section(name, start, length, bool(flags & _ALLOCATED)))
    return found


def images(section: bytes | bytearray | memoryview) -> Iterator[Image]:
    """Walk a section of GPU code.

    Args:
        section: its bytes.

    Yields:
        Each image.

    Raises:
        ValueError: the layout is not the known one; nothing should be blanked then.
    """
    position, number = 0, 0
    while position + _CONTAINER.size <= len(section):
        magic, _, header, length = _CONTAINER.unpack_from(section, position)
        if magic == 0:
            position += 8
            continue
        if magic != _CONTAINER_MAGIC:
            raise ValueError(f"GPU code at {position}: magic {magic:#x} is unknown")
        at, end = position + header, position + header + length
        if end > len(section):
            raise ValueError(f"GPU code at {position}: {length} bytes do not fit the section")
        while at < end:
            kind, _, image_header, payload, _, _, _, architecture = _IMAGE.unpack_from(section, at)
            start = at + image_header
            if kind not in (_PTX, _MACHINE_CODE) or start + payload > end:
                raise ValueError(f"GPU code at {at}: an image of kind {kind} is unknown")
            yield Image(number, kind == _MACHINE_CODE, architecture, start, payload)
            at = start + payload
        position, number = end, number + 1


def unused(found: list[Image], architecture: int) -> list[Image]:
    """Which images a GPU never reads.

    Args:
        found: all images of a section.
        architecture: the GPU's compute capability, such as 90.

    Returns:
        Those of other architectures; PTX that the GPU would have to compile, because its container
        holds no machine code for it, is kept.
    """
    native = {i.container for i in found if i.machine_code and i.architecture == architecture}

    def needed(image: Image) -> bool:
        if image.machine_code:
            return image.architecture == architecture
        return image.container not in native and image.architecture <= architecture

    return [image for image in found if not needed(image)]


def blank(elf: bytearray, architecture: int) -> int:
    """Overwrite with zeros what is not needed.

    Args:
        elf: the file's content, changed in place; left as it is if it is no ELF file.
        architecture: the GPU's compute capability, such as 90.

    Returns:
        Bytes that were overwritten.

    Raises:
        ValueError: GPU code in it has an unknown layout.
    """
    blanked = 0
    for section in sections(elf):
        if section.name in GPU_SECTIONS:
            code = memoryview(elf)[section.start : section.start + section.length]
            ranges = [
                (section.start + image.start, image.length)
                for image in unused(list(images(code)), architecture)
            ]
            code.release()
        elif not section.loaded and (
            section.name.startswith(".debug_") or section.name in UNLOADED_SECTIONS
        ):
            ranges = [(section.start, section.length)]
        else:
            continue
        for start, length in ranges:
            elf[start : start + length] = bytes(length)
            blanked += length
    return blanked
