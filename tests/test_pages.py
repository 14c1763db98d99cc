"""Keys and values in pages: steps over any mix of sequences give what each gives alone, and pages are shared and freed
as they should be."""

import random

import pytest
import torch
from paged import Steps

import golden
from qwen import QWenLMHeadModel
from qwen.pages import WORTHWHILE, OutOfPages, PagePool, common_length

LENGTHS = (150, 66, 7, 131, 65)  # 64 is the training length of the golden model: alphas differ, logn is at work


@pytest.fixture(scope="module", params=["kernels", "kernels with windows", "sdpa", "sdpa with windows"])
def model(request: pytest.FixtureRequest) -> QWenLMHeadModel:
    what, _, windows = request.param.partition(" with ")
    model = golden.model(local_attn=[20, 40, 1000] if windows else False)
    if what == "kernels" and not model.use_cpu_kernels():
        pytest.skip("no C++ compiler")
    return model


@torch.inference_mode()
def test_any_mix_of_chunks_and_tokens_is_each_row_alone(model: QWenLMHeadModel) -> None:
    """Against the model on each whole row, read at once without pages."""
    rng = random.Random(0)
    rows = [golden.ids(length, k)[0].tolist() for k, length in enumerate(LENGTHS)]
    steps = Steps(model, rows)
    while steps.left:
        steps.run([min(rng.choice((0, 1, 1, 5, 40)), left) for left in steps.left])
    for row, logits in zip(rows, steps.logits, strict=True):
        torch.testing.assert_close(torch.cat(logits), model(torch.tensor([row])).logits[0], atol=1e-4, rtol=1e-4)


# ---- the pool ----


def new_pool(limit: int = 1024) -> PagePool:
    return PagePool([torch.device("cpu")] * 2, torch.float32, heads=2, head_dim=16, limit=limit)


def write(pool: PagePool, ids: list[int], **kwargs: object):  # noqa: ANN201
    """A sequence that is read: the keys and values of a token are the token."""
    sequence = pool.begin(ids, **kwargs)
    known, count = sequence.length, len(ids) - sequence.length
    pool.extend(sequence, count)
    for place in range(known, len(ids)):
        page = sequence.pages[place // pool.page_size].number
        for layer in pool.layers:
            layer[:, page, :, place % pool.page_size] = float(ids[place])
    pool.written(sequence, count)
    return sequence, known


def read(pool: PagePool, sequence) -> list[int]:  # noqa: ANN001
    numbers = [page.number for page in sequence.pages]
    values = pool.layers[1][1, numbers, 0].flatten(0, 1)[:, 0]
    return values[: sequence.length].int().tolist()


def test_what_prompts_have_in_common_is_one_page() -> None:
    pool, system = new_pool(), list(range(100, 320))
    first, known = write(pool, [*system, 1, 2, 3])
    assert known == 0
    second, known = write(pool, [*system, 7, 8])
    assert known == 220 and [p.number for p in second.pages[:3]] == [p.number for p in first.pages[:3]]
    assert second.pages[3] is not first.pages[3], "a page that differs is a copy"
    assert read(pool, first) == [*system, 1, 2, 3] and read(pool, second) == [*system, 7, 8]
    assert pool.taken == 5
    other, known = write(pool, [*system, 9], kind=3.0)
    assert known == 0, "keys of another kind are others"
    for sequence in (first, second, other):
        pool.release(sequence)
    assert pool.taken == 0 and pool.available == pool.limit


def test_the_last_token_is_always_read() -> None:
    pool, ids = new_pool(), list(range(128))
    pool.release(write(pool, ids)[0])
    assert write(pool, ids)[1] == 127
    assert pool.begin(ids, share=False).length == 0


def test_a_conversation_goes_on_in_its_own_page() -> None:
    """Its end, which the next turn may write otherwise, is written over where nobody else reads it."""
    pool, ids = new_pool(), list(range(40))
    first, _ = write(pool, [*ids, 900, 901])
    number = first.pages[0].number
    pool.release(first)
    second, known = write(pool, [*ids, *range(500, 540)])
    assert known == 40 and second.pages[0].number == number and len(second.pages) == 2
    assert read(pool, second) == [*ids, *range(500, 540)]


def test_little_in_common_is_not_worth_a_copy() -> None:
    pool = new_pool()
    write(pool, list(range(WORTHWHILE - 1)) + [900] * 20)
    assert write(pool, list(range(60)))[1] == 0


def test_the_longest_unused_make_room() -> None:
    pool = new_pool(limit=64 * 6)
    old = write(pool, [1] * 100)[0]
    pool.release(old)
    new = write(pool, [2] * 100)[0]
    pool.release(new)
    third = write(pool, [3] * 200)[0]  # four pages: two are free, two are those of the ones
    assert write(pool, [2] * 100)[1] == 99
    with pytest.raises(OutOfPages):
        write(pool, [4] * 100)
    pool.release(third)
    assert write(pool, [1] * 100)[1] == 0


def test_two_that_read_the_same_at_once_end_on_one_page() -> None:
    pool, ids = new_pool(), list(range(70))
    a, b = pool.begin(ids), pool.begin(ids)
    for sequence in (a, b):
        pool.extend(sequence, 70)
    pool.written(a, 70)
    pool.written(b, 70)
    assert a.pages[0] is b.pages[0] and a.pages[1] is not b.pages[1] and pool.taken == 3
    for sequence in (a, b):
        pool.release(sequence)
    assert pool.taken == 0 and len(pool.unused) == 1, "an end below 16 tokens is not kept"


def test_what_is_forgotten_is_not_found() -> None:
    pool, ids = new_pool(), list(range(100))
    running, _ = write(pool, ids)
    pool.release(write(pool, [*ids, *ids])[0])
    pool.forget()
    assert write(pool, ids)[1] == 0
    running.ids += ids
    pool.extend(running, 100)
    pool.written(running, 100)
    pool.release(running)
    assert pool.taken == 2


@pytest.mark.parametrize("seed", range(3))
def test_random_sequences_keep_their_tokens(seed: int) -> None:
    """Hundreds of beginnings, steps and ends in little room: nobody's tokens are another's, and no page is lost."""
    rng, pool, live = random.Random(seed), new_pool(limit=64 * 12), []
    for _ in range(400):
        if live and (rng.random() < 0.5 or pool.available < 4):
            pool.release(live.pop(rng.randrange(len(live))))
        else:
            ids = [rng.choice((5, 6))] * rng.randrange(20, 90) + [rng.randrange(3)] * rng.randrange(1, 90)
            sequence, known = write(pool, ids)
            assert known < len(ids)
            live.append(sequence)
        assert all(read(pool, sequence) == sequence.ids for sequence in live)
        used = {page.number for sequence in live for page in sequence.pages}
        assert pool.taken == len(used) and not used & set(pool.free)
    for sequence in live:
        pool.release(sequence)
    assert pool.taken == 0 and len(pool.free) + len(pool.unused) == pool.size


def test_common_length() -> None:
    assert common_length([1, 2, 3], [1, 2, 4]) == 2 and common_length([1], [1, 2]) == 1 and common_length([], [1]) == 0
