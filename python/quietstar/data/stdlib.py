"""Real text that every machine with Python has: the standard library's own sources and docstrings.

Used where nothing may be downloaded: the text demo, the ``tiny`` recipe and the tests. Holds

- :func:`stdlib_files`: which files, in a fixed order;
- :func:`load_stdlib`: their text, split into training and held-out files *by name*, so that the
  split is the same on every machine that runs the same Python version;
- :func:`train_tokenizer`, :func:`stdlib_tokenizer`: a small byte-level BPE tokenizer trained on
  them.
"""

from __future__ import annotations

import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quietstar.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
START_THOUGHT = "<|startthought|>"
END_THOUGHT = "<|endthought|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, START_THOUGHT, END_THOUGHT)

# Folders that hold no text of the library itself (packages, tests), that only some distributions
# install (idlelib, tkinter, lib2to3, ...: without them the corpus is the same on more machines), or
# that are generated (encodings, pydoc_data).
EXCLUDED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "__phello__"),
    *("lib-dynload", "idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"),
    *("encodings", "pydoc_data"),
}
# Tables rather than text, or written by the build of this one interpreter.
EXCLUDED_FILES = frozenset(
    ["html/entities.py", "re/_casefix.py", "stringprep.py", "sitecustomize.py", "usercustomize.py"]
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")

# Of ten files, by their names: one is held out, three are kept for further training, six are left.
SPLITS = {"heldout": {0}, "further": {1, 2, 3}, "first": set(range(4, 10)), "train": set(range(1, 10))}
SPLITS |= {"test": SPLITS["heldout"], "validation": SPLITS["heldout"]}


@dataclass(frozen=True)
class Document:
    """One text and where it came from (a path relative to the corpus, or a row number).

    Attributes:
        prompt: where the text is a completion, what stands before it and is not learnt.
        rendered: whether prompt and completion have their special tokens already.
    """

    name: str
    text: str
    prompt: str | None = None
    rendered: bool = False


def stdlib_root() -> Path:
    """The folder that holds this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def stdlib_files(root: Path | None = None) -> list[str]:
    """Paths of the corpus files, relative to ``root``, with ``/`` between parts and sorted.

    Raises :class:`UserError` where the library is not there as files (a zipped Python).
    """
    root = stdlib_root() if root is None else root
    names = []
    for folder, folders, files in os.walk(root):
        # What is left out is not even walked through: packages come and go there, and are many.
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        inside = Path(folder).relative_to(root)
        names += [
            (inside / name).as_posix()
            for name in files
            if name.endswith(".py") and not name.startswith(EXCLUDED_PREFIXES)
        ]
    names = [name for name in names if name not in EXCLUDED_FILES]
    if not names:
        raise UserError(
            f"the standard library has no source files under {root}; this Python may ship it "
            "zipped: give text files of your own in data.files"
        )
    return sorted(names)


def in_split(name: str, split: str) -> bool:
    """Whether a file belongs to a split: arithmetic on its name, never Python's own hash.

    ``heldout`` is for evaluation; ``train`` is all the rest, and consists of ``first`` and ``further``
    (for training that is to see text that is new to the model, like the evaluation's).
    """
    return zlib.crc32(name.encode("utf-8")) % 10 in SPLITS[split]


def load_stdlib(split: str, root: Path | None = None) -> Iterator[Document]:
    """Yield the documents of ``split`` (see :func:`in_split`), in the order of their names.

    Files that are empty or not UTF-8 are left out.
    """
    if split not in SPLITS:
        raise UserError(
            f"the standard library corpus has no split {split!r}; expected one of {', '.join(SPLITS)}"
        )
    root = stdlib_root() if root is None else root
    for name in stdlib_files(root):
        if in_split(name, split):
            try:
                text = (root / name).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                yield Document(name, text)


def sample_documents(documents: Iterable[Document], max_bytes: int) -> list[str]:
    """Texts of about ``max_bytes`` together, taken from all over ``documents``."""
    listed = list(documents)
    if sum(len(d.text) for d in listed) <= max_bytes:
        return [d.text for d in listed]
    # Sorted by a hash of the name: a fixed shuffle, so that no one package fills the sample.
    listed.sort(key=lambda d: (zlib.crc32(b"sample/" + d.name.encode("utf-8")), d.name))
    texts, taken = [], 0
    for document in listed:
        texts.append(document.text)
        taken += len(document.text)
        if taken >= max_bytes:
            break
    return texts


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the special tokens of :data:`SPECIAL_TOKENS`.

    Byte-level: every text can be encoded and comes back unchanged. ``vocab_size`` counts the
    special tokens and the 256 bytes. The same texts give the same tokenizer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise UserError(
            f"vocab_size is {vocab_size}; expected at least {smallest} (256 bytes and "
            f"{len(SPECIAL_TOKENS)} special tokens)"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        extra_special_tokens=[START_THOUGHT, END_THOUGHT],
        clean_up_tokenization_spaces=False,
    )


def stdlib_tokenizer(vocab_size: int = 2048, max_bytes: int = 4_000_000) -> PreTrainedTokenizerFast:
    """The tokenizer of the text demo, trained on ``max_bytes`` of the corpus's training files."""
    return train_tokenizer(sample_documents(load_stdlib("train"), max_bytes), vocab_size)
