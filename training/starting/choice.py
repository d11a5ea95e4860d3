"""Which columns of a table are texts, and which are to be predicted: guessed from their names and their values."""

from collections.abc import Iterator, Sequence
from typing import Any

from trunkline.engine.text.cells import word_bounds
from trunkline.training.starting.columns import MOSTLY, Column, is_missing
from trunkline.training.starting.names import WRITTEN, hints_at_label, hints_at_text, is_no_text, words_of

CLASSES = 50  # most classes of a column whose name does not say that it has some
NAMED_CLASSES = 1000  # and of one whose name does
GRADES = 12  # most whole numbers that are taken for classes
COMPARED = 500  # rows in which two columns are held against one another
IDS = frozenset("label labels class category intent emotion topic type".split())  # whose numbers are ids, no grades


def labels_in(columns: Sequence[Column]) -> list[Column]:
    """What is to be predicted, a task each: columns whose names say so, else those that look like it; none: the text.

    Where the names of several columns say so no more of one than of another (fine_label, coarse_label), it is all of
    them.
    """
    found = candidates(columns)
    strongest = max((hints_at_label(column.name) for column in found), default=0)
    hinted = [column for column in found if hints_at_label(column.name) == strongest]
    if strongest:
        return hinted if strongest < 3 and all(map(is_classes, hinted)) else hinted[:1]
    if tagged := [column for column in columns if words_tagged_by(column, columns)]:
        return tagged
    for kind in (text_answered_by, is_written):
        if special := [column for column in columns if kind(column, columns)]:
            return special[:1]
    flags = [column for column in found if {str(value) for value in column.counts} == {"0", "1"}]
    if len(flags) > 1 and len(flags) == len(found):
        return flags
    return ([*filter(is_classes, found)] or found)[-1:]


def candidates(columns: Sequence[Column]) -> list[Column]:
    """Columns that may be a label: of some classes, or of numbers, in most rows."""
    return [
        column
        for column in columns
        if not (column.keys or column.dates or column.addresses or column.objects)
        and (is_classes(column) or is_number(column) or holds_several(column))
        and column.distinct > 1
        and column.missing <= len(column.values) * (0.95 if hints_at_label(column.name) == 3 else 0.5)
        and not words_tagged_by(column, columns)
    ]


def is_classes(column: Column) -> bool:
    most = NAMED_CLASSES if hints_at_label(column.name) else CLASSES
    if column.seen > most or column.lists or column.objects or column.dates or column.several:
        return False
    if column.numbers >= MOSTLY:
        return column.whole and column.distinct <= (most if are_ids(column) else GRADES)
    return column.distinct <= min(most, max(2, column.present // 2)) and column.words <= 6


def are_ids(column: Column) -> bool:
    """Whether numbers in it, by its name, number classes and grade nothing."""
    return bool(IDS & {*words_of(column.name)})


def is_number(column: Column) -> bool:
    named = bool(hints_at_label(column.name))
    return column.numbers >= MOSTLY and column.seen > 2 and (named or not column.whole)


def holds_several(column: Column) -> bool:
    """Whether a cell holds several labels."""
    return column.several or (column.lists and not column.objects and bool(hints_at_label(column.name)))


def texts_in(columns: Sequence[Column], label: Column | None) -> list[Column]:
    """The text columns: those with a name for texts, else those with whole sentences in them."""
    able = [
        column
        for column in columns
        if column is not label
        and (column.has_texts or column.lists)
        and not (column.numbers >= MOSTLY or column.dates or column.addresses or column.objects or column.several)
        and (hints_at_text(column.name) or not column.keys)
        and column.present > 0.1 * len(column.values)
    ]
    if named := [c for c in able if hints_at_text(c.name) and (c.words >= 1.5 or c.seen > CLASSES)]:
        return named
    longest = max((column.words for column in able), default=0)
    sentences = [c for c in able if c.words >= max(2.5, longest / 10) and c.seen > 2]
    return [column for column in sentences if not is_no_text(column.name)] or sentences


def is_written(label: Column, columns: Sequence[Column]) -> bool:
    """Whether it is a text that is to be written, by its name."""
    is_text = label.has_texts and label.words >= 2 and label.seen > CLASSES
    return is_text and bool(WRITTEN & {*words_of(label.name)}) and bool(texts_in(columns, label))


def words_tagged_by(label: Column, columns: Sequence[Column]) -> Column | None:
    """The column for whose words this one has a tag each."""
    if not label.cells or label.objects or not (label.lists or (label.has_texts and label.words >= 2)):
        return None
    for text in columns:
        if text is label or not (text.has_texts or text.lists):
            continue
        pairs = [(_parts(tags), _parts(words)) for tags, words in _compared(label, text)]
        lengths = {len(words) for _, words in pairs}
        tags, words = ({str(part) for pair in pairs for part in pair[side]} for side in (0, 1))
        same = all(len(tags) == len(words) for tags, words in pairs)
        if same and len(lengths) > 1 and len(tags) <= 200 and len(tags) < len(words):
            return text
    return None


def text_answered_by(label: Column, columns: Sequence[Column]) -> Column | None:
    """The column in which its texts stand, word for word."""
    if label.objects:
        answers = label.share(lambda cell: "text" in (cell[0] if isinstance(cell, list) else cell)) == 1
        texts = [column for column in columns if answers and column.has_texts]
        return max(texts, key=lambda column: column.words, default=None)
    if not (label.has_texts and (hints_at_label(label.name) or WRITTEN & {*words_of(label.name)})):
        return None
    for text in columns:
        if text is not label and text.has_texts and text.words > 2 * label.words:
            found = [str(answer) in str(whole) for answer, whole in _compared(label, text)]
            if found and sum(found) >= MOSTLY * len(found) and not is_classes(label):
                return text
    return None


def _compared(first: Column, second: Column) -> Iterator[tuple[Any, Any]]:
    """Cells of the same row, where both hold something."""
    step = max(1, len(first.values) // COMPARED)
    for pair in zip(first.values[::step], second.values[::step], strict=True):
        if not any(map(is_missing, pair)):
            yield pair


def _parts(cell: Any) -> list[Any]:
    """The words of a text, or the parts of a list."""
    return cell if isinstance(cell, list) else [str(cell)[first:end] for first, end in word_bounds(str(cell))]
