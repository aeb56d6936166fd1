"""Byte-level text for the examples: what to read, how it is split, how it is fed.

With nothing given, the text is the running Python's own standard library: about 30 MB
of real source code that is on every machine. Bytes are the tokens (vocabulary 256).

Train and validation are split by file, deterministically. The pipeline is grain's; its
position is a small dictionary that goes into the checkpoint and is restored exactly.
"""

import dataclasses
import hashlib
import pathlib
import sysconfig
from collections.abc import Sequence

import grain
import numpy as np

VOCABULARY = 256
END_OF_FILE = b"\0"
VALIDATION_SHARE = 0.05


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run.

    Attributes:
      train: Bytes to train on, uint8 [train bytes].
      validation: Bytes to validate on, uint8 [validation bytes].
      digest: Identifies both, so that a run resumes only on the text it began with.
      source: What to call it in a report.
    """

    train: np.ndarray
    validation: np.ndarray
    digest: str
    source: str


def load_text(
    paths: Sequence[str] = (), *, needed: int = 2, flag: str = "--data"
) -> Text:
    """Reads the text and splits it into train and validation by file.

    Files are ordered by a hash of their names; the first ones, 5% of the bytes, are
    for validation. A single file gives its last 5% instead.

    Args:
      paths: Files or folders (searched through; binary and hidden files are skipped).
        None given: the standard library's ``.py`` files.
      needed: How many bytes each of the two halves must have at least.
      flag: What `paths` are called on the command line, for errors.

    Raises:
      ValueError: A path cannot be read, or there is too little text.
    """
    if paths:
        # The number keeps files of equal names from different folders apart.
        files = [
            (f"{i}/{name}", file)
            for i, path in enumerate(paths)
            for name, file in _find(pathlib.Path(path), flag)
        ]
        source = ", ".join(map(str, paths))
    else:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        files = [
            (str(path.relative_to(root)), path)
            for path in root.rglob("*.py")
            if not {"site-packages", "dist-packages"} & set(path.parts)
        ]
        source = "the Python standard library's sources"
    texts = {name: _read(path, flag) for name, path in files}
    texts = {name: text for name, text in texts.items() if text and b"\0" not in text}
    total = sum(map(len, texts.values()))
    if total == 0:
        raise ValueError(
            f"{flag}: got {len(files)} files without text in {source}, needed text"
        )

    if len(texts) == 1:
        (text,) = texts.values()
        cut = len(text) - max(needed, int(VALIDATION_SHARE * len(text)))
        train, validation = text[: max(cut, 0)], text[max(cut, 0) :]
    else:
        names = sorted(texts, key=lambda name: hashlib.sha256(name.encode()).digest())
        ends = np.cumsum([len(texts[name]) for name in names])
        cut = 1 + int(np.searchsorted(ends, max(needed, VALIDATION_SHARE * total)))
        train, validation = (
            END_OF_FILE.join(texts[name] for name in half)
            for half in (names[cut:], names[:cut])
        )
    for half, text in (("training", train), ("validation", validation)):
        if len(text) < needed:
            raise ValueError(
                f"{flag}: got {len(text)} bytes for {half} from {source} ({total} "
                f"bytes in {len(texts)} files), needed at least {needed}"
            )
    return Text(
        train=np.frombuffer(train, np.uint8),
        validation=np.frombuffer(validation, np.uint8),
        digest=hashlib.sha256(train + END_OF_FILE + validation).hexdigest()[:16],
        source=source,
    )


def _find(path: pathlib.Path, flag: str) -> list[tuple[str, pathlib.Path]]:
    """Returns (name, path) of a file, or of each file below a folder."""
    if not path.exists():
        raise ValueError(f"{flag}: got {path}, which is not there, needed a file")
    if path.is_file():
        return [(path.name, path)]
    try:
        found = [
            (f"{path.name}/{file.relative_to(path)}", file)
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and not any(part[0] == "." for part in file.relative_to(path).parts)
        ]
    except OSError as error:
        raise ValueError(
            f"{flag}: got {path}, which cannot be read ({error}), needed a folder"
        ) from error
    if not found:
        raise ValueError(f"{flag}: got {path}, an empty folder, needed files with text")
    return found


def _read(path: pathlib.Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{flag}: got {path}, which cannot be read ({error}), needed a text file"
        ) from error


class Windows:
    """Random access to a text's windows of ``length + 1`` bytes, one byte shared.

    Window i holds the inputs ``text[i * length : (i + 1) * length]`` and, shifted by
    one, their targets.
    """

    def __init__(self, text: np.ndarray, length: int):
        self.text, self.length = text, length

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.length

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(index) * self.length
        return self.text[start : start + self.length + 1]


def train_batches(
    text: np.ndarray, *, length: int, batch: int, seed: int
) -> grain.DatasetIterator:
    """Shuffled batches without end, uint8 [batch, length + 1].

    Every epoch has an order of its own. The position is ``get_state()``; no threads or
    processes read ahead, so it is that of the last batch handed out.
    """
    return iter(
        grain.MapDataset.source(Windows(text, length))
        .shuffle(seed=seed)
        .repeat()
        .batch(batch, drop_remainder=True)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def validation_batches(
    text: np.ndarray, *, length: int, batch: int, count: int
) -> list[np.ndarray]:
    """At most ``count`` batches of windows spread evenly over the text, always equal.

    The last batch of a small text repeats windows to be full: one shape, one program.
    """
    windows = Windows(text, length)
    wanted = min(count * batch, -(-len(windows) // batch) * batch)
    picks = np.arange(wanted) * len(windows) // wanted
    return [
        np.stack([windows[i] for i in picks[start : start + batch]])
        for start in range(0, wanted, batch)
    ]
