"""A network as an nnet3 file holds it: config lines of its nodes, then named components."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from kaldi_mpi.files import atomic_write
from kaldi_mpi.formats.tokens import Reader, Writer
from kaldi_mpi.formats.transition import read_transitions
from kaldi_mpi.nnet3.components import Nnet3Component, read_component, write_component

_MOST_COMPONENTS = 100_000


@dataclass
class Nnet:
    """A network.

    Attributes:
        config_lines: of the nodes, as they stand in the file.
        components: by name, in the order of the file.
        source: the file that it was read from, for messages.
    """

    config_lines: list[str] = field(default_factory=list)
    components: dict[str, Nnet3Component] = field(default_factory=dict)
    source: str = "nnet"


def read_nnet(path: str | os.PathLike[str]) -> Nnet:
    """Read a .raw file, or the network of a .mdl file; binary or text.

    Raises:
        DataError: names the file, the component and the byte offset.
    """
    reader = Reader(path)
    if reader.peek() == "<TransitionModel>":
        read_transitions(reader)
    return read_network(reader)


def read_network(reader: Reader) -> Nnet:
    """Read from where `reader` stands."""
    before = reader.position
    reader.expect("<Nnet3>")
    nnet = Nnet(source=reader.file)
    # Text has its line end eaten with the token; "<Nnet3> \n" leaves it in both modes.
    line = reader.line()
    if line.strip():
        raise reader.error("line end expected after <Nnet3>", before)
    while line := reader.line():
        nnet.config_lines.append(line)
    reader.expect("<NumComponents>")
    before = reader.position
    count = reader.integer()
    if not 0 <= count <= _MOST_COMPONENTS:
        raise reader.error(f"impossible number of components {count}", before)
    for _ in range(count):
        reader.key = None
        reader.expect("<ComponentName>")
        before = reader.position
        name = reader.token()
        if name in nnet.components:
            raise reader.error(f"component {name} for the second time", before)
        reader.key = name
        nnet.components[name] = read_component(reader)
    reader.key = None
    reader.expect("</Nnet3>")
    return nnet


def write_nnet(nnet: Nnet, path: str | os.PathLike[str], binary: bool = True) -> None:
    """Write a .raw file; the file appears whole or not at all.

    Raises:
        DataError: the file cannot be written; names it and the cause.
    """
    with atomic_write(path) as stream:
        write_network(nnet, Writer(stream, binary))


def write_network(nnet: Nnet, writer: Writer) -> None:
    """Write where `writer` stands."""
    writer.token("<Nnet3>")
    writer.line("")
    for line in nnet.config_lines:
        writer.line(line)
    writer.line("")
    writer.token("<NumComponents>")
    writer.integer(len(nnet.components))
    writer.newline()
    for name, component in nnet.components.items():
        writer.token("<ComponentName>")
        writer.token(name)
        write_component(component, writer)
        writer.newline()
    writer.token("</Nnet3>")
