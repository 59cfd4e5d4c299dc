"""The vocabulary that a family's table is written in, and the table applied to one architecture.

A layout says which boxes of which Hugging Face tensors lie where in the shard that one tensor-parallel rank holds of a
Megatron parameter. A box can be copied either way, so loading and exporting read the same table.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

from nemo_rlhf.config.architecture import Architecture
from nemo_rlhf.convert import known_names

Box = tuple[slice, ...]
Shape = tuple[int, ...]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"


@dataclass(frozen=True)
class Cut:
    """One tensor-parallel rank's part: ``rank`` of ``size``, with the vocabulary padded to ``padded_vocab_size``."""

    rank: int
    size: int
    padded_vocab_size: int


@dataclass(frozen=True)
class Piece:
    """Box ``outside`` of Hugging Face tensor number ``tensor`` of a row is box ``inside`` of the rank's parameter."""

    tensor: int
    outside: Box
    inside: Box


class Layout(Protocol):
    """How the Hugging Face tensors of one row make up a Megatron parameter.

    ``shapes`` are those of the whole tensors. Pieces come tensor by tensor, do not overlap and, over all ranks, take
    every element of every tensor. What they leave of the parameter is padding, which is zero.

    ``transposed``: a parameter's values are those of the (two-dimensional) tensor with its dimensions swapped, so
    ``inside`` is as wide as ``outside`` is high.
    """

    transposed: ClassVar[bool]

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape: ...

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]: ...


def whole(shape: Shape) -> Box:
    return tuple(slice(0, size) for size in shape)


def _rows(start: int, stop: int, shape: Shape) -> Box:
    return (slice(start, stop), *whole(shape[1:]))


def _part(size: int, cut: Cut, what: str) -> int:
    if size % cut.size:
        raise ValueError(f"tensor_model_parallel_size={cut.size} does not divide the model's {what} ({size}).")
    return size // cut.size


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    transposed: ClassVar[bool] = False

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        return shapes[0]

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        yield Piece(0, whole(shapes[0]), whole(shapes[0]))


@dataclass(frozen=True)
class Split:
    """Rank r holds the r-th equal part along one dimension: 0 for a column-parallel layer, 1 for a row-parallel one."""

    transposed: ClassVar[bool] = False
    dimension: int

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        shape = list(shapes[0])
        shape[self.dimension] = _part(shape[self.dimension], cut, "layer width")
        return tuple(shape)

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        inside = whole(self.local_shape(shapes, architecture, cut))
        width = inside[self.dimension].stop
        outside = list(inside)
        outside[self.dimension] = slice(cut.rank * width, (cut.rank + 1) * width)
        yield Piece(0, tuple(outside), inside)


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value (weights or biases) interleaved: for each query group its queries, its key, its value."""

    transposed: ClassVar[bool] = False

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        _part(architecture.num_query_groups, cut, "query groups")
        return (sum(shape[0] for shape in shapes) // cut.size, *shapes[0][1:])

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        groups = _part(architecture.num_query_groups, cut, "query groups")
        widths = [shape[0] // architecture.num_query_groups for shape in shapes]
        for tensor, (shape, width) in enumerate(zip(shapes, widths, strict=True)):
            for group in range(groups):
                first = (cut.rank * groups + group) * width
                place = group * sum(widths) + sum(widths[:tensor])
                yield Piece(tensor, _rows(first, first + width, shape), _rows(place, place + width, shape))


@dataclass(frozen=True)
class FusedQueryKeyValue:
    """``QueryKeyValue`` of one tensor, which holds all queries, then all keys, then all values."""

    transposed: ClassVar[bool] = False

    def _parts(self, shapes: tuple[Shape, ...], architecture: Architecture) -> tuple[Shape, ...]:
        words = sizes(architecture)
        return tuple((words[word], *shapes[0][1:]) for word in ("query", "key_value", "key_value"))

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        return QueryKeyValue().local_shape(self._parts(shapes, architecture), architecture, cut)

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        parts = self._parts(shapes, architecture)
        starts = (0, parts[0][0], parts[0][0] + parts[1][0])
        for piece in QueryKeyValue().pieces(parts, architecture, cut):
            start, rows = starts[piece.tensor], piece.outside[0]
            yield Piece(0, _rows(start + rows.start, start + rows.stop, shapes[0]), piece.inside)


@dataclass(frozen=True)
class Transposed:
    """``layout`` of tensors whose rows are inputs and whose columns are outputs (GPT-2's Conv1D)."""

    transposed: ClassVar[bool] = True
    layout: Layout

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        return self.layout.local_shape(_swapped(shapes), architecture, cut)

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        for piece in self.layout.pieces(_swapped(shapes), architecture, cut):
            yield Piece(piece.tensor, piece.outside[::-1], piece.inside)


def _swapped(shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    return tuple(shape[::-1] for shape in shapes)


@dataclass(frozen=True)
class GatedMLP:
    """Gate and up projection: each is split over the ranks, and a rank stacks its gate part on its up part."""

    transposed: ClassVar[bool] = False

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        return (2 * _part(shapes[0][0], cut, "feed-forward width"), *shapes[0][1:])

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        width = _part(shapes[0][0], cut, "feed-forward width")
        for tensor, shape in enumerate(shapes):
            outside = _rows(cut.rank * width, (cut.rank + 1) * width, shape)
            yield Piece(tensor, outside, _rows(tensor * width, (tensor + 1) * width, shape))


@dataclass(frozen=True)
class Vocabulary:
    """One row a token, split over the ranks after padding to a multiple of them."""

    transposed: ClassVar[bool] = False

    def local_shape(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Shape:
        return (_part(cut.padded_vocab_size, cut, "padded vocabulary"), *shapes[0][1:])

    def pieces(self, shapes: tuple[Shape, ...], architecture: Architecture, cut: Cut) -> Iterator[Piece]:
        rows = _part(cut.padded_vocab_size, cut, "padded vocabulary")
        start = cut.rank * rows
        stop = min(start + rows, shapes[0][0])
        if start < stop:
            yield Piece(0, _rows(start, stop, shapes[0]), _rows(0, stop - start, shapes[0]))


@dataclass(frozen=True)
class Stored:
    """A Hugging Face tensor: its name (``{layer}`` and ``{expert}`` for their numbers) and shape, in the words of
    ``sizes()``."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of a family's table. ``initial`` is how random weights start: "residual" is a normal distribution
    narrowed by 1/sqrt(2 * num_layers), for projections whose output is added to the residual stream (GPT-2).

    ``layers``: a model of experts may have "dense" layers without them and "sparse" ones with them. A row with
    ``{expert}`` in its names stands for every expert; tensor-parallel ranks do not split those."""

    megatron: str
    stored: tuple[Stored, ...]
    layout: Layout
    initial: Literal["normal", "residual", "ones", "zeros"] = "normal"
    layers: Literal["all", "dense", "sparse"] = "all"

    @property
    def per_expert(self) -> bool:
        return "{expert}" in self.megatron


def sizes(architecture: Architecture) -> dict[str, int]:
    """The words in which tables give shapes."""
    return {
        "hidden": architecture.hidden_size,
        "value": 1,
        "ffn": architecture.ffn_hidden_size,
        "experts": architecture.num_experts,
        "expert_ffn": architecture.expert_ffn_hidden_size,
        "query": architecture.num_attention_heads * architecture.kv_channels,
        "key_value": architecture.num_query_groups * architecture.kv_channels,
        "query_key_value": (architecture.num_attention_heads + 2 * architecture.num_query_groups)
        * architecture.kv_channels,
        "head": architecture.kv_channels,
        "vocab": architecture.vocab_size,
        "positions": architecture.max_position_embeddings,
    }


@dataclass(frozen=True)
class Entry:
    """A row for one layer of one architecture: names and shapes filled in."""

    megatron: str
    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    row: Row
    architecture: Architecture

    def local_shape(self, cut: Cut) -> Shape:
        return self.row.layout.local_shape(self.shapes, self.architecture, self._cut(cut))

    def pieces(self, cut: Cut) -> Iterator[Piece]:
        return self.row.layout.pieces(self.shapes, self.architecture, self._cut(cut))

    def _cut(self, cut: Cut) -> Cut:
        return replace(cut, rank=0, size=1) if self.row.per_expert else cut


# transformers' sequence classification models with one label have a linear layer without bias
VALUE_HEAD = Row("value_head.weight", (Stored("score.weight", ("value", "hidden")),), Replicated(), initial="zeros")


class WeightMap:
    """A family's table for one architecture: with a value head in the output layer's place where it has one, and with
    neither for a trunk alone.

    ``entries`` goes from Megatron parameter names (global layer numbers) to entries; ``tensors`` from each Hugging Face
    tensor that a checkpoint must have to its entry and its number there; ``tolerated`` names tensors that a
    checkpoint may have and nothing needs (the output layer beside a tied embedding).
    """

    def __init__(self, table: tuple[Row, ...], architecture: Architecture) -> None:
        self.architecture = architecture
        self.entries: dict[str, Entry] = {}
        self.tensors: dict[str, tuple[Entry, int]] = {}
        self.tolerated: frozenset[str] = frozenset()
        for per_layer, rows in itertools.groupby(table, key=lambda row: "{layer}" in row.megatron):
            for layer, row in itertools.product(range(architecture.num_layers if per_layer else 1), tuple(rows)):
                if row.layers == "all" or (row.layers == "sparse") == architecture.is_sparse(layer):
                    for expert in range(architecture.num_experts if row.per_expert else 1):
                        self._add(self._entry(row, layer, expert))
        if "value" in architecture.heads:
            self._add(self._entry(VALUE_HEAD, 0, 0))
        elif architecture.tie_embeddings and "trunk" not in architecture.heads:
            self.entries[OUTPUT_LAYER] = self.entries[EMBEDDING]

    def _entry(self, row: Row, layer: int, expert: int) -> Entry:
        words = sizes(self.architecture)
        names = tuple(stored.name.format(layer=layer, expert=expert) for stored in row.stored)
        shapes = tuple(tuple(words[word] for word in stored.shape) for stored in row.stored)
        return Entry(row.megatron.format(layer=layer, expert=expert), names, shapes, row, self.architecture)

    def _add(self, entry: Entry) -> None:
        assert entry.megatron not in self.entries, f"the table has {entry.megatron} twice"
        if entry.megatron == OUTPUT_LAYER and {"value", "trunk"} & {*self.architecture.heads}:
            return
        if entry.megatron == OUTPUT_LAYER and self.architecture.tie_embeddings:
            self.tolerated = frozenset(entry.names)
            return
        self.entries[entry.megatron] = entry
        for number, name in enumerate(entry.names):
            assert name not in self.tensors, f"the table has {name} twice"
            self.tensors[name] = (entry, number)

    def shape(self, name: str) -> Shape:
        entry, number = self.tensors[name]
        return entry.shapes[number]

    def num_parameters(self) -> int:
        """Number of distinct weights, vocabulary padding left out."""
        total = 0
        for name in self.tensors:
            product = 1
            for size in self.shape(name):
                product *= size
            total += product
        return total

    def check(self, shapes: Mapping[str, Shape], where: str, optional: Collection[str] = ()) -> None:
        """Account for every tensor of a source; ``optional`` ones may be missing.

        Raises ValueError naming the tensors that are missing, unknown or of another shape.
        """
        missing = [name for name in self.tensors if name not in shapes and name not in optional]
        if missing and (why := known_names.reason(missing, shapes)):
            raise ValueError(f"{where} lacks {_list(missing)}: {why}.")
        if missing:
            raise ValueError(f"{where} lacks {_list(missing)}: it is incomplete or config.json is another model's.")
        unknown = [name for name in shapes if name not in self.tensors and name not in self.tolerated]
        if unknown:
            raise ValueError(
                f"{where} has {_list(unknown)}, which a {self.architecture.family} model with this config.json has no "
                "place for: check that both belong together."
            )
        for name, found in shapes.items():
            if name in self.tensors and tuple(found) != self.shape(name):
                raise ValueError(
                    f"{where}: tensor {name} has shape {list(found)}, but config.json says {list(self.shape(name))}."
                )


def _list(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
