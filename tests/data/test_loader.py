import numpy as np
import pytest
import torch

from adasplash.data import IGNORE_INDEX, Loader, Tokens
from adasplash.data.shards import ShardWriter

END, T = 9, 8


class Counting:
    """Stands for the tokens 0, 1, 2, ..., so that a token tells its place."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def read(self, start, stop):
        return np.arange(start, stop)


def loader_of(length=8 * 13 + 3, **settings):
    return Loader(Counting(length), **{"seq_len": T, "seed": 5, "end_token": -1} | settings)


def windows(batch) -> list[int]:
    assert (batch.input_ids[:, 0] % T == 0).all()
    return (batch.input_ids[:, 0] // T).tolist()


@pytest.mark.parametrize("length, count", [(T + 1, 1), (2 * T, 1), (2 * T + 1, 2), (8 * 13 + 3, 13)])
def test_length(length, count):
    assert len(loader_of(length)) == count


def test_targets_are_the_next_tokens():
    batch = loader_of().next_batch(13)
    assert batch.input_ids.shape == batch.targets.shape == (13, T)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64 and batch.position_ids is None
    torch.testing.assert_close(batch.input_ids, batch.input_ids[:, :1] + torch.arange(T))
    torch.testing.assert_close(batch.targets, batch.input_ids + 1)


def test_every_window_once_an_epoch_in_another_order_each_time():
    loader = loader_of()
    epochs = [[windows(loader.next_batch(1))[0] for _ in range(13)] for _ in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(13))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert windows(loader_of(seed=6).next_batch(13)) != epochs[0]
    assert windows(loader_of(seed=5).next_batch(13)) == epochs[0]


def test_the_order_of_a_seed_stays_what_it_is():
    """Runs are resumed under other versions of numpy; a changed order would repeat some text and miss other."""
    assert windows(loader_of(8 * 6 + 1, seed=0).next_batch(12)) == [5, 0, 3, 2, 1, 4, 1, 0, 3, 4, 5, 2]


def test_without_shuffling_the_windows_follow_the_text():
    loader = loader_of(shuffle=False)
    assert windows(loader.next_batch(20)) == [*range(13), *range(7)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_out_one_global_sequence(world_size):
    count = 3
    whole = loader_of()
    ranks = [loader_of() for _ in range(world_size)]
    for _ in range(5):  # beyond the first epoch
        expected = whole.next_batch(count * world_size)
        parts = [loader.next_batch(count, rank, world_size) for rank, loader in enumerate(ranks)]
        torch.testing.assert_close(torch.cat([part.input_ids for part in parts]), expected.input_ids)
        assert all(loader.state_dict() == whole.state_dict() for loader in ranks)


def test_resuming_twice_and_with_another_number_of_ranks_equals_never_stopping():
    never_stopped = loader_of()
    expected = torch.cat([never_stopped.next_batch(4).input_ids for _ in range(9)])
    got, state = [], None
    for world_size in (1, 2, 4):
        loaders = [loader_of(seed=77) if state else loader_of() for _ in range(world_size)]
        for loader in loaders:
            if state:
                loader.load_state_dict(state)
        for _ in range(3):
            got += [loader.next_batch(4 // world_size, rank, world_size) for rank, loader in enumerate(loaders)]
        state = loaders[0].state_dict()
        assert all(type(value) is int for value in state.values())
    torch.testing.assert_close(torch.cat([batch.input_ids for batch in got]), expected)


def documents_loader(tmp_path, **settings):
    """The text 1 2 3 END | 4 5 6 7 8 END END | 1 1 1 ... in windows of 8."""

    class Facts:
        vocab_size, end_token, fingerprint = 10, END, "facts"

    writer = ShardWriter(tmp_path / "train", Facts)
    for ids in ([1, 2, 3], [4, 5, 6, 7, 8], [], [1] * 20):
        writer.add(np.asarray(ids), len(ids))
    writer.finish()
    return Loader(Tokens(tmp_path / "train", "facts"), seq_len=T, seed=0, end_token=END, shuffle=False, **settings)


def test_documents_apart(tmp_path):
    batch = documents_loader(tmp_path, cross_document=False).next_batch(2)
    assert batch.input_ids.tolist() == [[1, 2, 3, END, 4, 5, 6, 7], [8, END, END, 1, 1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 0, 0, 1, 2, 3, 4]]
    skip = IGNORE_INDEX
    assert batch.targets.tolist() == [[2, 3, END, skip, 5, 6, 7, 8], [END, skip, skip, 1, 1, 1, 1, 1]]


def test_a_window_that_ends_with_a_document_does_not_change_its_first_position(tmp_path):
    """An end token in the last place must not wrap round to the first."""
    loader = documents_loader(tmp_path, cross_document=False)
    loader.seq_len = 4
    batch = loader.next_batch(2)
    assert batch.input_ids[0].tolist() == [1, 2, 3, END]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_documents_together(tmp_path):
    batch = documents_loader(tmp_path).next_batch(2)
    assert batch.position_ids is None
    assert batch.targets.tolist() == [[2, 3, END, 4, 5, 6, 7, 8], [END, END, 1, 1, 1, 1, 1, 1]]


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="needs 9 tokens in each split, got 8; give more text, a shorter seq_len"):
        loader_of(T)
    with pytest.raises(ValueError, match="needs 9 tokens in each split, got 0;"):
        loader_of(0)
    with pytest.raises(ValueError, match="seed = -1"):
        loader_of(seed=-1)
    for arguments in ((0,), (1, 2, 2), (1, -1, 2)):
        with pytest.raises(ValueError, match="0 <= rank < world_size"):
            loader_of().next_batch(*arguments)


def test_moving_a_batch_to_where_it_is_changes_nothing():
    batch = loader_of().next_batch(2)
    assert batch.to(torch.device("cpu")).input_ids is batch.input_ids
