"""The counter-based generator: against integers of Python, and against what chance gives."""

import math

import pytest
import torch

from torch_pathloss.weighting._generator import normal, uniform


def mix(word: int) -> int:
    """The mixing function in integers without bounds, reduced by the remainder."""
    word ^= word >> 16
    word = word * 0x21F0AAAD % 2**32
    word ^= word >> 15
    word = word * 0xD35A2D97 % 2**32
    return word ^ word >> 15


def by_hand(seed: int, counter: int, index: int) -> float:
    start = mix((mix((seed + 0x9E3779B9) % 2**32) + counter) % 2**32)
    return (mix((start + index * 0x9E3779B9) % 2**32) // 256) / 2**24


def grid(seed: int, counters: int, count: int) -> torch.Tensor:
    return torch.stack([uniform(torch.tensor(seed), torch.tensor(c), count) for c in range(counters)]).double()


@pytest.mark.parametrize("seed", [0, 1, 12345, 2**31, 2**32 - 1])
@pytest.mark.parametrize("counter", [0, 1, 2**31 - 1, 2**32 - 1, 2**40 + 3])
def test_uniform_is_the_formula_in_integers_of_python(seed: int, counter: int) -> None:
    found = uniform(torch.tensor(seed), torch.tensor(counter), 50)
    assert found.tolist() == [by_hand(seed, counter, index) for index in range(50)]


def test_the_mixing_function_changes_half_of_the_bits_when_one_bit_changes() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 2**32, (1000,), generator=generator).tolist()
    for bit in range(32):
        flipped = sum(bin(mix(word) ^ mix(word ^ 1 << bit)).count("1") for word in words) / (32 * len(words))
        assert abs(flipped - 0.5) < 0.02  # standard deviation 0.5 / sqrt(32000) = 0.003


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
@pytest.mark.parametrize(("counters", "count"), [(4000, 5), (20, 1000)])
def test_uniform_fills_a_hundred_bins_evenly(seed: int, counters: int, count: int) -> None:
    numbers = grid(seed, counters, count).flatten()
    counts = torch.histc(numbers, 100, 0, 1)
    expected = len(numbers) / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum().item()
    assert 51 < chi_squared < 172  # 99 degrees of freedom: 99 +- 14.1; these are beyond 1e-4 on either side
    assert numbers.min() >= 0
    assert numbers.max() < 1


@pytest.mark.parametrize("lag", [1, 2, 3, 16])
@pytest.mark.parametrize("dim", [0, 1], ids=["counters", "indices"])
def test_neighbours_do_not_correlate(lag: int, dim: int) -> None:
    numbers = grid(3, 300, 300) - 0.5
    size = numbers.shape[dim] - lag
    products = numbers.narrow(dim, 0, size) * numbers.narrow(dim, lag, size)
    deviation = (1 / 12) / math.sqrt(products.numel())
    assert abs(products.mean().item()) < 4 * deviation


def test_neighbouring_seeds_do_not_correlate() -> None:
    numbers = torch.stack([uniform(torch.tensor(s), torch.tensor(0), 300) for s in range(301)]).double() - 0.5
    products = numbers[:-1] * numbers[1:]
    assert abs(products.mean().item()) < 4 * (1 / 12) / math.sqrt(products.numel())


def test_pairs_of_one_count_fill_a_square_evenly() -> None:
    numbers = grid(11, 10000, 2)
    cell = (numbers * 8).long() @ torch.tensor([8, 1])
    counts = cell.bincount(minlength=64).double()
    expected = len(numbers) / 64
    assert ((counts - expected) ** 2 / expected).sum().item() < 112  # 63 degrees of freedom: beyond 1e-4


def test_normal_has_the_moments_and_the_distribution_of_the_normal() -> None:
    numbers = torch.cat([normal(torch.tensor(5), torch.tensor(c), 200) for c in range(200)]).double()
    size = len(numbers)
    assert abs(numbers.mean().item()) < 4 / math.sqrt(size)
    assert abs(numbers.var().item() - 1) < 4 * math.sqrt(2 / size)
    assert abs((numbers**3).mean().item()) < 4 * math.sqrt(15 / size)
    assert abs((numbers**4).mean().item() - 3) < 4 * math.sqrt(96 / size)
    ordered = torch.special.ndtr(numbers.sort().values)
    steps = torch.arange(size + 1) / size
    distance = max((steps[1:] - ordered).max().item(), (ordered - steps[:-1]).max().item())
    assert distance < 2.2 / math.sqrt(size)  # Kolmogorov-Smirnov, beyond 1e-4


def test_neighbours_of_normal_do_not_correlate() -> None:
    numbers = torch.stack([normal(torch.tensor(5), torch.tensor(c), 200) for c in range(200)]).double()
    for products in (numbers[1:] * numbers[:-1], numbers[:, 1:] * numbers[:, :-1]):
        assert abs(products.mean().item()) < 4 / math.sqrt(products.numel())


def test_a_compiled_draw_is_bit_equal_and_a_counter_changed_in_place_compiles_nothing_again() -> None:
    counter, seed = torch.tensor(0), torch.tensor(2**32 - 1)
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        graphs.append(inputs)
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def draw() -> torch.Tensor:
        counter.add_(1)
        return uniform(seed, counter, 4)

    for step in range(1, 41):
        assert draw().equal(uniform(seed, torch.tensor(step), 4))
    assert len(graphs) == 1
