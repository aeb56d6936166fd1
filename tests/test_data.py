"""The examples' text pipeline: split, order, position, refusals."""

import importlib
import pathlib
import sys

import numpy as np
import pytest

# Examples are scripts: their neighbours are modules beside them.
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))
_data = importlib.import_module("_data")


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"part{i % 4}").mkdir(exist_ok=True)
        (tmp_path / f"part{i % 4}" / f"{i}.txt").write_bytes(b"%03d " % i * 100)
    (tmp_path / "picture.bin").write_bytes(b"\0" * 5000)
    (tmp_path / ".hidden").write_bytes(b"hidden" * 1000)
    return tmp_path


def test_split_is_by_file_and_always_equal(folder):
    text = _data.load_text([str(folder)])
    files = lambda half: {part[:3] for part in bytes(half).split(b"\0")}
    train, validation = files(text.train), files(text.validation)
    assert train | validation == {b"%03d" % i for i in range(40)}
    assert not train & validation and len(validation) == 2
    again = _data.load_text([str(folder)])
    assert again.digest == text.digest
    np.testing.assert_array_equal(again.train, text.train)
    (folder / "part0" / "0.txt").write_bytes(b"changed")
    assert _data.load_text([str(folder)]).digest != text.digest


def test_one_file_is_split_at_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 251)) * 4)
    text = _data.load_text([str(path)])
    assert (len(text.train), len(text.validation)) == (950, 50)
    assert bytes(text.train) + bytes(text.validation) == path.read_bytes()


def test_files_of_equal_names_are_all_read(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(name * 100)
    text = _data.load_text([str(tmp_path / name / "text.txt") for name in "ab"])
    assert {bytes(text.train), bytes(text.validation)} == {b"a" * 100, b"b" * 100}


def test_default_is_the_standard_library():
    text = _data.load_text()
    assert 5e6 < len(text.train) and 0.04 < len(text.validation) / len(text.train) < 0.1


def test_every_epoch_has_each_window_once_in_its_own_order():
    text = np.arange(4 * 16 + 1, dtype=np.uint8)
    batches = _data.train_batches(text, length=4, batch=4, seed=0)
    epochs = [np.concatenate([next(batches) for _ in range(4)]) for _ in range(2)]
    for epoch in epochs:
        assert sorted(epoch[:, 0]) == list(range(0, 64, 4))
        np.testing.assert_array_equal(epoch, epoch[:, :1] + np.arange(5))
    assert (epochs[0] != epochs[1]).any()


def test_position_is_restored_exactly():
    text = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    make = lambda seed=3: _data.train_batches(text, length=8, batch=3, seed=seed)
    batches = make()
    for _ in range(50):  # into the second epoch
        next(batches)
    position = batches.get_state()
    resumed = make()
    resumed.set_state(position)
    for _ in range(50):
        np.testing.assert_array_equal(next(resumed), next(batches))
    assert (next(make(4)) != next(make(3))).any()


def test_validation_batches_cover_the_text_evenly():
    text = np.arange(201, dtype=np.uint8)
    few = _data.validation_batches(text, length=10, batch=2, count=2)
    assert np.stack(few)[..., 0].ravel().tolist() == [0, 50, 100, 150]
    every = _data.validation_batches(text, length=10, batch=8, count=99)
    assert [batch.shape for batch in every] == [(8, 11)] * 3
    assert {int(row[0]) for batch in every for row in batch} == set(range(0, 200, 10))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path / "none", "--data: got .*none, which is not there, needed"),
        (lambda path: path / "empty", "--data: got .*an empty folder, needed files"),
        (lambda path: path / "blank.txt", "--data: got 1 files without text in"),
        (lambda path: path / "short.txt", "--data: got .* bytes for .*needed at least"),
        (lambda path: path / "loop", "--data: got .*, needed"),
    ],
)
def test_bad_data_is_named(tmp_path, make, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=message):
        _data.load_text([str(make(tmp_path))], needed=100)


@pytest.mark.parametrize("name", ["none", "empty", "blank.txt", "short.txt"])
def test_errors_name_the_flag_of_the_program(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").touch()
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="^--paths: got "):
        _data.load_text([str(tmp_path / name)], needed=100, flag="--paths")


def test_unreadable_file_is_named(folder, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(pathlib.Path, "read_bytes", refuse)
    with pytest.raises(ValueError, match=r"--data: got .*txt, which cannot be read"):
        _data.load_text([str(folder)])
    with pytest.raises(ValueError, match=r"^--paths: got .*txt, which cannot be read"):
        _data.load_text([str(folder)], flag="--paths")
